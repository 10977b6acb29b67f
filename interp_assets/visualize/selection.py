"""Of many firings, keep each latent's strongest and a uniform sample: exact, independent of order, no loop over latents.

`smallest_per_segment` does both. It needs one sort of packed 64-bit words (segment, leading key bits), which NumPy vectorises, to find
each segment's n-th smallest key, and compares every element with its segment's; only the elements that tie there are ordered by a
second key. Sorting all firings by three keys instead is 30 times slower.

    top       key = activation, largest first; ties by priority      (row order would favour early data, and ties are common in bfloat16)
    random    key = priority                                          (priority.py: a uniform sample)

With documents, the top list first keeps the best firing of each latent in each document; since a document lies in one shard, and its
rows are neighbours, this may be done in any part of the data before merging.
"""

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

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
    About 60 ns a firing.
    """
    latents = firings.relative_latents()
    strength = descending_keys(firings.activations)
    candidates = np.arange(len(latents)) if documents is None else _best_of_documents(latents, documents, strength, priorities)
    kinds = np.zeros(len(latents), np.uint8)
    is_top = smallest_per_segment(latents[candidates], firings.n_latents, limits.top_k, strength[candidates], priorities[candidates])
    kinds[candidates[is_top]] = TOP
    kinds[smallest_priorities(latents, firings.n_latents, limits.n_random, priorities)] |= RANDOM
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


def _best_of_documents(
    latents: NDArray[np.int32], documents: NDArray[np.uint32], strength: NDArray[np.uint64], priorities: NDArray[np.uint64]
) -> NDArray[np.int64]:
    """Return the index of the best firing of every latent in every document, by (activation, priority)."""
    if len(latents) == 0:
        return np.empty(0, np.int64)
    starts = np.flatnonzero(np.concatenate([[True], (latents[1:] != latents[:-1]) | (documents[1:] != documents[:-1])]))
    lengths = np.diff(np.append(starts, len(latents)))
    is_best = strength == np.repeat(np.minimum.reduceat(strength, starts), lengths)
    contested = np.where(is_best, priorities, np.iinfo(np.uint64).max)
    return np.flatnonzero(is_best & (contested == np.repeat(np.minimum.reduceat(contested, starts), lengths)))
