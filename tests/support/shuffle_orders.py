"""The shuffle's order in memory, as the jobs make it on disk: the pure core, for proofs."""

from functools import partial
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from interp_assets.shuffle.append import WORD_ROWS, merge_counts, merge_stream, merge_words
from interp_assets.shuffle.hypergeometric import count_table
from interp_assets.shuffle.permutation import Draws, split_job
from interp_assets.shuffle.sizes import ShuffleSizes, offsets


def shuffle_indices(sizes: ShuffleSizes, draws: Draws) -> list[NDArray[np.int64]]:
    """Shuffle the numbers 0..n_rows-1 in memory as the jobs shuffle rows; returns each mixed shard's numbers in their final order."""
    buckets = [np.arange(sizes.n_rows)]
    for pass_index in range(1, sizes.passes):
        buckets = [part for bucket, rows in enumerate(buckets) for part in _distribute(sizes, draws, pass_index, bucket, rows)]
    return [rows[draws.gather_order(bucket, len(rows))] for bucket, rows in enumerate(buckets)]


def _distribute(sizes: ShuffleSizes, draws: Draws, pass_index: int, bucket: int, rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Run all jobs of one input bucket; returns the output buckets."""
    ranges: list[list[NDArray[np.int64]]] = [[] for _ in range(sizes.fan_out)]
    starts = offsets(sizes.job_rows(pass_index, bucket))
    for job, (start, stop) in enumerate(pairwise(starts)):
        split = split_job(draws, sizes, pass_index, bucket, job)
        mixed = rows[start:stop][split.order]
        for part, parts in enumerate(ranges):
            parts.append(mixed[split.offsets[part] : split.offsets[part + 1]])
    return [np.concatenate(parts) for parts in ranges]


def append_indices(draws: Draws, old: NDArray[np.int64], new: NDArray[np.int64], n_buckets: int, word_rows: int = WORD_ROWS) -> NDArray[np.int64]:
    """Merge two orders in memory as the jobs merge rows: the pure core, for proofs."""
    table = merge_counts(draws, len(old), len(new), n_buckets)
    merged: list[NDArray[np.int64]] = []
    at_old, at_new = 0, 0
    for bucket in range(n_buckets):
        bits = merge_stream(draws, len(old), len(new), bucket)
        for is_old in merge_words(bits, int(table[bucket, 0]), int(table[bucket, 1]), word_rows):
            n_places, from_old = len(is_old), int(is_old.sum())
            places = np.empty(n_places, np.int64)
            places[is_old], places[~is_old] = old[at_old : at_old + from_old], new[at_new : at_new + n_places - from_old]
            merged.append(places)
            at_old, at_new = at_old + from_old, at_new + n_places - from_old
    return np.concatenate(merged) if merged else np.zeros(0, np.int64)


def draw_whole_table(sizes: ShuffleSizes, *, seed: int = 0) -> NDArray[np.int64]:
    """Draw pass 1's table `[jobs, fan_out]` and check both margins."""
    table = count_table(partial(Draws(seed).stream, "counts", 1, 0), sizes.job_rows(1, 0), sizes.capacities(1, 0))
    assert table.sum(axis=0).tolist() == sizes.capacities(1, 0), "the ranges of all jobs fill every bucket"
    assert table.sum(axis=1).tolist() == sizes.job_rows(1, 0), "the ranges of a job are its rows"
    return table
