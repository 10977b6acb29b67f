"""Large local files are read and written past the page cache, in aligned pieces, from memory that is used again.

Why: a shuffle moves every byte twice through a machine and never looks at it again, so the page cache only costs. Where this was measured,
buffered writes with fsync ran at 0.3 GB/s and direct ones at 1.7; the first touch of a page (the kernel zeroes it) cost three to thirty
times what copying it did, so buffers ask for huge pages and are kept.

Direct I/O wants offset, length and address to be multiples of `ALIGNMENT`. Reads take the aligned part directly and what is left over
ordinarily. Writes pad the last piece and cut the file to its length. File systems that refuse direct I/O get ordinary reads and writes.

Only `store.py` and buffers' users import this; what may be read or written is the store's business.
"""

import glob
import itertools
import mmap
import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Final

import numpy as np
from numpy.typing import NDArray

from interp_assets.storage.process_names import NUMBER_DIGITS, may_run_number, number_process

ALIGNMENT: Final = 4096
PIECE_BYTES: Final = 8 << 20
"""One direct write."""
_N_PIECES: Final = 3
"""Pieces of a writer: one being filled, the others on their way."""
_SPARE: Final[SimpleQueue[mmap.mmap]] = SimpleQueue()
_MOST_SPARE: Final = 8
"""Pieces of this process that nobody has borrowed and that are kept."""
_DIRECT: Final = getattr(os, "O_DIRECT", 0)
_COUNTER: Final = itertools.count()
_FORGOTTEN_S: Final = 7 * 24 * 3600
"""A file that nobody has written to for so long has no writer, on whatever machine it was."""


class Workspace:
    """Memory that a process lends to one job after the other, so that its pages are touched for the first time only once.

    One buffer is kept, the largest asked for. Not for several threads at once.
    """

    def __init__(self) -> None:
        """Start with nothing."""
        self._memory: mmap.mmap | None = None
        self._is_lent = False

    @contextmanager
    def lend(self, n_bytes: int) -> Iterator[NDArray[np.uint8]]:
        """Lend `n_bytes` of page-aligned memory with arbitrary content until the block ends; no view of it may outlive the block."""
        assert not self._is_lent, "a workspace lends to one job at a time"
        if self._memory is None or len(self._memory) < n_bytes:
            self._memory = None  # the old one is given back before the new one is asked for
            self._memory = allocate(n_bytes)
        self._is_lent = True
        try:
            yield np.frombuffer(self._memory, np.uint8, n_bytes)
        finally:
            self._is_lent = False


