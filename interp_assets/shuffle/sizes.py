"""How many rows every job, bucket and pass of a shuffle has: integer arithmetic on the training shards' row counts.

    pass 1          input bucket 0 = all rows, one job a training shard, `fan_out` output buckets
    pass p < P      input buckets = pass p-1's output buckets, cut into jobs by row ranges, `fan_out` output buckets each
    pass P          one job a bucket: shuffle it in memory; its output is a mixed shard

The output bucket `j` of input bucket `b` has the number `b * fan_out + j`. Bucket sizes differ by at most one row per pass. Nothing here
is random, and nothing depends on memory or machines: the same shards, passes and fan-out give the same sizes everywhere.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray


def share(n_rows: int, n_parts: int, part: int) -> int:
    """Return the size of one of `n_parts` nearly equal parts of `n_rows`."""
    return (part + 1) * n_rows // n_parts - part * n_rows // n_parts


def shares(n_rows: int, n_parts: int) -> list[int]:
    """Return the sizes of `n_parts` nearly equal parts of `n_rows`; they differ by at most one."""
    return [share(n_rows, n_parts, part) for part in range(n_parts)]


def offsets(sizes: list[int] | tuple[int, ...] | NDArray[np.int64]) -> list[int]:
    """Return where each of several consecutive parts starts, and the end."""
    return [0, *(int(end) for end in np.cumsum(np.asarray(sizes, np.int64)))]


def largest_bucket(n_rows: int, passes: int, fan_out: int) -> int:
    """Return the rows of the largest mixed shard of a shuffle."""
    for _ in range(passes - 1):
        n_rows = -(-n_rows // fan_out)
    return n_rows


def smallest_fan_out(n_rows: int, limit: int, passes: int) -> int:
    """Return the smallest fan-out with which `passes` passes (2 or more) end in mixed shards of at most `limit` rows (1 or more)."""
    fan_out = max(2, math.ceil((n_rows / limit) ** (1 / (passes - 1))) - 2)
    while largest_bucket(n_rows, passes, fan_out) > limit:
        fan_out += 1
    return fan_out


@dataclass(frozen=True, kw_only=True)
class ShuffleSizes:
    """The sizes of one shuffle. Passes count from 1; a bucket's number includes those of the passes before."""

    passes: int
    fan_out: int
    shard_rows: tuple[int, ...]
    """Valid rows of the training shards, in order: the jobs of pass 1."""

    @cached_property
    def n_rows(self) -> int:
        """All rows."""
        return sum(self.shard_rows)

    @property
    def n_buckets(self) -> int:
        """Mixed shards that come out."""
        return self.n_inputs(self.passes)

    def n_inputs(self, pass_index: int) -> int:
        """Return how many input buckets a pass has."""
        return self.fan_out ** (pass_index - 1)

    def input_rows(self, pass_index: int, bucket: int) -> int:
        """Return the rows of input bucket `bucket` of a pass; of the last pass, the rows of a mixed shard."""
        assert 0 <= bucket < self.n_inputs(pass_index), f"pass {pass_index} has {self.n_inputs(pass_index)} input buckets, not {bucket}"
        if pass_index == 1:
            return self.n_rows
        parent, part = divmod(bucket, self.fan_out)
        return share(self.input_rows(pass_index - 1, parent), self.fan_out, part)

    def job_rows(self, pass_index: int, bucket: int) -> list[int]:
        """Return the rows of each job of a distributing pass on one input bucket. No job is larger than pass 1's largest."""
        if pass_index == 1:
            return list(self.shard_rows)
        n_rows = self.input_rows(pass_index, bucket)
        return shares(n_rows, max(1, -(-n_rows // max(1, *self.shard_rows))))

    def capacities(self, pass_index: int, bucket: int) -> list[int]:
        """Return the rows of each output bucket of one input bucket of a distributing pass."""
        return shares(self.input_rows(pass_index, bucket), self.fan_out)

    @property
    def largest_bucket_rows(self) -> int:
        """Rows of the largest mixed shard."""
        return largest_bucket(self.n_rows, self.passes, self.fan_out)
