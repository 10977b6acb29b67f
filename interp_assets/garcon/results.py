"""Answers become what a notebook shows: tensors with the tokens they belong to, tables, and heat maps."""

import html
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Final

import polars as pl
import torch
from torch import Tensor

from interp_assets.errors import InputError
from interp_assets.garcon.backend import Chats, Kept
from interp_assets.planning.progress import format_count

_MAX_CELLS: Final = 20_000
_MAX_VALUES: Final = 5_000_000


class Result:
    """One tensor that was asked for, with what its axes mean. Before its trace has run, asking for the tensor is an error."""

    def __init__(self, name: str, axes: Sequence[str], write_tokens: Callable[[], list[list[str]]], operation: str = "") -> None:
        """`axes` name the tensor's axes; `write_tokens` tells the tokens of each of its rows that stand at its positions."""
        self.name, self.axes, self._write_tokens = name, tuple(axes), write_tokens
        self.operation = operation
        """Its operation in the plan of its trace."""
        self.kept: Kept | None = None
        """What the server keeps of it; None where it came whole."""
        self._tensor: Tensor | None = None

    @cached_property
    def tokens(self) -> list[list[str]]:
        """The tokens of each of its rows that stand at its positions, as text; decoded when they are first asked for."""
        return self._write_tokens()

    def fill(self, answer: Tensor | Kept) -> None:
        """Take the answer."""
        if isinstance(answer, Kept):
            self.kept = answer
        else:
            self._tensor = answer

    @property
    def is_filled(self) -> bool:
        """Whether its numbers are here."""
        return self._tensor is not None

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

    @property
    def sink(self) -> Tensor:
        """Of a pattern: what each query gives to no key, [rows, heads, queries]; more than rounding where attention has sinks (GPT-OSS).

        Raises `InputError` for anything else.
        """
        if self.axes[:2] != ("row", "head") or self.axes[-1:] != ("key",):
            raise InputError(f"{self.name} is no pattern: only attention has a sink.")
        looked = self.tensor.sum(-1)
        return torch.where(looked > 0, 1 - looked, 0.0)  # padding looks at nothing

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
        rows, columns = (self.labels(axis) for axis in long)
        return draw_heat_map(self._tensor.reshape(len(rows), len(columns)), rows, columns, self.name)

    def labels(self, axis: int) -> list[str]:
        """Return what stands along an axis: tokens, or numbers."""
        size = self.tensor.shape[axis]
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

    def _repr_html_(self) -> str:
        """Draw results that have one axis each, of one length, as the lines of a heat map; list any others."""
        filled = [result for result in self._results.values() if result.is_filled]
        shapes = {tuple(size for size in result.tensor.shape if size > 1) for result in filled}
        if len(filled) < max(2, len(self)) or len(shapes) != 1 or len(shapes.pop()) != 1:
            return f"<code>{html.escape(repr(self))}</code>".replace("\n", "<br>")
        values = torch.stack([result.tensor.flatten().float().cpu() for result in filled])
        axis = next(i for i, size in enumerate(filled[0].tensor.shape) if size > 1)
        return draw_heat_map(values, list(self), filled[0].labels(axis), filled[0].name.partition(" by ")[0])

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
        return f"{self.what}: {format_count(len(self.points), 'point')} x {len(self.columns)}, base {self.base:.4g}"

    def _repr_html_(self) -> str:
        return draw_heat_map(self.tensor - self.base, self.points, self.columns, f"{self.what}, less {self.base:.4g} without it")


def tabulate_tokens(prompts: Chats, write: Callable[[Sequence[Sequence[int]]], list[list[str]]], special: Sequence[int]) -> pl.DataFrame:
    """Return one line a token; texts have no roles."""
    lines = []
    for row, (ids, pieces, roles) in enumerate(itertools.zip_longest(prompts.rows, write(prompts.rows), prompts.roles)):
        told = zip(ids, pieces, roles or [None] * len(ids), strict=True)
        lines += [(row, place, token, piece, token in special, role) for place, (token, piece, role) in enumerate(told)]
    types = {"row": pl.Int64, "position": pl.Int64, "id": pl.Int64, "token": pl.String, "special": pl.Boolean, "role": pl.String}
    return pl.DataFrame(lines, types, orient="row")


def draw_heat_map(values: Tensor, rows: Sequence[str], columns: Sequence[str], title: str) -> str:
    """Draw [rows, columns] as an HTML table: blue below zero, red above, zero the colour of the page, be it light or dark.

    A cell's hint has its number and the whole of its labels; a label shows spaces and ends of lines, and its first characters where it is long.
    """
    largest = float(values.abs().max()) or 1.0
    head = "".join(f"<th title='{html.escape(name)}' style='{_COLUMN}'>{_shorten(name)}</th>" for name in columns)
    lines = []
    for name, line in zip(rows, values.tolist(), strict=True):
        cells = "".join(
            f"<td title='{html.escape(f'{name} / {column}: {value:.4g}')}' style='{_CELL}background-color:{_colour(value / largest)}'></td>"
            for column, value in zip(columns, line, strict=True)
        )
        lines.append(f"<tr style='{_CLEAR}'><th title='{html.escape(name)}' style='{_ROW}'>{_shorten(name)}</th>{cells}</tr>")
    steps = [step for step in (-1.0, -0.5, 0.5, 1.0) if (step < 0 and bool((values < 0).any())) or (step > 0 and bool((values > 0).any()))]
    scale = " ".join(f"<span style='background-color:{_colour(step)};padding:0 .4em'>{step * largest:.3g}</span>" for step in steps)
    table = f"<table style='border-collapse:collapse'><tr style='{_CLEAR}'><th></th>{head}</tr>{''.join(lines)}</table>"
    return f"<div style='overflow-x:auto'><div>{html.escape(title)} &nbsp; {scale}</div>{table}</div>"


_CLEAR: Final = "background-color:transparent"
_LABEL: Final = f"font-weight:normal;white-space:nowrap;{_CLEAR};"
_COLUMN: Final = f"{_LABEL}writing-mode:vertical-rl;transform:rotate(180deg);text-align:left;padding:.3em 0"
_ROW: Final = f"{_LABEL}text-align:right;padding:0 .4em"
_CELL: Final = "padding:0;min-width:1.3em;height:1.3em;"
_LONGEST_LABEL: Final = 20


def _shorten(label: str) -> str:
    """Return a label as it stands in a heat map, escaped: spaces at its ends as dots, a tab and the end of a line as their signs."""
    inner = label.strip(" ")
    before = len(label) - len(label.lstrip(" "))
    shown = "\u00b7" * before + inner + "\u00b7" * (len(label) - before - len(inner))
    shown = shown.replace("\n", "\u23ce").replace("\t", "\u21e5")
    return html.escape(shown if len(shown) <= _LONGEST_LABEL else f"{shown[: _LONGEST_LABEL - 1]}\u2026")


def _colour(share: float) -> str:
    if round(abs(share), 3) == 0:
        return "transparent"  # whatever the sign of what rounding left
    red, green, blue = (214, 39, 40) if share > 0 else (31, 119, 210)
    return f"rgba({red},{green},{blue},{min(1.0, abs(share)):.3f})"
