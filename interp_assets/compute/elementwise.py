"""What lies between the dense products of a block, in few passes: firing, and the way back from latents to pre-activations.

On the CPU each function is one compiled pass over the block (`loops.py`), on a GPU one kernel (`fused.py`); elsewhere, and as the definition that the
tests hold the passes to, it is the formula in torch. Column sums come along: firings, and the gradients of everything that is added to a column.

    fire      latents = [pre > 0] (pre + offset)
    pull      through = [|pre| < width / 2] (grad_n_fired + (grad + rise) threshold) / width
              grad    = [pre > 0] (grad + rise) + [pre <= 0] drop, and + through where it reaches the encoder
    open      opened = relu(gate)       latents = [gate > 0] relu((gate - bias) gain + bias_magnitude)
    close     grad = [latents > 0] grad gain + [gate > 0] (grad_gate + penalty)

Here `pre` is the pre-activation less its threshold. Pre-activations and columns are float32; latents and gradients of a block may be of a smaller
type, in which products take them, and are then rounded when they are written.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from interp_assets.compute import fused
from interp_assets.compute.loops import add_rows, as_arrays, close_rows, fire_rows, is_native, is_readable, open_rows, over_rows, pull_rows

Block = Float[Tensor, "rows latents"]
Column = Float[Tensor, " latents"]


class Fired(NamedTuple):
    """Sums over the rows of a block."""

    latents: Column
    n_fired: Column


class Slopes(NamedTuple):
    """What turns the gradient of a latent into that of its pre-activation, by latent."""

    rise: Column
    """Added to the gradient of latents that fire."""
    drop: Column
    """Gradient of latents that do not."""
    threshold: Column
    grad_n_fired: Float[Tensor, ""]
    """Gradient of every firing count."""
    width: float
    """Of the rectangle around the threshold; 0 for none."""
    reaches_encoder: bool
    """The rectangle's gradient flows to the pre-activation too, not to the threshold only."""


class Pulled(NamedTuple):
    """Sums over the rows of a block: of the gradient, of what goes through the rectangle, and of the pre-activations.

    The last two are 0 without a rectangle.
    """

    grad: Column
    through: Column
    pre: Column


class Gates(NamedTuple):
    """Parameters of a gated SAE, by latent."""

    bias: Column
    gain: Column
    bias_magnitude: Column


class Opened(NamedTuple):
    """Sums over the rows of a block."""

    n_fired: Column
    opened: Column


class Closed(NamedTuple):
    """Gradients of what is added to, or multiplies, a column."""

    bias_magnitude: Column
    log_gain: Column
    bias: Column


def sum_rows(values: Block) -> Column:
    """Add the rows; on a GPU as a product with ones, twice as fast as `sum(0)`."""
    if is_native(values):
        return _from(over_rows(add_rows, len(values), (1, values.shape[1]), values.numpy()))[0]
    return torch.mv(values.T, values.new_ones(len(values))) if values.is_cuda else values.sum(0)


def sum_all(values: Tensor) -> Float[Tensor, ""]:
    """Add all values; on a CPU by one thread, because torch's order of adding many depends on how many it has."""
    return torch.from_numpy(np.asarray(values.numpy().sum())) if values.device.type == "cpu" and values.dtype != torch.bfloat16 else values.sum()


def sum_squares(values: Float[Tensor, "rows width"]) -> Float[Tensor, ""]:
    """Add the squares of all values, row by row, without a tensor of their size."""
    return sum_all(values.norm(dim=1).square_())


def keep_above(grad: Block, level: Block) -> Block:
    """Set `grad` to 0, in place, where `level` is not above 0."""
    return torch.ops.aten.threshold_backward.grad_input(grad, level, 0.0, grad_input=grad)


def reach(values: Block, level: Float[Tensor, "rows 1"], n_tied: Int64[Tensor, "rows 1"]) -> Bool[Tensor, "rows latents"]:
    """Tell which values exceed the level of their row, or are among the first `n_tied` that equal it."""
    is_tied = values == level
    return (values > level) | (is_tied & (is_tied.cumsum(1) <= n_tied))


