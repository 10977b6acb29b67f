"""Losses of architectures whose every latent may fire: ReLU and JumpReLU, forward and backward in one go over blocks of rows.

Five dense products a block, and one small rule per architecture for what lies between them (`compute/elementwise.py`):

    pre = x W_enc + b          latents = rule(pre)          error = latents W_dec + b_dec - y
    grad W_dec += latents^T error           grad pre = rule'(error W_dec^T)          grad W_enc += grad pre^T x

The threshold is subtracted from the encoder's bias, so that `pre` is what exceeds it. How much of this is dense depends on the block:

    few latents are within reach of a gradient     these are found without a dense product (`compute/encode.py`), all else by pairs
    few fire, more get a gradient                  three products; decoding and the decoder's gradient by pairs
    many fire                                      five products

The straight-through gradients of JumpReLU (K = 1/width inside the rectangle around the threshold, else 0; g = gradient of a latent,
s = gradient of its firing count):

    grad threshold = - sum over rows of K (threshold g + s)       grad pre = [pre > threshold] g, and + K (threshold g + s) in the
                                                                  January 2025 recipe, where it flows to all parameters

The rectangle is around the pre-activation, never the activation. Thresholds stay in float32. Where they start near 0 (`jump_relu_step`) they are
trained themselves, and kept from falling below 0: Adam moves a weight by about the learning rate a step, whatever its gradient, and the
logarithm of 0.016 would need thousands of steps to get anywhere.
"""

from collections.abc import Iterator
from typing import Final, NamedTuple

import torch
from torch import Tensor

from interp_assets.compute import kernels
from interp_assets.compute.elementwise import Slopes, fire, pull, sum_all, sum_squares
from interp_assets.compute.encode import FewEncoder
from interp_assets.train.losses.loss import (
    FEW,
    LossContext,
    StepLoss,
    Weights,
    add_norm_gradient,
    add_offset_gradients,
    add_offsets,
    latent_norms,
    make_gradients,
    reconstruct,
    row_blocks,
)

_LEAST: Final = 1e-6
"""A latent below this has no penalty of its p-th power, whose slope has no bound there."""


def relu_loss(weights: Weights, x: Tensor, y: Tensor, context: LossContext) -> StepLoss:
    """ReLU with an L1 penalty weighted by decoder norms, or one of the p-th power (Karvonen et al. 2024, 2408.00113)."""
    rule = _Relu if context.constants.p == 1 else _PowerRelu
    return _dense_loss(weights, x, y, context, rule(weights, context))


def jump_relu_loss(weights: Weights, x: Tensor, y: Tensor, context: LossContext) -> StepLoss:
    """JumpReLU with learned thresholds and the straight-through gradient to all parameters; L0 is pulled to `k`.

    Anthropic's January 2025 recipe with another sparsity loss: its tanh penalty has no target and wants a coefficient search per
    width and model, the squared distance of the batch's mean L0 from `k` (Gemma Scope 2; dictionary_learning) does not. The
    pre-activation loss is on dead latents only, as SAELens found enough.
    """
    return _dense_loss(weights, x, y, context, _TargetJump(weights, y, context))


def jump_relu_tanh_loss(weights: Weights, x: Tensor, y: Tensor, context: LossContext) -> StepLoss:
    """JumpReLU as in Anthropic's January 2025 update: tanh penalty on f_i |d_i|, and the pre-activation loss on every latent."""
    return _dense_loss(weights, x, y, context, _TanhJump(weights, context))


def jump_relu_step_loss(weights: Weights, x: Tensor, y: Tensor, context: LossContext) -> StepLoss:
    """JumpReLU as in Gemma Scope: the penalty is L0 itself, whose straight-through gradient reaches the thresholds only."""
    return _dense_loss(weights, x, y, context, _StepJump(weights, y, context))


class _Block(NamedTuple):
    """Encoded rows."""

    rows: slice
    x: Tensor
    """What was encoded, as products take it."""
    pre: Tensor | None
    """Pre-activations less the thresholds; they last until the next block. None where all that counts is near."""
    near: kernels.Few | None
    """All that is within reach, or, for a rule without one, all that fires; None when it is much."""


