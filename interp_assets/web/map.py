"""Decoder directions become a map: two numbers for each live latent, in tiles of which a page loads those in view.

1. Embed: the two principal components of the unit decoder rows (`embed_directions`), deterministic, one pass over the weights.
2. Tile: a quadtree. The tile of depth 0 holds a sample of `TILE` latents of the whole map, its four children the next `TILE` of each quarter, and
   so on, so every depth adds points and no point comes twice. Which latents come first follows from a hash of their number.

    map/tiles.bin    10 bytes a point: x u16, y u16, latent u32, heat u8 (log frequency), 0
    map/tiles.idx    20 bytes a tile: depth, x, y, first point, points (u32), by depth

Beside the map lie the directions themselves, so that a page can compare any two features, of two SAEs of one hook point too:

    map/directions.bin    i8: the decoder row of every latent, scaled so that its largest number is 127

A cosine of two such rows is that of the exact ones within 0.003 at width 256 (the worst of 2,000 random pairs: 0.0022), and closer the wider.
They take `d_in` bytes a latent; beyond `MAX_DIRECTION_BYTES` they are left out.

Principal components are honest and cheap, and weak: two of some hundred dimensions. The page states their share of the variance, and how many of
the nearest decoder rows of a feature are near it on the map (`measure_kept`). Near points need not be near directions; the neighbours of a feature
page are exact. No t-SNE or UMAP: they take hours at ten million rows and invent clusters. Of the demo's neighbours these components keep 2 %, chance
1 %; a spectral layout of the nearest rows keeps 5 %, and halving along the first component again and again 6 %: neither is worth its cost. Clusters
and their names: `clusters.py`.
"""

from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from interp_assets.storage.manifest import ArtifactWriter

POINTS: Final = "map/tiles.bin"
INDEX: Final = "map/tiles.idx"
TILE: Final = 2048
"""Points of a tile, except at the greatest depth."""
MAX_DEPTH: Final = 10
DIRECTIONS: Final = "map/directions.bin"
MAX_DIRECTION_BYTES: Final = 4 << 30
"""A million latents of width 4,096: as much as half of their records."""
POINT: Final = np.dtype([("x", "<u2"), ("y", "<u2"), ("latent", "<u4"), ("heat", "u1"), ("zero", "u1")])
NEAREST: Final = 10
"""Decoder rows that count as a latent's neighbours."""
NEAR_SHARE: Final = 0.01
"""Points of the map that count as near, of all."""
_POOL: Final = 1 << 14
"""Latents among which neighbours are sought, and for how many of them: cost and error of a measure that is shown with two digits."""
_ASKED: Final = 256
_BLOCK_ROWS: Final = 1 << 14
_BLOCK_BYTES: Final = 64 << 10


class Layout(NamedTuple):
    """Where every latent stands, and what the axes are worth."""

    xy: NDArray[np.float32]
    """[latents, 2]"""
    method: str
    variance_share: float | None


def embed_directions(W_dec: NDArray[np.float32]) -> Layout:
    """Project unit decoder rows `[d_sae, d_in]` on their two principal components. The sign of an axis makes its largest weight positive."""
    total, products = np.zeros(W_dec.shape[1]), np.zeros((W_dec.shape[1],) * 2)
    blocks = range(0, len(W_dec), _BLOCK_ROWS)
    for first in blocks:
        rows = _unit(W_dec[first : first + _BLOCK_ROWS])
        total += rows.sum(0)
        products += rows.T @ rows
    mean = total / max(1, len(W_dec))
    values, vectors = np.linalg.eigh(products / max(1, len(W_dec)) - np.outer(mean, mean))
    axes = vectors[:, ::-1][:, :2]
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), range(axes.shape[1])])
    xy = np.zeros((len(W_dec), 2), np.float32)
    for first in blocks:
        xy[first : first + _BLOCK_ROWS, : axes.shape[1]] = (_unit(W_dec[first : first + _BLOCK_ROWS]) - mean) @ axes
    share = float(values[::-1][:2].sum() / max(values.sum(), 1e-30))
    return Layout(xy, "principal components of the unit decoder rows", round(share, 4))


