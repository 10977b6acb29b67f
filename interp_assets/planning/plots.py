"""Artifacts become small pictures for people: PNG images inside Markdown, as Dagster's UI shows them. What all stages' plots share.

The pictures live in Dagster's database, so they are small (about 10 kB). matplotlib's object interface with the Agg canvas is used:
no global figure state, no display.
"""

import base64
import io
from collections.abc import Sequence
from typing import Any, Final, Literal

import numpy as np
import polars as pl
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from PIL import Image

from interp_assets.storage.manifest import Produced, read_file
from interp_assets.storage.store import Store

_SIZE: Final = (5.2, 2.6)
DPI: Final = 80
_PALETTE: Final = 128
COLOUR: Final = "#3b6ea8"
SECOND: Final = "#c8643c"
GREY: Final = "#999999"
LARGE: Final = (7.4, 4.4)
_FEW_DECADES: Final = 100.0
_PLAIN: Final = 1e-4
"""Smaller numbers are written with an exponent."""
_NARROWEST: Final = 0.02
"""Of its numbers, what the range of an axis shows at least: what does not change shall look so, and not like noise in the seventh digit."""
MAX_NAMES: Final = 24
"""More lines or points than this are not named: nobody could read it."""


def make_figure(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    """Make a small figure with one pair of axes."""
    figure = Figure(figsize=_SIZE, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    dress(axes, x_label, y_label)
    return figure, axes


def dress(axes: Axes, x_label: str, y_label: str) -> None:
    """Give axes their labels, numbers that are written out, and a quiet look."""
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(write_number))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3, linewidth=0.6)


def use_log(axes: Axes, which: Literal["x", "y"], base: int = 10) -> None:
    """Make an axis logarithmic, with its decades written out, and 2 and 5 between them where there are few."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log", base=base)
    low, high = sorted(axis.get_view_interval())
    if base == 10:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if low > 0 and high < _FEW_DECADES * low else (1,)))
    axis.set_major_formatter(FuncFormatter(write_number))
    axis.set_minor_formatter(NullFormatter())


def write_number(value: float, _place: int | None = None) -> str:
    """Write a number of an axis: 1.5M, 20k, 1,024, 32.1, 0.002; never relative to another one in a corner."""
    for least, size, unit in ((1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= least:
            return f"{value / size:.4g}{unit}"
    return f"{value:,.5g}" if value == 0 or abs(value) >= _PLAIN else f"{value:.2g}"


def colour(names: Sequence[str]) -> dict[str, Any]:
    """Give each name a colour: ten that are told apart easily, or a ramp where there are more."""
    spread = colormaps["tab10"].colors if len(names) <= 10 else colormaps["turbo"](np.linspace(0.05, 0.95, len(names)))  # pyright: ignore[reportAttributeAccessIssue]
    return dict(zip(names, spread, strict=False))


def add_legend(figure: Figure, lines: list[Line2D]) -> None:
    """Put a legend below a figure, where its names can be read."""
    if len(lines) <= MAX_NAMES:
        figure.legend(handles=lines, loc="outside lower center", ncols=min(4, len(lines)), fontsize=8, frameon=False)


def read_table(store: Store, produced: Produced, name: str) -> pl.DataFrame:
    """Read a table of an artifact."""
    return pl.read_parquet(io.BytesIO(read_file(store, produced.ref.path, produced.manifest, name)))


def as_markdown(figure: Figure, caption: str) -> str:
    """Render a figure as an inline image of few colours, which takes a third of the bytes; the same data give the same bytes."""
    for axes in figure.axes:
        _widen(axes)
    drawn, buffer = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", metadata={"Software": None})
    Image.open(drawn).convert("RGB").quantize(_PALETTE).save(buffer, format="png", optimize=True)
    return f"![{caption}](data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()})"


def _widen(axes: Axes) -> None:
    """Give a linear axis with numbers that hardly differ a range in which that is seen."""
    low, high = axes.get_ylim()
    least = _NARROWEST * max(abs(low), abs(high))
    if axes.get_yscale() == "linear" and 0 <= high - low < least:  # the axis of a map runs down, and has no numbers
        axes.set_ylim((low + high - least) / 2, (low + high + least) / 2)
