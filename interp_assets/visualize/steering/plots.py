"""Dose curves and patched prompts become pictures, as Dagster's UI shows them."""

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import polars as pl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from interp_assets.garcon.steering.dose import ARMS, COLOURS, DIFFERENCE, Dose
from interp_assets.planning.plots import DPI, LARGE, add_legend, as_markdown, dress
from interp_assets.visualize.steering.patching import Patching

_MOST_LABELS: Final = 40
_LONGEST_LABEL: Final = 16
_COLUMNS: Final = 3


def plot_dose(dose: Dose, caption: str = "") -> str:
    """Draw each outcome's mean over strengths, a line an arm, its interval as a band."""
    rows = math.ceil(len(dose.outcomes) / _COLUMNS)
    figure = Figure(figsize=(LARGE[0], 0.4 + 2.0 * rows), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    table = dose.table()
    for axes, outcome in zip(figure.subplots(rows, _COLUMNS, squeeze=False).flat, dose.outcomes, strict=False):
        dress(axes, "strength", outcome)
        _draw_arms(axes, table.filter(pl.col("outcome") == outcome), dose.strengths, dose.numbers)
    for axes in figure.axes[len(dose.outcomes) :]:
        axes.remove()
    add_legend(figure, [Line2D([], [], color=colour, label=arm) for arm, colour in COLOURS.items()])
    return as_markdown(figure, caption or dose.what)


def plot_patching(patching: Patching) -> str:
    """Draw what each cell recovers: a row a point, red where the clean answer comes back."""
    values, points, labels = patching.grid()
    figure = Figure(figsize=LARGE, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    most = float(values.abs().max()) or 1.0
    drawn = axes.imshow(values.numpy(), cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto", interpolation="nearest")
    axes.set_yticks(*_ticks(points), fontsize=7, parse_math=False)
    axes.set_xticks(*_ticks(labels), fontsize=7, parse_math=False, rotation=90)
    figure.colorbar(drawn, ax=axes, shrink=0.8, label="share of the lead" if patching.lead else "effect")
    return as_markdown(figure, repr(patching))


def _draw_arms(axes: Axes, table: pl.DataFrame, strengths: Sequence[str], numbers: Sequence[float]) -> None:
    for arm in (*ARMS, DIFFERENCE):
        lines = {line["strength"]: line for line in table.filter(pl.col("arm") == arm).to_dicts()}
        low, mean, high = (
            np.array([lines[strength][name] if strength in lines else math.nan for strength in strengths]) for name in ("low", "mean", "high")
        )
        if np.isfinite(mean).any():
            axes.fill_between(numbers, low, high, color=COLOURS[arm], alpha=0.12, linewidth=0)
            axes.plot(numbers, mean, color=COLOURS[arm], linewidth=1.2, marker="." if len(numbers) == 1 else "")


def _ticks(labels: Sequence[str]) -> tuple[list[int], list[str]]:
    """Return the places that are labelled, and how: what no font has is written as Python would."""
    places = list(range(0, len(labels), max(1, math.ceil(len(labels) / _MOST_LABELS))))
    return places, [ascii(labels[place].replace("→", ">").replace("…", ".."))[1:-1][:_LONGEST_LABEL] for place in places]
