"""However text is cut into shards, batches and blocks of queries: the same numbers, the same candidates, the same examples."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import VOCABULARY, make_net

from interp_assets.compute.head_loops import N_SCORES, SLOTS, bin_of
from interp_assets.compute.priority import latent_keys, priorities, row_keys, sample_seed
from interp_assets.corpus.tokens import TokenShard
from interp_assets.garcon.attention import list_attention
from interp_assets.garcon.subject import SubjectModel
from interp_assets.harvest.heads.candidates import SAMPLED, STRONGEST, LayerSums, ShardRows
from interp_assets.harvest.heads.examples import INTERVAL, TOP, _choose, bin_edge, bins_of, cut_intervals
from interp_assets.harvest.heads.reading import hear_shard
from interp_assets.harvest.heads.statistics import HeadStatistics, merge_statistics
from interp_assets.planning.sections import HeadsConfig

CHOSEN = np.arange(30, dtype=np.uint32)


@pytest.fixture(scope="module", params=["gpt_oss", "mistral"])
def model(request: pytest.FixtureRequest) -> SubjectModel:
    """Build a model with grouped heads and a window; one of them has sinks, and experts."""
    return SubjectModel(make_net(request.param), "tiny")


def _contexts(n: int) -> list[np.ndarray]:
    generator = np.random.Generator(np.random.Philox(2))
    return [generator.integers(0, VOCABULARY - 3, int(length)).astype(np.uint32) % 40 for length in generator.integers(2, 48, n)]


def _shard(contexts: Sequence[np.ndarray]) -> TokenShard:
    numbers = np.repeat(np.arange(len(contexts)), [len(each) for each in contexts]).astype(np.uint32)
    token_ids = np.concatenate(contexts)
    return TokenShard(token_ids, numbers, numbers, token_ids != 7, None, None)  # type: ignore[arg-type] - nothing is stored


def _measure(model: SubjectModel, contexts: Sequence[np.ndarray], index: int = 0, queries: int = 128) -> list[LayerSums]:
    tokens, layers = _shard(contexts), list_attention(model.net)
    rows = ShardRows(tokens, CHOSEN, index, 3)
    sums = [LayerSums(layer, rows, queries) for layer in layers]
    for _ in hear_shard(model, layers, tokens, index, lambda layer, heard, places: sums[layer.layer].add(heard, places)):
        pass
    return sums


def _same(left: HeadStatistics, right: HeadStatistics) -> bool:
    return all(np.array_equal(value, getattr(right, name)) for name, value in vars(left).items())


def test_no_division_of_contexts_changes_a_bit_of_what_is_counted(model: SubjectModel) -> None:
    """One shard, two shards, another order, other blocks of queries, other neighbours in a batch: whole numbers add up to the same."""
    contexts = _contexts(12)
    whole = [sums.statistics for sums in _measure(model, contexts)]
    parts = [_measure(model, contexts[:5]), _measure(model, contexts[5:])]
    turned, fine = _measure(model, contexts[::-1]), _measure(model, contexts, queries=16)
    for layer, expected in enumerate(whole):
        assert int(expected.sum_of("rows").min()) > 200
        assert _same(merge_statistics([part[layer].statistics for part in parts]), expected)
        assert _same(turned[layer].statistics, expected)
        assert _same(fine[layer].statistics, expected)


def _table(heads: np.ndarray, rows: np.ndarray, scores: np.ndarray, priorities: np.ndarray, kinds: np.ndarray) -> pa.Table:
    columns = {
        "head": heads.astype(np.uint16),
        "row_id": rows.astype(np.uint64),
        "score": scores.astype(np.float32),
        "kind": kinds.astype(np.uint8),
        "priority": priorities.astype(np.uint64),
        "text": rows.astype(np.uint64) % np.uint64(997),
    }
    return pa.table(columns)


def _candidates_of(heads: np.ndarray, rows: np.ndarray, scores: np.ndarray, priorities: np.ndarray, n_top: int) -> pa.Table:
    """Return what a shard of these rows keeps, by the plain rule."""
    kinds = np.zeros(len(rows), np.uint8)
    bins = bins_of(scores.astype(np.float32))
    for head in np.unique(heads):
        mine = np.flatnonzero(heads == head)
        kinds[mine[np.lexsort((priorities[mine], -scores[mine]))[:n_top]]] |= STRONGEST
        for place in np.unique(bins[mine]):
            inside = mine[bins[mine] == place]
            kinds[inside[np.argsort(priorities[inside])[:SLOTS]]] |= SAMPLED
    kept = np.flatnonzero(kinds)
    return _table(heads[kept], rows[kept], scores[kept], priorities[kept], kinds[kept])


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
def test_examples_of_any_cut_are_those_of_all_rows(seed: int, n_shards: int) -> None:
    """Candidates of shards hold the uniform choice of every interval and the strongest rows, whichever way rows were divided."""
    generator = np.random.Generator(np.random.Philox(seed))
    n = 600
    heads, rows = generator.integers(0, 2, n), np.arange(n)
    scores = np.exp(generator.normal(0, 1.5, n)).astype(np.float32)
    priorities = generator.integers(0, 2**63, n).astype(np.uint64)
    config = HeadsConfig(top_k=5, n_intervals=4, examples_per_interval=3)
    counts = np.stack([np.bincount(bins_of(scores)[heads == head], minlength=N_SCORES) for head in (0, 1)])
    edges = cut_intervals(counts, config.n_intervals)
    owner = generator.integers(0, n_shards, n)
    parts = [
        _candidates_of(heads[mine], rows[mine], scores[mine], priorities[mine], config.n_kept_top) for mine in (owner == i for i in range(n_shards))
    ]
    chosen = _choose(pa.concat_tables(parts), edges, config)
    whole = _choose(_table(heads, rows, scores, priorities, np.full(n, STRONGEST | SAMPLED)), edges, config)
    assert chosen.equals(whole)
    table = chosen.to_pylist()
    for head in (0, 1):
        bins = bins_of(scores)
        for place in range(4):
            inside = np.flatnonzero((heads == head) & (bins >= edges[head, place]) & (bins < edges[head, place + 1]))
            expected = set(inside[np.argsort(priorities[inside])[:3]].tolist())
            assert {row["row_id"] for row in table if row["head"] == head and row["kind"] & INTERVAL and row["interval"] == place} == expected
        top = [row["row_id"] for row in sorted(table, key=lambda row: row["rank"]) if row["head"] == head and row["kind"] & TOP]
        assert len({row_id % 997 for row_id in top}) == len(top) == 5


def test_shards_keep_the_rows_of_smallest_priority_of_each_bin(model: SubjectModel) -> None:
    """The compiled slots against all rows of one more shard: what two shards keep holds what one of both keeps."""
    contexts = _contexts(12)
    whole = _measure(model, contexts)[0].candidates(8)
    first = whole.to_pydict()
    assert first["head"] == sorted(first["head"])
    assert len(set(zip(first["head"], first["row_id"], strict=True))) == len(first["head"])
    scores = np.array(first["score"], np.float32)
    assert [int(bin_of(score)) for score in scores] == bins_of(scores).tolist()
    sampled = [(head, int(place)) for head, place, kind in zip(first["head"], bins_of(scores), first["kind"], strict=True) if kind & SAMPLED]
    histogram = _measure(model, contexts)[0].statistics.score
    for head, place in set(sampled):
        assert sampled.count((head, place)) == min(SLOTS, int(histogram[head, place]))
    assert len(set(sampled)) == np.count_nonzero(histogram)


def test_intervals_are_cut_at_edges_of_bins_and_hold_every_row_once() -> None:
    """A bin with more rows than an interval should have leaves some intervals empty, and none doubled."""
    counts = np.zeros((3, N_SCORES), np.int64)
    counts[0, 100:140] = 25
    counts[1, 120] = 1000
    edges = cut_intervals(counts, 10)
    for head in range(3):
        inside = [int(counts[head, low:high].sum()) for low, high in zip(edges[head, :-1], edges[head, 1:], strict=True)]
        assert sum(inside) == counts[head].sum()
    assert [int(counts[0, low:high].sum()) for low, high in zip(edges[0, :-1], edges[0, 1:], strict=True)] == [100] * 10
    assert bin_edge(int(bins_of(np.array([1.0], np.float32))[0])) == 1.0


def test_samples_of_an_interval_are_uniform() -> None:
    """Priorities of heads and rows behave like random words: over many heads each row is drawn equally often (chi-square, fixed seed)."""
    seed = sample_seed(0, "heads", "examples")
    rows = row_keys(np.arange(200, dtype=np.uint64), seed)
    drawn = np.argsort(priorities(latent_keys(np.arange(4000, dtype=np.uint64), seed)[:, None], rows[None, :]), axis=1)[:, :5]
    counts = np.bincount(drawn.reshape(-1), minlength=200)
    statistic = float(((counts - 100) ** 2 / 100).sum())
    assert 130 < statistic < 275  # 199 degrees of freedom: between the 0.005% and 99.98% quantiles
