"""Parquet tables sorted by latent, streamed into artifacts and read back by ranges of latents.

Encodings follow the data: latents and row ids are sorted, so their differences are packed; the bytes of activations are split into
streams; zstd does the rest: 3 to 5 bytes per firing. A row group holds about 260,000 rows, and its smallest and largest latent stand
in the file's footer, so one latent slice reads few groups. Every byte read is verified (manifest.py).
"""

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from interp_assets.storage.manifest import ArtifactWriter, Manifest, read_range
from interp_assets.storage.store import ByteSink, Store

GROUP_ROWS: Final = 1 << 18
_BLOCK_BYTES: Final = 1 << 20
"""Bytes per checksum: row groups are a few MiB, so smaller blocks than usual waste less of a read."""


class TableWriter:
    """Appends columns to a Parquet file, in row groups of `GROUP_ROWS`. Made by `create_table`."""

    def __init__(self, writer: pq.ParquetWriter, schema: pa.Schema) -> None:
        """Write with `schema` to `writer`."""
        self._writer, self._schema = writer, schema
        self._pending: list[pa.Table] = []
        self.n_rows = 0
        self._n_written = 0

    def append(self, columns: Mapping[str, Any]) -> None:
        """Append arrays (NumPy or Arrow), one per column of the schema."""
        self._pending.append(pa.table([pa.array(columns[name]) for name in self._schema.names], schema=self._schema))
        self.n_rows += self._pending[-1].num_rows
        if self.n_rows - self._n_written >= GROUP_ROWS:
            self._flush(at_end=False)

    def close(self) -> None:
        """Write what is left."""
        self._flush(at_end=True)

    def _flush(self, *, at_end: bool) -> None:
        table = pa.concat_tables(self._pending) if self._pending else self._schema.empty_table()
        n_now = table.num_rows if at_end else table.num_rows // GROUP_ROWS * GROUP_ROWS
        if n_now:
            self._writer.write_table(table.slice(0, n_now), row_group_size=GROUP_ROWS)
        self._n_written += n_now
        self._pending = [table.slice(n_now)]


@contextmanager
def create_table(art: ArtifactWriter, name: str, schema: pa.Schema) -> Iterator[TableWriter]:
    """Stream a Parquet file into an artifact; it belongs to the artifact when the block ends without an error."""
    encodings = {
        field.name: "BYTE_STREAM_SPLIT" if pa.types.is_floating(field.type) else "DELTA_BINARY_PACKED"
        for field in schema
        if pa.types.is_floating(field.type) or field.type in (pa.uint32(), pa.uint64())
    }
    with art.open(name, block_bytes=_BLOCK_BYTES) as sink:
        target = pa.PythonFile(SinkFile(sink), mode="w")
        options = {"compression": "zstd", "use_dictionary": False, "write_statistics": ["latent"], "column_encoding": encodings}
        with pq.ParquetWriter(target, schema, **options) as writer:
            table = TableWriter(writer, schema)
            yield table
            table.close()


class LatentTable:
    """A Parquet file that is sorted by its column `latent`, read by ranges of latents; all of them lie in [start, stop)."""

    def __init__(self, store: Store, path: str, manifest: Manifest, name: str) -> None:
        """Open file `name` of the artifact at `path`: reads the footer."""
        self._file = pq.ParquetFile(pa.PythonFile(io.BufferedReader(_VerifiedFile(store, path, manifest, name), _BLOCK_BYTES), mode="r"))
        metadata = self._file.metadata
        place = self._file.schema_arrow.names.index("latent")
        bounds = [metadata.row_group(i).column(place).statistics for i in range(metadata.num_row_groups)]
        self._lows, self._highs = np.array([item.min for item in bounds], np.int64), np.array([item.max for item in bounds], np.int64)
        self._sizes = np.array([metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)], np.int64)
        self._ends = np.cumsum(self._sizes)
        self.start, self.stop = (int(self._lows[0]), int(self._highs[-1]) + 1) if bounds else (0, 0)

    def read(self, start: int, stop: int, columns: list[str] | None = None) -> dict[str, NDArray[Any]]:
        """Return the rows with `start <= latent < stop`, as one array per column (lists: see `read_table`)."""
        table = self.read_table(start, stop, columns)
        return {name: table.column(name).to_numpy() for name in table.column_names}

    def read_rows(self, first: int, last: int, column: str) -> NDArray[Any]:
        """Return one column of the rows [first, last) of the table."""
        groups = np.flatnonzero((self._ends > first) & (self._ends - self._sizes < last)).tolist()
        if not groups:
            return self._file.schema_arrow.empty_table().column(column).to_numpy()
        table = self._file.read_row_groups(groups, columns=[column], use_threads=False)
        before = int(self._ends[groups[0]] - self._sizes[groups[0]])
        return table.column(column).to_numpy()[first - before : last - before]

    def read_table(self, start: int, stop: int, columns: list[str] | None = None) -> pa.Table:
        """Return the rows with `start <= latent < stop` as an Arrow table."""
        groups = np.flatnonzero((self._lows < stop) & (self._highs >= start)).tolist()
        table = self._file.read_row_groups(groups, columns=columns, use_threads=False)
        first, last = np.searchsorted(table.column("latent").to_numpy(), np.array([start, stop], np.uint32))
        return table.slice(first, last - first)


class _VerifiedFile(io.RawIOBase):
    """A file of an artifact as Python's file objects are."""

    def __init__(self, store: Store, path: str, manifest: Manifest, name: str) -> None:
        super().__init__()
        self._store, self._path, self._manifest, self._name = store, path, manifest, name
        self._size = manifest.file(name).n_bytes
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        return self._place

    def readinto(self, buffer: Any) -> int:
        n_bytes = min(len(buffer), self._size - self._place)
        buffer[:n_bytes] = read_range(self._store, self._path, self._manifest, self._name, self._place, n_bytes)
        self._place += n_bytes
        return n_bytes


class SinkFile(io.RawIOBase):
    """A sink as Python's file objects are."""

    def __init__(self, sink: ByteSink) -> None:
        """Write into `sink`."""
        super().__init__()
        self._sink = sink
        self._place = 0

    def writable(self) -> bool:
        """Say yes."""
        return True

    def tell(self) -> int:
        """Return how many bytes were written."""
        return self._place

    def write(self, data: Any) -> int:
        """Append bytes."""
        self._sink.write(bytes(data))
        self._place += len(data)
        return len(data)