def allocate(n_bytes: int) -> mmap.mmap:
    """Return page-aligned anonymous memory of at least `n_bytes`, in huge pages where the system has them."""
    memory = mmap.mmap(-1, max(ALIGNMENT, -(-n_bytes // ALIGNMENT) * ALIGNMENT))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def borrow_piece() -> mmap.mmap:
    """Return a piece of `PIECE_BYTES` with arbitrary content; one that was given back, if there is one. Safe for threads."""
    try:
        return _SPARE.get_nowait()
    except Empty:
        return allocate(PIECE_BYTES)


def give_back(piece: mmap.mmap) -> None:
    """Take a piece that nothing reads or writes any more; a few are kept."""
    if _SPARE.qsize() < _MOST_SPARE:
        _SPARE.put(piece)


def read_into(path: Path, start: int, out: memoryview) -> int:
    """Fill `out` with the bytes of a file from `start` on; returns how many there were. Direct where `start` and `out` are aligned."""
    n_direct = len(out) // ALIGNMENT * ALIGNMENT if _DIRECT and _is_aligned(start, out) else 0
    n_read = 0
    if n_direct:
        with suppress(OSError):  # a file system without direct I/O: read everything below
            n_read = _read(path, _DIRECT, start, out[:n_direct])
            if n_read < n_direct:
                return n_read
    if n_read < len(out):
        n_read += _read(path, 0, start + n_read, out[n_read:])
    return n_read


def _is_aligned(start: int, out: memoryview) -> bool:
    return start % ALIGNMENT == 0 and np.frombuffer(out, np.uint8).ctypes.data % ALIGNMENT == 0


def _read(path: Path, flags: int, start: int, out: memoryview) -> int:
    descriptor, n_read = os.open(path, os.O_RDONLY | flags), 0
    try:
        while n_read < len(out):
            n_new = os.preadv(descriptor, [out[n_read:]], start + n_read)
            n_read += n_new
            if n_new == 0 or (flags and n_new % ALIGNMENT):
                break
    finally:
        os.close(descriptor)
    return n_read


class DirectWriter:
    """Streams one file: bytes are copied into pieces that a thread of its own writes, and the file appears whole and durable on `close`.

    Until then it lies beside its place under a name with `#`, which no listing shows. A file of less than one piece is written through the
    page cache. After any error call `abort`.
    """

    def __init__(self, path: Path) -> None:
        """Write to `path`; its folder is made when the first piece is full or the file is closed."""
        self._path = path
        self._temporary = path.with_name(f"{path.name}#{number_process()}{next(_COUNTER) % 10**6:06d}")
        self._descriptor = -1
        self._free: SimpleQueue[mmap.mmap] = SimpleQueue()
        self._n_borrowed = self._n_filled = self._n_written = 0
        self._piece = self._next_piece()
        self._thread = ThreadPoolExecutor(1, "direct-writer")
        self._pending: list[Future[None]] = []

    def write(self, data: bytes | memoryview) -> None:
        """Append a copy of `data`. Raises `OSError` of this or of an earlier piece."""
        view = memoryview(data).cast("B")
        while len(view):
            n_new = min(len(view), PIECE_BYTES - self._n_filled)
            target = np.frombuffer(self._piece, np.uint8, n_new, self._n_filled)
            np.copyto(target, np.frombuffer(view, np.uint8, n_new))  # lets other threads work meanwhile, as a slice of the mmap does not
            self._n_filled, view = self._n_filled + n_new, view[n_new:]
            if self._n_filled == PIECE_BYTES:
                self._send(PIECE_BYTES)
                self._piece = self._next_piece()

    def close(self) -> None:
        """Write what is left, flush file and folder to the disk, and give the file its name."""
        if self._descriptor < 0:  # a small file: through the page cache, somebody will soon read it
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            self._write_piece(self._piece, self._n_filled, 0)
        elif self._n_filled:
            n_bytes = self._n_written + self._n_filled
            n_padded = -(-self._n_filled // ALIGNMENT) * ALIGNMENT
            self._piece[self._n_filled : n_padded] = bytes(n_padded - self._n_filled)
            self._send(n_padded)
            self._join()
            os.ftruncate(self._descriptor, n_bytes)
        self._join()
        os.fsync(self._descriptor)
        os.close(self._descriptor)
        self._descriptor = -1
        self._end_thread()
        self._temporary.replace(self._path)
        flush(self._path.parent)

    def abort(self) -> None:
        """Remove every trace of the file."""
        self._end_thread()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        self._temporary.unlink(missing_ok=True)

    def _next_piece(self) -> mmap.mmap:
        """Return a piece that is not on its way: a new one while there are few, else the first that was written."""
        self._n_filled = 0
        if self._n_borrowed < _N_PIECES:
            self._n_borrowed += 1
            return borrow_piece()
        self._raise_early()
        return self._free.get()

    def _end_thread(self) -> None:
        """Wait for the thread, and give all pieces back."""
        self._thread.shutdown(cancel_futures=True)
        pieces = {id(self._piece): self._piece} if self._n_borrowed else {}  # the last piece may have been sent, and lie in both places
        while not self._free.empty():
            piece = self._free.get()
            pieces[id(piece)] = piece
        for piece in pieces.values():
            give_back(piece)
        self._n_borrowed = 0

    def _send(self, n_bytes: int) -> None:
        if self._descriptor < 0:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            remove_remains(self._path)
            self._descriptor = _create(self._temporary)
        self._pending.append(self._thread.submit(self._write_piece, self._piece, n_bytes, self._n_written))
        self._n_written += n_bytes
        self._n_filled = 0

    def _write_piece(self, piece: mmap.mmap, n_bytes: int, start: int) -> None:
        try:
            view, done = memoryview(piece)[:n_bytes], 0
            while done < n_bytes:
                done += os.pwrite(self._descriptor, view[done:], start + done)
        finally:
            self._free.put(piece)

    def _raise_early(self) -> None:
        while self._pending and self._pending[0].done():
            self._pending.pop(0).result()

    def _join(self) -> None:
        for future in self._pending:
            future.result()
        self._pending.clear()


def remove_remains(path: Path) -> None:
    """Remove what writers of `path` that were killed left behind: a file of many gigabytes that no listing shows.

    The file's name holds its writer's number, so that a process which now has the same id, here or on another machine of a shared disk, is
    not taken for it. Of another machine's writer only time tells.
    """
    for item in path.parent.glob(f"{glob.escape(path.name)}#*"):
        with suppress(FileNotFoundError):  # another writer of the same file does the same
            if _is_abandoned(item):
                item.unlink()


def find_remains(folder: Path) -> list[Path]:
    """List what writers of any file below a folder that were killed left behind."""
    found = []
    for item in sorted(folder.rglob("*#*")):
        with suppress(FileNotFoundError):
            if item.is_file() and re.search(rf"#\d{{{NUMBER_DIGITS + 6}}}$", item.name) and _is_abandoned(item):
                found.append(item)
    return found


def _is_abandoned(item: Path) -> bool:
    match = re.fullmatch(rf"(\d{{{NUMBER_DIGITS}}})\d{{6}}", item.name.rpartition("#")[2])
    return (match is not None and not may_run_number(match[1])) or time.time() - item.stat().st_mtime > _FORGOTTEN_S


def flush(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _create(path: Path) -> int:
    """Open a new file for writing, directly where the file system can."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
        return os.open(path, flags | _DIRECT, 0o666)
    except OSError:
        path.unlink(missing_ok=True)  # some file systems make the file and then refuse
        return os.open(path, flags, 0o666)
