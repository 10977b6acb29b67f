"""The running interpreter's standard library -> an ordered stream of documents, each with a stable held-out flag.

It is the one corpus that every machine with Python already has: no download, no account, and text that people who read features know by heart.
The demo runs on it, and the subject model that ships with the project was trained on it.

1. Walk the library folder; keep `.py` files outside `site-packages` and the like, as paths relative to the folder, with forward slashes.
2. Order: the library first, its test packages after it, each sorted by path. A caller who stops early gets library code, and an interpreter whose
   distribution ships no tests (Debian's) yields a prefix of the same order.
3. Skip what is not text to learn from: undecodable or blank files, exact copies of an earlier document, and the generated character-mapping tables of
   `encodings` (one table 70 times over: 1.2 MB that would flatter every held-out number).

The held-out rule hashes the path, not the position, so that a document is on the same side of the split on every Python version that has it.
Tokenizing and sharding do not belong here. The text itself differs between Python versions: whoever needs equal bytes pins the interpreter.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

HELD_OUT_PER_MILLE = 30
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__"})
TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
GENERATED_TABLE_MARK = "gencodec.py"


def iter_stdlib_documents(root: Path | None = None, *, with_tests: bool = True) -> Iterator[tuple[str, str]]:
    """Yield `(source, text)` for each document, `source` being its path below `root` (default: this interpreter's library)."""
    folder = Path(sysconfig.get_path("stdlib")) if root is None else root
    seen: set[bytes] = set()
    for source in _ordered_sources(folder, with_tests=with_tests):
        text = _read_text(folder / source)
        if not text.strip() or GENERATED_TABLE_MARK in text:
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if digest not in seen:
            seen.add(digest)
            yield source, text


def is_held_out(source: str) -> bool:
    """Tell whether the document at this relative path is kept from training: 3 % of all paths, chosen by hash."""
    digest = hashlib.sha256(source.encode()).digest()
    return int.from_bytes(digest[:8], "big") % 1000 < HELD_OUT_PER_MILLE


def is_test_source(source: str) -> bool:
    """Tell whether a relative path lies in one of the library's test packages."""
    return not TEST_FOLDERS.isdisjoint(source.split("/")[:-1])


def _ordered_sources(folder: Path, *, with_tests: bool) -> list[str]:
    """List relative paths: the library by path, then, if wanted, its tests by path."""
    sources: list[str] = []
    for parent, subfolders, names in os.walk(folder):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        sources += [(Path(parent) / name).relative_to(folder).as_posix() for name in names if name.endswith(".py")]
    return sorted((source for source in sources if with_tests or not is_test_source(source)), key=lambda source: (is_test_source(source), source))


def _read_text(path: Path) -> str:
    """Read UTF-8 text with its line ends unified; what cannot be decoded counts as blank (the library keeps such files to test its parser)."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""
