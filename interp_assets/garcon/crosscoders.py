"""Writes by a crosscoder become two forwards: its latents are known only when the last of its points has been reached, and the first is long past.

The first forward reads all its points and encodes them, side by side; in the second, each point is moved along its part of the decoder rows, by what
the latents were in the first. So a clamp adds (value - f) d at every point, with f of the text without the plan's writes.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from interp_assets.errors import InputError
from interp_assets.garcon.features import AttachedSae, check_latents
from interp_assets.garcon.parts import find_part
from interp_assets.garcon.plan import Add, Plan, Read, SaeAdd, SaeClamp, SaeRead, TensorName, name_tensor
from interp_assets.garcon.points import find_point
from interp_assets.garcon.subject import SubjectModel
from interp_assets.garcon.writes import Beside


def uses_crosscoder(plan: Plan, saes: Mapping[str, AttachedSae]) -> bool:
    """Tell whether a plan takes two forwards."""
    return any(name in saes and saes[name].more for name in (getattr(operation, "sae", "") for operation in plan.operations))


def expand_crosscoders(
    subject: SubjectModel, plan: Plan, beside: Beside, run: Callable[..., Any]
) -> tuple[Plan, dict[str, Tensor], dict[str, Tensor]]:
    """Return a plan without operations by crosscoders, what they read, and the tensors that the plan names instead, by digest.

    `run` runs a plan of reads. Raises `InputError` for another point than a crosscoder's first,
    for conditions on one, and for reads of it after the writes.
    """
    coders = {name: attached for name, attached in beside.saes.items() if attached.more}
    if not coders:
        return plan, {}, {}
    uses = [operation for operation in plan.operations if isinstance(operation, SaeRead | SaeClamp | SaeAdd) and operation.sae in coders]
    for operation in plan.operations:
        when = getattr(operation, "when", None)
        if when is not None and when.sae in coders:
            raise InputError(f"{when.sae!r} is a crosscoder: its latents are known after the forward, so no write can wait for one.")
    if not uses:
        return plan, {}, {}
    latents = {name: _encode(subject, plan, coders[name], run) for name in dict.fromkeys(operation.sae for operation in uses)}
    found: dict[str, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    operations: list[Any] = []
    lengths = [len(row) for row in plan.rows]
    for operation in plan.operations:
        if operation not in uses or not isinstance(operation, SaeRead | SaeClamp | SaeAdd):
            operations.append(operation)
            continue
        attached, encoded = coders[operation.sae], latents[operation.sae]
        point = find_point(subject.net, attached.hook_point)
        if find_point(subject.net, operation.point) != point:
            raise InputError(f"The crosscoder {operation.sae!r} belongs to {list(attached.hook_points)}; the plan has it at {operation.point!r}.")
        chosen = tuple(range(attached.sae.d_sae)) if isinstance(operation, SaeRead) and operation.latents is None else tuple(operation.latents or ())
        check_latents(attached, chosen)
        if isinstance(operation, SaeRead):
            if operation.after:
                raise InputError(f"{operation.sae!r} is a crosscoder: its latents are read of an unedited forward alone. Leave `after` out.")
            found[operation.name] = find_part(subject.net, point, operation, lengths).take(encoded)[..., list(chosen)]
            continue
        values = encoded.new_tensor(operation.values)
        change = values - encoded[..., list(chosen)] if isinstance(operation, SaeClamp) else values.expand(*encoded.shape[:2], -1)
        directions = attached.sae.W_dec[list(chosen)] if operation.along is None else beside.tensor(operation.along)
        rows = range(len(plan.rows)) if operation.rows is None else operation.rows
        for name, moved in _split(subject, attached, (change @ directions.to(change))[list(rows)]):
            operations.append(Add(point=name, rows=operation.rows, pos=operation.pos, when=operation.when, value=_keep(moved, tensors)))
    return plan.model_copy(update={"operations": tuple(operations)}), found, tensors


def _encode(subject: SubjectModel, plan: Plan, attached: AttachedSae, run: Callable[..., Any]) -> Tensor:
    """Return all latents of an unedited forward, [rows, positions, d_sae]."""
    reads = tuple(Read(name=name, point=name) for name in attached.hook_points)
    return encode_side_by_side(attached, run(subject, Plan(rows=plan.rows, operations=reads), {}).tensors)


def encode_side_by_side(attached: AttachedSae, read: Mapping[str, Tensor]) -> Tensor:
    """Return all latents of what a crosscoder's points read, [rows, positions, d_sae]. Raises `InputError` for another width."""
    rows = torch.cat([read[name].flatten(2) for name in attached.hook_points], dim=-1).float()
    if rows.shape[-1] != attached.sae.d_in:
        raise InputError(f"The crosscoder of {list(attached.hook_points)} encodes rows of {attached.sae.d_in}; there are rows of {rows.shape[-1]}.")
    return attached.sae.encode(rows.flatten(0, 1)).unflatten(0, rows.shape[:2])


def _split(subject: SubjectModel, attached: AttachedSae, moved: Tensor) -> list[tuple[str, Tensor]]:
    """Return each point's part of [rows, positions, d_out], in the point's own shape."""
    widths = [subject.d_in(name) for name in attached.hook_points]
    parts = zip(attached.hook_points, moved.split(widths, dim=-1), strict=True)
    heads = subject.net.config.get_text_config().num_attention_heads
    return [(name, part.unflatten(-1, (heads, -1)) if name.startswith("z.") else part) for name, part in parts]


def _keep(tensor: Tensor, tensors: dict[str, Tensor]) -> TensorName:
    kept = tensor.contiguous()
    name = name_tensor(kept)
    tensors[name.tensor] = kept
    return name