class _Encoder(NamedTuple):
    """What encodes a batch by blocks."""

    x: Tensor
    """The rows and the weights as products take them: rounded once a step."""
    W_enc_T: Tensor
    bias: Tensor
    context: LossContext
    few: FewEncoder

    def encode(self, rows: slice, out: Tensor, level: float, *, only_near: bool = False) -> _Block:
        """Encode some rows, and find what lies above `level`; `only_near` says that, where that is little, the rest need not be computed."""
        x, context, limit = self.x[rows], self.context, int(FEW * out.numel())
        if only_near and (near := self.few.find(rows, level, limit)):
            return _Block(rows, x, None, near)
        pre = kernels.product(x, self.W_enc_T.T, out, bias=self.bias, dtype=context.dtype, scratch=context.scratch)
        return _Block(rows, x, pre, kernels.find_few(pre, level, limit))


def _dense_loss(weights: Weights, x: Tensor, y: Tensor, context: LossContext, rule: "_Rule") -> StepLoss:
    scratch, dtype = context.scratch, context.dtype
    gradients = make_gradients(weights, scratch)
    operands = scratch.cast("x", x, dtype), scratch.cast("W_enc_T", weights["W_enc_T"], dtype)
    bias = weights["b_enc"] - rule.threshold
    encoder = _Encoder(*operands, bias, context, FewEncoder(*operands, bias, scratch))
    squared_error, cast = x.new_zeros((), dtype=torch.float64), {**weights, "W_dec": scratch.cast("W_dec", weights["W_dec"], dtype)}
    for block in rule.iter_blocks(encoder):
        add = _add_dense if rule.reach is None or block.near is None else _add_pairs
        squared_error += add(cast, gradients, x[block.rows], y[block.rows], context, rule, block)
    rule.finish(gradients)
    squared_error = squared_error.float() / context.ranks.n_slices
    loss = squared_error * (rule.error_scale / context.n_rows) + rule.loss + rule.auxiliary + encoder.few.damage
    return StepLoss(loss, squared_error, rule.loss, rule.auxiliary, rule.n_fired.long(), gradients)


def _add_dense(weights: Weights, gradients: Weights, x: Tensor, y: Tensor, context: LossContext, rule: "_Rule", block: _Block) -> Tensor:
    """Add the gradients of a block in which many latents get one; return its squared error. By pairs is what fires, where that is little."""
    assert block.pre is not None
    scratch, dtype, pre, near = context.scratch, context.dtype, block.pre, block.near
    pairs = near.pairs if near else None
    shape = (len(x), pre.shape[1])
    if near is None:
        latents = scratch.take("latents", shape, x, dtype)
        rule.activate(pre, latents)
        error = reconstruct(weights, x, latents, context, "error").sub_(y)
    else:
        latents = rule.activate_pairs(near.values, near.pairs)
        error = add_offsets(weights, x, context.ranks.sum_slices(kernels.decode_pairs(latents, rule.W_dec, near.pairs, scratch))).sub_(y)
    squared_error = sum_squares(error)
    error.mul_(2 * rule.error_scale / context.n_rows)
    operand = scratch.cast("error operand", error, dtype)
    if pairs is None:
        kernels.product(latents.T, operand, gradients["W_dec"], is_added=True, dtype=dtype, scratch=scratch)
    else:
        kernels.add_by_latent(gradients["W_dec"], error, latents, pairs, scratch)
    add_offset_gradients(weights, gradients, x, error)
    grad = kernels.product(operand, weights["W_dec"].T, scratch.take("gradient", shape, x, dtype), dtype=dtype)
    rule.add_penalty(grad, latents, pairs)
    gradients["b_enc"].add_(rule.backward(pre, grad))
    kernels.product(grad.T, block.x, gradients["W_enc_T"], is_added=True, dtype=dtype, scratch=scratch)
    return squared_error


