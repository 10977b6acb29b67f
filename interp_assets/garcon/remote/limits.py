"""A plan becomes the bytes that its answer will have, before its forward; and what is too large is refused with what would fit."""

import math
from collections.abc import Mapping
from typing import Final, NamedTuple

from interp_assets.errors import InputError, TooLargeError
from interp_assets.garcon.features import AttachedSae
from interp_assets.garcon.metrics import MetricOp
from interp_assets.garcon.parts import find_part
from interp_assets.garcon.plan import Attribute, GeneratePlan, Grad, Plan, Read, SaeRead
from interp_assets.garcon.points import HookPoint, find_point, point_shape
from interp_assets.garcon.subject import SubjectModel

_TOLD_BYTES: Final = 32
"""Of a number that is told with a token, as Python holds it."""


class Limits(NamedTuple):
    """How much one request may ask for."""

    body_bytes: int = 64 << 20
    """Of a request: the guard holds to it."""
    operations: int = 1024
    rows: int = 32
    tokens: int = 8192
    """Of one row."""
    cells: int = 65_536
    """Of a sweep."""
    answer_bytes: int = 256 << 20
    kept_bytes: int = 2 << 30
    """That are kept of one user's answers."""
    kept_s: float = 600.0


def check_plan(plan: Plan, limits: Limits) -> None:
    """Raise `TooLargeError` for a plan of too many operations or rows, or with a row that is too long."""
    longest = max(map(len, plan.rows))
    counts = {"operations": (len(plan.operations), limits.operations), "rows": (len(plan.rows), limits.rows)}
    _check_counts({**counts, "tokens in a row": (longest, limits.tokens)}, "run")


def check_texts(plan: GeneratePlan, limits: Limits) -> None:
    """Raise `TooLargeError` for a plan that writes too many texts at once, or too long ones, or tells too many numbers with their tokens."""
    n_rows = len(plan.rows) * plan.n * (2 if plan.compare else 1)
    longest = max(map(len, plan.rows)) + plan.new_tokens
    counts = {"texts": (n_rows, limits.rows), "tokens in a text": (longest, limits.tokens), "edits": (len(plan.edits), limits.operations)}
    _check_counts(counts, "written")
    n_told = len(plan.watch) + sum(len(read.latents) for read in plan.latents)
    n_bytes, a_number = _TOLD_BYTES * n_rows * plan.new_tokens * n_told, _TOLD_BYTES * n_rows * plan.new_tokens
    if n_bytes > limits.answer_bytes:
        raise TooLargeError(
            f"{n_told:,} latents and watched tokens over {n_rows:,} texts of {plan.new_tokens:,} new tokens take {n_bytes / 2**20:,.1f} MB; at most "
            f"{limits.answer_bytes / 2**20:,.1f} MB are held. {limits.answer_bytes // a_number:,} of them would fit: name fewer, or write less."
        )


def _check_counts(counts: Mapping[str, tuple[int, int]], done: str) -> None:
    for what, (count, most) in counts.items():
        if count > most:
            raise TooLargeError(f"The plan has {count:,} {what}; at most {most:,} are {done} at once. Ask several times.")


def answer_bytes(subject: SubjectModel, plan: Plan, saes: Mapping[str, AttachedSae]) -> dict[str, int]:
    """Return the bytes that each operation will answer. Raises `InputError` for what the model does not have.

    Of a `module:` point the width is found by a forward of a few tokens: call it where no other runs.
    """
    lengths, sizes = [len(row) for row in plan.rows], {}
    for operation in _answering(plan):
        try:
            sizes[operation.name] = _bytes_of(subject, operation, lengths, saes)
        except InputError as error:
            error.op, error.point = operation.op, getattr(operation, "point", "")
            raise
    return sizes


def needs_forward(plan: Plan) -> bool:
    """Tell whether `answer_bytes` runs a forward of its own."""
    return any(getattr(operation, "point", "").startswith("module:") or _names_module(operation) for operation in plan.operations)


def check_answer(sizes: Mapping[str, int], plan: Plan, limits: Limits, *, keep: bool) -> None:
    """Raise `TooLargeError` for an answer that is too large, with its size and with what would fit."""
    total, most = sum(sizes.values()), limits.kept_bytes if keep else limits.answer_bytes
    if total <= most:
        return
    largest = max(sizes, key=lambda name: sizes[name])
    points = {operation.name: getattr(operation, "point", "") for operation in _answering(plan)}
    of = f"{largest} at {points[largest]}" if points[largest] else largest
    longest = max(map(len, plan.rows))
    fit = max(1, longest * most // total)
    do = [f"choose positions (up to {fit:,} of {longest:,} would fit, pos=-1 takes {_megabytes(total // longest)}), or heads"]
    if not keep and total <= limits.kept_bytes:
        do.append("leave the answer on the server with keep=True and fetch what you need")
    error = TooLargeError(
        f"The answer would take {_megabytes(total)}, {_megabytes(sizes[largest])} of them {of}; at most {_megabytes(most)} are "
        f"{'kept' if keep else 'sent'}. Please {'; or '.join(do)}."
    )
    error.point = points[largest]
    raise error


def _answering(plan: Plan) -> list[Read | SaeRead | MetricOp | Grad | Attribute]:
    return [operation for operation in plan.operations if isinstance(operation, Read | SaeRead | MetricOp | Grad | Attribute)]


def _bytes_of(
    subject: SubjectModel, operation: Read | SaeRead | MetricOp | Grad | Attribute, lengths: list[int], saes: Mapping[str, AttachedSae]
) -> int:
    itemsize = subject.net.dtype.itemsize
    if isinstance(operation, MetricOp):
        return 4 * (len(lengths) if operation.rows is None else len(operation.rows))
    if isinstance(operation, Grad | Attribute):
        sizes = [_whole(subject, find_point(subject.net, name), len(lengths), max(lengths), None) for name in operation.at]
        return itemsize * sum(math.prod(size[:-1] if isinstance(operation, Attribute) else size) for size in sizes)
    point = find_point(subject.net, operation.point)
    part = find_part(subject.net, point, operation, lengths)
    n_positions = 1 if part.is_single else max(part.counts)
    if isinstance(operation, SaeRead):
        if operation.sae not in saes:
            raise InputError(f"No SAE is called {operation.sae!r} here; there are {sorted(saes)}.")
        n_latents = saes[operation.sae].sae.d_sae if operation.latents is None else len(operation.latents)
        return 4 * len(part.counts) * n_positions * n_latents
    size = list(_whole(subject, point, len(part.counts), max(lengths), None if operation.heads is None else len(operation.heads)))
    size[2 if point.kind == "pattern" else 1] = n_positions
    return itemsize * math.prod(size)


def _whole(subject: SubjectModel, point: HookPoint, n_rows: int, n_tokens: int, heads: int | None) -> tuple[int, ...]:
    """Return the shape of a point's tensor; a module's output may have no heads, and is taken for [rows, positions, width]."""
    shape = point_shape(subject.net, point)
    if shape is None:
        return (n_rows, n_tokens, subject.d_in(point.name))
    if point.kind == "pattern":
        return (n_rows, heads or int(shape[1]), n_tokens, n_tokens)
    trail = [int(size) for size in shape[2:]]
    return (n_rows, n_tokens, heads or trail[0], *trail[1:])


def _names_module(operation: object) -> bool:
    return any(name.startswith("module:") for name in getattr(operation, "at", ()))


def _megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:,.1f} MB"
