"""Who hears how the work goes: nobody by default, the command line's bars when a person watches."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple, Protocol, runtime_checkable

from interp_assets.storage.traffic import Traffic

Advance = Callable[[int], None]
"""What a stage calls with the units of work that it has done since the last call."""


def unheard(_n: int) -> None:
    """Hear of work and ignore it."""


class Compared(NamedTuple):
    """What a partition was expected to take, and what it took."""

    table: list[dict[str, Any]]
    """A row a unit, as assumed of any machine."""
    forecast_s: float
    """What was forecast of this machine."""


class Doing(NamedTuple):
    """What a worker of several is doing."""

    key: str
    """Its partition; empty where it waits."""
    n_units: int
    seconds: float
    """Since it began."""


@runtime_checkable
class Estimator(Protocol):
    """Knows what partitions should take, and learns from what they took."""

    def foresee(self, asset: Sequence[str], partition: str) -> float | None:
        """Return the seconds that a partition was forecast to take on this machine when the run began; None where nothing is expected."""
        ...

    def compare(self, asset: Sequence[str], partition: str, traffic: Traffic, seconds: float, *, is_whole: bool) -> Compared | None:
        """Return what was expected beside what it took, None where nothing is expected; only work that was done whole teaches anything."""
        ...


class Progress:
    """Hears of partitions and of work inside them. This one ignores it all; `console.Bars` draws."""

    estimator: Estimator | None = None
    """Knows what partitions should cost. Given by the definitions, because it sees all stages, and a stage sees only those before it."""

    @cached_property
    def expected_s(self) -> dict[str, float]:
        """What the partitions that were made were forecast to take on this machine, in seconds, by asset."""
        return {}

    def cost(self, asset: Sequence[str], partition: str, traffic: Traffic, seconds: float, *, is_whole: bool = True) -> list[dict[str, Any]] | None:
        """Return what a partition took beside what it was expected to take, if that is known."""
        found = self.estimator.compare(asset, partition, traffic, seconds, is_whole=is_whole) if self.estimator else None
        if found is None:
            return None
        self.expected_s["/".join(asset)] = self.expected_s.get("/".join(asset), 0.0) + found.forecast_s
        return found.table

    def divide(self, asset: Sequence[str], partitions: Sequence[str]) -> dict[str, float]:
        """Return the share of each of several partitions that are made at once in what they take: as their forecasts are, or equal ones."""
        known = [self.estimator.foresee(asset, key) if self.estimator else None for key in partitions]
        forecasts = [seconds for seconds in known if seconds is not None]
        total_s = sum(forecasts)
        if len(forecasts) < len(partitions) or total_s <= 0:
            return dict.fromkeys(partitions, 1 / len(partitions))
        return {key: seconds / total_s for key, seconds in zip(partitions, forecasts, strict=True)}

    def plan(self, n_partitions: int) -> None:
        """Hear how many partitions a run has, finished ones included."""

    def skip(self, n_partitions: int) -> None:
        """Hear that partitions are there already."""

    def expect(self, asset: str, n_partitions: int, unit: str = "rows") -> None:
        """Hear how many partitions of an asset are made next, and what their units of work are called."""

    def begin(self, asset: str, partition: str, n_units: int | None = None) -> None:
        """Hear that work on one partition starts (`""` without partitions), and how many units it has, if that is known."""

    def begin_together(self, asset: str, partitions: Sequence[str], n_units: int) -> None:
        """Hear that work on several partitions at once starts; when it is done, each of them begins and ends for itself."""
        self.begin(asset, ", ".join(partitions), n_units)

    def measure(self, text: str) -> None:
        """Hear how good what is being made is so far, in a few words."""

    def watch(self, doing: Sequence[Doing]) -> None:
        """Hear what all workers are doing that make partitions side by side."""

    def tell(self, sentence: str) -> None:
        """Hear something that a person should read."""

    def advance(self, n: int) -> None:
        """Hear that `n` more units of the current partition are done."""

    def end(self) -> None:
        """Hear that the current partition is finished, or has failed."""

    def leave(self) -> None:
        """Hear that the current partition is finished, and holds nothing: it was none of those expected."""
        self.end()


def describe_workers(doing: Sequence[Doing], unit: str, n_named: int = 4) -> str:
    """Say what workers are doing side by side, a few of them by name, and how fast they are together."""
    named = ", ".join(f"{each.key or 'one'} {each.n_units:,}" for each in doing[:n_named])
    more = f" and {len(doing) - n_named:,} more" if len(doing) > n_named else ""
    rate = sum(each.n_units / each.seconds for each in doing if each.seconds > 0)
    return f"{len(doing):,} at work: {named}{more} {unit}" + (f"; {rate:,.0f}/s together" if rate >= 1 else "")


class AssetReport(NamedTuple):
    """What a run did for one asset."""

    name: str
    n_partitions: int
    n_made: int
    """Partitions of which something was written."""
    n_bytes: int
    """Bytes that were written."""
    wall_s: float
    failed_checks: list[str]
    """For each check that did not pass and does not block its name, and what is wrong."""
    n_found: int = 0
    """Partitions that were asked for and found to be there, made by another run or without one: only recorded."""
    failed: Sequence[str] = ()
    """Partitions that failed."""
    waiting: Sequence[str] = ()
    """Partitions that are due and cannot be made before failed ones upstream."""
    stopped: Sequence[str] = ()
    """Partitions that were given up as the configuration asks for, and those that would read them: nothing is wrong."""
    message: str = ""
    """What the first failure said; empty when there is none."""
    made: Sequence[str] = ()
    """Partitions that were made."""

    @property
    def n_reused(self) -> int:
        """Partitions that were there already."""
        return self.n_partitions - self.n_made - len(self.failed) - len(self.waiting) - len(self.stopped)


def format_bytes(n_bytes: int) -> str:
    """Write a size with a unit: 1.5 GB."""
    size = float(n_bytes)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1000
    return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"


def format_count(n: int, one: str, many: str = "") -> str:
    """Write a number with its noun: 1 fault, 2 faults."""
    return f"{n:,} {choose_word(n, one, many)}"


def choose_word(n: int, one: str, many: str = "") -> str:
    """Return a noun (or a verb) for so many: fault, faults; is, are."""
    return one if n == 1 else many or one + "s"
