"""Parquet files, local or remote, become the values of one column in a range of rows, reading only the row groups that hold them.

The rows of several files count on from one file to the next. How many a file has is read once a process, from its footer.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import fsspec
import pyarrow.parquet as pq

MAX_GROUP_BYTES = 16 << 30
"""Of one row group, all columns, unpacked: it is read as a whole."""


class ColumnMissingError(LookupError):
    """A file without the asked column; `columns` are those it has."""

    def __init__(self, column: str, columns: list[str]) -> None:
        """Say which columns there are."""
        super().__init__(f"no column {column!r}; it has {columns}")
        self.columns = columns


def count_rows(files: Sequence[str], revision: str, most: int) -> int:
    """Count the rows of files at a revision, without looking at more files once there are `most`."""
    n_rows = 0
    for file in files:
        if n_rows >= most:
            break
        n_rows += _rows_of(file, revision)
    return min(n_rows, most)


def mean_bytes(file: str, column: str) -> float:
    """Return the unpacked bytes that a row has in a column, as the file's footer says. Raises what the file system raises."""
    with fsspec.open(file, "rb") as opened:
        footer = pq.read_metadata(opened)
    groups = [footer.row_group(group) for group in range(footer.num_row_groups)]
    parts = [group.column(i) for group in groups for i in range(group.num_columns)]
    return sum(part.total_uncompressed_size for part in parts if part.path_in_schema == column) / max(1, footer.num_rows)


def iter_column(files: Sequence[str], revision: str, column: str, first: int, stop: int) -> Iterator[object]:
    """Yield the column's values in rows [first, stop) of all files. Raises `ColumnMissingError`, and what the file system raises."""
    start = 0
    for file in files:
        if start >= stop:
            return
        n_rows = _rows_of(file, revision)
        if start + n_rows > first:
            yield from _iter_file(file, column, max(0, first - start), min(n_rows, stop - start))
        start += n_rows


def iter_row_groups(parquet: pq.ParquetFile, column: str, first: int, stop: int) -> Iterator[tuple[int, object]]:
    """Yield `(row, value)` for rows [first, stop) of one open file. Raises `ColumnMissingError`."""
    if column not in parquet.schema_arrow.names:
        raise ColumnMissingError(column, parquet.schema_arrow.names)
    start = 0
    for group in range(parquet.num_row_groups):
        n_rows = parquet.metadata.row_group(group).num_rows
        low, high = max(first, start), min(stop, start + n_rows)
        if low < high:
            if parquet.metadata.row_group(group).total_byte_size > MAX_GROUP_BYTES:
                raise ValueError(f"row group {group} has more than {MAX_GROUP_BYTES:,} bytes: write the file with smaller ones")
            values = parquet.read_row_group(group, columns=[column]).column(column).slice(low - start, high - low).to_pylist()
            yield from enumerate(values, low)
        start += n_rows


@lru_cache(maxsize=1 << 16)
def _rows_of(file: str, revision: str) -> int:  # noqa: ARG001 - part of the key: another revision, another count
    with fsspec.open(file, "rb") as opened:
        return int(pq.read_metadata(opened).num_rows)


def _iter_file(file: str, column: str, first: int, stop: int) -> Iterator[object]:
    with fsspec.open(file, "rb") as opened, pq.ParquetFile(opened) as parquet:
        for _, value in iter_row_groups(parquet, column, first, stop):
            yield value
