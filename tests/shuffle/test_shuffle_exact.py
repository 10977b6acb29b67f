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

from interp_assets.seeds import stream
from interp_assets.shuffle.permutation import Draws, shuffle_indices
from interp_assets.shuffle.sizes import ShuffleSizes, shares

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
    (2, 2, (4, 0, 1)),
    (2, 4, (2, 3)),
    (3, 2, (2, 2, 1)),
    (3, 2, (1, 1, 3)),
    (4, 2, (3, 2)),
]


@pytest.mark.parametrize(("passes", "fan_out", "shard_rows"), EXACT)
def test_every_order_of_five_rows_is_equally_likely(passes: int, fan_out: int, shard_rows: tuple[int, ...]) -> None:
    """One to four passes, ragged and empty shards, buckets of unequal size: 120 permutations, 1,800 seeds."""
    assert uniformity_p(5, 1800, real(passes, fan_out, shard_rows)) > 1e-4


@pytest.mark.slow
def test_every_order_of_six_rows_is_equally_likely() -> None:
    """Six rows have 720 orders; equal splits never make 432 of them. 7,200 seeds; 72,000 were run once (docs/log.md)."""
    assert uniformity_p(6, 7200, real(2, 2, (2, 2, 2))) > 1e-4


class EqualSplits(Draws):
    """Every job gives every bucket the same share: "each job writes K equal files"."""

    def split_counts(self, pass_index: int, bucket: int, job: int, job_rows: Sequence[int], capacities: Sequence[int]) -> NDArray[np.int64]:
        """Share a job's rows out evenly."""
        return np.array(shares(job_rows[job], len(capacities)))


class OneSeedForAllJobs(Draws):
    """Split jobs forget to put their number into the seed."""

    def split_order(self, pass_index: int, bucket: int, job: int, n_rows: int) -> NDArray[np.int64]:
        """Permute as job 0 would."""
        return super().split_order(pass_index, bucket, 0, n_rows)


class OneSeedForAllBuckets(Draws):
    """Gather jobs forget to put their number into the seed."""

    def gather_order(self, bucket: int, n_rows: int) -> NDArray[np.int64]:
        """Permute as bucket 0 would."""
        return super().gather_order(0, n_rows)


class NoFinalPermutation(Draws):
    """Buckets are left as they were gathered."""

    def gather_order(self, bucket: int, n_rows: int) -> NDArray[np.int64]:
        """Keep the order."""
        return np.arange(n_rows)


class NoFirstPermutation(Draws):
    """Jobs cut their rows without permuting them."""

    def split_order(self, pass_index: int, bucket: int, job: int, n_rows: int) -> NDArray[np.int64]:
        """Keep the order."""
        return np.arange(n_rows)


class ConstantTable(Draws):
    """The counts come from the right law, but from one seed for ever."""

    def split_counts(self, pass_index: int, bucket: int, job: int, job_rows: Sequence[int], capacities: Sequence[int]) -> NDArray[np.int64]:
        """Draw as the seed 0 would."""
        return Draws(0).split_counts(pass_index, bucket, job, job_rows, capacities)


class NaiveSwap(Draws):
    """The last permutation swaps each row with *any* other (n^n paths do not divide into n! orders)."""

    def gather_order(self, bucket: int, n_rows: int) -> NDArray[np.int64]:
        """Swap every place with a place drawn from all."""
        order, bits = np.arange(n_rows), self.stream("gather", bucket)
        for place in range(n_rows):
            other = bits.below(n_rows)
            order[[place, other]] = order[[other, place]]
        return order


MUTANTS = [
    (EqualSplits, 2, (2, 2, 1), 1500),
    (EqualSplits, 3, (2, 2, 1), 1500),
    (OneSeedForAllJobs, 2, (2, 2, 1), 1500),
    (OneSeedForAllBuckets, 2, (2, 2, 1), 1500),
    (NoFinalPermutation, 2, (2, 2, 1), 1500),
    (NoFirstPermutation, 2, (2, 2, 1), 1500),
    (ConstantTable, 2, (2, 2, 1), 1500),
    (NaiveSwap, 1, (4,), 6000),  # hidden by the first permutation when there is one
]


@pytest.mark.parametrize(("mutant", "passes", "shard_rows", "n_seeds"), MUTANTS)
def test_a_planted_fault_in_the_draws_is_caught(mutant: type[Draws], passes: int, shard_rows: tuple[int, ...], n_seeds: int) -> None:
    """If the proof cannot fail, it proves nothing."""
    assert uniformity_p(sum(shard_rows), n_seeds, real(passes, 2, shard_rows, mutant)) < 1e-20


def buffered(seed: int, n_rows: int = 5, buffer_rows: int = 3) -> list[int]:
    """Shuffle with a buffer, as most data loaders do: draw from it, refill it with the next row."""
    bits, buffer, out = stream(seed, "buffer"), [], []
    for row in range(n_rows):
        buffer.append(row)
        if len(buffer) == buffer_rows:
            out.append(buffer.pop(bits.below(len(buffer))))
    while buffer:
        out.append(buffer.pop(bits.below(len(buffer))))
    return out


def shards_then_rows(seed: int) -> list[int]:
    """Shuffle the order of the shards, then the rows inside each."""
    bits = stream(seed, "shards then rows")
    shards = [[0, 1], [2, 3], [4]]
    return [shards[i][j] for i in bits.permutation(3) for j in bits.permutation(len(shards[i]))]


def one_row_dropped_for_another(seed: int) -> NDArray[np.int64]:
    """Shuffle well, but write one row twice and another never."""
    order = real(2, 2, (2, 2, 1))(seed)
    return np.where(order == 3, 2, order)


@pytest.mark.parametrize("shuffle", [buffered, shards_then_rows, one_row_dropped_for_another])
def test_another_scheme_than_ours_is_caught(shuffle: Callable[[int], Order]) -> None:
    """The field's usual ways are not uniform, and the proof sees it."""
    assert uniformity_p(5, 1500, shuffle) < 1e-20
