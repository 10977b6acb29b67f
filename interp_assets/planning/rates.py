"""What partitions took on this machine, beside what was expected of them, becomes the factor by which the next forecast is corrected.

A forecast knows operations and bytes, and assumes two cores of a server. A small database in the user's cache folder (`storage/seen.py` tells where)
sums, for each kind of work, expected and real seconds of the partitions that were made here; older ones count less and less, so that a
forecast follows the machine. Partitions that took less than `SHORT_S`, or were expected to take less than `SLIGHT_S`, are left out: they are
start-up, of which nothing follows for larger ones.
Nothing but forecasts depends on it, and it may be deleted at any time.
"""

import sqlite3
from contextlib import closing, suppress
from pathlib import Path
from typing import Final, NamedTuple

from interp_assets.storage.seen import cache_folder

SHORT_S: Final = 1.0
SLIGHT_S: Final = 0.1
_FADE: Final = 0.95
_MOST: Final = 1e18
_TABLE: Final = "CREATE TABLE IF NOT EXISTS rates (kind TEXT PRIMARY KEY, expected_s REAL, taken_s REAL, partitions INTEGER)"
_ADD: Final = """INSERT INTO rates VALUES (:kind, :expected, :taken, 1) ON CONFLICT (kind) DO UPDATE SET
    expected_s = expected_s * :fade + :expected, taken_s = taken_s * :fade + :taken, partitions = partitions + 1"""


class Rate(NamedTuple):
    """How many times as long as expected a kind of work takes here, and of how many partitions that is known."""

    factor: float
    n_partitions: int


def rates_path() -> Path | None:
    """Return where the sums lie; None for a user without a home."""
    folder = cache_folder()
    return folder / "rates-3.sqlite" if folder else None


def note_rate(path: Path | None, kind: str, expected_s: float, taken_s: float) -> bool:
    """Add a partition that was made; tell whether it counts. What cannot be written is left out: a forecast is not worth an error."""
    if path is None or taken_s < SHORT_S or expected_s < SLIGHT_S:
        return False
    with suppress(OSError, sqlite3.Error):
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path, timeout=1.0)) as database, database:
            database.execute(_TABLE)
            database.execute(_ADD, {"kind": kind, "expected": expected_s, "taken": taken_s, "fade": _FADE})
        return True
    return False


def load_rates(path: Path | None) -> dict[str, Rate]:
    """Return what is known, by kind of work; nothing where there is no database or a damaged one."""
    if path is None:
        return {}
    address = f"{path.absolute().as_uri()}?mode=ro"
    with suppress(OSError, sqlite3.Error), closing(sqlite3.connect(address, uri=True, timeout=1.0)) as database:
        found = database.execute("SELECT kind, expected_s, taken_s, partitions FROM rates WHERE expected_s > 0 LIMIT 10000").fetchall()
        return {str(kind): Rate(taken / expected, int(n)) for kind, expected, taken, n in found if _are_sums(expected, taken, n)}
    return {}


def _are_sums(expected: object, taken: object, n_partitions: object) -> bool:
    """Say whether three values can be what was added up: a damaged database holds anything, and a forecast must not end in it."""
    numbers = [value for value in (expected, taken, n_partitions) if isinstance(value, int | float)]
    return len(numbers) == 3 and all(0 < value < _MOST for value in numbers)
