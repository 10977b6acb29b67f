"""Bounds of each row that rise while several threads scan a `topk` SAE: what cannot be among the row's k largest pre-activations is not kept.

A row's bound is just below the `n_kept`-th largest pre-activation of the first `n_tiles` tiles of latents, so far, and at least 0. The threads
share what each row knows;
each of them looks at the bounds while it scans a strip of latents, and folds in afterwards what exceeded them.

- With `n_kept = k + 1` and all tiles, a bound never reaches the (k+1)-th largest; about k (1 + ln(d_sae / 128)) pre-activations a row are kept.
- With fewer, the bound is a guess. It holds where fewer than `n_kept` of the row's k + 1 largest lie in these tiles: if latents are in no
  order, their number is hypergeometric, nearly Poisson, and `guess` allows for one failure in 100,000 rows. Whoever has scanned everything
  counts what exceeds the bounds, and scans rows that kept fewer than k + 1 again. Of 16,384 latents with k = 32, 40 a row are folded in
  after the first strips, and 170 kept.

The order in which threads arrive changes what is looked at, but neither the last bounds nor what exceeds them, and so nothing that is
returned. Bounds are read without a lock while others write: every value that a bound ever has is at most its last.
"""

import math
from threading import Event, Lock
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from interp_assets.visualize import kernels
from interp_assets.visualize.kernels import GROUP, TILE

_SHARE: Final = 8
_MANY_TILES: Final = 16
"""With fewer tiles a guess saves nothing."""
_FAILURES: Final = 1e-5


class Guess(NamedTuple):
    """How bounds are found: from how many tiles, and which of a row's largest pre-activations there."""

    n_tiles: int
    n_kept: int


def guess(k: int, n_tiles: int) -> Guess:
    """Return the guess for an SAE whose latents are in no order, or the certain bound where that is as good."""
    mean, n_kept, term = (k + 1) / _SHARE, 0, math.exp(-(k + 1) / _SHARE)
    tail = 1.0
    while tail > _FAILURES and n_kept <= k:
        tail -= term
        n_kept += 1
        term *= mean / n_kept
    n_asked = n_tiles // _SHARE
    return Guess(n_asked, n_kept) if n_tiles >= _MANY_TILES and n_kept <= min(k, n_asked * TILE // 2) else certain(k, n_tiles)


def certain(k: int, n_tiles: int) -> Guess:
    """Return the bound that cannot fail."""
    return Guess(n_tiles, k + 1)


class RisingBounds:
    """What a pre-activation of each row of a block must exceed to be kept."""

    def __init__(self, n_block: int, n_rows: int, how: Guess, n_threads: int) -> None:
        """Know nothing yet of `n_rows` rows; padding up to `n_block`, a multiple of `GROUP`, is never exceeded."""
        self.values = np.full(n_block, -np.inf, np.float32)
        self.values[n_rows:] = np.inf
        self.how = how
        self.has_begun = Event()
        """Set once every row has a bound; tiles that fold nothing in wait for it."""
        self._largest = np.full((n_block, how.n_kept), -np.inf, np.float32)
        self._edges = np.unique(np.linspace(0, n_block // GROUP, 2 * n_threads + 1).astype(np.int64)).tolist()
        self._locks = [Lock() for _ in self._edges[1:]]

    def fill(self, values: NDArray[np.float32], latents: tuple[NDArray[np.float32], ...], first: int) -> bool:
        """Fold in a strip of latents (weights, bias, threshold) for rows that begin at `first`, if some of them have no bound yet; tell whether.

        Without a bound every pre-activation would have to be kept.
        """
        last = first + len(values)
        if self.has_begun.is_set() or float(self.values[first:last].min()) > -np.inf:
            return False
        for i, low, high in self._ranges(first, last):
            with self._locks[i]:
                part = values[low - first : high - first].reshape(-1)
                kernels.fill_largest(self._largest[low:high], self.values[low:high], part, *latents)
        if float(self.values.min()) > -np.inf:
            self.has_begun.set()
        return True

    def fold(self, rows: NDArray[np.uint32], activations: NDArray[np.float32]) -> None:
        """Fold in pre-activations that exceeded their row's bound, in the order in which `append_firings` finds them: group by group of rows."""
        if len(rows) == 0:
            return
        for i, low, high in self._ranges(int(rows[0]) // GROUP * GROUP, (int(rows[-1]) // GROUP + 1) * GROUP):
            here = slice(*np.searchsorted(rows, (low, high)).tolist())
            with self._locks[i]:
                kernels.raise_largest(self._largest, self.values, rows[here], activations[here])

    def _ranges(self, first: int, last: int) -> list[tuple[int, int, int]]:
        """Cut rows [first, last) where locks change."""
        cuts = [
            (i, max(low * GROUP, first), min(high * GROUP, last)) for i, (low, high) in enumerate(zip(self._edges, self._edges[1:], strict=False))
        ]
        return [(i, low, high) for i, low, high in cuts if low < high]


class Thresholds(NamedTuple):
    """What a pre-activation of each row must exceed to be among its k largest, and where that is not known."""

    values: NDArray[np.float32]
    """As `train.sae.topk_threshold` has them."""
    is_unknown: NDArray[np.bool_]


def find_thresholds(bounds: RisingBounds, n_rows: int, k: int, rows: list[NDArray[np.uint32]], activations: list[NDArray[np.float32]]) -> Thresholds:
    """Find each row's threshold among all that was kept. Where fewer than k + 1 exceed a guess that is not 0, it is unknown."""
    every, kept = np.concatenate(rows), np.concatenate(activations)
    offsets, values, thresholds = np.zeros(n_rows + 1, np.int64), np.empty_like(kept), np.empty(n_rows, np.float32)
    n = kernels.sort_by_row(every, kept, bounds.values, offsets, values)
    kernels.middle_of_next(offsets, values[:n], k, thresholds)
    is_certain = bounds.how.n_kept > k
    return Thresholds(thresholds, (np.diff(offsets) <= (-1 if is_certain else k)) & (bounds.values[:n_rows] > 0))
