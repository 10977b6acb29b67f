"""What a fault suite did and how it ended, counted: printed at the end, and written as one JSON object a line."""

import json
import os
import platform
import subprocess
from collections import Counter
from pathlib import Path

from road_world import RowCount

CASES, RIGHT, REFUSED = "cases", "ended in the right bytes", "ended in a clear error, and then in the right bytes"
ROWS, LOST, DOUBLED = "rows compared with those that were harvested", "rows lost", "rows doubled"


class Tally:
    """Counts of one run of the suite."""

    def __init__(self) -> None:
        """Start at zero."""
        self.outcomes: Counter[str] = Counter(dict.fromkeys((CASES, RIGHT, REFUSED, ROWS, LOST, DOUBLED), 0))
        self.faults: Counter[str] = Counter()
        self.seconds = 0.0

    def fault(self, what: str, n: int = 1) -> None:
        """Count faults that were injected."""
        self.faults[what] += n

    def right(self, rows: RowCount, n_refused: int = 0) -> None:
        """Count an end in the right bytes, after `n_refused` clear errors, and fail if a row is missing or stands twice."""
        self.outcomes[REFUSED if n_refused else RIGHT] += 1
        self.outcomes.update({ROWS: rows.n_rows, LOST: rows.n_lost, DOUBLED: rows.n_doubled})
        assert (rows.n_lost, rows.n_doubled) == (0, 0)

    def lines(self) -> list[tuple[int, str]]:
        """List all counts in the order of a report."""
        totals = [(n, name) for name, n in self.outcomes.items()]
        return [*totals, (sum(self.faults.values()), "faults injected"), *((n, f"fault: {name}") for name, n in sorted(self.faults.items()))]

    def write(self, path: Path) -> None:
        """Write the counts beside commit and hardware."""
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
        where = {"hardware": f"{platform.machine()}, {os.cpu_count()} cores", "commit": commit}
        items = [*((name, n, "count") for n, name in self.lines()), ("wall time", round(self.seconds, 1), "s")]
        path.write_text("".join(json.dumps({"name": name, "value": value, "unit": unit, **where}) + "\n" for name, value, unit in items))
