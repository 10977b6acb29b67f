"""Rows become mergeable statistics of one hook point: count, sums, sums of squares, sum of norms and a histogram of norms.

The statistics are over the *valid* rows as they are stored (after rounding), in float64. Sums are taken in blocks of a fixed number of
rows, and shards are merged in order of shard, so that the bytes depend neither on the batch size nor on the order in which shards were
made. Counts and histograms merge exactly in any order; the float64 sums merge in any order to within rounding.

The histogram of norms has 4 bins an octave over all of float32, whatever the scale of the rows (`compute/octaves.py`).
"""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from interp_assets.compute.octaves import N_BINS, bin_edges, bins_of
from interp_assets.harvest.refs import activation_shard_ref, statistics_ref
from interp_assets.planning.pipeline import Pipeline
from interp_assets.storage.manifest import ArtifactWriter, Produced, create_artifact, find_made_from, load_manifest, timed
from interp_assets.storage.store import Store
from interp_assets.storage.tensors import load_tensors, save_tensors

STATISTICS: Final = "statistics.safetensors"
BLOCK_ROWS: Final = 2048
_ROUNDING: Final = 1e-12
"""Share of a sum of squares that is no deviation: stored rows have 24 binary digits at most."""


class ActivationStatistics(NamedTuple):
    """Statistics of the valid rows of some shards at one hook point."""

    n_rows: int
    """Number of valid rows."""
    sum: Float64[Tensor, " d_in"]
    sum_of_squares: Float64[Tensor, " d_in"]
    sum_of_norms: float
    norm_histogram: Int64[Tensor, "1024"]

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
        """Sum over dimensions of the variance: the mean squared distance from the mean row, the denominator of FVU."""
        return squared_deviation(float(self.sum_of_squares.sum()), self.sum, self.n_rows) / max(1, self.n_rows)

    @property
    def median_norm(self) -> float:
        """Median norm of a row, by interpolation inside a bin of the histogram: off by at most its width, 19 to 25%."""
        cumulative = np.concatenate([[0], np.cumsum(self.norm_histogram.numpy())])
        i = int(np.searchsorted(cumulative, cumulative[-1] / 2, side="left"))
        edges = bin_edges()[i - 1 : i + 1] if i else np.zeros(2)
        inside = (cumulative[-1] / 2 - cumulative[i - 1]) / (cumulative[i] - cumulative[i - 1]) if i else 0.0
        return float(edges[0] + inside * (edges[1] - edges[0]))

    @property
    def max_mean_ratio(self) -> float:
        """Largest root mean square of a dimension over the mean one: how much a few dimensions dominate."""
        spread = (self.sum_of_squares / max(1, self.n_rows)).sqrt()
        return float(spread.max() / spread.mean().clamp_min(1e-300))


class StatisticsAccumulator:
    """Takes rows in any pieces and sums them in blocks of `BLOCK_ROWS`, so that the pieces leave no trace in the result."""

    def __init__(self, d_in: int) -> None:
        """Begin with no rows."""
        self._total = empty_statistics(d_in)
        self._pending: list[Tensor] = []
        self._n_pending = 0

    def add(self, rows: Float[Tensor, "n d_in"]) -> None:
        """Add rows, in their order."""
        self._pending.append(rows)
        self._n_pending += len(rows)
        if self._n_pending < BLOCK_ROWS:
            return
        joined = torch.cat(self._pending)
        n_whole = len(joined) // BLOCK_ROWS * BLOCK_ROWS
        for first in range(0, n_whole, BLOCK_ROWS):
            self._total = merge([self._total, measure_rows(joined[first : first + BLOCK_ROWS])])
        self._pending, self._n_pending = [joined[n_whole:].clone()], len(joined) - n_whole

    def finish(self) -> ActivationStatistics:
        """Return the statistics of all rows so far."""
        return merge([self._total, *([measure_rows(torch.cat(self._pending))] if self._n_pending else [])])


def squared_deviation(sum_of_squares: float, row_sum: Float64[Tensor, " d"], n_rows: int) -> float:
    """Return the sum of the squared distances of rows from their mean, from float64 sums; 0 where no more is left than rounding."""
    found = sum_of_squares - float(row_sum.square().sum()) / max(1, n_rows)
    return found if found > _ROUNDING * sum_of_squares else 0.0


