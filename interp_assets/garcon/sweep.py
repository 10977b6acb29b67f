"""A grid of patches becomes one forward whose batch grows: each patched copy enters at the block it is patched in, so it pays only for what follows.

Row 0 is the text as it is. Before the block of a point, copies of row 0's residual stream are appended to the batch; at the point, each copy
gets its patch; from there on they are rows like any other. Masks and tables of positions belong to a batch of one and are broadcast.
Of n blocks the copies run through half on average, and small matrix products become large ones.

At `resid_post` the copies enter after the block. Copies that would make a forward too large wait for another one.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from interp_assets.errors import InputError
from interp_assets.garcon.metrics import MetricOp, measure, places_of
from interp_assets.garcon.plan import Divergence, Loss
from interp_assets.garcon.points import BY_HEAD, HookPoint, find_point, n_heads
from interp_assets.garcon.subject import SubjectModel, token_losses
from interp_assets.garcon.taps import Tap, order_of, tapped
from interp_assets.planning.hook_names import LAYER_KINDS

FORWARD_TOKENS: Final = 32_768
"""Token positions of all copies in one forward."""


class Cell(NamedTuple):
    """One patch: a point, and the position or the head that is patched."""

    point: HookPoint
    place: int
    """The position or the head."""


def run_sweep(
    subject: SubjectModel, row: Sequence[int], names: Sequence[str], source: Mapping[str, Tensor] | str, metric: MetricOp, by: str
) -> tuple[float, Tensor]:
    """Return the metric without a patch, and [points, positions or heads] of it with each.

    `source` holds a whole activation, [1, positions, ...], for each point, or is `zero`. Raises `InputError` for what cannot be swept.
    """
    steps = begin_sweep(subject, row, names, source, metric, by)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def begin_sweep(
    subject: SubjectModel, row: Sequence[int], names: Sequence[str], source: Mapping[str, Tensor] | str, metric: MetricOp, by: str
) -> Generator[tuple[int, int], None, tuple[float, Tensor]]:
    """Begin what `run_sweep` does: a forward a step, which yields how many cells are done and how many there are. Raises as that one."""
    points = [find_point(subject.net, name) for name in names]
    width = count_columns(subject, names, len(row), by)
    _check_source(source, metric)
    order = sorted(range(len(points)), key=lambda i: order_of(points[i].name))
    cells = [Cell(points[i], index) for i in order for index in range(width)]
    most = max(1, FORWARD_TOKENS // len(row))

    def steps() -> Generator[tuple[int, int], None, tuple[float, Tensor]]:
        base, values = 0.0, []
        for first in range(0, len(cells), most):
            measured = _forward(subject, row, cells[first : first + most], source, metric, by)
            base = float(measured[0])
            values.append(measured[1:])
            yield min(first + most, len(cells)), len(cells)
        grid = torch.empty((len(points), width))
        grid[torch.tensor(order)] = torch.cat(values).float().cpu().reshape(len(points), width)
        return base, grid

    return steps()


def count_columns(subject: SubjectModel, names: Sequence[str], n_tokens: int, by: str) -> int:
    """Return how many cells a point has: positions, or heads. Raises `InputError` for points that have no cells, or not all as many."""
    points = [find_point(subject.net, name) for name in names]
    if outside := [point.name for point in points if point.kind not in LAYER_KINDS]:
        raise InputError(f"A sweep patches inside or between blocks; {outside[0]!r} is neither. Name a point with a layer.")
    if by == "position":
        return n_tokens
    if by != "head":
        raise InputError(f"A sweep is by 'position' or by 'head'; found {by!r}.")
    widths = {n_heads(subject.net, point.kind) if point.kind in (*BY_HEAD, "pattern") else 0 for point in points}
    if len(widths) != 1 or widths == {0}:
        raise InputError(f"A sweep by head needs points with one number of heads; {[point.name for point in points]} have {sorted(widths)}.")
    return widths.pop()


def _check_source(source: Mapping[str, Tensor] | str, metric: MetricOp) -> None:
    if isinstance(source, str) and source != "zero":
        raise InputError(f"The source of a sweep is the result of another run, or 'zero'; found {source!r}.")
    if isinstance(metric, Divergence):
        raise InputError("A sweep measures logit_diff, logprob or loss.")


def _forward(
    subject: SubjectModel, row: Sequence[int], cells: Sequence[Cell], source: Mapping[str, Tensor] | str, metric: MetricOp, by: str
) -> Tensor:
    """Run row 0 and one copy a cell, and return the metric of each; cells come in the order of the forward."""
    taps = [Tap(point, act) for point, act in _acts(subject, cells, source, by)]
    token_ids = torch.tensor([list(row)])
    arguments: dict[str, Any] = subject.arguments(token_ids, None)
    place = None if isinstance(metric, Loss) else places_of(metric, [len(row)])[0][1]
    if place is not None and subject.can_choose_logits:
        arguments["logits_to_keep"] = torch.tensor([place], device=subject.device)
    with tapped(subject.net, taps, len(row)), torch.no_grad():
        logits = subject.net(**arguments).logits
    if len(logits) != 1 + len(cells):
        raise InputError(f"A sweep over {cells[0].point.name!r} lost copies: {len(logits) - 1} of {len(cells)} came out of the forward.")
    if isinstance(metric, Loss):
        return token_losses(logits, token_ids.expand(len(logits), -1), None).mean(1)
    return measure(metric, logits[:, 0 if subject.can_choose_logits else place])


def _acts(subject: SubjectModel, cells: Sequence[Cell], source: Mapping[str, Tensor] | str, by: str) -> Iterator[tuple[HookPoint, Any]]:
    """Yield what is done at each point: copies are appended where a block begins or ends, and patched where their cell says."""
    layers: dict[int, dict[HookPoint, list[tuple[int, int]]]] = {}
    for row, cell in enumerate(cells, start=1):
        layer = int(cell.point.name.partition(".")[2])
        layers.setdefault(layer, {}).setdefault(cell.point, []).append((row, cell.place))
    for layer, of_points in layers.items():
        inside = {point: rows for point, rows in of_points.items() if point.kind != "resid_post"}
        n_inside = sum(len(rows) for rows in inside.values())
        entry = find_point(subject.net, f"resid_pre.{layer}")
        if inside:
            yield entry, partial(_enter, n_copies=n_inside, put=_put_at(entry, inside.get(entry, []), source, by))
        for point, rows in of_points.items():
            if point.kind == "resid_post":
                yield point, partial(_enter, n_copies=len(rows), put=_put_at(point, rows, source, by))
            elif point != entry:
                yield point, partial(_patch, put=_put_at(point, rows, source, by))


def _enter(value: Tensor, *, n_copies: int, put: Callable[[Tensor], Tensor]) -> Tensor:
    return put(torch.cat([value, value[:1].expand(n_copies, *value.shape[1:])]))


def _patch(value: Tensor, *, put: Callable[[Tensor], Tensor]) -> Tensor:
    return put(value.clone())


def _put_at(point: HookPoint, rows: list[tuple[int, int]], source: Mapping[str, Tensor] | str, by: str) -> Callable[[Tensor], Tensor]:
    """Return what writes the source into the position or the head of each row, in place."""
    axis = 1 if (by == "position") != (point.kind == "pattern") else 2
    from_run = None if isinstance(source, str) else source[point.name] if rows else None

    def put(value: Tensor) -> Tensor:
        if not rows:
            return value
        given = torch.zeros_like(value[:1]) if from_run is None else from_run.to(value)
        if given.shape != value[:1].shape:
            raise InputError(
                f"The source at {point.name!r} has shape {list(given.shape)}, the activation {list(value[:1].shape)}: run a text as long."
            )
        copies, index = (torch.tensor(column, device=value.device) for column in zip(*rows, strict=True))
        if axis == 1:
            value[copies, index] = given[0, index]
        else:
            value[copies, :, index] = given[0, :, index].transpose(0, 1)
        return value

    return put
