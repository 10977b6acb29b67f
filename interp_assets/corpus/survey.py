"""A file or a folder becomes the measures of all its documents: name, bytes, digest, place; unchanged files are not read again.

What planning needs to know of a text is 40 bytes a document, about 2 % of web text. They are noted for each file (`storage/seen.py`, where the rule
stands by which a file counts as unchanged) under the question that they answer, and a file with a problem is never noted: it is read, and
named, each time. A file without text is no problem: an empty `__init__.py` is what a folder of sources looks like. It is skipped and counted.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import xxhash

from interp_assets.corpus.files import UNREADABLE, Place, TextIn, has_columns, iter_file, list_files, name_document
from interp_assets.errors import InputError, first_line
from interp_assets.planning.progress import format_count
from interp_assets.storage.seen import SeenFiles

NOTE_VERSION: Final = 3
"""Raise it when the same file would give other documents or digests."""
_SHOWN_PROBLEMS: Final = 20
_NOTE: Final = struct.Struct("<qqq16s")


class Measured(NamedTuple):
    """One document as planning sees it: its name, UTF-8 bytes, the XXH3-128 of them, and where it lies."""

    source: str
    n_bytes: int
    digest: bytes
    place: Place


def measure(text: str) -> tuple[int, bytes]:
    """Return the UTF-8 bytes of a text and their digest."""
    data = text.encode()
    return len(data), xxhash.xxh3_128_digest(data)


def iter_measured(path: str, text_in: TextIn, seen: SeenFiles, empty: list[str]) -> Iterator[Measured]:
    """Yield every document below `path` (a file or a folder), in order; names of files without text are appended to `empty`.

    Raises `InputError` after the last one when some could not be read, with a line for each: binary file, wrong JSON, missing column, closed folder.
    """
    problems: list[str] = []
    root, files = list_files(path, problems)
    for file in files:
        n_problems, n_found = len(problems), 0
        try:
            for document in _iter_file(root, file, text_in, seen, problems):
                n_found += 1
                yield document
        except UNREADABLE as error:
            problems.append(f"{root / file}: cannot be read: {first_line(error)}")
        if not n_found and len(problems) == n_problems:
            empty.append(file)
    if Path(path).expanduser().is_dir():
        seen.forget_missing(root, (root / file for file in files))
    if problems:
        shown = "\n".join(f"  {problem}" for problem in problems[:_SHOWN_PROBLEMS])
        rest = f"\n  and {len(problems) - _SHOWN_PROBLEMS} more" if len(problems) > _SHOWN_PROBLEMS else ""
        raise InputError(
            f"{format_count(len(problems), 'document or folder', 'documents or folders')} under {path} cannot be used; "
            f"fix them, move them away, or point `corpus.path` elsewhere:\n{shown}{rest}"
        )


def _iter_file(root: Path, file: str, text_in: TextIn, seen: SeenFiles, problems: list[str]) -> Iterator[Measured]:
    """Yield the documents of one file, from its note or from itself; then they are noted, unless there was a problem."""
    question = f"documents {NOTE_VERSION} {text_in.kind} {text_in.field if has_columns(file) else ''}"
    draft, noted = seen.find(root / file, question)
    if noted is not None:
        for row, offset, n_bytes, digest in _NOTE.iter_unpack(noted):
            yield Measured(name_document(file, row), n_bytes, digest, Place(file, row, offset))
        return
    n_problems, notes = len(problems), bytearray()
    for found in iter_file(root, file, text_in, problems):
        n_bytes, digest = measure(found.text)
        notes += _NOTE.pack(found.place.row, found.place.offset, n_bytes, digest)
        yield Measured(found.source, n_bytes, digest, found.place)
    if len(problems) == n_problems:
        seen.note(draft, question, bytes(notes))
