"""Who hears how the work goes: nobody by default, the command line's bars when a person watches."""

from collections.abc import Callable

Advance = Callable[[int], None]
"""What a stage calls with the units of work that it has done since the last call."""


class Progress:
    """Hears of partitions and of work inside them. This one ignores it all; `console.Bars` draws."""

    def begin(self, asset: str, partition: str) -> None:
        """Hear that work on one partition starts (`""` for an asset without partitions)."""

    def advance(self, n: int) -> None:
        """Hear that `n` more units of the current partition are done."""

    def end(self, *, is_cached: bool, n_bytes: int) -> None:
        """Hear that the current partition is finished, and whether its work had been done before."""

    def fail(self) -> None:
        """Hear that the current partition could not be made."""
