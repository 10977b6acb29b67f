"""What people see in a terminal: progress bars, tables and errors, drawn with rich.

Bars are drawn on a terminal only; elsewhere (a log file, a pipe) there are lines (`lines.py`). Nothing here decides anything.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Final

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn, TransferSpeedColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from interp_assets.planning.progress import AssetReport, Doing, Progress, describe_workers, format_bytes, format_count
from interp_assets.terminal.left import find_compiling

_NAMED: Final = 3
"""Partitions that are named where several are made at once."""


class Bars(Progress):
    """Draws the whole road and the partition at hand. A context manager: the bars are gone when it ends."""

    def __init__(self, console: Console) -> None:
        """Draw on `console`."""
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=32),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            _CompilingColumn(),
        )
        self._rich = RichProgress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._road = self._rich.add_task("the whole road", total=None, note="planning")
        self._partition = self._rich.add_task("", total=None, note="", visible=False)
        self._n_partitions = self._n_done = self._n_units = 0
        self._n_expected: int | None = None
        self._asset, self._unit, self._measured = "", "rows", ""

    def __enter__(self) -> "Bars":  # noqa: PYI034 - beartype, which checks in tests, cannot read Self
        """Start to draw."""
        self._rich.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Take the bars away."""
        self._rich.stop()

    def plan(self, n_partitions: int) -> None:
        """Show how many partitions there are."""
        self._n_partitions = n_partitions
        self._rich.update(self._road, total=n_partitions, completed=0, note=f"0/{format_count(n_partitions, 'partition')}")

    def skip(self, n_partitions: int) -> None:
        """Count partitions that are there already."""
        self._count(n_partitions)

    def expect(self, asset: str, n_partitions: int, unit: str = "rows") -> None:
        """Remember what the asset's units are called, and show it: what comes before its first partition may take minutes."""
        self._unit = unit
        if n_partitions:
            self._rich.reset(self._partition, description=asset, total=None, note="", visible=True)

    def begin(self, asset: str, partition: str, n_units: int | None = None) -> None:
        """Show the partition at hand. Partitions of one asset are alike: the last one's units are the next one's estimate."""
        if asset != self._asset:
            self._asset, self._n_expected = asset, None
        elif self._n_units:
            self._n_expected = self._n_units
        self._n_expected = n_units or self._n_expected
        self._n_units, self._measured = 0, ""
        name = " ".join(part for part in (asset, partition) if part)
        self._rich.reset(self._partition, description=name, total=self._n_expected, note="", visible=True)

    def begin_together(self, asset: str, partitions: Sequence[str], n_units: int) -> None:
        """Show several partitions as one piece of work."""
        self.begin(asset, name_together(partitions), n_units)

    def measure(self, text: str) -> None:
        """Show how good it is so far."""
        self._measured = text

    def watch(self, doing: Sequence[Doing]) -> None:
        """Show all workers in the line of the partition that is waited for."""
        if doing:
            self._rich.update(self._partition, note=describe_workers(doing, self._unit))

    def tell(self, sentence: str) -> None:
        """Print a sentence above the bars."""
        self._rich.console.print(f"  {sentence}", soft_wrap=True, markup=False)

    def advance(self, n: int) -> None:
        """Show units of work."""
        self._n_units += n
        total = None if self._n_expected is None else max(self._n_expected, self._n_units)
        note = f"{self._n_units:,} {self._unit}" + (", writing it" if self._n_units == self._n_expected else f"  {self._measured}")
        self._rich.update(self._partition, completed=self._n_units, total=total, note=note)

    def end(self) -> None:
        """Count the finished partition."""
        self._rich.update(self._partition, visible=False)
        self._count(1)

    def leave(self) -> None:
        """Take the bar of a partition that holds nothing away."""
        self._rich.update(self._partition, visible=False)

    def _count(self, n: int) -> None:
        if self._n_partitions:
            self._n_done += n
            self._rich.update(self._road, completed=self._n_done, note=f"{self._n_done:,}/{self._n_partitions:,} partitions")


