"""Trainings, evaluations and sweeps become pictures."""

from itertools import cycle
from typing import Final

import numpy as np
import polars as pl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from interp_assets.planning import plots
from interp_assets.planning.progress import format_count
from interp_assets.storage.manifest import Produced
from interp_assets.storage.store import Store
from interp_assets.train.sweep import COMPARED

_BINS: Final = 50
_LEAST_SHARE: Final = 0.01
"""What an axis of dead latents shows at least."""
_MARKERS: Final = "os^Dvp"
_DASHES: Final = ((4, 2), (1, 1.5), (4, 1.5, 1, 1.5), ())
_CURVES: Final = (("loss", "loss", True), ("l0", "L0 (latents a row)", True), ("fvu", "FVU", True), ("dead_share", "dead latents", False))
"""Panels of the learning curves: column, label, and whether a logarithmic axis is used where all values are positive."""


def plot_training(store: Store, sae: Produced) -> str:
    """Draw the loss of a training run, and its L0 on a second axis."""
    frame = plots.read_table(store, sae, "training.parquet")
    figure, axes = plots.make_figure("training step", "loss")
    steps = frame["step"].to_numpy()
    axes.plot(steps, frame["loss"].to_numpy(), color=plots.COLOUR)
    axes.yaxis.label.set_color(plots.COLOUR)
    if _spreads(frame["loss"]):
        plots.use_log(axes, "y")
    if "l0" in frame.columns:
        second = axes.twinx()
        plots.dress(second, "training step", "L0 (latents a row)")
        second.grid(visible=False)
        second.plot(steps, frame["l0"].to_numpy(), color=plots.SECOND, linewidth=1)
        second.yaxis.label.set_color(plots.SECOND)
    return plots.as_markdown(figure, "Loss and L0 over the training steps")


def plot_curves(store: Store, sweep: Produced) -> str:
    """Draw loss, L0, FVU and dead share of all SAEs over the rows that they were trained on."""
    frame = plots.read_table(store, sweep, "curves.parquet")
    figure = Figure(figsize=plots.LARGE, dpi=plots.DPI, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2).flat
    colours = plots.colour(frame["name"].unique(maintain_order=True).to_list())
    for axes, (column, label, is_log) in zip(panels, _CURVES, strict=True):
        plots.dress(axes, "rows trained on", label)
        for (name,), part in frame.group_by("name", maintain_order=True):
            axes.plot(part["n_rows"].to_numpy(), part[column].to_numpy(), color=colours[str(name)], linewidth=1, label=str(name))
        if is_log and _spreads(frame[column]):
            plots.use_log(axes, "y")
        if column == "dead_share":
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
            top = max(_LEAST_SHARE, 1.05 * float(np.max(frame[column].to_numpy(), initial=0.0)))
            axes.set_ylim(-0.02 * top, top)
    plots.add_legend(figure, [Line2D([], [], color=shade, linewidth=2, label=name) for name, shade in colours.items()])
    return plots.as_markdown(figure, "Learning curves of all SAEs")


def plot_pareto(store: Store, sweep: Produced) -> str:
    """Draw FVU against L0 on the held-out shards, one point per SAE, and a line of the best among those that do the same."""
    frame = plots.read_table(store, sweep, "sweep.parquet")
    figure, axes = plots.make_figure("L0 on held-out rows", "FVU on held-out rows")
    figure.set_size_inches(*plots.LARGE)
    architectures = frame["architecture"].unique(maintain_order=True).sort().to_list()
    colours = plots.colour(architectures)
    marked = [Line2D([], [], color=colours[name], linewidth=0, marker="o", label=name) for name in architectures]
    groups = frame.sort(*COMPARED).group_by(COMPARED, maintain_order=True)
    for (key, part), marker, dash in zip(groups, cycle(_MARKERS), cycle(_DASHES)):
        best = find_best(part)
        axes.plot(best["l0"].to_numpy(), best["fvu"].to_numpy(), color=plots.GREY, linewidth=1, linestyle=(0, dash), zorder=1)
        axes.scatter(part["l0"].to_numpy(), part["fvu"].to_numpy(), c=[colours[name] for name in part["architecture"]], marker=marker, s=28, zorder=2)
        marked.append(Line2D([], [], color=plots.GREY, linewidth=1, linestyle=(0, dash), marker=marker, label=_describe_group(*map(str, key))))
    if frame.height <= plots.MAX_NAMES:
        for row in frame.iter_rows(named=True):
            axes.annotate(row["name"], (row["l0"], row["fvu"]), xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.margins(x=0.12)
    plots.add_legend(figure, marked)
    return plots.as_markdown(figure, "FVU against L0 of all SAEs")


def find_best(table: pl.DataFrame) -> pl.DataFrame:
    """Return the SAEs of which no other one that does the same is as sparse and more exact, or sparser and as exact; by task, then by L0."""
    before = pl.col("fvu").cum_min().shift(1).over(*COMPARED)
    return table.sort(*COMPARED, "l0", "fvu", maintain_order=True).filter(before.is_null() | (pl.col("fvu") < before))


def plot_frequencies(store: Store, evaluation: Produced) -> str:
    """Draw the histogram of the firing frequency over latents; dead ones are counted in the title."""
    frame = plots.read_table(store, evaluation, "latents.parquet")
    frequency = frame["firing_frequency"].to_numpy()
    alive = frequency[frequency > 0]
    figure, axes = plots.make_figure("firing frequency (share of rows)", "latents")
    lowest, highest = (float(alive.min()), float(alive.max())) if len(alive) else (1e-3, 1.0)
    axes.hist(alive, bins=list(np.geomspace(lowest, max(highest, 1.01 * lowest), _BINS + 1)), color=plots.COLOUR)
    plots.use_log(axes, "x")
    axes.set_title(f"{format_count(len(alive), 'latent')} fire, {len(frequency) - len(alive):,} do not", fontsize=9)
    return plots.as_markdown(figure, "Histogram of firing frequencies")


def _describe_group(sources: str, targets: str, task: str) -> str:
    """Name what some SAEs of a sweep do alike."""
    return f"{task} {sources}" if sources == targets else f"{task} {sources} to {targets}"


def _spreads(values: pl.Series) -> bool:
    """Say whether numbers are positive and differ so much that a logarithmic axis shows more."""
    smallest, largest = values.min(), values.max()
    return isinstance(smallest, float) and isinstance(largest, float) and largest > 5 * smallest > 0
