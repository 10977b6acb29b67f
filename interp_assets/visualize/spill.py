"""Sorted runs of firings wait, in memory and beyond a limit on the local disk, until a tile's runs are merged and written.

A job with `keep: all` holds every firing of its rows and latents, 8 bytes each: 3 GiB for 4M rows at 100 firings a row. What exceeds
`SPILL_BYTES` is appended to one nameless temporary file, run after run, and read back tile by tile: one sequential write, one read of
each run. Scratch, no artifact: it vanishes with the job, whatever happens to it.
"""

import tempfile
import weakref
from typing import IO, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from interp_assets.visualize.firings import Firings

SPILL_BYTES: Final = 1 << 30
"""Runs in memory, of all tiles together."""


class _Run(NamedTuple):
    """A run, with 32-bit rows; its columns are in memory, or in the file from `place` on."""

    start: int
    offsets: NDArray[np.int64]
    rows: NDArray[np.uint32] | None
    activations: NDArray[np.float32] | None
    place: int


class RunStore:
    """The runs of all tiles of one job; rows are counted from the shard's first. Tiles may be added from several threads in turn."""

    def __init__(self, n_tiles: int, spill_bytes: int = SPILL_BYTES) -> None:
        """Hold nothing yet; `spill_bytes` of runs stay in memory."""
        self._runs: list[list[_Run]] = [[] for _ in range(n_tiles)]
        self._room = spill_bytes
        self._file: IO[bytes] | None = None

    def add(self, tile: int, run: Firings) -> None:
        """Keep a run of a tile, whose rows follow those of the tile's earlier runs."""
        rows = run.row_ids.astype(np.uint32)
        n_bytes = rows.nbytes + run.activations.nbytes
        if n_bytes <= self._room:
            self._room -= n_bytes
            self._runs[tile].append(_Run(run.start, run.offsets, rows, run.activations, 0))
            return
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="interp-firings-")  # noqa: SIM115 - lives as long as this object
            weakref.finalize(self, self._file.close)
        place = self._file.seek(0, 2)
        self._file.write(rows.tobytes() + run.activations.tobytes())
        self._runs[tile].append(_Run(run.start, run.offsets, None, None, place))

    def take(self, tile: int) -> list[Firings]:
        """Return the tile's runs in order, and forget them."""
        runs, self._runs[tile] = self._runs[tile], []
        return [self._read(run) for run in runs]

    def _read(self, run: _Run) -> Firings:
        rows, activations, n = run.rows, run.activations, int(run.offsets[-1])
        if rows is None or activations is None:
            assert self._file
            self._file.seek(run.place)
            data = self._file.read(8 * n)
            rows, activations = np.frombuffer(data, np.uint32, n), np.frombuffer(data, np.float32, n, 4 * n)
        return Firings(run.start, run.offsets, rows.astype(np.uint64), activations)
