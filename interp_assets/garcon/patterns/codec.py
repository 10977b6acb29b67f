"""Patterns become bytes: one an edge, the square root of what is looked at; lower triangles, and tiles of maxima for long contexts.

    byte = round(255 sqrt(p))        error of p at most 1/255 (0.0039), of a row's sum under 0.01; linear bytes lose a row that is spread out

A triangle is one gzip member a head: row q holds the bytes of keys 0..q (with both directions: all keys). Above `LONG` tokens a pattern is a
pyramid instead: level 0 in tiles of 256 x 256, each further level the maximum of 2 x 2, down to one tile. A page reads what it shows. The
format is described in docs/formats/attention_pattern.md.
"""

import gzip
from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from interp_assets.errors import ArtifactCorruptError, InputError
from interp_assets.storage.foreign import unpack_gzip

LONG: Final = 1024
"""Tokens up to which a pattern is one triangle."""
TILE: Final = 256
GZIP_LEVEL: Final = 6
_ROW_SLACK: Final = 1e-3


def quantize(pattern: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Return the byte of each edge."""
    return np.rint(255.0 * np.sqrt(np.clip(pattern, 0.0, 1.0))).astype(np.uint8)


def restore(values: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return what bytes stand for."""
    return (values.astype(np.float32) / np.float32(255.0)) ** 2


def check_pattern(pattern: NDArray[np.floating], n_tokens: int, *, weights: bool = False) -> None:
    """Raise `InputError` for an array that is no pattern of so many tokens: another shape, negative or not finite, rows that sum to more than one.

    `weights` takes any numbers from 0. Of a model with learned sinks rows sum to less than one, which is said by `weights` too.
    """
    if pattern.ndim < 2 or pattern.shape[-1] != n_tokens or pattern.shape[-2] != n_tokens:
        raise InputError(f"A pattern of {n_tokens:,} tokens is [..., {n_tokens}, {n_tokens}]; found {list(pattern.shape)}.")
    if not np.isfinite(pattern).all() or (pattern < 0).any():
        raise InputError("A pattern holds numbers from 0 to 1; found a negative one, or one that is not finite.")
    sums = pattern.sum(axis=-1)
    wrong = np.argwhere(np.abs(sums - 1.0) > _ROW_SLACK)
    if len(wrong) and not weights:
        *place, row = wrong[0].tolist()
        where = f" of head {place}" if place else ""
        raise InputError(f"Row {row}{where} of a pattern sums to {sums[tuple(wrong[0])]:.4f}, not 1. For other weights say weights=True.")


def pack_triangle(values: NDArray[np.uint8], *, both_ways: bool = False) -> bytes:
    """Return one head's bytes [tokens, tokens] as a gzip member."""
    n = len(values)
    rows = values.reshape(-1) if both_ways else values[np.tril_indices(n)]
    return gzip.compress(np.ascontiguousarray(rows).tobytes(), GZIP_LEVEL, mtime=0)


def unpack_triangle(member: bytes, n_tokens: int, where: str, *, both_ways: bool = False) -> NDArray[np.uint8]:
    """Return one head's bytes [tokens, tokens]. Raises `ArtifactCorruptError` for a member of another size."""
    expected = n_tokens * n_tokens if both_ways else n_tokens * (n_tokens + 1) // 2
    try:
        data = np.frombuffer(unpack_gzip(member, expected), np.uint8)
    except ValueError as error:
        raise ArtifactCorruptError(f"{where} is no pattern of {n_tokens:,} tokens ({error}). Materialize it again.") from error
    if len(data) != expected:
        raise ArtifactCorruptError(f"{where} has {len(data):,} edges, {n_tokens:,} tokens have {expected:,}. Materialize it again.")
    if both_ways:
        return data.reshape(n_tokens, n_tokens).copy()
    values = np.zeros((n_tokens, n_tokens), np.uint8)
    values[np.tril_indices(n_tokens)] = data
    return values


class TilePlace(NamedTuple):
    """A tile of a pyramid."""

    level: int
    row: int
    column: int


def n_levels(n_tokens: int) -> int:
    """Return the levels of a pyramid: the last one is a single tile."""
    return max(0, int(-(-n_tokens // TILE) - 1)).bit_length() + 1


def tile_places(n_tokens: int, *, both_ways: bool = False) -> Iterator[TilePlace]:
    """List the tiles of a pyramid in the order in which they are stored, the coarsest level first; those above the diagonal are not there."""
    for level in reversed(range(n_levels(n_tokens))):
        side = -(-n_tokens // (TILE << level))
        for row in range(side):
            for column in range(side if both_ways else row + 1):
                yield TilePlace(level, row, column)


def pack_tiles(values: NDArray[np.uint8], *, both_ways: bool = False) -> list[bytes]:
    """Return the tiles of one head's bytes [tokens, tokens], a gzip member each, in the order of `tile_places`."""
    levels = [values]
    while len(levels) < n_levels(len(values)):
        levels.append(halve(levels[-1]))
    members = []
    for level, row, column in tile_places(len(values), both_ways=both_ways):
        tile = np.zeros((TILE, TILE), np.uint8)
        part = levels[level][row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE]
        tile[: part.shape[0], : part.shape[1]] = part
        members.append(gzip.compress(tile.tobytes(), GZIP_LEVEL, mtime=0))
    return members


def unpack_tile(member: bytes, where: str) -> NDArray[np.uint8]:
    """Return a tile [256, 256]. Raises `ArtifactCorruptError` for a damaged one."""
    try:
        data = np.frombuffer(unpack_gzip(member, TILE * TILE), np.uint8)
    except ValueError as error:
        raise ArtifactCorruptError(f"{where} is no tile ({error}). Materialize it again.") from error
    if len(data) != TILE * TILE:
        raise ArtifactCorruptError(f"{where} has {len(data):,} bytes, a tile has {TILE * TILE:,}. Materialize it again.")
    return data.reshape(TILE, TILE)


def halve(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the maxima of 2 x 2; of the last row and column of an odd number, of what there is."""
    even = np.pad(values, ((0, values.shape[0] % 2), (0, values.shape[1] % 2)))
    return np.maximum.reduce([even[i::2, j::2] for i in (0, 1) for j in (0, 1)])


def shrink(values: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Return maxima over about equal parts, [size, size] at most: what a thumbnail shows."""
    n = len(values)
    if n <= size:
        return values
    starts = np.arange(size) * n // size
    return np.maximum.reduceat(np.maximum.reduceat(values, starts, axis=0), starts, axis=1)
