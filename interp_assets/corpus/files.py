"""A file or a folder becomes a stream of documents, and any document can be read again from where it was found.

    .jsonl .ndjson      one document a line, in `corpus.text_field`
    .parquet            one document a row, likewise
    any other name      the whole file is one document of UTF-8 text: .txt, .md, .py, ...
    .gz .zst behind it  the same, unpacked (not of Parquet)

**A format is read or refused.** What holds many documents, or one in wrappings, and is not read here (tables, archives, office files) is a
problem, never one document: a table that is swallowed whole looks like text, and nothing later would tell. Who means the bytes themselves
names the file `.txt`.

Files are taken in order of path, so that files which land later, under later names, come after those that are planned already; names
that start with a dot are left out. Rows without text, and files without any, yield nothing; what cannot be text, or cannot be listed, is a
problem, and problems are collected by the caller, so that all are raised at once.
"""

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from interp_assets.corpus.parquet import ColumnMissingError, iter_row_groups
from interp_assets.corpus.unpacked import OPEN_FILES, SUFFIXES, Content
from interp_assets.errors import InputError, first_line
from interp_assets.planning.sections import TextKind
from interp_assets.storage.foreign import DAMAGE, MAX_LINE_BYTES, mend_text, parse_json, read_line

UNREADABLE: Final = (*DAMAGE, pa.ArrowException)
"""What is raised while a file is read that is damaged, or something else than its name says."""
_LINES: Final = (".jsonl", ".ndjson")
_NEVER_EMPTY: Final = (".parquet", *SUFFIXES)
"""Formats with a header: a file of 0 bytes is a download that broke off, not an empty document."""
_AS_ROWS: Final = "write it as Parquet or JSON lines: `polars.read_csv(...).write_parquet(...)`, or what polars has for other formats"
_REFUSED: Final = {
    "a table": (_AS_ROWS, (".csv", ".tsv", ".tab", ".psv", ".xls", ".xlsx", ".ods", ".arrow", ".feather", ".ipc", ".orc", ".avro")),
    "a database": (_AS_ROWS, (".db", ".sqlite", ".sqlite3", ".duckdb", ".sql")),
    "JSON": ("if every line is an object, name it .jsonl; else write one object a line", (".json",)),
    "XML": ("write its texts as JSON lines or Parquet", (".xml", ".sgml", ".tei", ".tmx", ".xliff", ".rdf")),
    "a file of many records": ("write their texts as JSON lines or Parquet", (".warc", ".wet", ".wat", ".arc", ".mbox", ".tfrecord", ".conllu")),
    "an archive": ("unpack it", (".zip", ".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".7z", ".rar")),
    "compressed": ("unpack it, or pack it as .gz or .zst", (".bz2", ".xz", ".lz4", ".lzma", ".z", ".br", ".zip", ".snappy")),
    "an office file": ("write its text into a .txt file", (".pdf", ".doc", ".docx", ".odt", ".rtf", ".ppt", ".pptx", ".odp", ".epub", ".ps")),
    "Parquet in a wrapping": ("unpack it; Parquet packs its own columns", tuple(f".parquet{suffix}" for suffix in SUFFIXES)),
}
"""What is refused by its name, and what to do instead."""


class TextIn(NamedTuple):
    """What the configuration says of where a text is: its kind, and the key or column that holds it."""

    kind: TextKind
    field: str


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
                if mend_text(entry.name) != entry.name:
                    problems.append(f"{folder}: the name {os.fsencode(entry.name)!r} is not UTF-8: rename it")
                elif entry.is_dir(follow_symlinks=False):
                    yield from _iter_names(folder / entry.name, f"{prefix}{entry.name}/", problems)
                elif entry.is_file():
                    yield prefix + entry.name
                elif entry.is_symlink() and not entry.is_dir():
                    problems.append(f"{folder / entry.name}: is a link to a file that is not there")
    except OSError as error:
        problems.append(f"{folder}: cannot be listed: {error.strerror or error}")


def iter_file(root: Path, file: str, text_in: TextIn, problems: list[str]) -> Iterator[FoundDocument]:
    """Yield the documents of one file; what cannot be text becomes a line in `problems`. Raises `UNREADABLE`."""
    if refusal := find_refusal(file):
        problems.append(f"{root / file}: {refusal}")
    elif not (root / file).stat().st_size:
        if file.lower().endswith(_NEVER_EMPTY):
            problems.append(f"{root / file}: has 0 bytes, which no {Path(file).suffix} file has: a download that broke off? Fetch it again")
    elif is_lines(file):
        yield from _iter_lines(root, file, text_in, problems)
    elif is_parquet(file):
        yield from _iter_rows(root, file, text_in, problems)
    elif text_in.kind == "messages":
        problems.append(f"{root / file}: is text, and corpus.text_kind is messages, which lie in JSON lines or Parquet")
    else:
        text = _decode(_read_whole(root / file), root / file, problems)
        if text:
            yield FoundDocument(file, text, Place(file, 0, 0))


def find_refusal(file: str) -> str:
    """Say why a file of this name is no text, and what to do; nothing when it is read."""
    name = file.lower()
    for what, (advice, suffixes) in _REFUSED.items():
        if name.endswith(suffixes) or _bare(name).endswith(suffixes):
            return f"is {what}, not text: {advice}. If its bytes as they are are the text, name it .txt"
    return ""


def name_document(file: str, row: int) -> str:
    """Return the name of a document: the file's, with the line from 1 or the row from 0 where a file holds many."""
    if is_lines(file):
        return f"{file}:{row + 1}"
    return f"{file}:{row}" if is_parquet(file) else file


def iter_part(path: str, part: dict[str, Any], text_in: TextIn) -> Iterator[tuple[str, str]]:
    """Yield `(source, text)` of one part of a shard: all documents of a file from its first row up to `stop`."""
    root, _ = _list_root(path)
    file = root / part["file"]
    problems: list[str] = []
    if is_lines(file.name):
        found = _iter_lines(root, part["file"], text_in, problems, first=part["first"], offset=part["offset"], stop=part["stop"])
    elif is_parquet(file.name):
        found = _iter_rows(root, part["file"], text_in, problems, first=part["first"], stop=part["stop"])
    else:
        found = iter_file(root, part["file"], text_in, problems)
    try:
        for document in found:
            yield document.source, document.text
    except UNREADABLE as error:
        problems.append(f"{file}: cannot be read: {first_line(error)}")
    if problems:
        raise InputError(f"{problems[0]}. It has changed since it was planned: run `interp run` again.")


def _list_root(path: str) -> tuple[Path, Path]:
    where = Path(path).expanduser()
    if not path or not where.exists():
        raise InputError(f"There is nothing at corpus.path = {path!r}. Give a file or a folder of text, JSONL or Parquet files.")
    return (where.parent, where) if where.is_file() else (where, where)


def is_lines(file: str) -> bool:
    """Tell whether each line of a file is a document."""
    return _bare(file.lower()).endswith(_LINES)


def is_parquet(file: str) -> bool:
    """Tell whether each row of a file is a document."""
    return file.lower().endswith(".parquet")


def has_columns(file: str) -> bool:
    """Tell whether the text is one of several things in a line or row, so that it has to be named."""
    return is_lines(file) or is_parquet(file)


def _bare(name: str) -> str:
    """Return a name without what tells how the file is packed."""
    return next((name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix)), name)


@contextmanager
def _opened(path: Path, position: int = 0) -> Iterator[Content]:
    """Open a file at a byte of its content, unpacked where it is packed."""
    if path.name.lower().endswith(SUFFIXES):
        with OPEN_FILES.at(path, position) as content:
            yield content
    else:
        with path.open("rb") as file:
            file.seek(position)
            yield Content(file)


def _read_whole(path: Path) -> bytes:
    """Read the content of a file that is one document."""
    if not path.name.lower().endswith(SUFFIXES):
        return path.read_bytes()
    with _opened(path) as content:
        data = content.read(MAX_LINE_BYTES + 1)
    if len(data) > MAX_LINE_BYTES:
        raise ValueError(f"one document has more than the {MAX_LINE_BYTES:,} bytes that are allowed")
    return data


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
    root: Path, file: str, text_in: TextIn, problems: list[str], *, first: int = 0, offset: int = 0, stop: int = 1 << 62
) -> Iterator[FoundDocument]:
    """Yield the documents of lines [first, stop); `offset` is where line `first` begins in the (unpacked) file."""
    where = root / file
    with _opened(where, offset) as lines:
        for row in range(first, stop):
            line = read_line(lines)
            if not line:
                break
            text = _text_of_line(line, f"{where}, line {row + 1:,}", text_in, problems) if line.strip() else ""
            if text.strip():
                yield FoundDocument(name_document(file, row), text, Place(file, row, offset))
            offset += len(line)


