"""Tables and profiles of training become Markdown for people, and logged steps become lines of a log.

Nothing is computed here that is not in an artifact. Tables are short enough to live in Dagster's database.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from interp_assets.planning.progress import Progress
from interp_assets.storage.manifest import Produced, read_file
from interp_assets.storage.store import Store
from interp_assets.train.loop import OnMetrics, TrainingMetrics
from interp_assets.train.profile import PROFILE
from interp_assets.train.refs import LogRow
from interp_assets.train.sweep import COMPARED, MAX_SHOWN, TABLE, read_table, shorten
from interp_assets.train.times import find_times

_LOGGED: Final = 10
"""About how many lines a training adds to the log."""


def describe_speed(store: Store, sae: Produced) -> dict[str, str]:
    """Return what is known of how a training ran, as Markdown: its rates, and where a profiled window of steps spent its time."""
    times = find_times(store, sae.ref.path, sae.manifest)
    shown: dict[str, str] = {}
    if times:
        shown["speed"] = _speed(times)
    if any(entry.name == PROFILE for entry in sae.manifest.files):
        profile = json.loads(read_file(store, sae.ref.path, sae.manifest, PROFILE))
        shown["profile"] = _profile(profile, f"{store.url}/{profile['trace']}")
    return shown


def describe_sweep(store: Store, sweep: Produced) -> str:
    """Return the table of all SAEs as Markdown: those that do the same together, best FVU first."""
    table = read_table(store, sweep.ref.path, sweep.manifest, TABLE).sort(*COMPARED, "fvu")
    shown = shorten(table)
    text = markdown_table(shown.columns, shown.rows())
    missing = sweep.manifest.facts["missing"]
    more = [f"{table.height - MAX_SHOWN:,} more are in {TABLE}."] if table.height > MAX_SHOWN else []
    late = [f"Not trained and measured yet: {', '.join(missing)}."] if missing else []
    return "\n\n".join([text, *more, *late])


def make_listener(log: Callable[[str], Any], progress: Progress) -> OnMetrics:
    """Return what hears the logged steps of a training: `progress` shows how good the SAEs are, and `log` gets about `_LOGGED` lines of each."""
    tenths: dict[str, int] = {}
    last: dict[str, LogRow] = {}

    def listen(metrics: TrainingMetrics) -> None:
        row, tenth = metrics.row, _LOGGED * metrics.row.step // metrics.n_steps
        last[metrics.name] = row
        progress.measure(describe_quality(last))
        if row.step == metrics.n_steps:
            progress.tell(f"{metrics.name}: {describe_quality({'': row})}, dead {row.dead_share:.1%}, in the last batch of its training")
        if tenths.get(metrics.name) == tenth:
            return
        tenths[metrics.name] = tenth
        rate = ""
        if metrics.rows_per_s is not None and metrics.input_wait_share is not None:
            rate = f"; {metrics.rows_per_s:,.0f} rows/s, {metrics.input_wait_share:.1%} of the time waiting for rows"
        log(
            f"{metrics.name}: step {row.step:,} of {metrics.n_steps:,}: loss {row.loss:.4g}, L0 {row.l0:.1f}, FVU {row.fvu:.3f}, "
            f"dead {row.dead_share:.1%}{rate}"
        )

    return listen


def describe_quality(rows: Mapping[str, LogRow]) -> str:
    """Say how good SAEs are by their last logged steps: one's loss, L0 and FVU, or the span from the best of several to the worst."""
    ordered = sorted(rows.items(), key=lambda item: item[1].fvu)
    (first, best), (last, worst) = ordered[0], ordered[-1]
    if len(rows) == 1:
        return f"loss {best.loss:.4g}, L0 {best.l0:.1f}, FVU {best.fvu:.3f}"
    return f"FVU {best.fvu:.3f} ({first}, L0 {best.l0:.1f}) to {worst.fvu:.3f} ({last}, L0 {worst.l0:.1f})"


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Write a table as Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _speed(times: dict[str, Any]) -> str:
    together = f", {times['n_together']} SAEs in one pass" if times["n_together"] > 1 else ""
    processes = f", {times['processes']} processes" if times["processes"] > 1 else ""
    rates: list[list[object]] = []
    if times["rows_per_s"] is not None:
        rates.append(["rows/s", round(times["rows_per_s"])])
        rates.append(["rows/s of its own steps", round(times["step_rows_per_s"])])
        rates.append(["waiting for rows", f"{times['input_wait_share']:.1%}"])
    return markdown_table(
        ["", ""],
        [
            *rates,
            ["peak memory of the process in this run", f"{times['peak_memory_bytes'] / 1e9:.2f} GB"],
            *([["peak memory of the device", f"{times['peak_device_bytes'] / 1e9:.2f} GB"]] if times["peak_device_bytes"] is not None else []),
            ["on", f"{times['device']}, {times['threads']} threads{processes}{together}"],
        ],
    )


def _profile(profile: dict[str, Any], trace: str) -> str:
    first, stop = profile["steps"]
    memory = profile["memory"]
    phases = [[item["name"], f"{item['s']:.3f}", f"{item['share']:.1%}", item["calls"]] for item in profile["phases"]]
    groups = [[item["name"], f"{item['s']:.3f}", f"{item['share']:.1%}", f"{item['device_s']:.3f}"] for item in profile["groups"]]
    operations = [[item["name"], item["calls"], f"{item['cpu_s']:.3f}", f"{item['device_s']:.3f}"] for item in profile["operations"][:8]]
    head = (
        f"Steps {first:,} to {stop - 1:,}, {profile['wall_s']:.3f} s. Tensors grew by {memory['window_peak_bytes'] / 1e6:,.1f} MB; the process "
        f"peaked at {memory['process_peak_bytes'] / 1e9:.2f} GB. Timeline (Perfetto, chrome://tracing): `{trace}`"
    )
    return "\n\n".join(
        [
            head,
            markdown_table(["phase", "s", "share", "times"], phases),
            markdown_table(["kind of work", "s", "share", "s on the device"], groups),
            markdown_table(["operation", "times", "s", "s on the device"], operations),
        ]
    )


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value).replace("|", "\\|")
