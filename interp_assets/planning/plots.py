"""Artifacts become small pictures for people: PNG images inside Markdown, as Dagster's UI shows them. What all stages' plots share.

The pictures live in Dagster's database, so they are small (about 10 kB). matplotlib's object interface with the Agg canvas is used:
no global figure state, no display.
"""

import base64
import io
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import polars as pl
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
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
    """Give axes their labels and a quiet look."""
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3, linewidth=0.6)


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
    drawn, buffer = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", metadata={"Software": None})
    Image.open(drawn).convert("RGB").quantize(_PALETTE).save(buffer, format="png", optimize=True)
    return f"![{caption}](data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()})"
