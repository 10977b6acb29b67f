"""Harvesting: every row the model's own, at its place, in the same bytes whatever the batch; a NaN publishes nothing."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stored_rows import load_rows
from tiny_models import make_tiny_config, save_model, write_texts

from interp_assets.corpus.plan import plan_corpus
from interp_assets.corpus.sources import iter_documents
from interp_assets.corpus.tokens import context_offsets, load_tokens, make_token_shard
from interp_assets.errors import ArtifactCorruptError, ArtifactMissingError, InputError, NonFiniteError
from interp_assets.garcon.subject import SubjectModel, load_subject_model
from interp_assets.garcon.tokenizer import load_tokenizer
from interp_assets.harvest.activations import PADDING_STEP, harvest_shard, make_batches
from interp_assets.harvest.refs import activation_shard_ref
from interp_assets.harvest.rows import iter_row_blocks
from interp_assets.planning.config import ExecutionConfig
from interp_assets.planning.pipeline import Pipeline
from interp_assets.storage.store import Store, open_store

POINTS = ["resid_pre.0", "resid_post.0", "mlp_out.1", "z.1", "k.0", "mlp_act.1", "module:transformer.h.1.mlp.c_fc"]
ENCODER_POINTS = ["resid_post.0", "attn_out.1", "z.0"]


class World(NamedTuple):
    """A planned pipeline with its tokens, and its subject model."""

    pipeline: Pipeline
    store: Store
    subject: SubjectModel


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Save tiny models and texts once."""
    root = tmp_path_factory.mktemp("models")
    return {"texts": write_texts(root / "texts"), "root": root}


