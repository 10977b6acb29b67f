"""Files that were read before and have not changed since are answered from a note of that reading: one small database of this machine.

Planning needs digests of all text and of the model's weights, and reads nothing else of them. A note holds the answer to one question
about one file (`question`, for example "which documents, with which digests?") beside the file's stamp: device, inode, size, and the
nanoseconds of its last change of content (mtime) and of anything (ctime).

**The rule.** A note counts while the stamp is the same to the last nanosecond. A change that keeps the size and sets mtime back (`touch -d`,
`rsync -t`, `cp -p`) moves ctime, which no program can set, so it is noticed. A file that changed less than `SETTLED_NS` before it was read,
or while it was read, gets no note, because another change could bear the same time. What is left are file systems whose times lie, and
disks that rot: `execution.read_again` (`interp run --read-again`) reads everything. Even then nothing wrong is made: a shard's text is
hashed once more when it is tokenized, and weights when they are loaded, and what is not as planned is refused.

A note has a checksum over all of it, because SQLite has none: one that was damaged is no note.

The database lies in `INTERP_CACHE`, else in the user's cache folder. It may be deleted at any time. Where it cannot be read or written,
everything is read, as without it; ids never depend on it.
"""

import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterable
from contextlib import closing, suppress
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple

import xxhash

CACHE_VARIABLE: Final = "INTERP_CACHE"
SETTLED_NS: Final = 2_000_000_000
"""The coarsest times of common file systems (FAT) are two seconds apart."""
MAX_ANSWER_BYTES: Final = 500 << 20
"""Half of what SQLite takes in one value; a file with a longer answer is read each time."""
_SEAL_BYTES: Final = 16
_COMMIT_AFTER_S: Final = 2.0
_TABLE: Final = "CREATE TABLE IF NOT EXISTS notes (path BLOB, question TEXT, stamp TEXT, answer BLOB, PRIMARY KEY (path, question))"
_LOG: Final = logging.getLogger(__name__)


class Draft(NamedTuple):
    """A file that is about to be read: its stamp before, and when that was taken."""

    path: Path
    stamp: str
    is_settled: bool


class SeenFiles:
    """Notes of files that were read. A context manager; what was noted before an interrupt is kept."""

    def __init__(self, path: Path | None, *, reads_again: bool = False, now_ns: Callable[[], int] = time.time_ns) -> None:
        """Open the database at `path`, or none: then nothing is known and nothing noted. A damaged database is begun anew.

        `reads_again`: no note counts, and all are written anew.
        """
        self._now_ns, self._reads_again, self._committed = now_ns, reads_again, time.monotonic()
        self._path = path
        self._database = _open(path) if path else None

    def __enter__(self) -> "SeenFiles":  # noqa: PYI034 - beartype, which checks in tests, cannot read Self
        """Begin."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Keep the notes."""
        if self._database:
            with suppress(sqlite3.Error), closing(self._database) as database:
                database.commit()
            self._database = None

    def find(self, path: Path, question: str) -> tuple[Draft, bytes | None]:
        """Return what to give to `note` when the file has been read, and the noted answer if there is one. Raises `OSError` for no file."""
        path = path.absolute()
        stamp, changed_ns = stamp_file(path)
        draft = Draft(path, stamp, self._now_ns() - changed_ns >= SETTLED_NS)
        if self._reads_again:
            return draft, None
        row = self._ask("SELECT answer FROM notes WHERE path = ? AND question = ? AND stamp = ?", (os.fsencode(path), question, stamp))
        return draft, _unseal(row[0][0], draft, question) if row else None

    def note(self, draft: Draft, question: str, answer: bytes) -> bool:
        """Note what a file answered, unless it changed meanwhile or too lately; tell whether it was noted."""
        if self._database is None or not draft.is_settled or len(answer) > MAX_ANSWER_BYTES or stamp_file(draft.path)[0] != draft.stamp:
            return False
        sealed = _seal(draft, question, answer) + answer
        self._ask("INSERT OR REPLACE INTO notes VALUES (?, ?, ?, ?)", (os.fsencode(draft.path), question, draft.stamp, sealed))
        if time.monotonic() - self._committed > _COMMIT_AFTER_S and self._database:
            with suppress(sqlite3.Error):
                self._database.commit()
            self._committed = time.monotonic()
        return self._database is not None

    def recall(self, name: Path, stamp: str, question: str) -> bytes | None:
        """Return the noted answer of something that is no file, and whose stamp another one gave, such as an object's tag."""
        if self._reads_again:
            return None
        row = self._ask("SELECT answer FROM notes WHERE path = ? AND question = ? AND stamp = ?", (os.fsencode(name), question, stamp))
        return _unseal(row[0][0], Draft(name, stamp, is_settled=True), question) if row else None

    def keep(self, name: Path, stamp: str, question: str, answer: bytes) -> None:
        """Note what it answered, at once for all to see: who asks may go on for hours, and another process would wait for its turn to write."""
        sealed = _seal(Draft(name, stamp, is_settled=True), question, answer) + answer
        self._ask("INSERT OR REPLACE INTO notes VALUES (?, ?, ?, ?)", (os.fsencode(name), question, stamp, sealed))
        if self._database:
            with suppress(sqlite3.Error):
                self._database.commit()

    def answer(self, path: Path, question: str, read: Callable[[], bytes]) -> bytes:
        """Return the noted answer, or that of `read()`, which is then noted."""
        draft, noted = self.find(path, question)
        if noted is not None:
            return noted
        answer = read()
        self.note(draft, question, answer)
        return answer

    def forget_missing(self, folder: Path, files: Iterable[Path]) -> None:
        """Drop the notes of files below `folder` that are not among `files`, which must be all that are there."""
        root = os.fsencode(folder.absolute())
        known = {row[0] for row in self._ask("SELECT DISTINCT path FROM notes WHERE path > ? AND path < ?", (root + b"/", root + b"0"))}
        for path in known - {os.fsencode(file.absolute()) for file in files}:
            self._ask("DELETE FROM notes WHERE path = ?", (path,))

    def _ask(self, statement: str, values: tuple[object, ...]) -> list[tuple[bytes]]:
        """Run a statement; after the first that fails (a full disk, another process that does not let go) there is no database any more.

        A damaged one is deleted, so that the next process begins anew.
        """
        if self._database is None:
            return []
        try:
            return self._database.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            _LOG.info("Files are read without notes from here on: %s", error)
            with suppress(sqlite3.Error):
                self._database.close()
            self._database = None
            if _is_damage(error) and self._path:
                with suppress(OSError):
                    self._path.unlink(missing_ok=True)
            return []


