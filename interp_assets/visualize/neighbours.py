"""Latents become lists of their relatives: by direction of the decoder row, and by firing on the same rows.

Neighbours are exact: every decoder row against every other, in blocks (2 d F^2 operations; 14 s on an H200 for a million latents), so no index
of approximate neighbours is needed.

Co-activation is counted on a uniform sample of rows, the same for all jobs: all rows would cost L0^2 operations each. For every
firing of a latent, the latents that fire on the same row are its partners; (latent, partner) words are counted with one sort. About 20 ns a
pair.
"""

from typing import Final, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from interp_assets.compute.products import use_fastest_products
from interp_assets.visualize.firings import expand_ranges
from interp_assets.visualize.selection import descending_keys, smallest_per_segment

N_RELATIVES: Final = 10
"""Latents in each list."""
MIN_ROWS: Final = 2
"""Rows that two latents must share to count as relatives."""
_BLOCK_BYTES: Final = 64 << 20
_BLOCK_PAIRS: Final = 8 << 20


class Neighbours(NamedTuple):
    """Nearest decoder rows of consecutive latents, nearest first: `[latents, n]`."""

    latents: NDArray[np.int64]
    cosines: NDArray[np.float32]


class Coactivations(NamedTuple):
    """Partners of consecutive latents, closest first: latent i's are [offsets[i], offsets[i + 1])."""

    offsets: NDArray[np.int64]
    partners: NDArray[np.int64]
    cosines: NDArray[np.float32]
    rows: NDArray[np.int64]


class FiringSample(NamedTuple):
    """Which latents fire on each sampled row: row i's are latents[offsets[i]:offsets[i + 1]], rising."""

    offsets: NDArray[np.int64]
    latents: NDArray[np.int32]
    n_latents: int
    """Latents of the whole SAE."""


def find_neighbours(W_dec: Float[Tensor, "d_sae d_in"], start: int, stop: int) -> Neighbours:
    """Find the nearest decoder rows of the latents [start, stop) among all latents, by cosine. Rows of zeros are near to nothing."""
    use_fastest_products()
    units = W_dec / W_dec.norm(dim=1, keepdim=True).clamp_min(1e-30)
    n = min(N_RELATIVES, len(units) - 1)
    n_block = max(1, _BLOCK_BYTES // (4 * len(units)))
    latents, cosines = [np.empty((0, n), np.int64)], [np.empty((0, n), np.float32)]
    for first in range(start, stop, n_block):
        last = min(first + n_block, stop)
        similarity = units[first:last] @ units.T
        similarity[torch.arange(last - first), torch.arange(first, last)] = -torch.inf
        best = similarity.topk(n, dim=1)
        found, places = best.values.numpy(), best.indices.numpy()
        order = np.lexsort((places, -found), axis=1)
        latents.append(np.take_along_axis(places, order, axis=1))
        cosines.append(np.take_along_axis(found, order, axis=1))
    return Neighbours(np.concatenate(latents), np.concatenate(cosines))


def make_sample(latents: NDArray[np.int64], row_ids: NDArray[np.uint64], n_latents: int) -> FiringSample:
    """Sort sampled firings, in any order, by row."""
    rows = np.unique(row_ids)
    keys = np.searchsorted(rows, row_ids).astype(np.uint64) << np.uint64(32) | latents.astype(np.uint64)
    keys.sort()
    offsets = np.searchsorted(keys, np.arange(len(rows) + 1, dtype=np.uint64) << np.uint64(32))
    return FiringSample(offsets, (keys & np.uint64(0xFFFFFFFF)).astype(np.int32), n_latents)


def find_coactivations(sample: FiringSample, start: int, stop: int) -> Coactivations:
    """Find the closest partners of the latents [start, stop): by n_fg / sqrt(n_f n_g) over the sampled rows, at least `MIN_ROWS` shared."""
    counts = np.bincount(sample.latents, minlength=sample.n_latents)
    mine = np.flatnonzero((sample.latents >= start) & (sample.latents < stop))
    rows = np.searchsorted(sample.offsets, mine, side="right") - 1
    order = np.argsort(sample.latents[mine], kind="stable")
    own, rows = sample.latents[mine][order], rows[order]
    n_partners = np.diff(sample.offsets)[rows]
    bounds = np.concatenate([[0], np.cumsum(n_partners)])
    edges = np.searchsorted(own, np.arange(start, stop + 1))
    parts: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]] = []
    first = 0
    while first < stop - start:
        last = max(first + 1, int(np.searchsorted(bounds[edges], bounds[edges[first]] + _BLOCK_PAIRS, side="right")) - 1)
        low, high = edges[first], edges[last]
        partners = sample.latents[expand_ranges(sample.offsets[rows[low:high]], n_partners[low:high])]
        repeated = np.repeat(own[low:high] - start, n_partners[low:high])
        parts.append(_closest(repeated, partners, counts, start))
        first = last
    relative, partners, shared = (np.concatenate(columns) for columns in zip(*parts, strict=True)) if parts else (np.empty(0, np.int64),) * 3
    cosines = _cosines(relative + start, partners, shared, counts)
    sequence = np.lexsort((partners, -cosines, relative))
    offsets = np.searchsorted(relative[sequence], np.arange(stop - start + 1))
    return Coactivations(offsets, partners[sequence], cosines[sequence], shared[sequence])


def _closest(
    latents: NDArray[np.integer], partners: NDArray[np.integer], counts: NDArray[np.int64], start: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Count the pairs of one block and keep the closest partners of each latent (counted from `start`)."""
    n_latents = len(counts)
    base = int(latents.min()) if len(latents) else 0
    span = (int(latents.max()) - base + 1) * n_latents if len(latents) else 0
    keys = (latents - base).astype(np.int32 if span < 1 << 31 else np.int64) * n_latents + partners
    if span <= 4 * len(keys):
        dense = np.bincount(keys, minlength=span)
        pairs = np.flatnonzero(dense)
        shared = dense[pairs]
    else:
        pairs, shared = np.unique(keys.astype(np.int64), return_counts=True)
    relative, others = pairs // n_latents + base, pairs % n_latents
    is_pair = (shared >= MIN_ROWS) & (others != relative + start)
    relative, others, shared = relative[is_pair], others[is_pair], shared[is_pair]
    strength = descending_keys(_cosines(relative + start, others, shared, counts))
    n_segments = int(relative.max()) + 1 if len(relative) else 0
    kept = smallest_per_segment(relative, n_segments, N_RELATIVES, strength, others.astype(np.uint64))
    return relative[kept], others[kept], shared[kept]


def _cosines(
    latents: NDArray[np.integer], partners: NDArray[np.integer], shared: NDArray[np.int64], counts: NDArray[np.int64]
) -> NDArray[np.float32]:
    return (shared / np.sqrt(counts[latents].astype(np.float64) * counts[partners])).astype(np.float32)
