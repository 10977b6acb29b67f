"""The order is exactly uniform: chi-square over all permutations of a few rows, through the code that the jobs run.

Every variant of the real shuffle must look uniform over thousands of seeds; every planted fault, each a mistake that a shuffle in use has
made, must be caught. Nothing is replaced by a model: the jobs' own `split_job` and `gather_order` make the orders, and the next module
shows that bytes follow them.
"""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from shuffle_mutants import (
    ConstantTable,
    EqualSplits,
    NaiveSwap,
    NoFinalPermutation,
    NoFirstPermutation,
    OneSeedForAllBuckets,
    OneSeedForAllJobs,
    buffered,
    shards_then_rows,
)
from shuffle_orders import shuffle_indices

from interp_assets.shuffle.permutation import Draws
from interp_assets.shuffle.sizes import ShuffleSizes

Order = Sequence[int] | NDArray[np.int64]


def uniformity_p(n_rows: int, n_seeds: int, shuffle: Callable[[int], Order]) -> float:
    """Return the chi-square p-value of `shuffle(seed)` over all permutations of `n_rows` rows; an order that is none counts for none."""
    place = {order: i for i, order in enumerate(itertools.permutations(range(n_rows)))}
    counts = np.zeros(len(place) + 1)
    for seed in range(n_seeds):
        counts[place.get(tuple(int(row) for row in shuffle(seed)), -1)] += 1
    expected = n_seeds / len(place)
    return float(stats.chi2.sf(((counts[:-1] - expected) ** 2).sum() / expected + counts[-1] ** 2, len(place) - 1))


def real(passes: int, fan_out: int, shard_rows: tuple[int, ...], draws: type[Draws] = Draws) -> Callable[[int], Order]:
    """Return the project's shuffle of `shard_rows` as a function of the seed."""
    sizes = ShuffleSizes(passes=passes, fan_out=fan_out, shard_rows=shard_rows)
    return lambda seed: np.concatenate(shuffle_indices(sizes, draws(seed)))


EXACT = [
    (1, 1, (2, 2, 1)),
    (1, 4, (5,)),
    (2, 2, (2, 2, 1)),
    (2, 3, (1, 3, 1)),
    (2, 4, (4, 0, 1)),
    (3, 2, (2, 2, 1)),
    (4, 2, (1, 1, 3)),
]


@pytest.mark.parametrize(("passes", "fan_out", "shard_rows"), EXACT)
def test_every_order_of_five_rows_is_equally_likely(passes: int, fan_out: int, shard_rows: tuple[int, ...]) -> None:
    """One to four passes, ragged and empty shards, buckets of unequal size: 120 permutations, 960 seeds."""
    assert uniformity_p(5, 960, real(passes, fan_out, shard_rows)) > 1e-4


@pytest.mark.slow
def test_every_order_of_six_rows_is_equally_likely() -> None:
    """Six rows have 720 orders; equal splits never make 432 of them. 3,600 seeds here."""
    assert uniformity_p(6, 3600, real(2, 2, (2, 2, 2))) > 1e-4


MUTANTS = [
    (EqualSplits, 2, (2, 2, 1), 960),
    (EqualSplits, 3, (2, 2, 1), 960),
    (OneSeedForAllJobs, 2, (2, 2, 1), 960),
    (OneSeedForAllBuckets, 2, (2, 2, 1), 960),
    (NoFinalPermutation, 2, (2, 2, 1), 960),
    (NoFirstPermutation, 2, (2, 2, 1), 960),
    (ConstantTable, 2, (2, 2, 1), 960),
    (NaiveSwap, 1, (4,), 6000),  # hidden by the first permutation when there is one
]


@pytest.mark.parametrize(("mutant", "passes", "shard_rows", "n_seeds"), MUTANTS)
def test_a_planted_fault_in_the_draws_is_caught(mutant: type[Draws], passes: int, shard_rows: tuple[int, ...], n_seeds: int) -> None:
    """If the proof cannot fail, it proves nothing."""
    assert uniformity_p(sum(shard_rows), n_seeds, real(passes, 2, shard_rows, mutant)) < 1e-20


def one_row_dropped_for_another(seed: int) -> NDArray[np.int64]:
    """Shuffle well, but write one row twice and another never."""
    order = real(2, 2, (2, 2, 1))(seed)
    return np.where(order == 3, 2, order)


OTHERS = [lambda seed: buffered(seed, 5, 3), lambda seed: shards_then_rows(seed, (2, 2, 1)), one_row_dropped_for_another]


@pytest.mark.parametrize("shuffle", OTHERS, ids=["buffered", "shards_then_rows", "one_row_dropped_for_another"])
def test_another_scheme_than_ours_is_caught(shuffle: Callable[[int], Order]) -> None:
    """The field's usual ways are not uniform, and the proof sees it."""
    assert uniformity_p(5, 960, shuffle) < 1e-20
