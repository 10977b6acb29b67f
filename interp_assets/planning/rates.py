"""What partitions took on this machine, beside what was expected of them, becomes the line by which the next forecast is corrected.

A forecast knows operations and bytes, and assumes two cores of a server. What a partition takes is `start_s + factor * expected`: a start-up that
does not grow with the work, and how many times as long as assumed this machine takes. A small database in the user's cache folder
(`storage/seen.py` tells where) keeps, for each kind of work, the sums of which both follow; older partitions count less and less, so that a
forecast follows the machine. Before anything is known the start-up is about 0 (`START_UNCERTAIN_S`) and the factor about 1
(`FACTOR_UNCERTAIN`), which is why a second's work that took five says little about an hour's: the start-up explains it.

Partitions that took less than `SHORT_S`, or were expected to take less than `SLIGHT_S`, are left out.
Nothing but forecasts depends on it, and it may be deleted at any time.
"""

import math
import sqlite3
from contextlib import closing, suppress
from pathlib import Path
from typing import Final, NamedTuple

from interp_assets.storage.seen import cache_folder

SHORT_S: Final = 1.0
SLIGHT_S: Final = 0.1
START_UNCERTAIN_S: Final = 3.0
FACTOR_UNCERTAIN: Final = 1.0
_FADE: Final = 0.95
_MOST: Final = 1e18
_LEAST: Final = 0.01
"""The smallest factor: nothing takes no time."""
_TABLE: Final = """CREATE TABLE IF NOT EXISTS rates
    (kind TEXT PRIMARY KEY, weight REAL, expected_s REAL, squared REAL, excess_s REAL, product REAL, partitions INTEGER)"""
_ADD: Final = """INSERT INTO rates VALUES (:kind, :weight, :expected, :squared, :excess, :product, 1) ON CONFLICT (kind) DO UPDATE SET
    weight = weight * :fade + :weight, expected_s = expected_s * :fade + :expected, squared = squared * :fade + :squared,
    excess_s = excess_s * :fade + :excess, product = product * :fade + :product, partitions = partitions + 1"""


class Rate(NamedTuple):
    """How a kind of work goes here, beside what was expected of it, and of how many partitions that is known."""

    factor: float
    """How many times as long as expected it takes, once it has begun."""
    n_partitions: int
    start_s: float = 0.0
    """What each partition takes besides, however small it is."""

    def correct(self, expected_s: float) -> float:
        """Return what a partition takes here."""
        return self.start_s + self.factor * expected_s


def rates_path() -> Path | None:
    """Return where the sums lie; None for a user without a home."""
    folder = cache_folder()
    return folder / "rates-4.sqlite" if folder else None


def note_rate(path: Path | None, kind: str, expected_s: float, taken_s: float) -> bool:
    """Add a partition that was made; tell whether it counts. What cannot be written is left out: a forecast is not worth an error."""
    if path is None or taken_s < SHORT_S or expected_s < SLIGHT_S:
        return False
    weight, excess_s = 1 / (1 + expected_s), taken_s - expected_s  # times vary with their length
    sums = {"weight": weight, "expected": weight * expected_s, "squared": weight * expected_s**2}
    sums |= {"excess": weight * excess_s, "product": weight * expected_s * excess_s}
    with suppress(OSError, sqlite3.Error):
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path, timeout=1.0)) as database, database:
            database.execute(_TABLE)
            database.execute(_ADD, {"kind": kind, "fade": _FADE, **sums})
        return True
    return False


def load_rates(path: Path | None) -> dict[str, Rate]:
    """Return what is known, by kind of work; nothing where there is no database or a damaged one."""
    if path is None:
        return {}
    address = f"{path.absolute().as_uri()}?mode=ro"
    with suppress(OSError, sqlite3.Error), closing(sqlite3.connect(address, uri=True, timeout=1.0)) as database:
        columns = "kind, weight, expected_s, squared, excess_s, product, partitions"
        found = database.execute(f"SELECT {columns} FROM rates LIMIT 10000").fetchall()  # noqa: S608 - names of ours
        return {str(kind): rate for kind, *sums in found if (rate := _fit(sums))}
    return {}


def _fit(sums: list[object]) -> Rate | None:
    """Return the line nearest to sums of weighted squares and to what is likely beforehand; None where a damaged database holds anything else."""
    numbers = [float(value) for value in sums if isinstance(value, int | float)]
    if len(numbers) != len(sums) or not all(abs(value) < _MOST for value in numbers):
        return None
    weight, expected, squared, excess, product, n_partitions = numbers
    weight, squared = weight + START_UNCERTAIN_S**-2, squared + FACTOR_UNCERTAIN**-2
    determinant = weight * squared - expected**2
    if min(weight, expected, squared, n_partitions, determinant) <= 0:
        return None
    start_s, more = (excess * squared - product * expected) / determinant, (weight * product - expected * excess) / determinant
    return Rate(max(_LEAST, 1 + more), int(n_partitions), max(0.0, start_s)) if math.isfinite(start_s + more) else None
