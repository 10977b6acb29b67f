"""Rows become mergeable statistics of one hook point: count, sums, sums of squares and a histogram of norms.

The statistics are over the *valid* rows as they are stored (after rounding), in float64. Sums are taken in fixed blocks of rows, and
shards are merged in order of shard, so that the bytes depend neither on the batch size nor on the order in which shards were made.
"""

from typing import Final, NamedTuple

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from interp_assets.harvest.refs import statistics_ref
from interp_assets.manifest import load_manifest
from interp_assets.pipeline import Pipeline
from interp_assets.store import Store
from interp_assets.tensors import load_tensors

STATISTICS: Final = "statistics.safetensors"


class ActivationStatistics(NamedTuple):
    """Statistics of the valid rows of some shards at one hook point."""

    n_rows: int
    """Number of valid rows."""
    sum: Float64[Tensor, " d_in"]
    sum_of_squares: Float64[Tensor, " d_in"]
    sum_of_norms: float
    norm_histogram: Int64[Tensor, "64"]

    @property
    def mean(self) -> Float64[Tensor, " d_in"]:
        """Mean row."""
        return self.sum / max(1, self.n_rows)

    @property
    def mean_norm(self) -> float:
        """Mean Euclidean norm of a row."""
        return self.sum_of_norms / max(1, self.n_rows)

    @property
    def mean_squared_norm(self) -> float:
        """Mean squared Euclidean norm of a row."""
        return float(self.sum_of_squares.sum()) / max(1, self.n_rows)

    @property
    def variance(self) -> float:
        """Sum over dimensions of the variance: the denominator of FVU."""
        return self.mean_squared_norm - float((self.mean**2).sum())


def load_statistics(pipeline: Pipeline, store: Store, hook_point: str) -> ActivationStatistics:
    """Read the statistics of a hook point over all training shards."""
    ref = statistics_ref(pipeline, hook_point)
    tensors = load_tensors(store, ref.path, load_manifest(store, ref), STATISTICS)
    return as_statistics(tensors)


def as_statistics(tensors: dict[str, Tensor]) -> ActivationStatistics:
    """Take statistics from the tensors of a statistics file."""
    return ActivationStatistics(
        int(tensors["count"]), tensors["sum"], tensors["sum_of_squares"], float(tensors["sum_of_norms"]), tensors["norm_histogram"]
    )


def as_tensors(statistics: ActivationStatistics) -> dict[str, Tensor]:
    """Return statistics as the tensors of a statistics file."""
    return {
        "count": torch.tensor([statistics.n_rows], dtype=torch.int64),
        "sum": statistics.sum,
        "sum_of_squares": statistics.sum_of_squares,
        "sum_of_norms": torch.tensor([statistics.sum_of_norms], dtype=torch.float64),
        "norm_histogram": statistics.norm_histogram,
    }
