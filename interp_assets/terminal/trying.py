"""`interp try`: SAEs learn on the first mixed rows while a table shows how they do, in seconds and without becoming part of the pipeline.

Steps, losses and schedules are those of a training of so many rows; L0, FVU and dead share are then measured on the rows that follow. What is kept
is one artifact of two tables, in `tries/`, which nothing refers to: `interp gc` lists it.
"""

import io
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Final, NamedTuple

import polars as pl
from rich.console import Console
from rich.live import Live
from rich.table import Table

from interp_assets.errors import ArtifactMissingError, InputError, InterpError
from interp_assets.planning.config import PipelineConfig, SaeConfig
from interp_assets.planning.pipeline import Pipeline, load_pipeline, open_pipeline_store
from interp_assets.planning.progress import format_count
from interp_assets.shuffle.refs import mixed_ids
from interp_assets.storage.manifest import create_artifact, make_ref
from interp_assets.storage.store import Store
from interp_assets.terminal.console import print_table
from interp_assets.terminal.recording import recorded
from interp_assets.train.loop import OnFailure, OnMetrics, TrainingMetrics, train_briefly
from interp_assets.train.refs import LogRow

_BLOCKS: Final = "▁▂▃▄▅▆▇█"
_WIDTH: Final = 24
"""Blocks of a line of FVU at most."""
_COLUMNS: Final = ("name", "rows", "loss", "L0", "FVU", "dead", "FVU so far")
FOLDER: Final = "tries"
TABLE: Final = "try.parquet"
CURVES: Final = "curves.parquet"
_LEAST_STEPS: Final = 10
_POLL_S: Final = 0.3
Wait = Callable[[Sequence[Path]], bool]
"""Waits for files to change; False ends it."""


def print_try(out: Console, config: PipelineConfig, n_rows: int, note: str = "") -> bool:
    """Try all SAEs on `n_rows` rows each, and keep that in the history; return whether all could be trained."""
    with recorded(config, note) as recorder:
        tried, failed = _print_try(out, config, n_rows)
        told = {name: row for name, *row in tried.table.select("name", "l0", "fvu", "dead_share").rows()}
        recorder.entry["tried"] = {"rows": n_rows, "path": tried.path, "measures": ["l0", "fvu", "dead_share"], "saes": told, "failed": failed}
    return not failed


def watch_try(out: Console, load: Callable[[], PipelineConfig], path: Path, n_rows: int, *, wait: "Wait | None" = None) -> None:
    """Try again whenever the configuration or a file of code that it names is saved, until Ctrl-C. What is wrong is printed, and waited for."""
    files = [path]
    with suppress(KeyboardInterrupt):
        while True:
            try:
                config = load()
                files = [path, *sorted({Path(sae.code.path) for sae in config.saes if sae.code and sae.code.path})]
                print_try(out, config, n_rows)
            except InterpError as error:
                out.print(f"Error: {error}", style="red", markup=False, soft_wrap=True)
            out.print(f"Waiting for {', '.join(file.name for file in files)} to be saved; Ctrl-C ends it.", soft_wrap=True, markup=False)
            if not (wait or wait_for_change)(files):
                return


def wait_for_change(files: Sequence[Path]) -> bool:
    """Return when one of the files has other bytes, or is there again."""
    before = [_state(file) for file in files]
    while [_state(file) for file in files] == before:
        time.sleep(_POLL_S)
    return True


def _state(file: Path) -> tuple[int, int]:
    """Return what changes when a file is saved; an editor may take it away for a moment."""
    try:
        found = file.stat()
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_size


def _print_try(out: Console, config: PipelineConfig, n_rows: int) -> "tuple[Tried, dict[str, str]]":
    store = open_pipeline_store(config)
    seen: dict[str, list[LogRow]] = {}
    failed: dict[str, str] = {}
    started_s = time.monotonic()
    live = Live(console=out, get_renderable=lambda: _draw(seen, failed), refresh_per_second=4, transient=True)
    with live if out.is_terminal else nullcontext():

        def hear(metrics: TrainingMetrics) -> None:
            seen.setdefault(metrics.name, []).append(metrics.row)

        def drop(name: str, error: InterpError) -> None:
            failed[name] = str(error)

        tried = try_saes(load_pipeline(config, store), store, n_rows, hear, drop)
    rows = [
        (name, f"{l0:.1f}", f"{fvu:.4f}", f"{dead:.1%}", f"{loss:.4g}", draw_line([row.fvu for row in seen[name]]))
        for name, l0, fvu, dead, loss, _, _ in tried.table.sort("fvu").rows()
    ]
    print_table(out, ["name", "L0", "FVU", "dead", "loss", "FVU so far"], rows)
    for name, sentence in failed.items():
        out.print(f"{name} failed: {sentence}", style="red", soft_wrap=True, markup=False)
    took = f"{format_count(n_rows, 'row')} each in {time.monotonic() - started_s:.1f} s; L0, FVU and dead latents on rows that follow"
    out.print(f"{took}. Kept in {store.url}/{tried.path}/{TABLE}", soft_wrap=True, markup=False, highlight=False)
    return tried, failed


