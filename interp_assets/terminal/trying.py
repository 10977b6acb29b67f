"""`interp try`: SAEs learn a little while a table shows how they do, and what they came to stays as a table."""

import time
from contextlib import nullcontext
from typing import Final

from rich.console import Console
from rich.live import Live
from rich.table import Table

from interp_assets.errors import InterpError
from interp_assets.planning.config import PipelineConfig
from interp_assets.planning.pipeline import load_pipeline, open_pipeline_store
from interp_assets.terminal.console import print_table
from interp_assets.train.loop import TrainingMetrics
from interp_assets.train.refs import LogRow
from interp_assets.train.trying import TABLE, try_saes

_BLOCKS: Final = "▁▂▃▄▅▆▇█"
_WIDTH: Final = 24
"""Blocks of a line of FVU at most."""
_COLUMNS: Final = ("name", "rows", "loss", "L0", "FVU", "dead", "FVU so far")


def print_try(out: Console, config: PipelineConfig, n_rows: int) -> bool:
    """Try all SAEs on `n_rows` rows each; return whether all could be trained."""
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
    took = f"{n_rows:,} rows each in {time.monotonic() - started_s:.1f} s; L0, FVU and dead latents on rows that follow"
    out.print(f"{took}. Kept in {store.url}/{tried.path}/{TABLE}", soft_wrap=True, markup=False, highlight=False)
    return not failed


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