def empty_statistics(d_in: int) -> ActivationStatistics:
    """Return the statistics of no rows."""
    zeros = torch.zeros(d_in, dtype=torch.float64)
    return ActivationStatistics(0, zeros, zeros, 0.0, torch.zeros(N_BINS, dtype=torch.int64))


def measure_rows(rows: Float[Tensor, "n d_in"]) -> ActivationStatistics:
    """Take the statistics of some rows, in float64."""
    wide = rows.to(torch.float64)
    squares = wide.square()
    norms = squares.sum(dim=1).sqrt()
    return ActivationStatistics(len(rows), wide.sum(dim=0), squares.sum(dim=0), float(norms.sum()), norm_histogram(norms))


def norm_histogram(norms: Float[Tensor, " n"]) -> Int64[Tensor, "1024"]:
    """Count norms into bins, 4 per octave."""
    return torch.bincount(bins_of(norms), minlength=N_BINS)


def merge(parts: Sequence[ActivationStatistics]) -> ActivationStatistics:
    """Add up statistics, in the given order."""
    total = parts[0]
    for part in parts[1:]:
        sums: Any = (mine + theirs for mine, theirs in zip(total, part, strict=True))
        total = ActivationStatistics(*sums)
    return total


@timed
def merge_statistics(pipeline: Pipeline, store: Store, hook_point: str) -> Produced:
    """Publish the statistics of a hook point over all training shards, merged in order of shard."""
    ref = statistics_ref(pipeline, hook_point)
    refs = [activation_shard_ref(pipeline, hook_point, index) for index in pipeline.train_indices]
    shards = [load_manifest(store, shard) for shard in refs]
    if (manifest := find_made_from(store, ref, shards)) is not None:
        return Produced(ref, manifest, is_cached=True)
    parts = (load_tensors(store, shard.path, found, STATISTICS) for shard, found in zip(refs, shards, strict=True))
    total = merge([as_statistics(tensors) for tensors in parts])
    with create_artifact(store, ref, made_from=shards) as art:
        save_tensors(art, STATISTICS, {**as_tensors(total), "mean": total.mean}, n_rows=total.n_rows)
        art.facts = {
            "count": total.n_rows,
            "mean_norm": total.mean_norm,
            "mean_squared_norm": total.mean_squared_norm,
            "variance": total.variance,
            "max_mean_ratio": total.max_mean_ratio,
        }
    return art.produced


def load_statistics(pipeline: Pipeline, store: Store, hook_point: str) -> ActivationStatistics:
    """Read the statistics of a hook point over all training shards."""
    ref = statistics_ref(pipeline, hook_point)
    return as_statistics(load_tensors(store, ref.path, load_manifest(store, ref), STATISTICS))


def as_statistics(tensors: dict[str, Tensor]) -> ActivationStatistics:
    """Take statistics from the tensors of a statistics file."""
    return ActivationStatistics(
        int(tensors["count"]), tensors["sum"], tensors["sum_of_squares"], float(tensors["sum_of_norms"]), tensors["norm_histogram"]
    )


def save_shard_statistics(art: ArtifactWriter, statistics: ActivationStatistics, n_rows: int, dtype: str) -> None:
    """Write what an activation shard of `n_rows`, valid or not, tells of its rows: the file of statistics, and the facts."""
    save_tensors(art, STATISTICS, as_tensors(statistics), n_rows=statistics.n_rows)
    art.facts = {
        "n_rows": n_rows,
        "n_valid": statistics.n_rows,
        "d_in": len(statistics.sum),
        "dtype": dtype,
        "mean_norm": statistics.mean_norm,
        "mean_squared_norm": statistics.mean_squared_norm,
    }


def as_tensors(statistics: ActivationStatistics) -> dict[str, Tensor]:
    """Return statistics as the tensors of a statistics file."""
    return {
        "count": torch.tensor([statistics.n_rows], dtype=torch.int64),
        "sum": statistics.sum,
        "sum_of_squares": statistics.sum_of_squares,
        "sum_of_norms": torch.tensor([statistics.sum_of_norms], dtype=torch.float64),
        "norm_histogram": statistics.norm_histogram,
    }
