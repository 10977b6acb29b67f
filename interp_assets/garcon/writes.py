"""A write of a plan and the part of an activation that it reaches become what stands there afterwards.

The same for one forward over whole rows (`run.py`) and for a forward that generates (`steering/decode.py`): whoever runs it says which places a write
reaches, and at which of them its condition holds.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from interp_assets.errors import InputError
from interp_assets.garcon.features import AttachedSae, encode_part, move_part
from interp_assets.garcon.parts import Part
from interp_assets.garcon.plan import Patch, SaeClamp, TensorName, Write, is_of_sae


class Beside(NamedTuple):
    """What lies beside a plan."""

    tensors: Mapping[str, Tensor]
    """By digest."""
    saes: Mapping[str, AttachedSae]
    """By name."""

    def sae(self, name: str) -> AttachedSae:
        """Return an SAE. Raises `InputError` with the names there are."""
        if name not in self.saes:
            raise InputError(f"No SAE is called {name!r} here; there are {sorted(self.saes)}. `lab.open(...).model()` brings a pipeline's.")
        return self.saes[name]

    def tensor(self, name: TensorName) -> Tensor:
        """Return a tensor, where it lies: whoever uses it moves it to where the other numbers are."""
        if name.tensor not in self.tensors:
            raise InputError(f"The plan names the tensor {name.tensor}, which does not lie beside it.")
        return self.tensors[name.tensor]


def apply_write(write: Write, part: Part, shown: Tensor, beside: Beside, found: Mapping[str, Tensor], fires: Tensor | None = None) -> None:
    """Do one write in place. `found` are reads by name, `fires` [rows, positions] says where its condition holds; None means everywhere."""
    now = part.select(shown)
    replacement = _replacement(write, part, shown, now, beside, found)
    if fires is not None:
        holds = fires[list(part.rows), list(part.positions)]
        replacement = torch.where(holds.reshape(-1, *[1] * (now.ndim - 1)), replacement, now)
    part.put(shown, replacement)


def _replacement(write: Write, part: Part, shown: Tensor, now: Tensor, beside: Beside, found: Mapping[str, Tensor]) -> Tensor:
    """Return what a write makes of its part, [places, ...]."""
    if write.op == "patch":
        return _patched(write, part, shown, now, beside, found)
    if write.op == "scale":
        return now * write.times
    if is_of_sae(write):
        attached = beside.sae(write.sae)
        before = None if write.op == "sae_add" else _latents(write, attached, part, now, found)
        along = None if write.along is None else beside.tensor(write.along)
        return move_part(attached, now, write.latents, write.values, before=before, along=along)
    vector = part.fit(beside.tensor(write.value), shown, write.point, is_vector_enough=True)
    if write.op == "add":
        return now + (vector if write.times == 1.0 else write.times * vector)
    length = vector.norm(dim=-1, keepdim=True)
    if bool((length == 0).any()):
        raise InputError(f"The vector of {write.op} at {write.point!r} is zero: it has no direction.")
    along = (now * (vector / length)).sum(-1, keepdim=True)
    return now - (along if write.op == "project_out" else (along - write.limit).clamp_min(0.0)) * (vector / length)


def _latents(write: SaeClamp, attached: AttachedSae, part: Part, now: Tensor, found: Mapping[str, Tensor]) -> Tensor:
    """Return what the latents of a clamp are, [places, latents]: those of the part itself, or what has been read at a transcoder's input."""
    if not attached.is_transcoder:
        return encode_part(attached, now, write.latents)
    return found[input_of(write.sae, write.latents)][list(part.rows), list(part.positions)]


def _patched(write: Patch, part: Part, shown: Tensor, now: Tensor, beside: Beside, found: Mapping[str, Tensor]) -> Tensor:
    if write.value == "zero":
        return torch.zeros_like(now)
    if write.value == "mean":
        return part.row_means(shown)
    if isinstance(write.value, TensorName):
        return part.fit(beside.tensor(write.value), shown, write.point)
    if write.value.read not in found:
        raise InputError(f"A patch at {write.point!r} takes the read {write.value.read!r}, which the forward had not reached.")
    return part.fit(found[write.value.read], shown, write.point)


def input_of(sae: str, latents: Sequence[int]) -> str:
    """Name the reading of latents at their SAE's own point that a later write waits for: its condition, or what a transcoder's clamp takes away."""
    return f"latents {list(latents)} of {sae}"