def _add_pairs(weights: Weights, gradients: Weights, x: Tensor, y: Tensor, context: LossContext, rule: "_Rule", block: _Block) -> Tensor:
    """Add the gradients of a block in which few latents are within reach; return its squared error."""
    assert block.near is not None
    (pairs, above), scratch = block.near, context.scratch
    values = rule.activate_pairs(above, pairs)
    error = add_offsets(weights, x, context.ranks.sum_slices(kernels.decode_pairs(values, rule.W_dec, pairs, scratch))).sub_(y)
    squared_error = sum_squares(error)
    error.mul_(2 * rule.error_scale / context.n_rows)
    add_offset_gradients(weights, gradients, x, error)
    kernels.add_by_latent(gradients["W_dec"], error, values, pairs, scratch)
    grad = rule.backward_pairs(above, kernels.sampled_product(error, rule.W_dec, pairs, scratch), pairs)
    kernels.add_by_latent(gradients["W_enc_T"], x, grad, pairs, scratch)
    gradients["b_enc"].add_(kernels.sum_values(grad, pairs))
    return squared_error


class _Rule:
    """What an architecture does between the products; made anew for each step, because it also sums over the step's blocks.

    This one fires where a pre-activation exceeds the threshold and sends the gradient back the same way.
    """

    error_scale = 1.0
    """Factor of the squared error in the loss."""
    reach: float | None = 0.0
    """What lies this far below the threshold, or further, has neither value nor gradient; None when that is little."""

    def __init__(self, weights: Weights, context: LossContext, slopes: Slopes | None = None) -> None:
        self.weights, self.context, self.W_dec = weights, context, weights["W_dec"]
        zeros = torch.zeros_like(weights["b_enc"])
        self.slopes = slopes or Slopes(zeros, zeros, zeros, zeros.new_zeros(()), 0.0, reaches_encoder=False)
        self.threshold = self.slopes.threshold
        self.sums, self.n_fired, self.through, self.pre, self.n_rows = zeros, zeros, zeros, zeros, 0
        """Sums over rows: of latents, firings, what goes through the rectangle, and pre-activations less thresholds; their number."""
        self.loss = self.auxiliary = zeros.new_zeros(())
        """The sparsity loss and, logged apart, the loss on silence."""

    def iter_blocks(self, encoder: _Encoder) -> Iterator[_Block]:
        """Encode block by block, all into one buffer."""
        for rows in row_blocks(encoder.x, len(encoder.bias)):
            out = self.context.scratch.take("pre", (rows.stop - rows.start, len(encoder.bias)), encoder.bias)
            yield encoder.encode(rows, out, -(self.reach or 0.0), only_near=self.reach is not None)

    def activate(self, pre: Tensor, latents: Tensor) -> None:
        """Turn a block of pre-activations into latents, and count."""
        fired = fire(pre, self.threshold, latents)
        self.sums, self.n_fired = self.sums + fired.latents, self.n_fired + fired.n_fired

    def activate_pairs(self, above: Tensor, pairs: kernels.Pairs) -> Tensor:
        """Do the same for pairs alone; `above` is their pre-activation less the threshold."""
        fires = (above > 0).to(above.dtype)
        values = (above + self.threshold[pairs.latents]).mul_(fires)
        self.sums, self.n_fired = self.sums + kernels.sum_values(values, pairs), self.n_fired + kernels.sum_values(fires, pairs)
        return values

    def add_penalty(self, grad: Tensor, latents: Tensor, pairs: kernels.Pairs | None) -> None:
        """Add to the gradient of a block's latents what no slope can say; `latents` are the block's, or those of the pairs."""

    def backward(self, pre: Tensor, grad: Tensor) -> Tensor:
        """Turn the gradient of the latents into that of the pre-activations, in place; return its sum over the rows."""
        pulled = pull(pre, grad, self.slopes)
        self.through, self.pre, self.n_rows = self.through + pulled.through, self.pre + pulled.pre, self.n_rows + len(pre)
        return pulled.grad

    def backward_pairs(self, above: Tensor, grad: Tensor, pairs: kernels.Pairs) -> Tensor:
        """Do the same for pairs alone, which are all that is within reach."""
        slopes = self.slopes
        grad = grad.add_(slopes.rise[pairs.latents])
        if not slopes.width:
            return grad
        through = torch.addcmul(slopes.grad_n_fired, grad, self.threshold[pairs.latents])
        through = torch.where(above.abs() < slopes.width / 2, through, 0.0).div_(slopes.width)
        self.through = self.through + kernels.sum_values(through, pairs)
        grad = torch.where(above > 0, grad, 0.0)
        return grad.add_(through) if slopes.reaches_encoder else grad

    def finish(self, gradients: Weights) -> None:
        """Add the gradients of what was summed over the blocks, and set the losses."""


