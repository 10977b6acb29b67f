"""A file or a folder becomes a stream of documents, and any document can be read again from where it was found.

A `.jsonl` or `.jsonl.gz` file holds one document per line, a `.parquet` file one per row, any other file is one document of UTF-8 text.
Files are taken in order of path, so that files which land later, under later names, come after those that are planned already; names
that start with a dot are left out. Rows without text, and files without any, yield nothing; what cannot be text, or cannot be listed, is a
problem, and problems are collected by the caller, so that all are raised at once.
"""

import gzip
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from interp_assets.corpus.parquet import ColumnMissingError, iter_row_groups
from interp_assets.errors import InputError
from interp_assets.storage.foreign import parse_json, read_line

_NEVER_EMPTY = (".parquet", ".gz", ".bz2", ".xz", ".zst", ".zip")
"""Formats with a header: a file of 0 bytes is a download that broke off, not an empty document."""


class FoundDocument(NamedTuple):
    """One document: its name, its text, and where it lies."""

    source: str
    text: str
    place: "Place"


class Place(NamedTuple):
    """Where a document lies in a file: `row` counts lines or rows from 0, `offset` bytes; both are 0 for a whole file."""

    file: str
    row: int
    offset: int


def list_files(path: str, problems: list[str]) -> tuple[Path, list[str]]:
    """List the files of a corpus in order, relative to the folder that is returned with them. Raises `InputError` when there are none.

    A folder that cannot be listed becomes a line in `problems`.
    """
    root, where = _list_root(path)
    if where.is_file():
        return root, [where.name]
    files = sorted(_iter_names(where, "", problems))
    if not files and not problems:
        raise InputError(f"The folder {where} holds no files. Put text, JSONL or Parquet files there, or point `corpus.path` elsewhere.")
    return root, files


def _iter_names(folder: Path, prefix: str, problems: list[str]) -> Iterator[str]:
    """Yield what lies below a folder, without what starts with a dot and without following links to folders."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    yield from _iter_names(folder / entry.name, f"{prefix}{entry.name}/", problems)
                elif entry.is_file():
                    yield prefix + entry.name
    except OSError as error:
        problems.append(f"{folder}: cannot be listed: {error.strerror or error}")


def iter_file(root: Path, file: str, text_field: str, problems: list[str]) -> Iterator[FoundDocument]:
    """Yield the documents of one file; what cannot be text becomes a line in `problems`. Raises what the file system and formats raise."""
    if not (root / file).stat().st_size:
        if file.endswith(_NEVER_EMPTY):
            problems.append(f"{root / file}: has 0 bytes, which no {Path(file).suffix} file has: a download that broke off? Fetch it again")
        return
    if is_lines(file):
        yield from _iter_lines(root, file, text_field, problems)
    elif file.endswith(".parquet"):
        yield from _iter_rows(root, file, text_field, problems)
    else:
        text = _decode((root / file).read_bytes(), root / file, problems)
        if text:
            yield FoundDocument(file, text, Place(file, 0, 0))


def name_document(file: str, row: int) -> str:
    """Return the name of a document: the file's, with the line from 1 or the row from 0 where a file holds many."""
    if is_lines(file):
        return f"{file}:{row + 1}"
    return f"{file}:{row}" if file.endswith(".parquet") else file


def iter_part(path: str, part: dict[str, Any], text_field: str) -> Iterator[tuple[str, str]]:
    """Yield `(source, text)` of one part of a shard: all documents of a file from its first row up to `stop`."""
    root, _ = _list_root(path)
    file = root / part["file"]
    problems: list[str] = []
    if is_lines(file.name):
        found = _iter_lines(root, part["file"], text_field, problems, first=part["first"], offset=part["offset"], stop=part["stop"])
    elif file.suffix == ".parquet":
        found = _iter_rows(root, part["file"], text_field, problems, first=part["first"], stop=part["stop"])
    else:
        found = iter_file(root, part["file"], text_field, problems)
    try:
        for document in found:
            yield document.source, document.text
    except (OSError, EOFError, ValueError, zlib.error, pa.ArrowException) as error:
        problems.append(f"{file}: cannot be read: {error}")
    if problems:
        raise InputError(f"{problems[0]}. It has changed since it was planned: run `interp run` again.")


def _list_root(path: str) -> tuple[Path, Path]:
    where = Path(path).expanduser()
    if not path or not where.exists():
        raise InputError(f"There is nothing at corpus.path = {path!r}. Give a file or a folder of text, JSONL or Parquet files.")
    return (where.parent, where) if where.is_file() else (where, where)


def is_lines(file: str) -> bool:
    """Tell whether each line of a file is a document."""
    return file.endswith((".jsonl", ".jsonl.gz", ".ndjson"))


def _decode(data: bytes, where: Path, problems: list[str]) -> str:
    """Return the text of a file, nothing when it is blank; a problem and nothing when it is binary."""
    if not data.strip():
        return ""
    nul = data.find(b"\0")
    if nul >= 0:
        problems.append(f"{where}: is binary, not text (a NUL byte at offset {nul:,})")
        return ""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        problems.append(f"{where}: is not UTF-8 text (byte 0x{data[error.start]:02x} at offset {error.start:,})")
        return ""


def _iter_lines(
    root: Path, file: str, text_field: str, problems: list[str], *, first: int = 0, offset: int = 0, stop: int = 1 << 62
) -> Iterator[FoundDocument]:
    """Yield the documents of lines [first, stop); `offset` is where line `first` begins in the (decompressed) file."""
    where = root / file
    with gzip.open(where) if file.endswith(".gz") else where.open("rb") as lines:
        lines.seek(offset)
        for row in range(first, stop):
            line = read_line(lines)
            if not line:
                break
            text = _text_of_line(line, f"{where}, line {row + 1:,}", text_field, problems) if line.strip() else ""
            if text.strip():
                yield FoundDocument(name_document(file, row), text, Place(file, row, offset))
            offset += len(line)


def _text_of_line(line: bytes, where: str, text_field: str, problems: list[str]) -> str:
    try:
        row = parse_json(line)
    except ValueError as error:
        problems.append(f"{where}: is not JSON ({error})")
        return ""
    if not isinstance(row, dict) or text_field not in row:
        keys = sorted(row) if isinstance(row, dict) else type(row).__name__
        problems.append(f"{where}: has no {text_field!r}; it has {keys}. Set `corpus.text_field`")
        return ""
    return text_of(row[text_field], where, text_field, problems)


def text_of(value: object, where: str, text_field: str, problems: list[str]) -> str:
    """Return the text of a row, empty for null; a problem and nothing when it is of another type."""
    if value is None or isinstance(value, str):
        return value or ""
    problems.append(f"{where}: {text_field!r} holds a {type(value).__name__}, not text. Set `corpus.text_field`")
    return ""


def _iter_rows(root: Path, file: str, text_field: str, problems: list[str], *, first: int = 0, stop: int = 1 << 62) -> Iterator[FoundDocument]:
    """Yield the documents of rows [first, stop) of a Parquet file, reading only the row groups that hold them."""
    where = root / file
    with pq.ParquetFile(where) as parquet:
        try:
            for row, value in iter_row_groups(parquet, text_field, first, stop):
                text = text_of(value, f"{where}, row {row:,}", text_field, problems)
                if text.strip():
                    yield FoundDocument(name_document(file, row), text, Place(file, row, 0))
        except ColumnMissingError as error:
            problems.append(f"{where}: has {error}. Set `corpus.text_field`")
