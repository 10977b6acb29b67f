"""How far work was, and when, becomes how long it will take: an estimate that does not grow without saying why.

- The rate is that of all work, or of the last `RECENT_S` seconds where these are clearly slower: a start that was fast promises nothing.
- Seconds in which loops were compiled do not count: that happens once, at the start, and says nothing of the rest.
- Where an estimate is longer than the last one less the time gone by, it says how much slower work has become.
"""

import sys
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from interp_assets.compute.compiled import Compiling

RECENT_S: Final = 60.0
KNOWN_FROM: Final = 0.05
"""Share of the work before which nothing is said."""
_CLEARLY: Final = 1.25
_CLEARLY_S: Final = 20.0


def find_compiling() -> "Compiling | None":
    """Return what this process has to do with compiling; None while nothing that is compiled was imported, which takes a second."""
    module = sys.modules.get("interp_assets.compute.compiled")
    return module.observe_compiling() if module else None


class Estimate(NamedTuple):
    """How long the rest will take."""

    seconds: float
    why: str
    """Why it is longer than was said before; empty where it is not."""


class Remaining:
    """Watches one piece of work, of which any share may be done."""

    def __init__(self, now: Callable[[], float], compiling: "Callable[[], Compiling | None]") -> None:
        """Begin; `now` tells seconds, `compiling` what of them went into compiling."""
        self._now, self._compiling = now, compiling
        self._began_s, self._compiled_s = now(), self._took_s()
        self._seen: deque[tuple[float, float]] = deque([(0.0, 0.0)])
        self._said: tuple[float, float] | None = None

    @property
    def wall_s(self) -> float:
        """Seconds since the beginning."""
        return self._now() - self._began_s

    def _took_s(self) -> float:
        return found.took_s if (found := self._compiling()) else 0.0

    def estimate(self, done: float) -> Estimate | None:
        """Return how long the rest takes when a share `done` of the work is; None before enough is done, or when all is."""
        worked_s = self.wall_s - (self._took_s() - self._compiled_s)
        self._seen.append((worked_s, done))
        while len(self._seen) > 2 and worked_s - self._seen[1][0] >= RECENT_S:
            self._seen.popleft()
        if not KNOWN_FROM <= done < 1 or worked_s <= 0:
            return None
        since_s, since = self._seen[0]
        overall, recent = done / worked_s, (done - since) / max(1e-9, worked_s - since_s)
        is_slower = 0 < recent < overall / _CLEARLY and worked_s - since_s >= RECENT_S
        left_s = (1 - done) / (recent if is_slower else overall)
        expected_s = self._said[1] - (self.wall_s - self._said[0]) if self._said else left_s
        self._said = (self.wall_s, left_s)
        if left_s <= max(expected_s * _CLEARLY, expected_s + _CLEARLY_S):
            return Estimate(left_s, "")
        why = f"slower now: {recent / overall:.0%} of the speed before".replace("%", " %") if is_slower else "slower than at the start"
        return Estimate(left_s, why)
