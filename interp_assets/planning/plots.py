"""Artifacts become small pictures for people: PNG images inside Markdown, as Dagster's UI shows them.

The pictures live in Dagster's database, so they are small (about 10 kB). matplotlib's object interface with the Agg canvas is used:
no global figure state, no display.
"""

import base64
import io
import json
from collections.abc import Sequence
from itertools import cycle
from typing import Any, Final

import numpy as np
import polars as pl
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from PIL import Image
from safetensors.numpy import load as load_arrays

from interp_assets.harvest.statistics import norm_bin_edges
from interp_assets.storage.manifest import Produced, read_file
from interp_assets.storage.store import Store

_SIZE: Final = (5.2, 2.6)
_DPI: Final = 80
_PALETTE: Final = 128
_COLOUR: Final = "#3b6ea8"
_SECOND: Final = "#c8643c"
_GREY: Final = "#999999"
_MARKERS: Final = "os^Dvp"
_DASHES: Final = ((4, 2), (1, 1.5), (4, 1.5, 1, 1.5), ())
_LARGE: Final = (7.4, 4.4)
_MAX_NAMES: Final = 24
"""More lines or points than this are not named: nobody could read it."""
COMPARED: Final = ("hook_points", "target_hook_points", "task")
"""SAEs that agree in these columns do the same thing: their L0 and FVU can be compared."""
_CURVES: Final = (("loss", "loss", True), ("l0", "L0", True), ("fvu", "FVU", True), ("dead_share", "dead share", False))
"""Panels of the learning curves: column, label, and whether a logarithmic axis is used where all values are positive."""


def plot_training(store: Store, sae: Produced) -> str:
    """Draw the loss of a training run, and its L0 on a second axis."""
    frame = pl.read_parquet(io.BytesIO(read_file(store, sae.ref.path, sae.manifest, "training.parquet")))
    figure, axes = _make_figure("step", "loss")
    steps = frame["step"].to_numpy()
    losses = frame["loss"].to_numpy()
    axes.plot(steps, losses, color=_COLOUR)
    if len(losses) and losses.max() > 5 * losses.min() > 0:
        axes.set_yscale("log")
    if "l0" in frame.columns:
        second = axes.twinx()
        second.plot(steps, frame["l0"].to_numpy(), color=_SECOND, linewidth=1)
        second.set_ylabel("L0", color=_SECOND)
    return _as_markdown(figure, "Loss and L0 over the training steps")


def plot_curves(store: Store, sweep: Produced) -> str:
    """Draw loss, L0, FVU and dead share of all SAEs over the rows that they were trained on."""
    frame = _read_table(store, sweep, "curves.parquet")
    figure = Figure(figsize=_LARGE, dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2).flat
    colours = _colours(frame["name"].unique(maintain_order=True).to_list())
    for axes, (column, label, is_log) in zip(panels, _CURVES, strict=True):
        _dress(axes, "rows", label)
        for (name,), part in frame.group_by("name", maintain_order=True):
            axes.plot(part["n_rows"].to_numpy(), part[column].to_numpy(), color=colours[str(name)], linewidth=1, label=str(name))
        if is_log and _is_positive(frame[column]):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
    _add_legend(figure, [Line2D([], [], color=colour, linewidth=2, label=name) for name, colour in colours.items()])
    return _as_markdown(figure, "Learning curves of all SAEs")


