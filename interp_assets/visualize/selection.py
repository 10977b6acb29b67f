"""Of many firings, keep each latent's strongest and a uniform sample: exact, independent of order.

`select_firings` does both for firings that are sorted by latent, latent by latent. `smallest_per_segment` does the same for elements in any
order: one sort of packed 64-bit words (segment, leading key bits), which NumPy vectorises, finds each segment's n-th smallest key, and
every element is compared with its segment's; only those that tie there are ordered by a second key.

    top       key = activation, largest first; ties by priority      (row order would favour early data, and ties are common in bfloat16)
    random    key = priority                                          (priority.py: a uniform sample)

With documents, the top list first keeps the best firing of each latent in each document; since a document lies in one shard, and its
rows are neighbours, this may be done in any part of the data before merging.
"""

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from interp_assets.visualize import kernels
from interp_assets.visualize.firings import Firings

TOP: Final = 1
RANDOM: Final = 2
INTERVAL: Final = 4
"""Bits of the column `kind`: which lists of examples a firing belongs to."""
_FLIP: Final = np.uint64(0xFFFFFFFF)


class Limits(NamedTuple):
    """How many firings of a latent are kept."""

    top_k: int
    n_random: int


def select_firings(firings: Firings, priorities: NDArray[np.uint64], documents: NDArray[np.uint32] | None, limits: Limits) -> NDArray[np.uint8]:
    """Return the `kind` of every firing: bit `TOP`, bit `RANDOM`, or 0 for one that is not kept.

    `documents` (one per firing, equal for neighbours of one document) limits the top list to one firing a document; None does not.
    10 to 50 ns a firing.
    """
    kinds = np.zeros(len(firings.activations), np.uint8)
    own = np.empty(0, np.uint32) if documents is None else documents
    kernels.select(firings.offsets, firings.activations, priorities, own, documents is not None, (limits.top_k, limits.n_random), kinds)
    return kinds


def descending_keys(activations: NDArray[np.float32]) -> NDArray[np.uint64]:
    """Return 32-bit keys that order positive activations from the largest to the smallest: float bits order like integers."""
    return _FLIP - activations.view(np.uint32)


def smallest_priorities(segments: NDArray[np.integer], n_segments: int, n: int, priorities: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Mark the `n` elements of smallest priority of every segment."""
    return smallest_per_segment(segments, n_segments, n, priorities >> np.uint64(n_segments.bit_length()), priorities)


def smallest_per_segment(
    segments: NDArray[np.integer], n_segments: int, n: int, keys: NDArray[np.uint64], tie_keys: NDArray[np.uint64]
) -> NDArray[np.bool_]:
    """Mark the `n` smallest elements of every segment by (key, tie key); all of a segment that has no more.

    Elements come in any order. Keys are below 2^(64 - bits of `n_segments`); tie keys differ within a segment.
    """
    counts = np.bincount(segments, minlength=n_segments)
    if len(segments) == 0 or counts.max() <= n:
        return np.ones(len(segments), np.bool_)
    shift = np.uint64(64 - n_segments.bit_length())
    packed = segments.astype(np.uint64) << shift | keys
    ends = np.cumsum(counts)
    ordered = np.sort(packed)
    is_large = counts > n
    limit = np.full(n_segments, np.iinfo(np.uint64).max, np.uint64)
    limit[is_large] = ordered[(ends - counts)[is_large] + n - 1]
    limit_of = limit[segments]
    chosen = packed <= limit_of
    excess = np.bincount(segments[chosen], minlength=n_segments) - np.minimum(counts, n)
    if excess.any():
        _drop_ties(chosen, np.flatnonzero((packed == limit_of) & (excess[segments] > 0)), segments, tie_keys, excess)
    return chosen


def _drop_ties(
    chosen: NDArray[np.bool_], tied: NDArray[np.int64], segments: NDArray[np.integer], tie_keys: NDArray[np.uint64], excess: NDArray[np.int64]
) -> None:
    """Unmark the `excess` elements of largest tie key among the `tied` ones of each segment."""
    order = tied[np.lexsort((tie_keys[tied], segments[tied]))]
    own = segments[order]
    n_tied = np.bincount(own, minlength=len(excess))
    rank = np.arange(len(order)) - (np.cumsum(n_tied) - n_tied)[own]
    chosen[order[rank >= (n_tied - excess)[own]]] = False