class _Relu(_Rule):
    """Gradient where the latent is above 0, with lambda |d_i| added."""

    def __init__(self, weights: Weights, context: LossContext) -> None:
        super().__init__(weights, context)
        self.slope = context.coefficient / context.n_rows
        self.penalty = latent_norms(weights["W_dec"], context.widths) * self.slope
        self.slopes = self.slopes._replace(rise=self.penalty)

    def finish(self, gradients: Weights) -> None:
        self.loss = sum_all(self.sums * self.penalty)
        add_norm_gradient(gradients["W_dec"], self.weights["W_dec"], self.context.widths, self.sums * self.slope)


class _PowerRelu(_Relu):
    """Gradient where the latent is above 0, with lambda |d_i| p f_i^(p - 1) added."""

    reach = None

    def __init__(self, weights: Weights, context: LossContext) -> None:
        super().__init__(weights, context)
        self.slopes = self.slopes._replace(rise=torch.zeros_like(self.penalty))
        self.powers = torch.zeros_like(self.penalty)

    def add_penalty(self, grad: Tensor, latents: Tensor, pairs: kernels.Pairs | None) -> None:
        column, f, places = _find_fired(grad, latents, pairs, self.powers.dtype)
        p, flat = self.context.constants.p, grad.view(-1)
        slope = torch.where(f >= _LEAST, f.clamp(min=_LEAST).pow(p - 1), 0.0)
        self.powers.index_add_(0, column, slope * f)
        flat[places] = (flat[places] + p * slope * self.penalty[column]).to(flat.dtype)

    def finish(self, gradients: Weights) -> None:
        self.sums = self.powers
        super().finish(gradients)


