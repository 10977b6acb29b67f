"""The choice of examples: exact, mergeable, uniform."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2, kstest

from interp_assets.compute.priority import latent_keys, mix, priorities, row_keys, sample_seed
from interp_assets.visualize.firings import Firings, expand_ranges, merge_firings, sort_firings
from interp_assets.visualize.kernels import _nth_smallest, rank_firings
from interp_assets.visualize.selection import RANDOM, TOP, Limits, select_firings, smallest_per_segment, smallest_priorities

SEED = sample_seed(0, "visualize", "examples")


def priorities_of(firings, seed=SEED):
    """Return the priority of every firing."""
    keys = latent_keys(np.arange(firings.start, firings.start + firings.n_latents, dtype=np.uint64), seed)
    return priorities(keys[firings.relative_latents()], row_keys(firings.row_ids, seed))


def make_firings(rng, n_latents, n_rows, rate, n_values=4):
    """Make firings with few distinct activations."""
    fires = rng.random((n_rows, n_latents)) < rate
    rows, latents = np.nonzero(fires)
    activations = rng.integers(1, n_values + 1, len(rows)).astype(np.float32)
    return sort_firings(5, n_latents, latents.astype(np.uint16), rows.astype(np.uint64), activations)


def keep(firings, limits, documents):
    """Reduce firings to what is kept of them."""
    kinds = select_firings(firings, priorities_of(firings), documents, limits)
    return firings.take(kinds > 0), kinds[kinds > 0]


def test_the_compiled_priorities_are_the_plain_ones():
    """Pass A ranks firings in compiled code, later passes in plain: one bit of difference would draw another sample."""
    rng = np.random.default_rng(0)
    firings = sort_firings(7, 5, rng.integers(0, 5, 999).astype(np.uint16), np.sort(rng.integers(0, 4000, 999)), np.ones(999, np.float32))
    keys, ranked = row_keys(np.arange(4000, dtype=np.uint64), SEED), np.empty(999, np.uint64)
    rank_firings(firings.offsets, firings.row_ids, latent_keys(np.arange(7, 12, dtype=np.uint64), SEED), keys, ranked)
    assert ranked.tolist() == priorities_of(firings).tolist()


def test_the_finaliser_is_splitmix64():
    """The published constants: a typing error would still look random."""
    assert mix(np.array([0x9E3779B97F4A7C15], np.uint64))[0] == 0xE220A8397B1DCDAF  # first output of SplitMix64 with seed 0
    assert mix(np.array([0x3C6EF372FE94F82A], np.uint64))[0] == 0x6E789E6AA1B965F4  # its second


def test_priorities_of_one_latent_never_tie():
    """Row to priority is a bijection, so the smallest are unique."""
    keys = row_keys(np.arange(200_000, dtype=np.uint64), SEED)
    assert len(np.unique(priorities(latent_keys(np.array([3], np.uint64), SEED), keys))) == 200_000


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(0, 40), st.integers(1, 6), st.booleans())
def test_selection_equals_sorting_each_latent(seed, n_latents, n_rows, limit, by_document):
    """Against the obvious way, for any sizes, with ties everywhere."""
    rng = np.random.default_rng(seed)
    firings = make_firings(rng, n_latents, n_rows, 0.6)
    documents = (firings.row_ids // np.uint64(3)).astype(np.uint32) if by_document else None
    kinds = select_firings(firings, priorities_of(firings), documents, Limits(limit, limit + 1))
    order = priorities_of(firings)
    for i in range(n_latents):
        mine = range(firings.offsets[i], firings.offsets[i + 1])
        top, seen = set(), set()
        for j in sorted(mine, key=lambda j: (-firings.activations[j], order[j])):
            if len(top) < limit and (documents is None or documents[j] not in seen):
                top.add(j)
                seen.add(documents[j] if documents is not None else None)
        assert {j for j in mine if kinds[j] & TOP} == top
        assert {j for j in mine if kinds[j] & RANDOM} == set(sorted(mine, key=lambda j: order[j])[: limit + 1])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.integers(0, 60), max_size=5), st.booleans())
def test_merging_the_candidates_of_any_cut_gives_the_candidates_of_the_whole(seed, cuts, by_document):
    """Shards may be cut anywhere between documents, or between rows when documents do not matter."""
    firings = make_firings(np.random.default_rng(seed), 4, 60, 0.7)
    limits = Limits(3, 5)
    unit = 5 if by_document else 1
    edges = np.unique([0, *(cut // unit * unit for cut in cuts), 60]).astype(np.uint64)

    def documents(part):
        return (part.row_ids // np.uint64(5)).astype(np.uint32) if by_document else None

    parts = [firings.take((firings.row_ids >= low) & (firings.row_ids < high)) for low, high in pairwise(edges)]
    merged = merge_firings([keep(part, limits, documents(part))[0] for part in parts])
    whole, whole_kinds = keep(firings, limits, documents(firings))
    found, found_kinds = keep(merged, limits, documents(merged))
    assert (found.row_ids == whole.row_ids).all()
    assert (found_kinds == whole_kinds).all()
    assert (found.offsets == whole.offsets).all()
    twice, _ = keep(found, limits, documents(found))
    assert (twice.row_ids == whole.row_ids).all()


@pytest.mark.parametrize("order", ["falling", "rising", "mixed", "equal", "largest"])
@pytest.mark.parametrize("n", [1, 20, 200])
def test_the_nth_of_many_words_is_that_of_all_sorted(order, n):
    """Latents with thousands of firings are sifted: in whatever order these come, with ties, and with the largest word there is."""
    rng = np.random.default_rng(n)
    for n_words in (n, n + 1, 8 * n, 8 * n + 1, 5000):
        words = rng.integers(0, 1 << 64, n_words, np.uint64)
        words[rng.random(n_words) < 0.3] = words[0]
        if order in ("equal", "largest"):
            words[: n_words if order == "equal" else n_words - n + 1] = 7 if order == "equal" else 2**64 - 1
        elif order != "mixed":
            words = np.sort(words)[:: -1 if order == "falling" else 1].copy()
        assert _nth_smallest(words, n) == (sorted(words.tolist())[n - 1] if n_words > n else 2**64 - 1)


def test_every_row_is_drawn_equally_often():
    """Chi-square of inclusion over latents: with independent uniform samples the counts are multinomial-like with less spread."""
    n_latents, n_rows, n = 40_000, 40, 8
    keys = latent_keys(np.arange(n_latents, dtype=np.uint64), SEED)
    words = priorities(keys[:, None], row_keys(np.arange(n_rows, dtype=np.uint64), SEED)[None])
    segments = np.repeat(np.arange(n_latents, dtype=np.int32), n_rows)
    chosen = smallest_priorities(segments, n_latents, n, words.reshape(-1)).reshape(n_latents, n_rows)
    assert (chosen.sum(axis=1) == n).all()
    share = n / n_rows
    statistic = ((chosen.sum(axis=0) - n_latents * share) ** 2).sum() / (n_latents * share * (1 - share)) * (n_rows - 1) / n_rows
    assert 1e-4 < chi2.sf(statistic, n_rows - 1) < 1 - 1e-4
    pairs = (chosen[:, :-1] & chosen[:, 1:]).mean()
    assert abs(pairs - share * (n - 1) / (n_rows - 1)) < 5 * (share**2 / n_latents / n_rows) ** 0.5


def test_seeds_and_latents_draw_different_uniform_words():
    """Another seed must give another sample, and words must be uniform."""
    rows = row_keys(np.arange(5000, dtype=np.uint64), SEED)
    one = priorities(latent_keys(np.array([7], np.uint64), SEED), rows)
    other = priorities(latent_keys(np.array([7], np.uint64), sample_seed(1, "visualize", "examples")), rows)
    assert kstest(one / 2.0**64, "uniform").pvalue > 1e-4
    assert abs(np.corrcoef(one.astype(float), other.astype(float))[0, 1]) < 0.06


@pytest.mark.parametrize("n", [1, 3, 1000])
def test_smallest_per_segment_takes_elements_in_any_order(n):
    """Elements of a segment need not be neighbours, and equal keys are settled by the tie keys."""
    rng = np.random.default_rng(1)
    segments, keys, ties = rng.integers(0, 9, 500), rng.integers(0, 3, 500).astype(np.uint64), rng.permutation(500).astype(np.uint64)
    chosen = smallest_per_segment(segments, 9, n, keys, ties)
    for segment in range(9):
        mine = sorted(np.flatnonzero(segments == segment), key=lambda j: (keys[j], ties[j]))
        assert set(np.flatnonzero(chosen & (segments == segment))) == set(mine[:n])


def test_ranges_expand_one_after_the_other():
    """The gather behind every ragged join, empty ranges included."""
    assert expand_ranges(np.array([5, 9, 0]), np.array([2, 0, 3])).tolist() == [5, 6, 0, 1, 2]
    assert expand_ranges(np.array([], np.int64), np.array([], np.int64)).tolist() == []


def test_taking_and_merging_keep_firings_sorted_by_latent():
    """Everything downstream searches in these columns."""
    firings = make_firings(np.random.default_rng(3), 6, 50, 0.4)
    halves = [firings.take(firings.row_ids < np.uint64(20)), firings.take(firings.row_ids >= np.uint64(20))]
    merged = merge_firings(halves)
    assert all((one == other).all() for one, other in zip(merged[1:], firings[1:], strict=True))
    assert isinstance(merged, Firings)