def open_seen(*, read_again: bool = False) -> SeenFiles:
    """Open the notes of this user. `read_again`: believe none of them, and write all anew."""
    folder = cache_folder()
    return SeenFiles(folder / "seen-2.sqlite" if folder else None, reads_again=read_again)


def cache_folder() -> Path | None:
    """Return where notes lie: `INTERP_CACHE`, else `interp-assets` in the user's cache folder; None for a user without a home."""
    given, user = os.environ.get(CACHE_VARIABLE), os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(given).expanduser() if given else Path(user or "~/.cache").expanduser() / "interp-assets"
    except RuntimeError as error:  # no HOME, and a user id without an entry, as containers have
        _LOG.info("There are no notes of files: %s", error)
        return None


def _open(path: Path) -> sqlite3.Connection | None:
    """Open or make the database; None where that is impossible."""
    for _ in range(2):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return _connect(path)
        except (sqlite3.Error, OSError) as error:  # no folder, no right, locked, full; or damaged
            _LOG.info("There are no notes of files in %s: %s", path, error)
            if not _is_damage(error):
                return None
            with suppress(OSError):
                path.unlink(missing_ok=True)
    return None


def _connect(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=5.0, check_same_thread=False)
    try:
        database.execute("PRAGMA synchronous = OFF")  # a note that a power cut damages is no note, and waiting for a disk takes 100 times as long
        database.execute(_TABLE)
    except sqlite3.Error:
        database.close()
        raise
    return database


def _seal(draft: Draft, question: str, answer: bytes) -> bytes:
    """Return the checksum of a note: SQLite has none, and a flipped bit would be another file's answer."""
    hasher = xxhash.xxh3_128()
    for part in (os.fsencode(draft.path), question.encode(), draft.stamp.encode(), answer):
        hasher.update(len(part).to_bytes(8, "little") + part)
    return hasher.digest()


def _unseal(sealed: object, draft: Draft, question: str) -> bytes | None:
    """Return a noted answer; None for one that is not what was noted."""
    answer = sealed[_SEAL_BYTES:] if isinstance(sealed, bytes) else b""
    return answer if sealed == _seal(draft, question, answer) + answer else None


def _is_damage(error: Exception) -> bool:
    """Say whether SQLite found no database or a damaged one; what may pass (no right, locked, full) has classes of its own."""
    return type(error) is sqlite3.DatabaseError


def stamp_file(path: Path) -> tuple[str, int]:
    """Return what tells a file from a changed one, and the later of its two times."""
    facts = path.stat()
    stamp = f"{facts.st_dev}:{facts.st_ino}:{facts.st_size}:{facts.st_mtime_ns}:{facts.st_ctime_ns}"
    return stamp, max(facts.st_mtime_ns, facts.st_ctime_ns)
