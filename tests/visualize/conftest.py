"""A small world for the feature passes: corpus, activations and SAE made by hand, so that arithmetic is exact and full of ties."""

import json
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from interp_assets.compute.priority import sample_seed
from interp_assets.corpus.refs import token_shard_ref
from interp_assets.garcon.subject import Unembedding
from interp_assets.harvest.refs import activation_shard_ref, statistics_ref
from interp_assets.harvest.statistics import ActivationStatistics, as_tensors
from interp_assets.planning.config import make_config
from interp_assets.planning.pipeline import Pipeline, PipelinePlan, ShardSource
from interp_assets.storage.manifest import create_artifact, read_file
from interp_assets.storage.store import Store, open_store
from interp_assets.storage.tensors import save_tensors
from interp_assets.train.checkpoint import save_sae
from interp_assets.train.refs import evaluation_ref, sae_ref
from interp_assets.train.sae import Sae
from interp_assets.visualize.candidates import find_candidates
from interp_assets.visualize.examples import select_examples
from interp_assets.visualize.packing import unpack_record
from interp_assets.visualize.records import write_records
from interp_assets.visualize.windows import fire_windows

HOOK = "resid_post.0"
BOS = 0


@dataclass
class Shard:
    """What the test knows about one shard without asking the code under test."""

    token_ids: np.ndarray
    contexts: np.ndarray
    documents: np.ndarray
    valid: np.ndarray
    rows: torch.Tensor
    roles: list[str] | None = None


@dataclass
class World:
    """A pipeline in a memory store, with all that the feature passes read."""

    pipeline: Pipeline
    store: Store
    sae: Sae
    shards: list[Shard] = field(default_factory=list)

    def variant(self, store: Store | None = None, execution: dict[str, Any] | None = None, **features: Any) -> "World":
        """Publish the same shards and SAE under another configuration of the features, in a new store."""
        content = json.loads(self.pipeline.config.model_dump_json())
        content["features"] |= features
        content["execution"] |= execution or {}
        world = World(Pipeline(make_config(content), self.pipeline.plan), store or open_store("memory://variant"), self.sae, self.shards)
        publish(world)
        return world

    def dense(self) -> list[np.ndarray]:
        """Encode every shard the obvious way: `[rows, d_sae]`, zero on rows that are not valid."""
        return [np.where(shard.valid[:, None], self.sae.encode(shard.rows).numpy(), 0) for shard in self.shards]


def integer_sae(rng: np.random.Generator, kind: str, d_in: int, d_sae: int, k: int = 5) -> Sae:
    """Make an SAE of small integers: float32 products are exact in any order, and many activations tie. The last latents are dead."""
    W_enc = torch.from_numpy(rng.integers(-2, 3, (d_in, d_sae))).float()
    b_enc = torch.from_numpy(rng.integers(-6, 1, d_sae)).float()
    threshold = torch.from_numpy(rng.integers(0, 5, d_sae)).float() if kind == "jump_relu" else torch.zeros(d_sae)
    W_enc[:, -2:], b_enc[-2:] = 0, -1
    W_dec = torch.from_numpy(rng.integers(-3, 4, (d_sae, d_in))).float()
    return Sae(kind=kind, W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=torch.zeros(d_in), threshold=threshold, k=k if kind == "topk" else 0)


def make_shard(rng: np.random.Generator, n_rows: int, d_in: int, context_length: int = 24) -> Shard:
    """Make a shard of contexts of uneven length, each opened by a BOS, with documents that run across contexts."""
    contexts = np.arange(n_rows) // context_length
    is_first = np.concatenate([[True], contexts[1:] != contexts[:-1]])
    documents = np.cumsum(rng.random(n_rows) < 1 / 37)
    documents -= documents[0]
    token_ids = np.where(is_first, BOS, rng.integers(1, 50, n_rows))
    rows = torch.from_numpy(rng.integers(-3, 4, (n_rows, d_in))).to(torch.bfloat16)
    return Shard(token_ids.astype(np.uint32), contexts.astype(np.uint32), documents.astype(np.uint32), ~is_first, rows)


