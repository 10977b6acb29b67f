"""A job's rows come into one buffer by parallel verified reads, and leave it in any order as fixed-width records.

A record is a row id (uint64, little-endian) and the row's bytes. Two kinds of buffer hold the rows of a job:

- `RawRows`: activation shards as they are stored; the row id is the position, so none is stored, and rows that are not valid lie between
  the others and are never taken;
- `Records`: ranges of split files, record after record.

Reads are cut where checksum blocks end, so that nothing is read twice, and a few run at once; each writes into its own place of the
buffer. Memory: the buffer, `FIXED_BYTES` of pieces in flight and chunks, and while an order is drawn `SORT_BYTES` a row.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from interp_assets.manifest import Manifest, read_range
from interp_assets.store import Store
from interp_assets.tensors import ITEM_BYTES

ID_BYTES: Final = 8
SORT_BYTES: Final = 32
"""Memory a row, beside the row itself, while its job draws an order: random words, order, the sort's own space."""
PIECE_BYTES: Final = 8 << 20
"""One verified read."""
CHUNK_BYTES: Final = 4 << 20
"""Rows gathered and written at once."""
READERS: Final = 4
FIXED_BYTES: Final = 128 << 20
"""What a job may need whatever its size: pieces being read and chunks being sent, half of it in the store client's own buffers."""

SHARD_SHIFT: Final = 40
"""`row_id = shard_index << SHARD_SHIFT | row_in_shard`."""

Progress = Callable[[int], None]
"""Told how many more rows are done."""


class RowFormat(NamedTuple):
    """What one row is: its width and dtype."""

    d_in: int
    dtype: str

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.d_in * ITEM_BYTES[self.dtype]

    @property
    def record_bytes(self) -> int:
        """Bytes of a row with its id."""
        return ID_BYTES + self.row_bytes


class Segment(NamedTuple):
    """Bytes [start, start + n_bytes) of one file of an artifact, and where in the buffer they go."""

    path: str
    manifest: Manifest
    name: str
    start: int
    n_bytes: int
    at: int


class RawRows:
    """Valid rows of activation shards that lie one after the other in `rows`."""

    def __init__(self, rows: NDArray[np.uint8], kept: NDArray[np.int64], row_ids: NDArray[np.uint64]) -> None:
        """Hold `rows [n_all, row_bytes]`, the positions `kept [n_rows]` of the valid ones, and their row ids `[n_rows]`."""
        self.n_rows = len(kept)
        self.rows, self.kept, self.row_ids = rows, kept, row_ids

    def take(self, order: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        """Write the records of rows `order` into `out`."""
        out[:, :ID_BYTES] = self.row_ids[order].astype("<u8").view(np.uint8).reshape(-1, ID_BYTES)
        out[:, ID_BYTES:] = np.take(self.rows, self.kept[order], axis=0, mode="clip")


class Records:
    """Records that lie one after the other in `records [n_rows, record_bytes]`."""

    def __init__(self, records: NDArray[np.uint8]) -> None:
        """Hold `records`."""
        self.n_rows = len(records)
        self.records = records

    def take(self, order: NDArray[np.int64], out: NDArray[np.uint8]) -> None:
        """Write the records of rows `order` into `out`."""
        np.take(self.records, order, axis=0, out=out, mode="clip")


RowSource = RawRows | Records


def fill(store: Store, segments: Sequence[Segment], buffer: NDArray[np.uint8]) -> None:
    """Read and verify all segments into `buffer` (flat bytes), `READERS` at a time.

    Raises what `read_range` raises; the first segment's error when several fail.
    """

    def read(piece: Segment) -> None:
        data = read_range(store, piece.path, piece.manifest, piece.name, piece.start, piece.n_bytes)
        buffer[piece.at : piece.at + piece.n_bytes] = np.frombuffer(data, np.uint8)

    pieces = [piece for segment in segments for piece in cut_segment(segment)]
    with ThreadPoolExecutor(READERS) as readers:
        for _ in readers.map(read, pieces):
            pass


def cut_segment(segment: Segment) -> Iterator[Segment]:
    """Cut a segment into reads of about `PIECE_BYTES` that end where a checksum block ends."""
    block_bytes = segment.manifest.file(segment.name).block_bytes
    stride = block_bytes * max(1, PIECE_BYTES // block_bytes)
    start, end = segment.start, segment.start + segment.n_bytes
    while start < end:
        stop = min((start // stride + 1) * stride, end)
        yield segment._replace(start=start, n_bytes=stop - start, at=segment.at + start - segment.start)
        start = stop


def iter_chunks(source: RowSource, order: NDArray[np.int64], record_bytes: int) -> Iterator[NDArray[np.uint8]]:
    """Yield the records of a source in a given order, `[n, record_bytes]` of about `CHUNK_BYTES` a time, each in memory of its own."""
    n_chunk = max(1, CHUNK_BYTES // record_bytes)
    for start in range(0, len(order), n_chunk):
        part = order[start : start + n_chunk]
        chunk = np.empty((len(part), record_bytes), np.uint8)
        source.take(part, chunk)
        yield chunk


def record_ids(records: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Return the row ids of records `[n, record_bytes]`, as a copy."""
    return np.ascontiguousarray(records[:, :ID_BYTES]).view("<u8").reshape(-1).astype(np.uint64)


def frozen(array: NDArray[np.uint8]) -> memoryview:
    """Hand an array's bytes to a writer for good: read-only, so that the store need not copy them. Nothing may change them afterwards."""
    return array.reshape(-1).data.toreadonly() if array.size else memoryview(b"")
