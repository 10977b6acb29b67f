"""Streams are named, independent and the same everywhere."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from interp_assets.compute.seeds import stream

GOLDEN_WORDS = [10918426176720638442, 10297916245765513371, 13537781725814636216]


def test_words_are_the_same_on_every_machine() -> None:
    """Published bytes depend on them: a change here changes every shuffle."""
    assert stream(0, "shuffle", 1, "job", 17).words(3).tolist() == GOLDEN_WORDS


def test_names_are_not_confused() -> None:
    """Neighbouring names must not collide, nor integers with their digits."""
    keys = [("a", 1), ("a", "1"), ("a1",), ("a", 1, ""), ("", "a", 1), (1, "a")]
    first = {stream(0, *names).words(1).item() for names in keys} | {stream(1, "a", 1).words(1).item()}
    assert len(first) == len(keys) + 1


@given(st.integers(0, 300), st.integers(0, 2**63))
def test_a_permutation_holds_every_index_once(n: int, seed: int) -> None:
    """A row must be neither lost nor doubled."""
    assert sorted(stream(seed, "p").permutation(n).tolist()) == list(range(n))


def test_permutations_of_four_are_uniform() -> None:
    """Chi-square over all 24 orders; a naive swap shuffle fails it."""
    counts = np.zeros(256, dtype=int)
    for seed in range(12_000):
        counts[stream(seed, "p").permutation(4) @ np.array([64, 16, 4, 1])] += 1
    seen = counts[counts > 0]
    assert len(seen) == 24
    assert stats.chisquare(seen).pvalue > 1e-6


def test_below_has_no_modulo_bias() -> None:
    """Three values from words: the plain remainder would pass too, but never exceed the bound."""
    draws = [stream(0, "below", i).below(3) for i in range(6_000)]
    assert set(draws) == {0, 1, 2}
    assert stats.chisquare(np.bincount(draws)).pvalue > 1e-6
    assert stream(0).below(1) == 0


def test_uniform_stays_in_its_interval() -> None:
    """1.0 would index past the end of a table."""
    source = stream(0, "u")
    draws = [source.uniform() for _ in range(2_000)]
    assert min(draws) >= 0
    assert max(draws) < 1
    assert stats.kstest(draws, "uniform").pvalue > 1e-6