def publish(world: World) -> None:
    """Write the artifacts that the feature passes read."""
    pipeline, store = world.pipeline, world.store
    for index, shard in enumerate(world.shards):
        n_documents = int(shard.documents.max()) + 1
        with create_artifact(store, token_shard_ref(pipeline, index)) as art:
            columns = {"token_id": shard.token_ids, "context": shard.contexts, "document": shard.documents, "valid": shard.valid}
            roles = {"role": pa.array(shard.roles).dictionary_encode()} if shard.roles else {}
            art.put("tokens.parquet", _parquet(columns | roles))
            art.facts |= {"n_rows": len(shard.rows), "n_valid": int(shard.valid.sum())}
            first = np.searchsorted(shard.documents, np.arange(n_documents)).astype(np.uint64)
            art.put(
                "documents.parquet",
                _parquet(
                    {
                        "document": np.arange(n_documents, dtype=np.uint32),
                        "source": [f"text-{index}-{i}.py" for i in range(n_documents)],
                        "first_row": first,
                        "n_rows": np.diff(np.append(first, len(shard.rows))).astype(np.uint64),
                    }
                ),
            )
        with create_artifact(store, activation_shard_ref(pipeline, HOOK, index)) as art:
            save_tensors(art, "rows.safetensors", {"rows": shard.rows})
    with create_artifact(store, statistics_ref(pipeline, HOOK)) as art:
        save_tensors(art, "statistics.safetensors", as_tensors(_statistics(world)))
    with create_artifact(store, sae_ref(pipeline, "demo")) as art:
        save_sae(art, world.sae, pipeline, pipeline.config.sae("demo"), l0=5.0)
    with create_artifact(store, evaluation_ref(pipeline, "demo")) as art:
        art.facts["l0"] = 5.0


@pytest.fixture
def make_world():
    """Return a maker of worlds: SAE kind, sizes of the shards, and the configuration of the features."""

    def make(
        kind: str = "jump_relu", sizes: tuple[int, ...] = (150, 97, 230), d_in: int = 8, d_sae: int = 24, seed: int = 0, **features: Any
    ) -> World:
        rng = np.random.default_rng(seed)
        sae = integer_sae(rng, kind, d_in, d_sae)
        shards = [make_shard(rng, n, d_in) for n in sizes]
        architecture = {"relu": "relu", "jump_relu": "jump_relu", "topk": "topk"}[kind]
        content = {
            "harvest": {"hook_points": [HOOK]},
            "shuffle": {"passes": 2},
            "saes": [{"hook_point": HOOK, "architecture": architecture, "d_sae": d_sae, "k": min(5, d_sae)}],
            "features": {"top_k": 4, "n_random": 12, "window": 5, "n_intervals": 4, "examples_per_interval": 3, "distinct_tokens": 0} | features,
            "execution": {"rows_per_block": 64},
        }
        sources = [ShardSource(index=i, fingerprint=f"f{i}", n_documents=1, n_bytes=1, spec={}) for i in range(len(sizes))]
        plan = PipelinePlan(
            shards=sources, tokenizer_fingerprint="t", model_fingerprint="m", hook_widths={HOOK: d_in}, vocabulary_size=50, max_context=64
        )
        world = World(Pipeline(make_config(content), plan), open_store("memory://world"), sae, shards)
        publish(world)
        return world

    return make


def _statistics(world: World) -> ActivationStatistics:
    rows = torch.cat([shard.rows.double() for shard in world.shards])
    rows = rows[torch.isfinite(rows).all(dim=1)]
    norms = rows.norm(dim=1)
    return ActivationStatistics(len(rows), rows.sum(0), rows.square().sum(0), float(norms.sum()), torch.zeros(64, dtype=torch.int64))


