"""Planted faults: shuffles that are wrong in one place, each a mistake that a shuffle in use has made. The proofs must catch every one."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from interp_assets.compute.seeds import stream
from interp_assets.shuffle.permutation import Draws
from interp_assets.shuffle.sizes import shares


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


def buffered(seed: int, n_rows: int, buffer_rows: int) -> list[int]:
    """Shuffle with a buffer, as most data loaders do: draw from it, refill it with the next row."""
    bits, buffer, out = stream(seed, "buffer"), list[int](), list[int]()
    for row in range(n_rows):
        buffer.append(row)
        if len(buffer) == buffer_rows:
            out.append(buffer.pop(bits.below(len(buffer))))
    while buffer:
        out.append(buffer.pop(bits.below(len(buffer))))
    return out


def shards_then_rows(seed: int, shard_rows: Sequence[int]) -> list[int]:
    """Shuffle the order of the shards, then the rows inside each."""
    bits = stream(seed, "shards then rows")
    starts = np.concatenate([[0], np.cumsum(shard_rows)])
    return [int(starts[i] + j) for i in bits.permutation(len(shard_rows)) for j in bits.permutation(shard_rows[i])]
