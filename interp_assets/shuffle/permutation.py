"""The order that a shuffle gives to row numbers: the pure core that the jobs apply to bytes, and that the proofs run as it is.

1. A distributing job permutes its rows uniformly (`order`) and cuts them at `offsets`, its row of the count table, into one range for
   each output bucket.
2. A bucket is the concatenation of its ranges over the jobs; the next pass cuts it into jobs by row ranges.
3. The last pass permutes every bucket uniformly.

Given the counts' exact law and uniform orders on both sides, the concatenated buckets are one exactly uniform permutation
(`hypergeometric.py`). Random words come from streams named by pass, bucket and job, never by hook point: the rows of several hook points
stay aligned. Every choice goes through a `Draws`, so that the tests can plant a fault in any one of them and see it caught.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from interp_assets.compute.seeds import Stream, stream
from interp_assets.shuffle.hypergeometric import count_row
from interp_assets.shuffle.sizes import ShuffleSizes, offsets


class JobSplit(NamedTuple):
    """What a distributing job does: `order[i]` is its row that comes i-th, range j is `order[offsets[j]:offsets[j + 1]]`."""

    order: NDArray[np.int64]
    offsets: list[int]


class Draws:
    """All random choices of one shuffle, each from its own named stream."""

    def __init__(self, root_seed: int) -> None:
        """Draw from the streams of `root_seed`."""
        self.root_seed = root_seed

    def stream(self, *names: str | int) -> Stream:
        """Open one of the shuffle's streams."""
        return stream(self.root_seed, "shuffle", *names)

    def split_counts(self, pass_index: int, bucket: int, job: int, job_rows: Sequence[int], capacities: Sequence[int]) -> NDArray[np.int64]:
        """Draw how many rows of a job go to each output bucket, `[fan_out]`."""
        return count_row(partial(self.stream, "counts", pass_index, bucket), job_rows, capacities, job)

    def split_order(self, pass_index: int, bucket: int, job: int, n_rows: int) -> NDArray[np.int64]:
        """Draw the uniform order of a job's rows."""
        return self.stream("split", pass_index, bucket, job).permutation(n_rows)

    def gather_order(self, bucket: int, n_rows: int) -> NDArray[np.int64]:
        """Draw the uniform order of a mixed shard's rows."""
        return self.stream("gather", bucket).permutation(n_rows)


def split_job(draws: Draws, sizes: ShuffleSizes, pass_index: int, bucket: int, job: int) -> JobSplit:
    """Draw what job `job` does with its part of input bucket `bucket` in a distributing pass."""
    job_rows = sizes.job_rows(pass_index, bucket)
    counts = draws.split_counts(pass_index, bucket, job, job_rows, sizes.capacities(pass_index, bucket))
    return JobSplit(draws.split_order(pass_index, bucket, job, job_rows[job]), offsets(counts))