def plot_pareto(store: Store, sweep: Produced) -> str:
    """Draw FVU against L0 on the held-out shards, one point per SAE, and a line of the best among those that do the same."""
    frame = _read_table(store, sweep, "sweep.parquet")
    figure, axes = _make_figure("L0 on held-out rows", "FVU on held-out rows")
    figure.set_size_inches(*_LARGE)
    architectures = frame["architecture"].unique(maintain_order=True).sort().to_list()
    colours = _colours(architectures)
    marked = [Line2D([], [], color=colours[name], linewidth=0, marker="o", label=name) for name in architectures]
    groups = frame.sort(*COMPARED).group_by(COMPARED, maintain_order=True)
    for (key, part), marker, dash in zip(groups, cycle(_MARKERS), cycle(_DASHES)):
        best = find_best(part)
        axes.plot(best["l0"].to_numpy(), best["fvu"].to_numpy(), color=_GREY, linewidth=1, linestyle=(0, dash), zorder=1)
        axes.scatter(part["l0"].to_numpy(), part["fvu"].to_numpy(), c=[colours[name] for name in part["architecture"]], marker=marker, s=28, zorder=2)
        marked.append(Line2D([], [], color=_GREY, linewidth=1, linestyle=(0, dash), marker=marker, label=_describe_group(*map(str, key))))
    if frame.height <= _MAX_NAMES:
        for row in frame.iter_rows(named=True):
            axes.annotate(row["name"], (row["l0"], row["fvu"]), xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.margins(x=0.12)
    _add_legend(figure, marked)
    return _as_markdown(figure, "FVU against L0 of all SAEs")


def find_best(table: pl.DataFrame) -> pl.DataFrame:
    """Return the SAEs of which no other one that does the same is as sparse and more exact, or sparser and as exact; by task, then by L0."""
    before = pl.col("fvu").cum_min().shift(1).over(*COMPARED)
    return table.sort(*COMPARED, "l0", "fvu", maintain_order=True).filter(before.is_null() | (pl.col("fvu") < before))


def plot_frequencies(store: Store, evaluation: Produced) -> str:
    """Draw the histogram of log10 firing frequency over latents; dead ones are counted in the title."""
    frame = pl.read_parquet(io.BytesIO(read_file(store, evaluation.ref.path, evaluation.manifest, "latents.parquet")))
    frequency = frame["firing_frequency"].to_numpy()
    alive = frequency[frequency > 0]
    figure, axes = _make_figure("log10 firing frequency", "latents")
    axes.hist(np.log10(alive), bins=50, color=_COLOUR)
    axes.set_title(f"{len(alive):,} latents fire, {len(frequency) - len(alive):,} do not", fontsize=9)
    return _as_markdown(figure, "Histogram of firing frequencies")


def plot_norms(store: Store, statistics: Produced) -> str:
    """Draw the histogram of activation norms at one hook point."""
    arrays = load_arrays(read_file(store, statistics.ref.path, statistics.manifest, "statistics.safetensors"))
    counts, edges = arrays["norm_histogram"], norm_bin_edges()
    first, last = np.flatnonzero(counts)[[0, -1]] if counts.any() else (0, len(counts) - 1)
    shown = slice(max(0, first - 1), last + 2)
    figure, axes = _make_figure("norm", "rows")
    axes.bar(edges[:-1][shown], counts[shown], width=np.diff(edges)[shown], align="edge", color=_COLOUR, edgecolor="white", linewidth=0.3)
    axes.set_xscale("log", base=2)
    return _as_markdown(figure, "Histogram of activation norms")


def plot_certificate(store: Store, certificate: Produced) -> str:
    """Draw how often rows at a distance are of one document, against chance."""
    content = json.loads(read_file(store, certificate.ref.path, certificate.manifest, "certificate.json"))
    figure, axes = _make_figure("distance in rows", "same document, z score")
    lags = content["lags"]
    axes.plot([item["lag"] for item in lags], [item["z"] for item in lags], "o-", color=_COLOUR, markersize=4)
    axes.axhspan(-3, 3, color=_COLOUR, alpha=0.12)
    axes.set_xscale("log", base=2)
    return _as_markdown(figure, "Autocorrelation of documents in the mixed rows")


def _make_figure(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=_SIZE, dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    _dress(axes, x_label, y_label)
    return figure, axes


def _dress(axes: Axes, x_label: str, y_label: str) -> None:
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3, linewidth=0.6)


def _colours(names: Sequence[str]) -> dict[str, Any]:
    """Give each name a colour: ten that are told apart easily, or a ramp where there are more."""
    spread = colormaps["tab10"].colors if len(names) <= 10 else colormaps["turbo"](np.linspace(0.05, 0.95, len(names)))  # pyright: ignore[reportAttributeAccessIssue]
    return dict(zip(names, spread, strict=False))


def _describe_group(sources: str, targets: str, task: str) -> str:
    """Name what some SAEs of a sweep do alike."""
    return f"{task} {sources}" if sources == targets else f"{task} {sources} to {targets}"


def _add_legend(figure: Figure, lines: list[Line2D]) -> None:
    if len(lines) <= _MAX_NAMES:
        figure.legend(handles=lines, loc="outside lower center", ncols=min(4, len(lines)), fontsize=8, frameon=False)


def _is_positive(values: pl.Series) -> bool:
    smallest, largest = values.min(), values.max()
    return isinstance(smallest, float) and isinstance(largest, float) and largest > 5 * smallest > 0


def _read_table(store: Store, produced: Produced, name: str) -> pl.DataFrame:
    return pl.read_parquet(io.BytesIO(read_file(store, produced.ref.path, produced.manifest, name)))


def _as_markdown(figure: Figure, caption: str) -> str:
    """Render a figure as an inline image of few colours, which takes a third of the bytes; the same data give the same bytes."""
    drawn, buffer = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", metadata={"Software": None})
    Image.open(drawn).convert("RGB").quantize(_PALETTE).save(buffer, format="png", optimize=True)
    return f"![{caption}](data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()})"
