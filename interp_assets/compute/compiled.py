"""A loop over elements becomes native code at its first call, which is kept on disk where the disk can be written.

Compiled loops hold no lock of Python's while they run, so threads run them side by side. Numba types its arguments itself: what checks
types of annotated functions at run time is unwrapped.

What a loop calls becomes part of its code. Numba keeps that until the file of the loop itself changes, and would go on with the old code of a
function that was changed in another: so the files in `SHARED`, whose functions loops of other files call, count as part of each loop's.
"""

import hashlib
import inspect
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

import numba
from numba.core import event
from numba.core.caching import FunctionCache

SHARED: Final = tuple(
    Path(__file__).parent / name for name in ("compiled.py", "vectors.py", "dots.py", "coarse.py", "bfloat16.py", "loops.py", "encode_loops.py")
)
"""Files with functions that compiled loops of other files call."""


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a loop at its first call; its arithmetic is done in the order in which it is written."""
    return _compile(function, reorders=False)


def reordered(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a loop whose sums may be added in the order of the processor's lanes, and products into sums without rounding between."""
    return _compile(function, reorders=True)


def digest_of(files: Iterable[Path]) -> str:
    """Return the digest of the content of files."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _compile(function: Callable[..., Any], *, reorders: bool) -> Callable[..., Any]:
    plain, freedom = inspect.unwrap(function), {"reassoc", "contract"} if reorders else False
    dispatcher: Any = numba.njit(nogil=True, error_model="numpy", fastmath=freedom)(plain)
    with suppress(RuntimeError):  # nowhere to keep compiled code: a read-only file system
        dispatcher._cache = _Cache(plain)  # noqa: SLF001 - what `cache=True` does, with a stamp of more files
    return dispatcher


_shared_digest: Final = digest_of(SHARED)


class _Cache(FunctionCache):
    """Compiled code that is fresh only while the loop's own file and all shared ones are as they were."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self._cache_file._source_stamp = (self._cache_file._source_stamp, _shared_digest)  # noqa: SLF001 - no public way to add to it


class _Compilations(event.Listener):
    """Hears of each loop that is compiled, not of one that is read from disk."""

    def __init__(self) -> None:
        self.n = self.n_open = 0
        self.took_s = self._began_s = 0.0
        self.tell: Callable[[Compiling], Any] = str

    def on_start(self, event: event.Event) -> None:  # noqa: ARG002 - the base class' signature
        if not self.n_open:
            self._began_s = time.monotonic()
        self.n, self.n_open = self.n + 1, self.n_open + 1
        self.tell(observe_compiling())

    def on_end(self, event: event.Event) -> None:  # noqa: ARG002 - as above
        self.n_open -= 1
        if not self.n_open:
            self.took_s += time.monotonic() - self._began_s
            self.tell(observe_compiling())


_compilations = _Compilations()
_heard: list["Compiling"] = []
event.register("numba:compile", _compilations)


class Compiling(NamedTuple):
    """What this process has to do with compiling at the moment."""

    is_busy: bool
    took_s: float
    """Seconds spent so far, that of the loop at hand left out."""
    n: int = 0
    """Loops that were compiled, or are."""


def observe_compiling() -> Compiling:
    """Tell whether a loop is being compiled, here or in processes that are heard of, and how long the others took: no rate is made of that."""
    own = Compiling(_compilations.n_open > 0, _compilations.took_s, _compilations.n)
    found = [own, *_heard]
    return Compiling(any(item.is_busy for item in found), sum(item.took_s for item in found), sum(item.n for item in found))


def n_compilations() -> int:
    """Return how many loops this process, and those that are heard of, have compiled: a second each, which no rate should count."""
    return observe_compiling().n


def tell_compiling(tell: Callable[[Compiling], Any]) -> None:
    """Let `tell` hear whenever a loop begins or ends to be compiled in this process: for one that works for another."""
    _compilations.tell = tell


def hear_compiling() -> Callable[[Compiling], None]:
    """Return what takes the latest word of another process that works for this one."""
    place = len(_heard)
    _heard.append(Compiling(is_busy=False, took_s=0.0))

    def hear(found: Compiling) -> None:
        _heard[place] = found

    return hear
