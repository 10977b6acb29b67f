"""Who hears how the work goes: nobody by default, the command line's bars when a person watches."""

from collections.abc import Callable
from typing import NamedTuple

Advance = Callable[[int], None]
"""What a stage calls with the units of work that it has done since the last call."""


class Progress:
    """Hears of partitions and of work inside them. This one ignores it all; `console.Bars` draws."""

    def plan(self, n_partitions: int) -> None:
        """Hear how many partitions a run has, finished ones included."""

    def skip(self, n_partitions: int) -> None:
        """Hear that partitions are there already."""

    def begin(self, asset: str, partition: str, n_units: int | None = None) -> None:
        """Hear that work on one partition starts (`""` without partitions), and how many units it has, if that is known."""

    def advance(self, n: int) -> None:
        """Hear that `n` more units of the current partition are done."""

    def end(self) -> None:
        """Hear that the current partition is finished, or has failed."""


class AssetReport(NamedTuple):
    """What a run did for one asset."""

    name: str
    n_partitions: int
    n_made: int
    n_bytes: int
    wall_s: float
    failed_checks: list[str]
    """Checks that did not pass and do not block."""
