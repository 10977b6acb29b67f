"""Firings become exact, mergeable statistics per latent: count, sum, histogram and maximum.

All but the maximum are integers, so any cut over rows and any order give the same bits:

- the sum is exact, whatever the scale: a float32 is a whole number of 2^-149, and the sum of such numbers is kept as `SUM_DIGITS` digits of 32
  bits each, the lowest first (`sum_digits`);
- the histogram's bins are runs of float bits: `bits >> 21` keeps the exponent and two bits of the mantissa, four bins per octave and no
  logarithm to round. Bins start at a power of two that is the same for all jobs of an SAE (`histogram_origin`); what lies outside the 16
  octaves is counted in the first or last bin.

Counts and sums are not idempotent: a job overwrites its output as a whole, and no job may be merged twice.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from interp_assets.errors import NonFiniteError
from interp_assets.visualize import kernels
from interp_assets.visualize.firings import Firings
from interp_assets.visualize.kernels import N_BINS

BINS_PER_OCTAVE: Final = 4
SUM_DIGITS: Final = 9
_SUM_UNIT: Final = -149
"""Exponent of the smallest float32."""
_EXPONENT_BIAS: Final = 127
_TENSORS: Final = ("count", "sum_digits", "histogram", "maximum")


@dataclass(frozen=True)
class LatentStatistics:
    """Statistics of the latents [start, start + n) over some rows."""

    start: int
    count: NDArray[np.int64]
    sum_digits: NDArray[np.int64]
    """`[n, SUM_DIGITS]`: the sum of the activations in units of 2^-149, to base 2^32, lowest digit first."""
    histogram: NDArray[np.int64]
    """`[n, 64]`."""
    maximum: NDArray[np.float32]
    """0 where there is no firing."""

    @property
    def mean(self) -> NDArray[np.float64]:
        """Mean activation over the firings, exact but for float64; 0 where there is none."""
        return self.sum_digits @ 2.0 ** (32 * np.arange(SUM_DIGITS) + _SUM_UNIT) / np.maximum(self.count, 1)

    def narrow(self, first: int, last: int) -> "LatentStatistics":
        """Return the statistics of latents [start + first, start + last)."""
        return LatentStatistics(self.start + first, *(getattr(self, name)[first:last] for name in _TENSORS))


def empty_statistics(start: int, n_latents: int) -> LatentStatistics:
    """Return the statistics of no rows."""
    return LatentStatistics(
        start,
        np.zeros(n_latents, np.int64),
        np.zeros((n_latents, SUM_DIGITS), np.int64),
        np.zeros((n_latents, N_BINS), np.int64),
        np.zeros(n_latents, np.float32),
    )


def add_firings(statistics: LatentStatistics, firings: Firings, origin: int) -> None:
    """Add the firings of the same latents on other rows to `statistics`, in place."""
    first_bin = (_EXPONENT_BIAS + origin) * BINS_PER_OCTAVE
    kernels.measure(firings.offsets, firings.activations, first_bin, statistics.sum_digits, statistics.histogram, statistics.maximum)
    _carry(statistics.sum_digits)
    np.add(statistics.count, np.diff(firings.offsets), out=statistics.count)


def merge_statistics(parts: Sequence[LatentStatistics]) -> LatentStatistics:
    """Merge the statistics of the same latents over disjoint rows."""
    return LatentStatistics(
        parts[0].start,
        np.sum([part.count for part in parts], axis=0),
        _carry(np.sum([part.sum_digits for part in parts], axis=0)),
        np.sum([part.histogram for part in parts], axis=0),
        np.max([part.maximum for part in parts], axis=0),
    )


def join_statistics(parts: Sequence[LatentStatistics]) -> LatentStatistics:
    """Put the statistics of consecutive latents over the same rows side by side."""
    return LatentStatistics(parts[0].start, *(np.concatenate([getattr(part, name) for part in parts]) for name in _TENSORS))


def statistics_tensors(statistics: LatentStatistics) -> dict[str, Tensor]:
    """Return statistics as the tensors of a `statistics.safetensors`."""
    return {name: torch.from_numpy(getattr(statistics, name)) for name in _TENSORS}


def as_statistics(start: int, tensors: dict[str, Tensor]) -> LatentStatistics:
    """Take statistics from the tensors of a `statistics.safetensors`."""
    return LatentStatistics(start, *(tensors[name].numpy() for name in _TENSORS))


def _carry(digits: NDArray[np.int64]) -> NDArray[np.int64]:
    """Bring all digits but the highest below 2^32, in place: then equal sums are equal digits."""
    for i in range(SUM_DIGITS - 1):
        digits[:, i + 1] += digits[:, i] >> 32
        digits[:, i] &= 0xFFFFFFFF
    return digits


def histogram_origin(mean_norm: float, W_enc: Tensor) -> int:
    """Choose the exponent of the first bin: 16 octaves that end two above (mean row norm) x (median length of an encoder column that is not 0).

    That product bounds the pre-activation of a typical row and latent (Cauchy-Schwarz), and firings are rarely below 2^-10 of it.
    Raises `NonFiniteError` for statistics of damaged rows.
    """
    lengths = W_enc.float().norm(dim=0)
    typical = mean_norm * float(lengths[lengths > 0].median() if lengths.any() else 0.0)
    if not math.isfinite(typical):
        raise NonFiniteError(
            f"The mean row norm of the activation statistics is {mean_norm}: a row holds a NaN or an infinity. Harvest the shards again."
        )
    return math.ceil(math.log2(max(typical, 2.0**-100))) + 2 - N_BINS // BINS_PER_OCTAVE


def bin_edges(origin: int) -> NDArray[np.float64]:
    """Return the 65 edges of the histogram's bins."""
    steps = np.arange(N_BINS + 1)
    return 2.0 ** (origin + steps // BINS_PER_OCTAVE) * (1 + steps % BINS_PER_OCTAVE / BINS_PER_OCTAVE)


def exact_quantiles(counts: NDArray[np.int64], activations: NDArray[np.float32], n_intervals: int) -> NDArray[np.float32]:
    """Return `[n, n_intervals + 1]` quantiles of every latent: the value of rank floor(i (count - 1) / n_intervals), NaN when dead.

    `activations` are sorted by latent, `counts` say how many belong to each. One vectorised sort of (latent, float bits) words.
    """
    keys = np.repeat(np.arange(len(counts), dtype=np.uint64) << np.uint64(32), counts)
    keys |= activations.view(np.uint32)
    keys.sort()
    ranks = np.arange(n_intervals + 1) * (counts[:, None] - 1) // n_intervals
    quantiles = np.full((len(counts), n_intervals + 1), np.nan, np.float32)
    fires = counts > 0
    places = (np.cumsum(counts) - counts)[fires, None] + ranks[fires]
    quantiles[fires] = (keys[places] & np.uint64(0xFFFFFFFF)).astype(np.uint32).view(np.float32)
    return quantiles


def histogram_quantiles(statistics: LatentStatistics, origin: int, n_intervals: int) -> NDArray[np.float32]:
    """Estimate the same quantiles from the histograms, by interpolation inside a bin: off by at most a bin's width (19 to 25%)."""
    edges = bin_edges(origin)
    quantiles = np.full((len(statistics.count), n_intervals + 1), np.nan, np.float32)
    for i in np.flatnonzero(statistics.count):
        cumulative = np.concatenate([[0], np.cumsum(statistics.histogram[i])])
        occupied = np.flatnonzero(statistics.histogram[i])
        keep = np.unique(np.concatenate([occupied, occupied + 1]))
        found = np.interp(np.linspace(0, statistics.count[i], n_intervals + 1), cumulative[keep], edges[keep])
        quantiles[i] = np.minimum(found, statistics.maximum[i])
        quantiles[i, -1] = statistics.maximum[i]
    return quantiles
