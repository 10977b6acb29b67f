"""Artifacts become small pictures for people: PNG images inside Markdown, as Dagster's UI shows them.

The pictures live in Dagster's database, so they are small (about 10 kB). matplotlib's object interface with the Agg canvas is used:
no global figure state, no display.
"""

import base64
import io
import json
from typing import Final

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from safetensors.numpy import load as load_arrays

from interp_assets.harvest.statistics import norm_bin_edges
from interp_assets.manifest import Produced, read_file
from interp_assets.store import Store

_SIZE: Final = (5.2, 2.6)
_DPI: Final = 80
_COLOUR: Final = "#3b6ea8"
_SECOND: Final = "#c8643c"


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
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3, linewidth=0.6)
    return figure, axes


def _as_markdown(figure: Figure, caption: str) -> str:
    """Render a figure as an inline image; the same data give the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return f"![{caption}](data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()})"