class _CompilingColumn(ProgressColumn):
    """Says that loops are being compiled, on the line of the partition at hand."""

    def render(self, task: Task) -> Text:
        return Text("compiling loops, once" if task.id and (found := find_compiling()) and found.is_busy else "")


def name_together(partitions: Sequence[str]) -> str:
    """Name partitions that are made at once, a few by name."""
    return ", ".join(partitions) if len(partitions) <= _NAMED else f"{', '.join(partitions[:_NAMED])} and {len(partitions) - _NAMED:,} more"


@contextmanager
def byte_bar(console: Console, description: str, n_bytes: int) -> Iterator[Any]:
    """Draw a bar of bytes; the value is a function that advances it."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=32),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
    )
    with RichProgress(*columns, console=console, transient=True, disable=not console.is_terminal) as rich:
        task = rich.add_task(description, total=n_bytes)
        yield lambda n: rich.advance(task, n)


def print_report(console: Console, report: AssetReport) -> None:
    """Print one line for a finished asset."""
    counts = ((report.n_made, "made"), (report.n_reused, "there already"), (len(report.stopped), "stopped"))
    parts = [f"{n:,} {word}" for n, word in counts if n]
    text = Text(f"  {report.name:<38}{', '.join(parts):<34}{report.wall_s:>8.1f} s  {format_bytes(report.n_bytes):>9}")
    console.print(text, soft_wrap=True)
    left = [f"{len(keys):,} {word}: {', '.join(keys[:8])}" for keys, word in ((report.failed, "failed"), (report.waiting, "waiting")) if keys]
    if left:
        console.print(f"    {'; '.join(left)}", style="red", markup=False, soft_wrap=True)
    if report.stopped:
        console.print(f"    stopped, as `stop` asks for: {', '.join(report.stopped[:8])}", markup=False, soft_wrap=True)
    if report.message:
        console.print(f"    {report.message}", markup=False, soft_wrap=True)
    for sentence in report.failed_checks:
        console.print(f"    check not passed: {sentence}", style="yellow", soft_wrap=True, markup=False)


def print_total(console: Console, reports: Sequence[AssetReport]) -> None:
    """Print the sum of a run."""
    n_partitions, n_made = sum(report.n_partitions for report in reports), sum(report.n_made for report in reports)
    wall_s, n_bytes = sum(report.wall_s for report in reports), sum(report.n_bytes for report in reports)
    what = f"{format_count(len(reports), 'asset')}, {format_count(n_partitions, 'partition')}"
    console.print(f"  {what}: {n_made:,} made in {wall_s:.1f} s, {format_bytes(n_bytes)} written.", soft_wrap=True)


def print_table(console: Console, columns: Sequence[str], rows: Iterable[Sequence[object]], *, right_from: int | None = None) -> None:
    """Print a table as wide as it is; numbers stand at the right, and so does all from column `right_from` on."""
    content = [list(row) for row in rows]
    texts = [list(columns), *([_cell(value) for value in row] for row in content)]
    widths = [max(cell_len(row[i]) for row in texts) for i in range(len(columns))]
    first_right = len(columns) if right_from is None else right_from
    is_number = [i >= first_right or (bool(content) and all(isinstance(row[i], int | float) for row in content)) for i in range(len(columns))]
    for n_line, row in enumerate(texts):
        padding = [" " * (width - cell_len(cell)) for width, cell in zip(widths, row, strict=True)]
        cells = [pad + cell if right else cell + pad for pad, cell, right in zip(padding, row, is_number, strict=True)]
        console.print("  ".join(cells).rstrip(), style="bold" if n_line == 0 else None, soft_wrap=True, markup=False)


def _cell(value: object) -> str:
    """Write one cell: numbers with thousands separators, text on one line."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:,}"
    return "".join(char if char.isprintable() else "\ufffd" for char in str(value))
