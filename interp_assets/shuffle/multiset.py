"""A multiset of rows becomes 128 bits that do not depend on their order: equal before and after a shuffle, or a row was lost or changed.

Every record (row id and row) is hashed to 64 bits by a multilinear form over its 64-bit words with fixed random odd keys, modulo 2^64;
two different non-linear finishers of that word are summed over the rows, each modulo 2^64. Sums make the hash mergeable: hash the parts
in any order, on any machine, and `+` them. The finishers matter: without them the sum would only depend on the column sums of the words,
and exchanging two rows' ids would go unseen.

Two different records collide with probability about 2^-64. This guards against a pipeline's own mistakes (rows lost, doubled, torn or
given another's id); changed bytes on a disk are the checksums' business, and an adversary is nobody's here. Cost: about 0.1 s per GB.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from interp_assets.compute.seeds import stream

_MASK = (1 << 64) - 1
_FINISHERS = ((0xBF58476D1CE4E5B9, 0x94D049BB133111EB), (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53))
"""Multipliers of splitmix64 (Steele et al. 2014) and of MurmurHash3."""


_BLOCK_ROWS = 1 << 16


class MultisetHash(NamedTuple):
    """Two sums modulo 2^64, and how many rows they are over."""

    n_rows: int = 0
    low: int = 0
    high: int = 0

    def merge(self, other: "MultisetHash") -> "MultisetHash":
        """Return the hash of both multisets together."""
        return MultisetHash(self.n_rows + other.n_rows, (self.low + other.low) & _MASK, (self.high + other.high) & _MASK)

    def encode(self) -> str:
        """Return rows and sums as text, for a manifest's facts."""
        return f"{self.n_rows}:{self.high:016x}{self.low:016x}"

    @staticmethod
    def decode(text: str) -> "MultisetHash":
        """Parse what `encode` wrote. Raises `ValueError` for anything else."""
        n_rows, digits = text.split(":")
        value = int(digits, 16)
        return MultisetHash(int(n_rows), value & _MASK, value >> 64)


def hash_records(records: NDArray[np.uint8]) -> MultisetHash:
    """Hash records `[n, record_bytes]`, each a row id and a row."""
    return hash_rows(np.ascontiguousarray(records[:, :8]).view("<u8").reshape(-1), records[:, 8:])


def hash_rows(row_ids: NDArray[np.uint64], rows: NDArray[np.uint8]) -> MultisetHash:
    """Hash rows `[n, row_bytes]` with their row ids `[n]`."""
    keys = _keys(1 + -(-rows.shape[1] // 8))
    return _finish(multilinear(rows) + row_ids * keys[0])


def hash_kept(row_ids: NDArray[np.uint64], rows: NDArray[np.uint8], kept: NDArray[np.int64]) -> MultisetHash:
    """Hash the rows at ascending positions `kept` of `rows [n_all, row_bytes]` with their row ids, block by block and without moving a row."""
    total = MultisetHash()
    for start in range(0, len(kept), _BLOCK_ROWS):
        part, ids = kept[start : start + _BLOCK_ROWS], row_ids[start : start + _BLOCK_ROWS]
        forms = multilinear(rows[part[0] : part[-1] + 1])[part - part[0]]
        total = total.merge(_finish(forms + ids * _keys(1)[0]))
    return total


def multilinear(rows: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Return the form of each row of `[n, row_bytes]`: the sum of its 64-bit words times their keys, modulo 2^64."""
    n_rows, row_bytes = rows.shape
    n_words = -(-row_bytes // 8)
    if row_bytes % 8:
        padded = np.zeros((n_rows, n_words * 8), np.uint8)
        padded[:, :row_bytes] = rows
        rows = padded
    words = rows.view("<u8") if n_rows else np.zeros((0, n_words), np.uint64)
    return np.einsum("ij,j->i", words, _keys(1 + n_words)[1:])


def _finish(forms: NDArray[np.uint64]) -> MultisetHash:
    sums: list[int] = []
    for first, second in _FINISHERS:
        value = forms ^ (forms >> np.uint64(30))
        value *= np.uint64(first)
        value ^= value >> np.uint64(27)
        value *= np.uint64(second)
        value ^= value >> np.uint64(31)
        sums.append(int(value.sum(dtype=np.uint64)))
    return MultisetHash(len(forms), *sums)


@lru_cache(maxsize=16)
def _keys(n_words: int) -> NDArray[np.uint64]:
    """Return the first `n_words` keys: fixed, odd, and a prefix of any longer list of keys."""
    return stream(0, "multiset hash").words(n_words) | np.uint64(1)
