"""A file or a folder becomes a stream of documents, and any document can be read again from where it was found.

A `.jsonl` or `.jsonl.gz` file holds one document per line, a `.parquet` file one per row, any other file is one document of UTF-8 text.
Files are taken in order of path, so that files which land later, under later names, come after those that are planned already; names
that start with a dot are left out. Rows without text are skipped; what cannot be text is a problem, and problems are collected over all
files before they are raised.
"""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from interp_assets.corpus.parquet import ColumnMissingError, iter_row_groups
from interp_assets.errors import InputError

_SHOWN_PROBLEMS = 20


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


def iter_folder(path: str, text_field: str) -> Iterator[FoundDocument]:
    """Yield every document below `path` (a file or a folder).

    Raises `InputError` after the last one when some could not be read, with a line for each: empty or binary file, wrong JSON, missing column.
    """
    root, files = _list_files(path)
    problems: list[str] = []
    for file in files:
        try:
            yield from _iter_file(root, file, text_field, problems)
        except (OSError, EOFError, pa.ArrowException) as error:
            problems.append(f"{root / file}: cannot be read: {error}")
    if problems:
        shown = "\n".join(f"  {problem}" for problem in problems[:_SHOWN_PROBLEMS])
        rest = f"\n  and {len(problems) - _SHOWN_PROBLEMS} more" if len(problems) > _SHOWN_PROBLEMS else ""
        raise InputError(
            f"{len(problems)} document(s) under {path} cannot be used; fix them, move them away, or point `corpus.path` elsewhere:\n{shown}{rest}"
        )


def iter_part(path: str, part: dict[str, Any], text_field: str) -> Iterator[tuple[str, str]]:
    """Yield `(source, text)` of one part of a shard: all documents of a file from its first row up to `stop`."""
    root, _ = _list_root(path)
    file = root / part["file"]
    problems: list[str] = []
    if _is_lines(file):
        found = _iter_lines(root, part["file"], text_field, problems, first=part["first"], offset=part["offset"], stop=part["stop"])
    elif file.suffix == ".parquet":
        found = _iter_rows(root, part["file"], text_field, problems, first=part["first"], stop=part["stop"])
    else:
        found = _iter_file(root, part["file"], text_field, problems)
    try:
        for document in found:
            yield document.source, document.text
    except (OSError, EOFError, pa.ArrowException) as error:
        problems.append(f"{file}: cannot be read: {error}")
    if problems:
        raise InputError(f"{problems[0]}. It has changed since it was planned: run `interp run` again.")


def _list_root(path: str) -> tuple[Path, Path]:
    where = Path(path).expanduser()
    if not path or not where.exists():
        raise InputError(f"There is nothing at corpus.path = {path!r}. Give a file or a folder of text, JSONL or Parquet files.")
    return (where.parent, where) if where.is_file() else (where, where)


def _list_files(path: str) -> tuple[Path, list[str]]:
    root, where = _list_root(path)
    if where.is_file():
        return root, [where.name]
    relative = (found.relative_to(root) for found in where.rglob("*") if found.is_file())
    files = sorted(file.as_posix() for file in relative if not any(part.startswith(".") for part in file.parts))
    if not files:
        raise InputError(f"The folder {where} holds no files. Put text, JSONL or Parquet files there, or point `corpus.path` elsewhere.")
    return root, files


def _is_lines(file: Path) -> bool:
    return file.name.endswith((".jsonl", ".jsonl.gz", ".ndjson"))


def _iter_file(root: Path, file: str, text_field: str, problems: list[str]) -> Iterator[FoundDocument]:
    if _is_lines(root / file):
        yield from _iter_lines(root, file, text_field, problems)
    elif file.endswith(".parquet"):
        yield from _iter_rows(root, file, text_field, problems)
    else:
        text = _decode((root / file).read_bytes(), root / file, problems)
        if text:
            yield FoundDocument(file, text, Place(file, 0, 0))


def _decode(data: bytes, where: Path, problems: list[str]) -> str:
    """Return the text of a file; a problem and nothing when it has none or is binary."""
    if not data.strip():
        problems.append(f"{where}: is empty")
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
    n_found = 0
    n_problems = len(problems)
    with gzip.open(where) if file.endswith(".gz") else where.open("rb") as lines:
        lines.seek(offset)
        for row in range(first, stop):
            line = lines.readline()
            if not line:
                break
            text = _text_of_line(line, f"{where}, line {row + 1:,}", text_field, problems) if line.strip() else ""
            if text.strip():
                n_found += 1
                yield FoundDocument(f"{file}:{row + 1}", text, Place(file, row, offset))
            offset += len(line)
    if not n_found and len(problems) == n_problems:
        problems.append(f"{where}: holds no text")


def _text_of_line(line: bytes, where: str, text_field: str, problems: list[str]) -> str:
    try:
        row = json.loads(line)
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
    n_found = 0
    n_problems = len(problems)
    with pq.ParquetFile(where) as parquet:
        try:
            for row, value in iter_row_groups(parquet, text_field, first, stop):
                text = text_of(value, f"{where}, row {row:,}", text_field, problems)
                if text.strip():
                    n_found += 1
                    yield FoundDocument(f"{file}:{row}", text, Place(file, row, 0))
        except ColumnMissingError as error:
            problems.append(f"{where}: has {error}. Set `corpus.text_field`")
    if not n_found and len(problems) == n_problems:
        problems.append(f"{where}: holds no text")
