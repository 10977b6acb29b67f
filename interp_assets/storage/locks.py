"""A file becomes a lock between processes: one holds it, says in it who it is, and the system lets go of it when that process ends.

`flock` is what the kernel gives back however a process dies, so no lock is ever left behind; what a dead holder wrote is overwritten by the
next one. The file itself stays, because to delete it would give two processes two locks. Where a file system has no locks, or the folder
cannot be written, nothing is locked: work goes on as it would have without. Source: flock(2).
"""

import errno
import fcntl
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO, Any, Final, NamedTuple

_POLL_S: Final = 0.2
_NO_LOCKS: Final = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Holder(NamedTuple):
    """Who holds a lock."""

    process_id: int
    host: str
    command: str
    since: str
    """Local time, ISO 8601."""

    def describe(self) -> str:
        """Name it for people."""
        return f"`{self.command}` (process {self.process_id} on {self.host}, since {self.since.replace('T', ' ')})"


@contextmanager
def locked(path: Path, *, waits_for: Callable[[Holder | None], None] | None = None, sleep: Callable[[float], None] = time.sleep) -> Iterator[None]:
    """Hold the lock of a file, made when it is not there, while the block runs; `waits_for` hears once who holds it meanwhile."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError:
        yield
        return
    with file:
        is_ours = _wait(file, waits_for, sleep)
        if is_ours:
            _write(file, json.dumps(name_holder()._asdict()) + "\n")
        try:
            yield
        finally:
            if is_ours:
                _write(file, "")


def _wait(file: IO[str], waits_for: Callable[[Holder | None], None] | None, sleep: Callable[[float], None]) -> bool:
    """Wait for the lock; answer False where there are no locks."""
    is_told = False
    while True:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waits_for is not None and not is_told:
                waits_for(_read(file))
                is_told = True
            sleep(_POLL_S)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return False
        else:
            return True


def name_holder() -> Holder:
    """Name this process."""
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return Holder(os.getpid(), socket.gethostname(), command, datetime.now().astimezone().isoformat(timespec="seconds"))


def _read(file: IO[str]) -> Holder | None:
    file.seek(0)
    try:
        return parse_holder(json.loads(file.read(1 << 16)))
    except ValueError:
        return None


def parse_holder(content: Any) -> Holder | None:
    """Return the holder that JSON names; None where it names none."""
    try:
        return Holder(int(content["process_id"]), str(content["host"]), str(content["command"]), str(content["since"]))
    except (ValueError, TypeError, KeyError):
        return None


def _write(file: IO[str], text: str) -> None:
    file.seek(0)
    file.truncate()
    file.write(text)
    file.flush()
