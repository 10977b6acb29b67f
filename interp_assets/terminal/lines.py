"""How the work goes, as plain lines for a log file or a pipe: no bars, no escape codes, and never minutes of silence.

    activations: 12 partitions to make
    activations: 4 of 12 done, shard-000004 at 43 %; 1 min 20 s so far, about 2 min 24 s left

A line comes when an asset of several partitions begins, and every `every_s` seconds from then on, from a thread of its own: a stage that
computes for an hour without a word would print nothing if only its own calls did. What is left is what there was so far, in proportion:
partitions of one asset are alike. Before a twentieth of the work is done, nothing is said of it.
"""

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Final

from rich.console import Console

from interp_assets.planning.progress import Progress
from interp_assets.terminal.console import Bars

EVERY_S: Final = 15.0
_KNOWN_FROM: Final = 0.05


class Lines(Progress):
    """Prints lines about the asset at hand. A context manager: its thread ends with it."""

    def __init__(self, console: Console, *, every_s: float = EVERY_S, now: Callable[[], float] = time.monotonic) -> None:
        """Print on `console`."""
        self._console, self._every_s, self._now = console, every_s, now
        self._over, self._lock = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._asset, self._partition = "", ""
        self._n_partitions = self._n_made = self._n_units = self._n_last = 0
        self._n_expected: int | None = None
        self._began = 0.0

    def __enter__(self) -> "Lines":  # noqa: PYI034 - beartype, which checks in tests, cannot read Self
        """Start to watch."""
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """End the thread."""
        self._over.set()
        self._thread.join()

    def expect(self, asset: str, n_partitions: int) -> None:
        """Say how many partitions of an asset are made next."""
        with self._lock:
            self._asset, self._n_partitions, self._n_made, self._partition = asset, n_partitions, 0, ""
            self._n_units, self._n_last, self._n_expected, self._began = 0, 0, None, self._now()
        if n_partitions > 1:
            self._print(f"{asset}: {n_partitions:,} partitions to make")

    def begin(self, asset: str, partition: str, n_units: int | None = None) -> None:
        """Remember the partition at hand; the last one's units are the next one's estimate."""
        with self._lock:
            known = max(self._n_units, self._n_last) if asset == self._asset else 0
            self._asset, self._partition, self._n_units, self._n_expected = asset, partition, 0, n_units or known or self._n_expected

    def advance(self, n: int) -> None:
        """Count units of work."""
        with self._lock:
            self._n_units += n

    def end(self) -> None:
        """Count the finished partition."""
        with self._lock:
            self._n_made, self._partition = self._n_made + 1, ""
            self._n_last, self._n_units = self._n_units, 0

    def tell(self, sentence: str) -> None:
        """Print a sentence."""
        self._print(sentence)

    def describe(self) -> str:
        """Say how far the asset at hand is; nothing between assets."""
        with self._lock:
            if not self._n_partitions or self._n_made >= self._n_partitions:
                return ""
            share = min(1.0, self._n_units / self._n_expected) if self._n_expected and self._n_units else 0.0
            wall_s, done = self._now() - self._began, self._n_made + share
            parts = [f"{self._n_made:,} of {self._n_partitions:,} done"] if self._n_partitions > 1 else []
            if self._partition or share:
                at = f"at {share:.0%}".replace("%", " %") if share else f"with {self._n_units:,} units of work done" if self._n_units else "at work"
                parts.append(f"{self._partition} {at}".strip())
            left = ""
            if _KNOWN_FROM <= done / self._n_partitions < 1:
                left = f", about {format_duration(wall_s * (self._n_partitions - done) / done)} left"
            return f"{self._asset}: {', '.join(parts) or 'at work'}; {format_duration(wall_s)} so far{left}"

    def _watch(self) -> None:
        while not self._over.wait(self._every_s):
            if line := self.describe():
                self._print(line)

    def _print(self, line: str) -> None:
        self._console.print(f"  {line}", soft_wrap=True, markup=False, highlight=False)


def watch(console: Console) -> Bars | Lines:
    """Return what shows a person how the work goes: bars on a terminal, lines elsewhere."""
    return Bars(console) if console.is_terminal else Lines(console)


def format_duration(seconds: float) -> str:
    """Write a duration in its two largest units: 45 s, 2 min 5 s, 3 h 20 min, 4 d 6 h."""
    units = [(86400, "d"), (3600, "h"), (60, "min"), (1, "s")]
    rest = max(0, round(seconds))
    if rest >= 3600:
        rest = round(rest / 60) * 60
    if rest >= 86400:
        rest = round(rest / 3600) * 3600
    parts = []
    for size, name in units:
        if rest >= size:
            parts.append(f"{rest // size} {name}")
            rest %= size
    return " ".join(parts[:2]) or "< 1 s"
