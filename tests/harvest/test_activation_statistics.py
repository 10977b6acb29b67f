"""Statistics of activations: right against NumPy, and the same however rows and shards are cut."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stored_rows import load_rows
from tiny_models import make_tiny_config, save_model, write_texts

from interp_assets.compute.octaves import bin_edges
from interp_assets.corpus.plan import plan_corpus
from interp_assets.corpus.tokens import load_tokens, make_token_shard
from interp_assets.errors import ArtifactMissingError
from interp_assets.garcon.subject import load_subject_model
from interp_assets.garcon.tokenizer import load_tokenizer
from interp_assets.harvest.activations import harvest_shard
from interp_assets.harvest.statistics import (
    BLOCK_ROWS,
    StatisticsAccumulator,
    empty_statistics,
    load_statistics,
    measure_rows,
    merge,
    merge_statistics,
    norm_histogram,
)
from interp_assets.planning.config import ExecutionConfig
from interp_assets.storage.store import Store


def _rows(n_rows: int) -> torch.Tensor:
    return torch.randn((n_rows, 5), generator=torch.Generator().manual_seed(n_rows)) * 3


@given(cuts=st.lists(st.integers(0, 2 * BLOCK_ROWS + 100), max_size=5))
def test_pieces_leave_no_trace_in_the_bits(cuts: list[int]) -> None:
    """The batch size is an execution field."""
    rows = _rows(2 * BLOCK_ROWS + 100)
    edges = sorted({0, len(rows), *cuts})
    whole, pieces = StatisticsAccumulator(5), StatisticsAccumulator(5)
    whole.add(rows)
    for first, stop in itertools.pairwise(edges):
        pieces.add(rows[first:stop])
    for one, other in zip(whole.finish(), pieces.finish(), strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))


@given(sizes=st.lists(st.integers(0, 50), min_size=1, max_size=6), seed=st.integers(0, 100))
def test_shards_merge_in_any_order(sizes: list[int], seed: int) -> None:
    """Counts exactly, float64 sums to within rounding; NumPy is the oracle."""
    parts = [_rows(size) for size in sizes]
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(parts))
    total = merge([empty_statistics(5), *(measure_rows(parts[i]) for i in order)])
    rows = torch.cat(parts).double().numpy()
    assert total.n_rows == len(rows)
    np.testing.assert_allclose(total.sum.numpy(), rows.sum(axis=0), atol=1e-9)
    np.testing.assert_allclose(total.sum_of_squares.numpy(), (rows**2).sum(axis=0), atol=1e-9)
    np.testing.assert_allclose(total.sum_of_norms, np.linalg.norm(rows, axis=1).sum(), atol=1e-9)
    assert int(total.norm_histogram.sum()) == len(rows)
    if len(rows):
        np.testing.assert_allclose(total.variance, rows.var(axis=0).sum(), atol=1e-8)


@pytest.mark.parametrize("scale", [1e-30, 1e-5, 1.0, 1e5, 1e30])
def test_the_histogram_is_numpys_at_any_scale(scale: float) -> None:
    """Bins are read off the float's bits, and rows of a small or a large hook point are as well told apart as others."""
    edges = bin_edges()
    assert (edges[0], edges[508], edges[509], edges[512]) == (0.0, 1.0, 1.25, 2.0)
    norms = np.concatenate([edges[400:600], scale * np.geomspace(0.07, 4000, 997)]).astype(np.float32)
    finite = np.isfinite(edges)
    counts = norm_histogram(torch.from_numpy(norms)).numpy()
    assert counts[: finite.sum() - 1].tolist() == np.histogram(norms, edges[finite])[0].tolist()
    assert (counts > 0).sum() > 60


def test_merged_statistics_are_those_of_all_valid_training_rows(tmp_path: Path, memory_store: Store) -> None:
    """BOS and the held-out shard must not leak into the normalisation."""
    config = make_tiny_config(save_model(tmp_path / "model", "gpt2"), write_texts(tmp_path / "texts"))
    pipeline = plan_corpus(config, memory_store)
    subject = load_subject_model(config.model, ExecutionConfig(device="cpu"))
    for index in pipeline.shard_indices:
        make_token_shard(pipeline, memory_store, load_tokenizer(config.model), index)
        if index == 2:
            with pytest.raises(ArtifactMissingError):
                merge_statistics(pipeline, memory_store, "resid_post.0")
        harvest_shard(pipeline, memory_store, subject, index)
    produced = merge_statistics(pipeline, memory_store, "resid_post.0")
    rows = []
    for index in pipeline.train_indices:
        valid = load_tokens(pipeline, memory_store, index).valid
        rows.append(load_rows(pipeline, memory_store, "resid_post.0", index, 0, len(valid))[torch.from_numpy(valid.copy())].double())
    expected = torch.cat(rows)
    statistics = load_statistics(pipeline, memory_store, "resid_post.0")
    assert statistics.n_rows == len(expected) == produced.manifest.facts["count"]
    torch.testing.assert_close(statistics.mean, expected.mean(0))
    assert produced.manifest.facts["mean_norm"] == pytest.approx(float(expected.norm(dim=1).mean()))
    assert produced.manifest.facts["variance"] == pytest.approx(float(expected.var(dim=0, correction=0).sum()))
    assert merge_statistics(pipeline, memory_store, "resid_post.0").is_cached