def _parquet(columns: dict[str, Any]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


@pytest.fixture(scope="session")
def tokenizer():
    """Return a tokenizer of fifty words, the first of them BOS."""
    words = {"<bos>": BOS} | {f"w{i}": i for i in range(1, 50)}
    backend = Tokenizer(WordLevel(words, unk_token="w1"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", unk_token="w1")


@pytest.fixture(scope="session")
def unembedding():
    """Return the way from eight dimensions to the logits of 52 tokens, two more than the tokenizer knows."""
    rng = np.random.default_rng(7)
    return Unembedding(torch.from_numpy(rng.integers(-3, 4, (8, 52))).float(), "")


@pytest.fixture
def run_passes(tokenizer, unembedding):
    """Return a runner of all four passes over a world; it answers what pass D produced, by slice."""

    def run(world: World):
        pipeline, store, sae = world.pipeline, world.store, world.sae
        slices = range(pipeline.config.features.latent_slices)
        for index in pipeline.shard_indices:
            for latent_slice in slices:
                find_candidates(pipeline, store, sae, "demo", index, latent_slice)
        for latent_slice in slices:
            select_examples(pipeline, store, "demo", latent_slice)
        for index in pipeline.shard_indices:
            fire_windows(pipeline, store, sae, "demo", index)
        return [write_records(pipeline, store, "demo", sae, i, tokenizer, unembedding) for i in slices]

    return run


@pytest.fixture
def read_records():
    """Return a reader of records: the way a browser does, by offsets and gzip members."""

    def read(world: World, produced) -> list[dict[str, Any]]:
        path, manifest = produced.ref.path, produced.manifest
        offsets = np.frombuffer(read_file(world.store, path, manifest, "records.idx"), "<u8").tolist()
        data = read_file(world.store, path, manifest, "records.bin")
        order = np.frombuffer(read_file(world.store, path, manifest, "tokens.order"), "<u4")
        return [unpack_record(data[low:high], order, "a record") for low, high in pairwise(offsets)]

    return read


@pytest.fixture
def expect_records():
    """Return the brute force: encode everything, sort everything in Python, and write down each latent's examples and statistics."""
    return _expect_records


def splitmix(word: int) -> int:
    """The 64-bit finaliser in Python integers."""
    word ^= word >> 30
    word = word * 0xBF58476D1CE4E5B9 % 2**64
    word ^= word >> 27
    word = word * 0x94D049BB133111EB % 2**64
    return word ^ word >> 31


def _expect_records(world: World) -> list[dict[str, Any]]:
    features, seed = world.pipeline.config.features, int(sample_seed(world.pipeline.config.seed, "visualize", "examples"))
    dense = world.dense()
    n_valid = sum(int(shard.valid.sum()) for shard in world.shards)
    return [_expect_record(world, dense, latent, features, seed, n_valid) for latent in range(world.sae.d_sae)]


def _expect_record(world: World, dense: list[np.ndarray], latent: int, features: Any, seed: int, n_valid: int) -> dict[str, Any]:
    key = splitmix((latent * 0x9E3779B97F4A7C15 + seed * 0xD6E8FEB86659FD93 + 1) % 2**64)
    firings = []
    for index, values in enumerate(dense):
        for row in np.flatnonzero(values[:, latent] > 0).tolist():
            row_key = splitmix((((index << 40) + row) * 0xD1B54A32D192ED03 + seed) % 2**64)
            firings.append((-float(values[row, latent]), splitmix(key ^ row_key), index, row))
    top, seen = [], set()
    for firing in sorted(firings):
        document = (firing[2], int(world.shards[firing[2]].documents[firing[3]]))
        if len(top) < features.top_k * (4 if features.distinct_tokens else 1) and not (features.one_per_document and document in seen):
            top.append(firing)
            seen.add(document)
    if features.distinct_tokens:
        texts = {}
        for firing in top:
            texts.setdefault(_expect_context(world, firing, features.distinct_tokens), firing)
        top = list(texts.values())[: features.top_k]
    by_priority = sorted(firings, key=lambda firing: firing[1])
    values = sorted(-firing[0] for firing in firings)
    quantiles = [values[i * (len(values) - 1) // features.n_intervals] for i in range(features.n_intervals + 1)] if values else []
    intervals = []
    for i in range(features.n_intervals if values else 0):
        low, high, is_last = quantiles[i], quantiles[i + 1], i == features.n_intervals - 1
        inside = [firing for firing in by_priority if low <= -firing[0] < high or (is_last and -firing[0] >= low)]
        if inside:
            chosen = inside[: features.examples_per_interval]
            intervals.append({"low": low, "high": high, "examples": [_expect_window(world, dense, latent, firing) for firing in chosen]})
    return {
        "count": len(firings),
        "sum": sum(values),
        "max": max(values, default=0.0),
        "quantiles": quantiles,
        "frequency": len(firings) / n_valid,
        "top": [_expect_window(world, dense, latent, firing) for firing in top],
        "intervals": intervals,
        "random": [_expect_window(world, dense, latent, firing) for firing in by_priority[: min(20, features.n_random)]],
    }


def _expect_context(world: World, firing: tuple[float, int, int, int], n_tokens: int) -> tuple[int, ...]:
    """Return the tokens around a firing, -1 outside its context and document."""
    _, _, index, row = firing
    shard = world.shards[index]
    places = range(row - n_tokens, row + n_tokens + 1)
    return tuple(int(shard.token_ids[place]) if 0 <= place < len(shard.rows) and _belong_together(shard, place, row) else -1 for place in places)


def _expect_window(world: World, dense: list[np.ndarray], latent: int, firing: tuple[float, int, int, int]) -> dict[str, Any]:
    activation, _, index, row = firing
    shard, window = world.shards[index], world.pipeline.config.features.window
    low = high = row
    while low > max(0, row - window) and _belong_together(shard, low - 1, row):
        low -= 1
    while high + 1 < min(len(shard.rows), row + window + 1) and _belong_together(shard, high + 1, row):
        high += 1
    places = range(low, high + 1)
    return {
        "row": [index, row],
        "document": f"text-{index}-{shard.documents[row]}.py",
        "tokens": [int(shard.token_ids[place]) for place in places],
        "peak": row - low,
        "position": row - int(np.flatnonzero(shard.contexts == shard.contexts[row])[0]),
        "activation": -activation,
        "activations": [[place - low, float(dense[index][place, latent])] for place in places if dense[index][place, latent] > 0],
        "masked": [place - low for place in places if not shard.valid[place]],
    }


def _belong_together(shard: Shard, one: int, other: int) -> bool:
    return bool(shard.contexts[one] == shard.contexts[other] and shard.documents[one] == shard.documents[other])
