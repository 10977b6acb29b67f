"""Firings of consecutive latents, sorted by latent and row, the currency of all feature passes.

A firing is a valid row on which a latent exceeds its threshold: (latent, row id, activation), activation > 0. `Firings` holds them by
columns with offsets per latent, 12 bytes each. Rows of one shard reach a job in order, so a stable counting sort by latent also sorts
by row: about 10 ns a firing.
"""

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from interp_assets.planning.pipeline import SHARD_SHIFT
from interp_assets.visualize import kernels

ROW_BITS: Final = SHARD_SHIFT
FIRING_SCHEMA: Final = pa.schema([("latent", pa.uint32()), ("row_id", pa.uint64()), ("activation", pa.float32())])


class Firings(NamedTuple):
    """Firings of the latents [start, start + n), sorted by latent, then row id."""

    start: int
    offsets: NDArray[np.int64]
    """Firings of latent start + i are [offsets[i], offsets[i + 1])."""
    row_ids: NDArray[np.uint64]
    activations: NDArray[np.float32]

    @property
    def n_latents(self) -> int:
        """Number of latents, firing or not."""
        return len(self.offsets) - 1

    def relative_latents(self) -> NDArray[np.int32]:
        """Return the latent of every firing, counted from `start`."""
        return np.repeat(np.arange(self.n_latents, dtype=np.int32), np.diff(self.offsets))

    def take(self, mask: NDArray[np.bool_]) -> "Firings":
        """Return the firings where `mask` is true."""
        places = np.flatnonzero(mask)
        return Firings(self.start, np.searchsorted(places, self.offsets), self.row_ids[places], self.activations[places])

    def columns(self, first_id: int = 0) -> dict[str, NDArray[np.generic]]:
        """Return the columns of a Parquet table of firings; `first_id` is added to the row ids."""
        latents = np.repeat(np.arange(self.start, self.start + self.n_latents, dtype=np.uint32), np.diff(self.offsets))
        return {"latent": latents, "row_id": self.row_ids + np.uint64(first_id), "activation": self.activations}


def empty_firings(start: int, n_latents: int) -> Firings:
    """Return no firings of the latents [start, start + n_latents)."""
    return Firings(start, np.zeros(n_latents + 1, np.int64), np.empty(0, np.uint64), np.empty(0, np.float32))


def sort_firings(start: int, n_latents: int, latents: NDArray[np.uint16], row_ids: NDArray[np.integer], activations: NDArray[np.float32]) -> Firings:
    """Sort firings by latent (counted from `start`) that come, for each latent, in order of row."""
    offsets = np.zeros(n_latents + 1, np.int64)
    found = Firings(start, offsets, np.empty(len(latents), np.uint64), np.empty(len(latents), np.float32))
    kernels.sort_by_latent(latents, row_ids, activations, offsets, found.row_ids, found.activations)
    return found


def merge_firings(parts: Sequence[Firings]) -> Firings:
    """Merge firings of the same latents over disjoint, rising ranges of rows: per latent, the parts follow each other."""
    if len(parts) == 1:
        return parts[0]
    counts = np.stack([np.diff(part.offsets) for part in parts], axis=1)
    ends = np.cumsum(counts.reshape(-1))
    offsets = np.concatenate([[0], ends[len(parts) - 1 :: len(parts)]]).astype(np.int64)
    row_ids = np.empty(int(offsets[-1]), np.uint64)
    activations = np.empty(int(offsets[-1]), np.float32)
    starts = (ends - counts.reshape(-1)).reshape(counts.shape)
    for i, part in enumerate(parts):
        places = np.arange(len(part.row_ids)) + np.repeat(starts[:, i] - part.offsets[:-1], counts[:, i])
        row_ids[places] = part.row_ids
        activations[places] = part.activations
    return Firings(parts[0].start, offsets, row_ids, activations)


def as_firings(start: int, stop: int, columns: Mapping[str, NDArray[np.generic]]) -> Firings:
    """Take the firings of latents [start, stop) from the columns of a table that is sorted by latent."""
    latents = columns["latent"]
    offsets = np.searchsorted(latents, np.arange(start, stop + 1).astype(latents.dtype)).astype(np.int64)
    return Firings(start, offsets, columns["row_id"].astype(np.uint64, copy=False), columns["activation"].astype(np.float32, copy=False))


def expand_ranges(starts: NDArray[np.integer], lengths: NDArray[np.integer]) -> NDArray[np.int32]:
    """Return the indices start, start + 1, ... of every range, one range after the other; they stay below 2^31."""
    ends = np.cumsum(lengths)
    shifts = np.repeat((starts - (ends - lengths)).astype(np.int32), lengths)
    shifts += np.arange(len(shifts), dtype=np.int32)
    return shifts