def _find_fired(grad: Tensor, latents: Tensor, pairs: kernels.Pairs | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return what fires in a block: latents, their values, and their places in the gradient."""
    if pairs is None:
        places = kernels.nonzero(latents > 0)
        return places % latents.shape[1], latents.view(-1)[places].to(dtype), places
    return pairs.latents, latents, pairs.bags * grad.shape[1] + pairs.latents


class _Jump(_Rule):
    """What the JumpReLU rules share: the threshold, its rectangle and its gradient; and the loss that pulls silent latents back.

    The sum of relu(threshold - pre) is that of the latents less their thresholds, less that of all values: no pass of its own.
    """

    reach: float | None = None

    def __init__(self, weights: Weights, context: LossContext, width: float, *, reaches_encoder: bool) -> None:
        threshold = weights["threshold"] if "threshold" in weights else weights["log_threshold"].exp()
        zeros = torch.zeros_like(threshold)
        super().__init__(weights, context, Slopes(zeros, zeros, threshold, zeros.new_zeros(()), width, reaches_encoder))

    def pull_silent(self, norms: Tensor, scale: float) -> None:
        """Weigh the loss on silence by `norms`, and by `scale` for each row."""
        self.silence_scale, self.push = scale, norms * scale
        self.slopes = self.slopes._replace(drop=-self.push)

    def finish_silence(self) -> Tensor:
        """Set the loss on silence and its gradient to the thresholds; return that of the norms."""
        silence = self.sums - self.threshold * self.n_fired - self.pre
        self.auxiliary = sum_all(silence * self.push)
        self.through = self.through - self.push * (self.n_rows - self.n_fired)
        return silence * self.silence_scale

    def finish(self, gradients: Weights) -> None:
        if "threshold" in gradients:
            gradients["threshold"].sub_(self.through)
        else:
            gradients["log_threshold"].sub_(self.through * self.threshold)


class _TargetJump(_Jump):
    """The squared distance of L0 from k, and the pre-activation loss on dead latents."""

    def __init__(self, weights: Weights, y: Tensor, context: LossContext) -> None:
        super().__init__(weights, context, context.constants.jump_width, reaches_encoder=True)
        self.error_scale = 1 / y.shape[1]
        self.is_dead = context.is_dead.to(y.dtype)
        weight = context.constants.pre_activation_weight / (context.n_rows * y.shape[1])
        self.pull_silent(latent_norms(weights["W_dec"], context.widths) * self.is_dead, weight)

    def iter_blocks(self, encoder: _Encoder) -> Iterator[_Block]:
        """Encode the whole batch first: the gradient of each firing depends on L0. The loss is spread evenly over ranks."""
        context, shape = self.context, (len(encoder.x), len(encoder.bias))
        encoded = context.scratch.take("encoded", shape, encoder.bias)
        blocks = [encoder.encode(rows, encoded[rows], 0.0) for rows in row_blocks(encoder.x, shape[1])]
        n_own = sum(len(block.near.values) if block.near else kernels.count_true(encoded[block.rows] > 0) for block in blocks)
        n_fired = context.ranks.sum(torch.tensor(float(n_own), dtype=torch.float64, device=encoder.x.device))
        miss = n_fired / (context.n_rows * context.k) - 1
        self.loss = (context.coefficient * miss.square() / context.ranks.size).float()
        self.slopes = self.slopes._replace(grad_n_fired=(2 * context.coefficient * miss / (context.n_rows * context.k)).float())
        return iter(blocks)

    def finish(self, gradients: Weights) -> None:
        add_norm_gradient(gradients["W_dec"], self.weights["W_dec"], self.context.widths, self.finish_silence() * self.is_dead)
        super().finish(gradients)


class _TanhJump(_Jump):
    """The tanh of decoder-weighted activations, and the pre-activation loss on every latent."""

    def __init__(self, weights: Weights, context: LossContext) -> None:
        super().__init__(weights, context, context.constants.jump_width, reaches_encoder=True)
        norms = latent_norms(weights["W_dec"], context.widths)
        self.pull_silent(norms, context.constants.pre_activation_weight / context.n_rows)
        self.slope, self.scale = context.coefficient / context.n_rows, context.constants.tanh_scale
        self.steepness, self.rise = norms * self.scale, norms * (self.scale * self.slope)
        self.slopes = self.slopes._replace(rise=self.rise)
        self.grad_norms = torch.zeros_like(norms)

    def add_penalty(self, grad: Tensor, latents: Tensor, pairs: kernels.Pairs | None) -> None:
        """Take back what the slope adds too much where a latent fires: tanh is 0, and its slope the rise, everywhere else.

        d tanh(c f n) = (1 - tanh^2) (c n df + c f dn).
        """
        column, f, places = _find_fired(grad, latents, pairs, self.rise.dtype)
        tanh = (f * self.steepness[column]).tanh_()
        self.loss = self.loss + sum_all(tanh) * self.slope
        squared = tanh.square_()
        self.grad_norms.index_add_(0, column, (1 - squared).mul_(f))
        flat = grad.view(-1)
        flat[places] = (flat[places] - squared * self.rise[column]).to(flat.dtype)

    def finish(self, gradients: Weights) -> None:
        scale = self.grad_norms * (self.scale * self.slope) + self.finish_silence()
        add_norm_gradient(gradients["W_dec"], self.weights["W_dec"], self.context.widths, scale)
        super().finish(gradients)


class _StepJump(_Jump):
    """L0 itself; nothing but the mask reaches the encoder."""

    def __init__(self, weights: Weights, y: Tensor, context: LossContext) -> None:
        super().__init__(weights, context, context.constants.step_width * weights["W_enc_T"].shape[1] ** 0.5, reaches_encoder=False)
        self.error_scale = 1 / y.shape[1]
        self.reach = self.slopes.width / 2
        self.slopes = self.slopes._replace(grad_n_fired=self.slopes.grad_n_fired + context.coefficient / context.n_rows)

    def finish(self, gradients: Weights) -> None:
        self.loss = sum_all(self.n_fired) * (self.context.coefficient / self.context.n_rows)
        super().finish(gradients)
