"""How the work goes, as plain lines for a log file or a pipe: no bars, no escape codes, and never minutes of silence.

    activations: 12 partitions to make
    activations: 4 of 12 done, shard-000004 at 43 %; 1 min 20 s so far, about 2 min 24 s left
    sae: demo at 12 %, compiling loops (once on this machine); 40 s so far
    sae: demo at 60 %, FVU 0.21, L0 32.0; 9 min so far, about 6 min left
    sae: demo at 100 %, writing and checking it; 15 min so far

A line comes when an asset of several partitions begins, and every `every_s` seconds from then on, from a thread of its own: a stage that
computes for an hour without a word would print nothing if only its own calls did. What is left is `left.py`'s: partitions of one asset are alike.
"""

import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Final

from rich.console import Console

from interp_assets.planning.progress import Doing, Progress, describe_workers, format_count
from interp_assets.terminal.console import Bars, name_together
from interp_assets.terminal.left import Remaining, find_compiling

if TYPE_CHECKING:
    from interp_assets.compute.compiled import Compiling

EVERY_S: Final = 15.0


class Lines(Progress):
    """Prints lines about the asset at hand. A context manager: its thread ends with it."""

    def __init__(
        self,
        console: Console,
        *,
        every_s: float = EVERY_S,
        now: Callable[[], float] = time.monotonic,
        compiling: "Callable[[], Compiling | None]" = find_compiling,
    ) -> None:
        """Print on `console`."""
        self._console, self._every_s, self._now, self._compiling = console, every_s, now, compiling
        self._over, self._lock = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._asset, self._partition, self._unit = "", "", "rows"
        self._measured = self._workers = ""
        self._n_partitions = self._n_made = self._n_units = self._n_last = 0
        self._together = range(0)
        """Which of the partitions, counted, were begun at once and have not all ended."""
        self._n_expected: int | None = None
        self._left = Remaining(now, compiling)

    def __enter__(self) -> "Lines":  # noqa: PYI034 - beartype, which checks in tests, cannot read Self
        """Start to watch."""
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """End the thread."""
        self._over.set()
        self._thread.join()

    def expect(self, asset: str, n_partitions: int, unit: str = "rows") -> None:
        """Say how many partitions of an asset are made next."""
        with self._lock:
            self._asset, self._n_partitions, self._n_made, self._partition, self._unit = asset, n_partitions, 0, "", unit
            self._n_units, self._n_last, self._n_expected, self._left = 0, 0, None, Remaining(self._now, self._compiling)
            self._together, self._measured, self._workers = range(0), "", ""
        if n_partitions > 1:
            self._print(f"{asset}: {format_count(n_partitions, 'partition')} to make")

    def begin(self, asset: str, partition: str, n_units: int | None = None) -> None:
        """Remember the partition at hand; the last one's units are the next one's estimate."""
        with self._lock:
            self._measured = ""
            if self._n_made in self._together:  # its work is done: it is only written down
                self._partition = partition
                return
            known = max(self._n_units, self._n_last) if asset == self._asset else 0
            self._asset, self._partition, self._n_units, self._n_expected = asset, partition, 0, n_units or known or self._n_expected

    def begin_together(self, asset: str, partitions: Sequence[str], n_units: int) -> None:
        """Remember that the units of several partitions are done at once."""
        with self._lock:
            self._together, self._measured = range(self._n_made, self._n_made + len(partitions)), ""
            self._asset, self._partition, self._n_units, self._n_expected = asset, name_together(partitions), 0, n_units

    def measure(self, text: str) -> None:
        """Remember how good it is so far."""
        with self._lock:
            self._measured = text

    def watch(self, doing: Sequence[Doing]) -> None:
        """Remember what workers are doing side by side."""
        with self._lock:
            self._workers = describe_workers(doing, self._unit) if doing else ""

    def advance(self, n: int) -> None:
        """Count units of work."""
        with self._lock:
            self._n_units += n

    def end(self) -> None:
        """Count the finished partition."""
        with self._lock:
            self._n_made, self._partition = self._n_made + 1, ""
            if self._n_made not in self._together:
                self._n_last, self._n_units, self._together = self._n_units, 0, range(0)

    def leave(self) -> None:
        """Forget a partition that holds nothing."""
        with self._lock:
            self._partition, self._n_units = "", 0

    def tell(self, sentence: str) -> None:
        """Print a sentence."""
        self._print(sentence)

    def describe(self) -> str:
        """Say how far the asset at hand is; nothing where nothing is to be made."""
        with self._lock:
            if not self._n_partitions:
                return ""
            share = min(1.0, self._n_units / self._n_expected) if self._n_expected and self._n_units else 0.0
            n, n_made = self._n_partitions, min(self._n_made, self._n_partitions)
            parts = [f"{n_made:,} of {n:,} done"] if n > 1 else []
            if n_made == n:
                parts.append("checking what was made")
            elif self._workers:
                parts.append(self._workers)
            elif self._partition or share:
                at = f"at {share:.0%}".replace("%", " %") if share else f"with {self._n_units:,} {self._unit} done" if self._n_units else "at work"
                parts.append(f"{self._partition} {at}".strip() + (", writing and checking it" if share == 1 else ""))
                parts += [self._measured] if self._measured and share < 1 else []
            if (found := self._compiling()) and found.is_busy:
                parts.append("compiling loops (once on this machine)")
            n_worked = self._together.start + share * len(self._together) if self._together else n_made + share
            left = self._left.estimate(min(1.0, n_worked / n))
            rest = f", about {format_duration(left.seconds)} left" + (f" ({left.why})" if left.why else "") if left else ""
            return f"{self._asset}: {', '.join(parts) or 'at work'}; {format_duration(self._left.wall_s)} so far{rest}"

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
