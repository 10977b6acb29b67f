"""A loop over elements becomes native code at its first call, which is kept on disk where the disk can be written.

Compiled loops hold no lock of Python's while they run, so threads run them side by side. Numba types its arguments itself: what checks
types of annotated functions at run time is unwrapped.
"""

import inspect
from collections.abc import Callable
from typing import Any

import numba
from numba.core import event


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a loop at its first call; its arithmetic is done in the order in which it is written."""
    return _compile(function, reorders=False)


def reordered(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a loop whose sums may be added in the order of the processor's lanes, and products into sums without rounding between."""
    return _compile(function, reorders=True)


def _compile(function: Callable[..., Any], *, reorders: bool) -> Callable[..., Any]:
    plain, freedom = inspect.unwrap(function), {"reassoc", "contract"} if reorders else False
    try:
        return numba.njit(nogil=True, cache=True, error_model="numpy", fastmath=freedom)(plain)
    except RuntimeError:  # nowhere to keep compiled code: a read-only file system
        return numba.njit(nogil=True, error_model="numpy", fastmath=freedom)(plain)


class _Compilations(event.Listener):
    """Hears of each loop that is compiled, not of one that is read from disk."""

    def __init__(self) -> None:
        self.n = 0

    def on_start(self, event: event.Event) -> None:  # noqa: ARG002 - the base class' signature
        self.n += 1

    def on_end(self, event: event.Event) -> None:
        """Nothing."""


_compilations = _Compilations()
event.register("numba:compile", _compilations)


def n_compilations() -> int:
    """Return how many loops this process has compiled: a second each, which no rate should count."""
    return _compilations.n