def measure_kept(layout: Layout, W_dec: NDArray[np.float32], latents: NDArray[np.uint32]) -> dict[str, float] | None:
    """Measure how many of a latent's nearest decoder rows are near it on the map; `latents` are a fair sample in any order, the first ones are used.

    Returns `kept`, the mean share of the `NEAREST` rows of highest cosine that are among the nearest points of the map, and `near_share`, the
    share of all points that these are: what chance would keep. None for too few latents.
    """
    pool = latents[:_POOL]
    n_near = max(NEAREST, round(NEAR_SHARE * len(pool)))
    if len(pool) <= n_near + 1:
        return None
    rows, xy = _unit(W_dec[pool]), layout.xy[pool].astype(np.float64)
    n_kept, all_cosines = 0, np.round(rows[:_ASKED] @ rows.T, 9)  # so that equal rows stay equal
    for i, cosines in enumerate(all_cosines):
        distances = ((xy - xy[i]) ** 2).sum(1)
        cosines[i], distances[i] = -np.inf, np.inf
        nearest = np.argsort(-cosines, kind="stable")[:NEAREST]
        n_kept += int(np.isin(nearest, np.argsort(distances, kind="stable")[:n_near]).sum())
    return {"kept": round(n_kept / (NEAREST * len(all_cosines)), 4), "near_share": round(n_near / (len(pool) - 1), 4)}


def place_points(layout: Layout, frequency: NDArray[np.float32]) -> NDArray[Any]:
    """Return the points of all latents that fire: any first part of them is a fair sample."""
    live = np.flatnonzero(frequency > 0)
    live = live[np.argsort(_hash(live), kind="stable")]
    points = np.zeros(len(live), POINT)
    for axis, name in enumerate(("x", "y")):
        values = layout.xy[live, axis].astype(np.float64)
        low, high = (values.min(), values.max()) if len(values) else (0.0, 0.0)
        points[name] = np.round((values - low) / max(high - low, 1e-30) * 65535)
    points["latent"] = live
    heat = np.log10(np.maximum(frequency[live], 1e-8)) / 8 + 1
    points["heat"] = np.clip(np.round(255 * heat), 0, 255)
    return points


def write_map(art: ArtifactWriter, layout: Layout, points: NDArray[Any]) -> dict[str, object]:
    """Write the tiles of all points; return what `bundle.json` says of them."""
    tiles, n_points = [], 0
    with art.open(POINTS, n_rows=len(points), block_bytes=_BLOCK_BYTES) as sink:
        for depth in range(MAX_DEPTH + 1):
            keys = (points["y"].astype(np.int64) >> (16 - depth) << depth) | (points["x"].astype(np.int64) >> (16 - depth))
            room = TILE if depth < MAX_DEPTH else len(points)
            order = np.argsort(keys, kind="stable")
            starts = np.flatnonzero(np.diff(keys[order], prepend=-1))
            counts = np.diff(starts, append=len(order))
            is_here = np.arange(len(order)) - np.repeat(starts, counts) < room
            sink.write(points[order[is_here]].tobytes())
            for key, count in zip(keys[order[starts]].tolist(), np.minimum(counts, room).tolist(), strict=True):
                tiles.append((depth, key & ((1 << depth) - 1), key >> depth, n_points, count))
                n_points += count
            points = points[np.sort(order[~is_here])]
    art.put(INDEX, np.array(tiles, "<u4").tobytes(), n_rows=len(tiles))
    return {"method": layout.method, "variance_share": layout.variance_share, "n_points": n_points, "n_tiles": len(tiles)}


def write_directions(art: ArtifactWriter, W_dec: NDArray[np.float32]) -> dict[str, int] | None:
    """Write decoder rows `[d_sae, d_in]`; return what `bundle.json` says of them, None where they are too many."""
    if W_dec.size > MAX_DIRECTION_BYTES:
        return None
    with art.open(DIRECTIONS, n_rows=len(W_dec), block_bytes=_BLOCK_BYTES) as sink:
        for first in range(0, len(W_dec), _BLOCK_ROWS):
            rows = W_dec[first : first + _BLOCK_ROWS].astype(np.float64)
            largest = np.maximum(np.abs(rows).max(1, keepdims=True), 1e-30)
            sink.write(np.round(127 * rows / largest).astype(np.int8).tobytes())
    return {"width": W_dec.shape[1]}


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    exact = rows.astype(np.float64)
    return exact / np.maximum(np.linalg.norm(exact, axis=1, keepdims=True), 1e-30)


def _hash(latents: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Mix numbers (splitmix64), so that every prefix of the order is a uniform sample."""
    mixed = latents.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))
