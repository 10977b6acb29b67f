"""Statistics of heads become maps: a row a layer, a column a head."""

from typing import Final

import numpy as np
import polars as pl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from interp_assets.planning.plots import DPI, as_markdown

MAPPED: Final = ("induction", "previous", "first", "self", "duplicate", "entropy_share")


def plot_heads(table: pl.DataFrame) -> str:
    """Draw maps of the statistics that people look for first, of a table with one line a head."""
    figure = Figure(figsize=(7.4, 4.4), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    layers = table["layer"].unique(maintain_order=True).to_list()
    n_heads = int(table["head"].max()) + 1 if len(table) else 1  # pyright: ignore[reportArgumentType]
    drawn = None
    for axes, name in zip(figure.subplots(2, 3).flat, MAPPED, strict=True):
        values = np.full((len(layers), n_heads), np.nan)
        for layer, head, value in table.select("layer", "head", name).iter_rows():
            values[layers.index(layer), head] = np.nan if value is None else value
        drawn = axes.imshow(values, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto", interpolation="nearest")
        axes.set_title(name.replace("_", " "), fontsize=9)
        axes.set_yticks(range(len(layers)), [str(layer) for layer in layers], fontsize=7)
        axes.set_xticks(range(0, n_heads, max(1, n_heads // 8)))
        axes.tick_params(labelsize=7)
    figure.supxlabel("head", fontsize=9)
    figure.supylabel("layer", fontsize=9)
    assert drawn is not None
    figure.colorbar(drawn, ax=figure.axes, shrink=0.8, label="share")
    return as_markdown(figure, "Statistics of all heads, a row a layer")