def draw_line(values: list[float]) -> str:
    """Draw numbers as a line of blocks, the least at the bottom."""
    step = max(1, -(-len(values) // _WIDTH))
    shown = values[::step]
    if not shown:
        return ""
    low, span = min(shown), (max(shown) - min(shown)) or 1.0
    return "".join(_BLOCKS[min(len(_BLOCKS) - 1, int((value - low) / span * len(_BLOCKS)))] for value in shown)


def _draw(seen: dict[str, list[LogRow]], failed: dict[str, str]) -> Table:
    table = Table(*_COLUMNS, box=None)
    for name, rows in sorted(seen.items(), key=lambda item: item[1][-1].fvu):
        last = rows[-1]
        numbers = f"{last.n_rows:,}", f"{last.loss:.4g}", f"{last.l0:.1f}", f"{last.fvu:.4f}", f"{last.dead_share:.1%}"
        table.add_row(name, *numbers, "failed" if name in failed else draw_line([row.fvu for row in rows]))
    return table


class Tried(NamedTuple):
    """What a try came to."""

    table: pl.DataFrame
    """A row an SAE: name, L0, FVU and dead share on rows that it was not trained on, loss at the end, rows and seconds."""
    failed: Mapping[str, InterpError]
    path: str
    """Where the tables lie in the store."""


def try_saes(pipeline: Pipeline, store: Store, n_rows: int, on_metrics: OnMetrics | None = None, on_failure: OnFailure | None = None) -> Tried:
    """Train all SAEs but imported ones on `n_rows` rows each. Raises `InputError` where there are no mixed rows yet, or no SAE is left."""
    arms = [shorten_training(config, n_rows) for config in pipeline.config.saes if not config.imported]
    short = Pipeline(pipeline.config.model_copy(update={"saes": arms}), pipeline.plan)
    failed: dict[str, InterpError] = {}

    def drop(name: str, error: InterpError) -> None:
        failed[name] = error
        if on_failure is not None:
            on_failure(name, error)

    try:
        found = train_briefly(short, store, [arm.name for arm in arms], on_metrics, drop)
    except ArtifactMissingError as error:
        how = "interp run --select +shuffle_certificate --select +activation_statistics"
        message = f"Pipeline {pipeline.config.name!r} has no mixed rows to try SAEs on yet. Make them: {how}"
        raise InputError(message) from error
    if not found and failed:
        raise next(iter(failed.values()))
    rows = [
        (name, item.measures.l0, item.measures.fvu, item.measures.dead_share, item.log[-1].loss, item.log[-1].n_rows, item.wall_s)
        for name, item in found.items()
    ]
    table = pl.DataFrame(rows, schema=["name", "l0", "fvu", "dead_share", "train_loss", "n_rows", "seconds"], orient="row")
    curves = [
        pl.DataFrame(item.log, schema=list(LogRow._fields), orient="row").insert_column(0, pl.lit(name).alias("name")) for name, item in found.items()
    ]
    points = sorted({name for arm in arms for name in (*arm.sources, *arm.targets)})
    identity = {"saes": [arm.identity() for arm in arms], "seed": pipeline.config.seed}
    ref = make_ref("try", FOLDER, identity=identity, inputs={name: mixed_ids(pipeline, name) for name in points}, label="try")
    with create_artifact(store, ref, replace=True) as art:
        for name, frame in ((TABLE, table), (CURVES, pl.concat(curves))):
            buffer = io.BytesIO()
            frame.write_parquet(buffer)
            art.put(name, buffer.getvalue(), n_rows=frame.height, is_timed=True)
        art.facts["failed"] = {name: str(error) for name, error in failed.items()}
    return Tried(table, failed, ref.path)


def shorten_training(config: SaeConfig, n_rows: int) -> SaeConfig:
    """Return an SAE's configuration for so many rows: at least ten steps, and latents that count as dead in proportion."""
    batch_rows = min(config.batch_rows, max(1, n_rows // _LEAST_STEPS))
    share = n_rows / config.n_rows
    dead = max(batch_rows, min(config.dead_after_rows, round(config.dead_after_rows * share)))
    return config.model_copy(update={"n_rows": n_rows, "batch_rows": batch_rows, "dead_after_rows": dead})
