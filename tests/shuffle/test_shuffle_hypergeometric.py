"""Counts are drawn from the exact law, by any job alone."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from interp_assets.compute.seeds import Stream, stream
from interp_assets.shuffle.hypergeometric import _weigh, count_row, count_table, draw_hypergeometric, draw_multivariate


def node_stream(lo: int, hi: int) -> Stream:
    """Open the stream of a tree node in these tests."""
    return stream(3, "test", lo, hi)


@pytest.mark.parametrize(("good", "bad", "drawn"), [(3, 4, 2), (5, 5, 5), (2, 9, 8), (1, 1, 1), (30, 50, 20)])
def test_a_draw_has_the_hypergeometric_law(good: int, bad: int, drawn: int) -> None:
    """Everything rests on it: 10,000 draws against the textbook probabilities."""
    bits = stream(0, "law", good, bad, drawn)
    found = np.bincount([draw_hypergeometric(bits, good, bad, drawn) for _ in range(10_000)], minlength=good + 1)
    expected = stats.hypergeom(good + bad, good, drawn).pmf(np.arange(good + 1)) * 10_000
    likely = expected > 5
    value = ((found - expected)[likely] ** 2 / expected[likely]).sum() + (found[~likely].sum() - expected[~likely].sum()) ** 2
    assert stats.chi2.sf(value, likely.sum()) > 1e-4


@pytest.mark.parametrize(("good", "population", "drawn"), [(10**6, 10**8, 10**7), (10**8, 10**11, 5 * 10**10), (10**11 // 2, 10**11, 10**9)])
def test_large_populations_keep_their_moments_and_their_shape(good: int, population: int, drawn: int) -> None:
    """At 100 billion rows no library can check us; the normal limit can."""
    bits = stream(1, "moments", good)
    draws = np.array([draw_hypergeometric(bits, good, population - good, drawn) for _ in range(300)], np.float64)
    mean = drawn * good / population
    sd = math.sqrt(mean * (1 - good / population) * (population - drawn) / (population - 1))
    z = (draws - mean) / sd
    assert abs(z.mean()) < 4 / math.sqrt(300)
    assert abs(z.var() - 1) < 4 * math.sqrt(2 / 300)
    assert stats.kstest(z, "norm").pvalue > 1e-4


def test_impossible_and_certain_draws_take_no_randomness() -> None:
    """A job without rows must not shift the draws of the others."""
    bits = stream(0, "certain")
    assert [draw_hypergeometric(bits, 5, 0, 3), draw_hypergeometric(bits, 0, 5, 3), draw_hypergeometric(bits, 5, 7, 12)] == [3, 0, 5]
    assert bits.uniform() == stream(0, "certain").uniform()


@given(good=st.integers(1, 10**9), bad=st.integers(0, 10**9), share=st.floats(0, 0.5), width=st.integers(1, 20_000))
@settings(max_examples=40, deadline=None)
def test_weights_are_summed_as_term_by_term_bit_for_bit(good: int, bad: int, share: float, width: int) -> None:
    """A draw is one integer on every machine and for ever: arrays must add in the order of the formula."""
    drawn = int(share * (good + bad))
    lowest, highest = max(0, drawn - bad), min(drawn, good)
    mode = min(max((drawn + 1) * (good + 1) // (good + bad + 2), lowest), highest)
    first, last = max(lowest, mode - width), min(highest, mode + width)
    assert list(_weigh(good, bad, drawn, first, mode, last)) == weigh_term_by_term(good, bad, drawn, first, mode, last)


@given(
    jobs=st.lists(st.integers(0, 60), min_size=1, max_size=9),
    weights=st.lists(st.integers(1, 5), min_size=1, max_size=6),
)
@settings(deadline=None)
def test_every_job_alone_finds_its_row_of_one_table_with_the_right_margins(jobs: list[int], weights: list[int]) -> None:
    """Jobs never talk; if their rows disagreed, buckets would overflow or starve."""
    total = sum(jobs)
    ends = [total * sum(weights[: i + 1]) // sum(weights) for i in range(len(weights))]
    capacities = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    table = count_table(node_stream, jobs, capacities)
    assert table.sum(axis=1).tolist() == jobs
    assert table.sum(axis=0).tolist() == capacities
    assert (table >= 0).all()
    for job in range(len(jobs)):
        assert count_row(node_stream, jobs, capacities, job).tolist() == table[job].tolist()


def test_a_table_has_the_joint_law_of_a_uniform_permutation() -> None:
    """All 3 x 2 tables with margins (2, 2, 1) and (3, 2), against counting all 120 permutations."""
    found: dict[tuple[int, ...], int] = {}
    n_draws = 3000
    for seed in range(n_draws):
        table = count_table(lambda lo, hi, seed=seed: stream(seed, "joint", lo, hi), [2, 2, 1], [3, 2])
        key = tuple(table[:, 0].tolist())
        found[key] = found.get(key, 0) + 1
    law = {(a, b, c): math.comb(2, a) * math.comb(2, b) * math.comb(1, c) / math.comb(5, 3) for a in range(3) for b in range(3) for c in range(2)}
    expected = {key: p * n_draws for key, p in law.items() if sum(key) == 3}
    assert set(found) == set(expected)
    value = sum((found[key] - mean) ** 2 / mean for key, mean in expected.items())
    assert stats.chi2.sf(value, len(expected) - 1) > 1e-4


def test_rows_that_do_not_fit_the_buckets_are_our_own_mistake() -> None:
    """Sizes come from the plan; a mismatch is a bug, not an input."""
    with pytest.raises(AssertionError, match="5 rows into buckets"):
        count_row(node_stream, [2, 3], [4], 0)
    with pytest.raises(AssertionError, match="4 rows into 3 places"):
        draw_multivariate(stream(0, "x"), [1, 2], 4)


def weigh_term_by_term(n_good: int, n_bad: int, n_drawn: int, first: int, mode: int, last: int) -> list[float]:
    """Return the running sum of p(x) / p(mode) for x = first..last, term by term."""
    weights = [1.0]
    for x in range(mode, first, -1):
        weights.append(weights[-1] * ((float(x) * (n_bad - n_drawn + x)) / (float(n_good - x + 1) * (n_drawn - x + 1))))
    weights.reverse()
    weight = 1.0
    for x in range(mode, last):
        weight *= (float(n_good - x) * (n_drawn - x)) / (float(x + 1) * (n_bad - n_drawn + x + 1))
        weights.append(weight)
    total = 0.0
    for i, term in enumerate(weights):
        total += term
        weights[i] = total
    return weights