def fire(pre: Block, offset: Column, latents: Block) -> Fired:
    """Write the latents of a block."""
    if is_native(pre) and is_readable(latents):
        return Fired(*_from(over_rows(fire_rows, len(pre), (2, pre.shape[1]), *as_arrays(pre, offset, latents))))
    if fused.is_fusable(pre, latents):
        return Fired(*fused.fire(pre, offset, latents))
    values = keep_above(torch.add(pre, offset, out=_room(latents, pre)), pre)
    _write(values, latents)
    return Fired(sum_rows(values), (pre > 0).sum(0).to(pre.dtype))


def pull(pre: Block, grad: Block, slopes: Slopes) -> Pulled:
    """Turn the gradient of the latents into that of the pre-activations, in place."""
    share = 1 / slopes.width if slopes.width else 0.0
    if is_native(pre) and is_readable(grad):
        scalars = np.array([float(slopes.grad_n_fired), slopes.width / 2, share, slopes.reaches_encoder], np.float32)
        columns = torch.stack([slopes.rise, slopes.drop, slopes.threshold])
        return Pulled(*_from(over_rows(pull_rows, len(pre), (3, pre.shape[1]), *as_arrays(pre, grad, columns), scalars)))
    if fused.is_fusable(pre, grad):
        columns = torch.stack([slopes.rise, slopes.drop, slopes.threshold])
        return Pulled(*fused.pull(pre, grad, columns, slopes.grad_n_fired, slopes.width, reaches_encoder=slopes.reaches_encoder))
    values = grad.to(pre.dtype).add_(slopes.rise)
    through = torch.where(pre.abs() < slopes.width / 2, (slopes.grad_n_fired + values * slopes.threshold) * share, 0.0)
    keep_above(values.sub_(slopes.drop), pre).add_(slopes.drop)
    if slopes.reaches_encoder:
        values.add_(through)
    _write(values, grad)
    return Pulled(sum_rows(values), sum_rows(through), sum_rows(pre) if slopes.width else torch.zeros_like(slopes.rise))


def open_gates(gate: Block, gates: Gates, opened: Block, latents: Block) -> Opened:
    """Write the open gates and the latents of a block of a gated SAE; `gate` holds the gates' bias."""
    if is_native(gate) and is_readable(opened, latents):
        return Opened(*_from(over_rows(open_rows, len(gate), (2, gate.shape[1]), *as_arrays(gate, torch.stack(gates), opened, latents))))
    if fused.is_fusable(gate, opened, latents):
        return Opened(*fused.open_gates(gate, torch.stack(gates), opened, latents))
    above = torch.clamp(gate, min=0.0, out=_room(opened, gate))
    values = torch.addcmul(gates.bias_magnitude, gate - gates.bias, gates.gain, out=_room(latents, gate)).relu_()
    _write(above, opened)
    _write(keep_above(values, gate), latents)
    return Opened((values > 0).sum(0).to(gate.dtype), sum_rows(above))


def close_gates(gate: Block, gates: Gates, grads: tuple[Block, Block], latents: Block, penalty: float) -> Closed:
    """Turn the gradients of latents and open gates, the first in place, into that of the projection."""
    grad, grad_gate = grads
    if is_native(gate) and is_readable(grad, grad_gate, latents):
        g, columns, first, second, f = as_arrays(gate, torch.stack(gates), grad, grad_gate, latents)
        return Closed(*_from(over_rows(close_rows, len(gate), (3, gate.shape[1]), g, columns, (first, second), f, np.float32(penalty))))
    if fused.is_fusable(gate, grad, grad_gate, latents):
        return Closed(*fused.close_gates(gate, torch.stack(gates), grads, latents, penalty))
    magnitude = torch.where(latents > 0, grad.to(gate.dtype), 0.0)
    bias_magnitude = sum_rows(magnitude)
    magnitude.mul_(gates.gain)
    log_gain = sum_rows(magnitude * (gate - gates.bias))
    opened = torch.where(gate > 0, grad_gate.to(gate.dtype) + penalty, 0.0)
    _write(magnitude + opened, grad)
    return Closed(bias_magnitude, log_gain, sum_rows(opened))


def _room(out: Block, like: Block) -> Block:
    """Return where to compute what goes to `out`: there, unless it is of a smaller type."""
    return out if out.dtype == like.dtype else torch.empty_like(like)


def _write(values: Block, out: Block) -> None:
    if values.data_ptr() != out.data_ptr():
        out.copy_(values)


def _from(sums: np.ndarray) -> Tensor:
    return torch.from_numpy(sums)