@pytest.fixture
def make_world(folders: dict[str, Path]) -> Callable[..., World]:
    """Return a function that plans a pipeline and makes its token shards in a store of its own."""

    def make(kind: str = "gpt2", *, store: Store | None = None, dtype: str = "bfloat16", tokens_per_batch: int = 200, **corpus: object) -> World:
        store = store or open_store("memory://world")
        if kind not in folders:
            folders[kind] = save_model(folders["root"] / kind, kind)
        points = {"gpt2": POINTS, "bert": ENCODER_POINTS}.get(kind, ["resid_post.0", "mlp_out.1"])
        config = make_tiny_config(
            folders[kind],
            folders["texts"],
            corpus={"contexts": "per_document" if kind == "bert" else "packed", **corpus},
            harvest={"hook_points": points, "dtype": dtype},
            execution={"tokens_per_batch": tokens_per_batch, "device": "cpu"},
        )
        pipeline = plan_corpus(config, store)
        for index in pipeline.shard_indices:
            make_token_shard(pipeline, store, load_tokenizer(config.model), index)
        return World(pipeline, store, load_subject_model(config.model, ExecutionConfig(device="cpu")))

    return make


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_every_row_is_what_the_model_computes_for_its_context_alone(kind: str, make_world: Callable[..., World]) -> None:
    """The oracle runs one context at a time, without padding; rows that are not valid are stored too."""
    world = make_world(kind, dtype="float32")
    steps: list[int] = []
    produced = harvest_shard(world.pipeline, world.store, world.subject, 0, steps.append)
    tokens = load_tokens(world.pipeline, world.store, 0)
    assert sum(steps) == tokens.n_rows
    offsets = context_offsets(tokens.contexts)
    points = world.pipeline.config.harvest.hook_points
    assert list(produced) == points
    rows = {point: load_rows(world.pipeline, world.store, point, 0, 0, tokens.n_rows) for point in points}
    for first, stop in pairwise(offsets.tolist()):
        token_ids = torch.from_numpy(tokens.token_ids[first:stop].astype(np.int64))[None]
        for point, expected in world.subject.capture(token_ids, None, points).items():
            assert rows[point].shape == (tokens.n_rows, world.pipeline.d_in(point))
            torch.testing.assert_close(rows[point][first:stop], expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2"])
def test_a_document_in_a_context_of_its_own_is_read_as_if_it_were_alone(kind: str, make_world: Callable[..., World]) -> None:
    """In packed contexts attention crosses documents; `per_document` is the exact way for decoders too, padding and all."""
    rows, point = {}, "resid_post.0"
    for contexts in ("packed", "per_document"):
        world = make_world(kind, store=open_store(f"memory://{contexts}"), dtype="float32", contexts=contexts, context_length=40, shard_bytes=1200)
        harvest_shard(world.pipeline, world.store, world.subject, 0)
        tokens = load_tokens(world.pipeline, world.store, 0)
        rows[contexts] = load_rows(world.pipeline, world.store, point, 0, 0, tokens.n_rows)[torch.from_numpy(tokens.valid.copy())]
    tokenizer = load_tokenizer(world.pipeline.config.model)
    texts = [text for _, text in iter_documents(world.pipeline.config.corpus, world.pipeline.source(0))]
    pieces = [text[first : first + 40] for text in texts for first in range(0, len(text), 40)]  # a token is a byte, and this tokenizer adds none
    alone = torch.cat([world.subject.capture(torch.tensor([tokenizer(piece)["input_ids"]]), None, [point])[point][0] for piece in pieces])
    assert len(texts) > 1
    torch.testing.assert_close(rows["per_document"], alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(rows["packed"], alone, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_the_batch_size_leaves_no_trace_in_the_bytes(kind: str, make_world: Callable[..., World]) -> None:
    """On a CPU `tokens_per_batch` is an execution field: it may not change a digest."""
    digests = []
    for tokens_per_batch in (1, 60, 100_000):
        world = make_world(kind, tokens_per_batch=tokens_per_batch)
        produced = harvest_shard(world.pipeline, world.store, world.subject, 1)
        digests.append([result.manifest.digest for result in produced.values()])
    assert digests[0] == digests[1] == digests[2]


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gemma2", "qwen3"])
def test_any_architecture_goes_the_whole_way_to_the_same_bytes(kind: str, make_world: Callable[..., World]) -> None:
    """From text to activation shards, twice, in two stores."""
    digests = []
    for _ in range(2):
        world = make_world(kind, store=open_store("memory://again"))
        produced = harvest_shard(world.pipeline, world.store, world.subject, 0)
        assert all(result.manifest.facts["mean_norm"] > 0 for result in produced.values())
        digests.append([result.manifest.digest for result in produced.values()])
    assert digests[0] == digests[1]


def test_hook_points_that_are_there_are_kept(make_world: Callable[..., World]) -> None:
    """Only what is missing is made again, and equal."""
    world = make_world()
    first = harvest_shard(world.pipeline, world.store, world.subject, 0)
    assert all(result.is_cached for result in harvest_shard(world.pipeline, world.store, world.subject, 0).values())
    lost = activation_shard_ref(world.pipeline, "mlp_out.1", 0)
    world.store.delete([f"{lost.path}/manifest.json"])
    again = harvest_shard(world.pipeline, world.store, world.subject, 0)
    assert {name: result.is_cached for name, result in again.items()} == {name: name != "mlp_out.1" for name in POINTS}
    assert again["mlp_out.1"].manifest.digest == first["mlp_out.1"].manifest.digest


def test_a_damaged_shard_is_found_on_reading_and_rebuilt_with_the_same_digest(make_world: Callable[..., World], local_store: Store) -> None:
    """So everything that was made of it stays fresh."""
    world = make_world(store=local_store)
    first = harvest_shard(world.pipeline, local_store, world.subject, 0)["resid_post.0"]
    path = local_store.local_path(f"{first.ref.path}/rows.safetensors")
    assert path is not None
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ArtifactCorruptError, match=r"rows.safetensors is damaged in block 0"):
        load_rows(world.pipeline, local_store, "resid_post.0", 0, 0, 1)
    local_store.delete([f"{first.ref.path}/manifest.json"])
    assert harvest_shard(world.pipeline, local_store, world.subject, 0)["resid_post.0"].manifest.digest == first.manifest.digest


def test_a_nan_names_its_row_and_publishes_nothing(make_world: Callable[..., World]) -> None:
    """One NaN would poison the statistics, the shuffle and the SAE; past attention even earlier rows of its context (0 * NaN is NaN)."""
    world = make_world()
    tokens = load_tokens(world.pipeline, world.store, 0)
    row = int(np.flatnonzero(tokens.token_ids == ord("7") - 33)[0])
    embedding = world.subject.net.get_input_embeddings()
    weight = embedding.weight
    assert isinstance(weight, torch.Tensor)
    weight[int(tokens.token_ids[row]), 3] = float("nan")
    context = int(tokens.contexts[row])
    offset = row - int(context_offsets(tokens.contexts)[context])
    with pytest.raises(NonFiniteError) as caught:
        harvest_shard(world.pipeline, world.store, world.subject, 0)
    assert "Activation nan at hook point 'resid_pre.0' of shard-000000" in str(caught.value)
    assert f"row {row:,} (context {context}, offset {offset}, token id {int(tokens.token_ids[row])})" in str(caught.value)
    for point in POINTS:
        with pytest.raises(ArtifactMissingError):
            load_rows(world.pipeline, world.store, point, 0, 0, 1)


def test_a_value_too_large_for_the_stored_dtype_is_refused(make_world: Callable[..., World]) -> None:
    """Float16 ends at 65504: massive activations become infinities."""
    world = make_world(dtype="float16")
    world.subject.net.get_submodule("transformer.h.1.mlp.c_fc").bias[0] = 1e6  # type: ignore[index,operator]
    with pytest.raises(NonFiniteError, match=r"Activation inf at .*the value \S+ does not fit float16, use bfloat16"):
        harvest_shard(world.pipeline, world.store, world.subject, 0)


def test_a_model_of_another_width_is_refused(make_world: Callable[..., World], folders: dict[str, Path]) -> None:
    """The plan and the model in hand must be of one kind."""
    world = make_world()
    wide = world.pipeline.plan.hook_widths | {"resid_post.0": 17}
    plan = type(world.pipeline.plan)(**{**vars(world.pipeline.plan), "hook_widths": wide})
    with pytest.raises(InputError, match=r"'resid_post.0' has width 16 in .*, the plan says 17"):
        harvest_shard(Pipeline(world.pipeline.config, plan), world.store, world.subject, 0)


def test_row_blocks_are_all_rows_in_order(make_world: Callable[..., World]) -> None:
    """Later stages go over a shard block by block."""
    world = make_world()
    n_rows = harvest_shard(world.pipeline, world.store, world.subject, 0)["resid_post.0"].manifest.facts["n_rows"]
    whole = load_rows(world.pipeline, world.store, "resid_post.0", 0, 0, n_rows)
    assert whole.dtype == torch.bfloat16
    for size in (7, 64, n_rows, n_rows + 1):
        blocks = list(iter_row_blocks(world.pipeline, world.store, "resid_post.0", 0, size))
        assert [block.first_row for block in blocks] == list(range(0, n_rows, size))
        assert torch.equal(torch.cat([block.rows for block in blocks]), whole)


@given(
    lengths=st.lists(st.integers(1, 48), min_size=1, max_size=30),
    tokens_per_batch=st.integers(1, 300),
    must_see_mask=st.booleans(),
)
def test_batches_hold_every_position_once(lengths: list[int], tokens_per_batch: int, must_see_mask: bool) -> None:
    """A position left out would be uninitialised memory in a published file."""
    offsets = np.cumsum([0, *lengths]).astype(np.int64)
    token_ids = np.arange(offsets[-1], dtype=np.uint32)
    seen: list[int] = []
    padded_by_length: dict[int, set[tuple[int, bool]]] = {}
    for batch in make_batches(token_ids, offsets, tokens_per_batch, max_context=48, must_see_mask=must_see_mask):
        assert batch.token_ids[batch.attention_mask].tolist() == batch.rows.tolist()
        assert batch.token_ids.numel() <= max(tokens_per_batch, 48)
        seen += batch.rows.tolist()
        for mask in batch.attention_mask:
            uses_mask = must_see_mask and not bool(batch.attention_mask.all())
            padded_by_length.setdefault(int(mask.sum()), set()).add((len(mask), uses_mask))
            assert len(mask) - int(mask.sum()) <= PADDING_STEP
    assert sorted(seen) == list(range(int(offsets[-1])))
    assert all(len(shapes) == 1 for shapes in padded_by_length.values()), "a context's shape must depend on its own length only"