def _text_of_line(line: bytes, where: str, text_in: TextIn, problems: list[str]) -> str:
    try:
        row = parse_json(line)
    except ValueError as error:
        problems.append(f"{where}: is not JSON ({error})")
        return ""
    if not isinstance(row, dict) or text_in.field not in row:
        keys = sorted(row) if isinstance(row, dict) else type(row).__name__
        problems.append(f"{where}: has no {text_in.field!r}; it has {keys}. Set `corpus.text_field`")
        return ""
    return text_of(row[text_in.field], where, text_in, problems)


def text_of(value: object, where: str, text_in: TextIn, problems: list[str]) -> str:
    """Return the text of a row, empty for null; a problem and nothing when it is of another type. Messages become JSON, the same from any format."""
    if value is None:
        return ""
    if text_in.kind == "messages":
        if (messages := _clean_messages(value)) is not None:
            return json.dumps(messages, ensure_ascii=False, sort_keys=True, separators=(",", ":"), default=str) if messages else ""
        problems.append(f"{where}: {text_in.field!r} holds no messages, a list of {{role, content}} with text in both. Set `corpus.text_field`")
        return ""
    if isinstance(value, str):
        return value
    problems.append(f"{where}: {text_in.field!r} holds a {type(value).__name__}, not text. Set `corpus.text_field`")
    return ""


