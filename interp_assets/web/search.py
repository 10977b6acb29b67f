"""The features' tokens become `search.sqlite`, a full-text index that finds features by any piece of a token.

Full-text search breaks text into words and drops the rest; tokens are pieces of words, spaces and punctuation. So every distinct token
gets a number, and the index (SQLite FTS5, contentless, 2-3 bytes per entry) holds the numbers as words, one column per kind of evidence:

    words(id, text)                              every distinct token string of the bundle, with its lower-case form
    features(peaks, raised, lowered)             per latent: tokens at the peaks of its top examples, and its top and bottom logits

A query is cut at spaces; each part selects all tokens that contain it (letter case ignored), and a feature must match every part. To
find tokens by their own spaces, a part may be quoted: `" in"` finds ` in`, ` int`, ` import`... A part may name its column: `raised:def`.

Bytes: the same tables in the same order with the same SQLite give the same file (the library's version number, which SQLite writes into
the header, is cleared). The index is made with the bundle, because at ten million features building it takes minutes.
"""

import re
import sqlite3
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from interp_assets.errors import ArtifactCorruptError, InputError

COLUMNS: Final = ("peaks", "raised", "lowered")
"""Tokens at the peaks of the top examples, top logits, bottom logits."""
MAX_QUERY: Final = 200
"""Characters of a query."""
_PART: Final = re.compile(r'(?:(\w+):)?(?:"([^"]*)"|(\S+))')
_VERSION_FIELD: Final = slice(96, 100)
"""Where SQLite's header keeps the version of the library that wrote the file; informative only."""


class FeatureWords(NamedTuple):
    """What can be searched of one latent."""

    latent: int
    peaks: Sequence[str]
    raised: Sequence[str]
    lowered: Sequence[str]


def build_index(features: Iterable[FeatureWords]) -> bytes:
    """Return the bytes of an SQLite file that indexes `features`. About 10 us each."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "search.sqlite"
        connection = sqlite3.connect(path, isolation_level=None)
        try:
            _fill(connection, features)
        finally:
            connection.close()
        data = bytearray(path.read_bytes())
    data[_VERSION_FIELD] = bytes(4)
    return bytes(data)


def _fill(connection: sqlite3.Connection, features: Iterable[FeatureWords]) -> None:
    numbers: dict[str, int] = {}

    def encode(words: Sequence[str]) -> str:
        return " ".join(f"w{numbers.setdefault(word, len(numbers))}" for word in words)

    connection.execute("PRAGMA journal_mode = OFF")
    connection.execute("PRAGMA synchronous = OFF")
    connection.execute("PRAGMA page_size = 4096")
    connection.execute("CREATE TABLE words (id INTEGER PRIMARY KEY, text TEXT NOT NULL, folded TEXT NOT NULL)")
    connection.execute(f"CREATE VIRTUAL TABLE features USING fts5({', '.join(COLUMNS)}, content='', detail=column, columnsize=0)")
    connection.execute("BEGIN")
    connection.executemany(
        "INSERT INTO features (rowid, peaks, raised, lowered) VALUES (?, ?, ?, ?)",
        ((item.latent, encode(item.peaks), encode(item.raised), encode(item.lowered)) for item in features),
    )
    connection.executemany("INSERT INTO words VALUES (?, ?, ?)", ((number, word, word.casefold()) for word, number in numbers.items()))
    connection.execute("INSERT INTO features (features) VALUES ('optimize')")
    connection.execute("COMMIT")
    connection.execute("VACUUM")


def search_latents(path: Path, query: str) -> NDArray[np.uint32]:
    """Return the latents that match `query`, rising. Raises `InputError` for a query that is too long, `ArtifactCorruptError` for a damaged index."""
    if len(query) > MAX_QUERY:
        raise InputError(f"The query has {len(query):,} characters, at most {MAX_QUERY} are searched. Shorten it.")
    connection = sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True)
    try:
        expressions = [_expression(connection, *part) for part in _parse(query)]
        if not expressions or None in expressions:
            return np.empty(0, np.uint32)
        match = " AND ".join(f"({expression})" for expression in expressions)
        found = connection.execute("SELECT rowid FROM features WHERE features MATCH ? ORDER BY rowid", (match,))
        return np.fromiter((row[0] for row in found), np.uint32)
    except sqlite3.DatabaseError as error:
        raise ArtifactCorruptError(f"The search index {path} cannot be read ({error}). Materialize the bundle again.") from error
    finally:
        connection.close()


def _parse(query: str) -> list[tuple[str, str]]:
    """Cut a query into (column or "", text)."""
    parts = []
    for column, quoted, plain in _PART.findall(query):
        if column and column not in COLUMNS:
            parts.append(("", f"{column}:{quoted or plain}"))  # a token may hold a colon
        else:
            parts.append((column, quoted or plain))
    return [(column, text) for column, text in parts if text]


def _expression(connection: sqlite3.Connection, column: str, text: str) -> str | None:
    """Return the FTS5 expression for all tokens that contain `text`, or None when there are none."""
    found = connection.execute("SELECT id FROM words WHERE instr(folded, ?)", (text.casefold(),)).fetchall()
    if not found:
        return None
    words = " OR ".join(f"w{number}" for (number,) in found)
    return f"{{{column or ' '.join(COLUMNS)}}} : ({words})"
