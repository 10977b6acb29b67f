"""Answers become what a notebook shows: tensors with the tokens they belong to, tables, and heat maps."""

import html
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import polars as pl
import torch
from torch import Tensor

from interp_assets.errors import InputError
from interp_assets.garcon.backend import Kept

_MAX_CELLS = 20_000
_MAX_VALUES = 5_000_000


class Result:
    """One tensor that was asked for, with what its axes mean. Before its trace has run, asking for the tensor is an error."""

    def __init__(self, name: str, axes: Sequence[str], tokens: Sequence[Sequence[str]]) -> None:
        """`axes` name the tensor's axes; `tokens` are the tokens of each of its rows that stand at its positions."""
        self.name, self.axes, self.tokens = name, tuple(axes), [list(row) for row in tokens]
        self.operation = ""
        """Its operation in the plan of its trace."""
        self.kept: Kept | None = None
        """What the server keeps of it; None where it came whole."""
        self._tensor: Tensor | None = None

    def fill(self, answer: Tensor | Kept) -> None:
        """Take the answer."""
        if isinstance(answer, Kept):
            self.kept = answer
        else:
            self._tensor = answer

    @property
    def tensor(self) -> Tensor:
        """The values; what a server keeps is fetched. Raises `InputError` before the trace has run."""
        if self._tensor is None and self.kept is not None:
            self._tensor = self.kept.fetch(self.kept.name)
        if self._tensor is None:
            raise InputError(f"{self.name} has not been computed: a trace runs when its `with` block ends. Read it below the block.")
        return self._tensor

    @property
    def value(self) -> Any:
        """The numbers as plain Python: one number if there is one."""
        return self.tensor.item() if self.tensor.numel() == 1 else self.tensor.tolist()

    def table(self) -> pl.DataFrame:
        """Return one line a number: a column for each axis, the token at its position, and the value. Raises `InputError` for millions of numbers."""
        values = self.tensor.float().cpu()
        if values.numel() > _MAX_VALUES:
            raise InputError(f"{self.name} has {values.numel():,} numbers, too many for a table: choose positions or heads, or use its tensor.")
        indices = torch.cartesian_prod(*(torch.arange(size) for size in values.shape)).reshape(-1, max(1, values.ndim))
        columns: dict[str, Any] = {axis: indices[:, i].numpy() for i, axis in enumerate(self.axes)}
        if "position" in columns:
            pairs = zip(columns["row"].tolist(), columns["position"].tolist(), strict=True)
            columns["token"] = [self.tokens[row][place] if place < len(self.tokens[row]) else "" for row, place in pairs]
        return pl.DataFrame({**columns, "value": values.flatten().numpy()})

    def __repr__(self) -> str:
        """Say name, axes and shape."""
        shape = list(self.kept.name.shape) if self.kept else "not yet run" if self._tensor is None else list(self._tensor.shape)
        return f"{self.name} [{', '.join(self.axes)}] {shape}"

    def _repr_html_(self) -> str:
        """Draw the two axes that are longer than one, with their tokens; anything else is told in words."""
        shape = [] if self._tensor is None else self._tensor.shape
        long = [axis for axis, size in enumerate(shape) if size > 1]
        if self._tensor is None or len(long) != 2 or self._tensor.numel() > _MAX_CELLS:
            return f"<code>{html.escape(repr(self))}</code>"
        rows, columns = (self._labels(axis, shape[axis]) for axis in long)
        return draw_heat_map(self._tensor.reshape(len(rows), len(columns)), rows, columns, self.name)

    def _labels(self, axis: int, size: int) -> list[str]:
        has_tokens = self.axes[axis] in ("position", "key") and len(self.tokens[0]) == size
        return self.tokens[0] if has_tokens else [str(i) for i in range(size)]


class Results(Mapping[str, Result]):
    """Several results, by the name of their point."""

    def __init__(self, results: Mapping[str, Result]) -> None:
        """Keep their order."""
        self._results = dict(results)

    def __getitem__(self, name: str) -> Result:
        """Return the result at a point. Raises `InputError` with the names there are."""
        if name not in self._results:
            raise InputError(f"There is no result at {name!r}; there are {list(self._results)}.")
        return self._results[name]

    def __iter__(self) -> Iterator[str]:
        """Yield the names."""
        return iter(self._results)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._results)

    def __repr__(self) -> str:
        """List them."""
        return "\n".join(map(repr, self._results.values()))

    def table(self) -> pl.DataFrame:
        """Return the tables of all results under each other, with the point in front."""
        tables = [result.table().with_columns(pl.lit(name).alias("point")) for name, result in self._results.items()]
        table = pl.concat(tables, how="diagonal")
        return table.select("point", pl.exclude("point"))


class Grid:
    """A metric for every cell of points by positions or heads, beside its value without a change."""

    def __init__(self, cells: Tensor, base: float, points: Sequence[str], columns: Sequence[str], what: str) -> None:
        """`cells` is [points, columns]; `what` says what was done in a cell."""
        self.tensor, self.base, self.points, self.columns, self.what = cells, base, list(points), list(columns), what

    def table(self) -> pl.DataFrame:
        """Return one line a cell: point, column, its token or head, the metric, and its difference from the base."""
        cells = [(point, i, column) for point, (i, column) in itertools.product(self.points, enumerate(self.columns))]
        values = self.tensor.flatten()
        return pl.DataFrame(
            {
                "point": [point for point, _, _ in cells],
                "column": [i for _, i, _ in cells],
                "label": [label for _, _, label in cells],
                "value": values.numpy(),
                "difference": (values - self.base).numpy(),
            }
        )

    def __repr__(self) -> str:
        """Say what it is."""
        return f"{self.what}: {len(self.points)} points x {len(self.columns)}, base {self.base:.4g}"

    def _repr_html_(self) -> str:
        return draw_heat_map(self.tensor - self.base, self.points, self.columns, f"{self.what}, less {self.base:.4g} without it")


def draw_heat_map(values: Tensor, rows: Sequence[str], columns: Sequence[str], title: str) -> str:
    """Draw [rows, columns] as an HTML table: blue below zero, red above, each cell's number as its hint. Names are escaped."""
    largest = float(values.abs().max()) or 1.0
    head = "".join(f"<th style='font-weight:normal;white-space:pre'>{html.escape(name)}</th>" for name in columns)
    lines = []
    for name, line in zip(rows, values.tolist(), strict=True):
        cells = "".join(f"<td title='{value:.4g}' style='background:{_colour(value / largest)};min-width:1.4em'>&nbsp;</td>" for value in line)
        lines.append(f"<tr><th style='text-align:right;font-weight:normal'>{html.escape(name)}</th>{cells}</tr>")
    return f"<table><caption>{html.escape(title)}</caption><tr><th></th>{head}</tr>{''.join(lines)}</table>"


def _colour(share: float) -> str:
    fade = round(255 * (1 - min(1.0, abs(share))))
    return f"rgb(255,{fade},{fade})" if share > 0 else f"rgb({fade},{fade},255)"