def _clean_messages(value: object) -> list[dict[str, Any]] | None:
    """Return messages without the keys that are null, which a column of Parquet has in every row; None for anything else."""
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        return None
    cleaned = [{"content": "", **{key: item for key, item in message.items() if item is not None}} for message in value]
    return cleaned if all(isinstance(message.get("role"), str) and isinstance(message["content"], str) for message in cleaned) else None


def _iter_rows(root: Path, file: str, text_in: TextIn, problems: list[str], *, first: int = 0, stop: int = 1 << 62) -> Iterator[FoundDocument]:
    """Yield the documents of rows [first, stop) of a Parquet file, reading only the row groups that hold them."""
    where = root / file
    with pq.ParquetFile(where) as parquet:
        try:
            for row, value in iter_row_groups(parquet, text_in.field, first, stop):
                text = text_of(value, f"{where}, row {row:,}", text_in, problems)
                if text.strip():
                    yield FoundDocument(name_document(file, row), text, Place(file, row, 0))
        except ColumnMissingError as error:
            problems.append(f"{where}: has {error}. Set `corpus.text_field`")


def fingerprint_listing(folder: Path) -> str:
    """Hash names, sizes and times of the files under a folder (or of one file): cheap, and changed by any landing.

    A file that goes away meanwhile is not there.
    """
    hasher = hashlib.blake2b(digest_size=12)
    for path in sorted(folder.rglob("*")) if folder.is_dir() else [folder]:
        with suppress(OSError):
            facts = path.stat()
            if stat.S_ISREG(facts.st_mode):
                hasher.update(os.fsencode(path.relative_to(folder)) + f"\0{facts.st_size}\0{facts.st_mtime_ns}\0".encode())
    return hasher.hexdigest()
