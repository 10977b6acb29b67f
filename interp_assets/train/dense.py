"""Losses of architectures whose every latent may fire: ReLU and JumpReLU, forward and backward in one go over blocks of rows.

Five dense products a block, and one small rule per architecture for what lies between them:

    pre = x W_enc + b          latents = rule(pre)          error = latents W_dec + b_dec - y
    grad W_dec += latents^T error           grad pre = rule'(error W_dec^T)          grad W_enc += grad pre^T x

`rule.offset` is added to the encoder's bias, so that a JumpReLU rule is handed `pre - threshold` without a pass over the block. Masks are
made by `threshold_backward` (gradient where above 0) and `hardtanh_backward` (gradient inside a rectangle): one pass each, where
comparisons and `torch.where` take several.

The straight-through gradients of JumpReLU (K = 1/width inside the rectangle around the threshold, else 0; g = gradient of a latent,
s = gradient of its firing count):

    grad threshold = - sum over rows of K (threshold g + s)       grad pre = [pre > threshold] g, and + K (threshold g + s) in the
                                                                  January 2025 recipe, where it flows to all parameters

The rectangle is around the pre-activation, never the activation. Thresholds stay in float32.
"""

from typing import Final, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from interp_assets.train.kernels import (
    Pairs,
    decode_pairs,
    find_few,
    nonzero,
    product,
    sampled_product,
    sum_by_latent,
    sum_values,
    take_pairs,
)
from interp_assets.train.losses import (
    FEW,
    LossContext,
    StepLoss,
    Weights,
    add_norm_gradient,
    add_offset_gradients,
    add_offsets,
    count_fired,
    keep_above,
    latent_norms,
    make_gradients,
    reconstruct,
    row_blocks,
    row_parts,
    sum_rows,
)

JUMP_WIDTH: Final = 2.0
"""Width of the rectangle, in units of a normalised row's dimensions (Anthropic, January 2025)."""
TANH_SCALE: Final = 4.0
PRE_ACTIVATION_COEFFICIENT: Final = 3e-6
"""Weight of the loss that pulls silent latents back (Anthropic, January 2025)."""
STEP_WIDTH: Final = 0.001
"""Width of the rectangle for rows of squared norm 1 (Rajamanoharan et al. 2024): times sqrt(d_in) here."""


@runtime_checkable
class Rule(Protocol):
    """What an architecture does between the dense products; made anew for each step, because it also sums over the step's blocks."""

    offset: Tensor | None
    """Subtracted from the encoder's bias."""
    error_scale: float
    """Factor of the squared error in the loss."""
    loss: Tensor
    """Sparsity loss."""
    auxiliary: Tensor
    n_fired: Tensor
    reach: float | None
    """What lies this far below the offset, or further, has neither value nor gradient; None when too much lies above."""

    def encode_first(self, x: Tensor, W_enc_T: Tensor, bias: Tensor) -> Tensor | None:
        """Encode the whole batch before anything is decoded, if the rule needs to see it; else None."""
        ...

    def activate(self, pre: Tensor, latents: Tensor, buffer: Tensor) -> None:
        """Turn pre-activations (less the offset) into latents, and count; `buffer` is free."""
        ...

    def backward(self, pre: Tensor, latents: Tensor, grad: Tensor, buffer: Tensor) -> None:
        """Turn the gradient of the latents into that of the pre-activations, in place."""
        ...

    def activate_pairs(self, above: Tensor, pairs: Pairs) -> Tensor:
        """Do the same for the pairs within reach alone."""
        ...

    def backward_pairs(self, above: Tensor, grad: Tensor, pairs: Pairs) -> Tensor:
        """Do the same for the pairs within reach alone."""
        ...

    def finish(self, gradients: Weights) -> None:
        """Add the gradients of what was summed over the blocks."""
        ...


def relu_loss(weights: Weights, x: Tensor, y: Tensor, context: LossContext) -> StepLoss:
    """ReLU with an L1 penalty weighted by decoder norms."""
    return _dense_loss(weights, x, y, context, _Relu(weights, context))


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


class _Found(NamedTuple):
    pairs: Pairs
    above: Tensor
    """Pre-activations of the pairs, less the offset."""


def _dense_loss(weights: Weights, x: Tensor, y: Tensor, context: LossContext, rule: Rule) -> StepLoss:
    scratch, dtype = context.scratch, context.dtype
    gradients, W_enc_T = make_gradients(weights, scratch), weights["W_enc_T"].to(dtype)
    bias = weights["b_enc"] if rule.offset is None else weights["b_enc"] - rule.offset
    encoded = rule.encode_first(x, W_enc_T, bias)
    squared_error, scale = x.new_zeros((), dtype=torch.float64), 2 * rule.error_scale / context.n_rows
    cast, n_latents = {**weights, "W_dec": weights["W_dec"].to(dtype)}, len(bias)
    parts = list(row_parts(len(x), n_latents))
    buffer = scratch.take("buffer", (parts[0].stop, n_latents), x)
    for rows in row_blocks(len(x), n_latents):
        shape = (rows.stop - rows.start, n_latents)
        if encoded is None:  # noqa: SIM108 - one line would not fit
            pre = product(x[rows], W_enc_T.T, scratch.take("pre", shape, x), bias=bias, dtype=dtype)
        else:
            pre = encoded[rows]
        pairs = None if rule.reach is None else find_few(pre, -rule.reach, int(FEW * pre.numel()))
        if pairs is not None:
            squared_error += _add_pairs(weights, gradients, x[rows], y[rows], context, rule, _Found(pairs, take_pairs(pre, pairs)))
            continue
        latents = scratch.take("latents", shape, x)
        for part in row_parts(*shape):
            rule.activate(pre[part], latents[part], buffer[: part.stop - part.start])
        error = reconstruct(cast, x[rows], latents, context, "error").sub_(y[rows])
        squared_error += error.square().sum()
        error.mul_(scale)
        product(latents.T, error, gradients["W_dec"], is_added=True, dtype=dtype)
        add_offset_gradients(weights, gradients, x[rows], error)
        grad = product(error, cast["W_dec"].T, scratch.take("gradient", shape, x), dtype=dtype)
        for part in row_parts(*shape):
            rule.backward(pre[part], latents[part], grad[part], buffer[: part.stop - part.start])
            gradients["b_enc"].add_(sum_rows(grad[part]))
        product(grad.T, x[rows], gradients["W_enc_T"], is_added=True, dtype=dtype)
    rule.finish(gradients)
    squared_error = squared_error.float() / context.ranks.n_slices
    loss = squared_error * (rule.error_scale / context.n_rows) + rule.loss + rule.auxiliary
    return StepLoss(loss, squared_error, rule.loss, rule.auxiliary, rule.n_fired.long(), gradients)


def _add_pairs(weights: Weights, gradients: Weights, x: Tensor, y: Tensor, context: LossContext, rule: Rule, found: _Found) -> Tensor:
    """Add the gradients of a block in which few latents are within reach; return its squared error."""
    pairs = found.pairs
    values = rule.activate_pairs(found.above, pairs)
    error = add_offsets(weights, x, context.ranks.sum_slices(decode_pairs(values, weights["W_dec"], pairs))).sub_(y)
    squared_error = error.square().sum()
    error.mul_(2 * rule.error_scale / context.n_rows)
    add_offset_gradients(weights, gradients, x, error)
    gradients["W_dec"].add_(sum_by_latent(error, pairs.bags, values, pairs))
    grad = rule.backward_pairs(found.above, sampled_product(error, weights["W_dec"], pairs), pairs)
    gradients["W_enc_T"].add_(sum_by_latent(x, pairs.bags, grad, pairs))
    gradients["b_enc"].add_(sum_values(grad, pairs))
    return squared_error


class _Relu:
    """Gradient where the latent is above 0, with lambda |d_i| added."""

    offset: Tensor | None = None
    reach: float | None = 0.0
    error_scale = 1.0

    def __init__(self, weights: Weights, context: LossContext) -> None:
        self.weights, self.widths = weights, context.widths
        norms = latent_norms(weights["W_dec"], context.widths)
        self.slope = context.coefficient / context.n_rows
        self.penalty = norms * self.slope
        self.sums, self.n_fired = torch.zeros_like(norms), torch.zeros_like(norms)
        self.loss = self.auxiliary = norms.new_zeros(())

    def encode_first(self, x: Tensor, W_enc_T: Tensor, bias: Tensor) -> None:  # noqa: ARG002 - it does not look ahead
        return None

    def activate(self, pre: Tensor, latents: Tensor, buffer: Tensor) -> None:
        torch.clamp(pre, min=0.0, out=latents)
        self.sums += sum_rows(latents)
        self.n_fired += count_fired(latents, buffer)

    def backward(self, pre: Tensor, latents: Tensor, grad: Tensor, buffer: Tensor) -> None:  # noqa: ARG002 - other rules need them
        keep_above(grad.add_(self.penalty), latents)

    def activate_pairs(self, above: Tensor, pairs: Pairs) -> Tensor:
        self.sums += sum_values(above, pairs)
        self.n_fired += pairs.counts
        return above

    def backward_pairs(self, above: Tensor, grad: Tensor, pairs: Pairs) -> Tensor:  # noqa: ARG002 - all within reach fire
        return grad.add_(self.penalty[pairs.latents])

    def finish(self, gradients: Weights) -> None:
        self.loss = self.sums @ self.penalty
        add_norm_gradient(gradients["W_dec"], self.weights["W_dec"], self.widths, self.sums * self.slope)


class _Jump:
    """What the JumpReLU rules share: the threshold, its rectangle and its gradient."""

    error_scale = 1.0
    reach: float | None = None

    def __init__(self, weights: Weights, context: LossContext, width: float, *, reaches_encoder: bool) -> None:
        self.weights, self.context, self.width, self.reaches_encoder = weights, context, width, reaches_encoder
        self.threshold = weights["log_threshold"].exp()
        self.offset: Tensor | None = self.threshold
        self.grad_threshold = torch.zeros_like(self.threshold)
        self.n_fired = torch.zeros_like(self.threshold)
        self.grad_n_fired = self.threshold.new_zeros(())
        """Gradient of every latent's firing count."""
        self.loss = self.auxiliary = self.threshold.new_zeros(())

    def encode_first(self, x: Tensor, W_enc_T: Tensor, bias: Tensor) -> Tensor | None:  # noqa: ARG002 - only one rule looks ahead
        return None

    def activate(self, pre: Tensor, latents: Tensor, buffer: Tensor) -> None:
        keep_above(torch.add(pre, self.threshold, out=latents), pre)
        self.n_fired += count_fired(latents, buffer)

    def backward(self, pre: Tensor, latents: Tensor, grad: Tensor, buffer: Tensor) -> None:  # noqa: ARG002 - a subclass needs the latents
        torch.addcmul(self.grad_n_fired, grad, self.threshold, out=buffer)
        torch.ops.aten.hardtanh_backward.grad_input(buffer, pre, -self.width / 2, self.width / 2, grad_input=buffer)
        self.grad_threshold -= sum_rows(buffer) / self.width
        self.mask(pre, grad)
        if self.reaches_encoder:
            grad.add_(buffer, alpha=1 / self.width)

    def mask(self, pre: Tensor, grad: Tensor) -> None:
        """Keep the gradient of latents that fire."""
        keep_above(grad, pre)

    def activate_pairs(self, above: Tensor, pairs: Pairs) -> Tensor:
        fires = (above > 0).to(above.dtype)
        self.n_fired += sum_values(fires, pairs)
        return (above + self.threshold[pairs.latents]).mul_(fires)

    def backward_pairs(self, above: Tensor, grad: Tensor, pairs: Pairs) -> Tensor:
        through = torch.addcmul(self.grad_n_fired, grad, self.threshold[pairs.latents])
        through = torch.where(above.abs() < self.width / 2, through, 0.0).div_(self.width)
        self.grad_threshold -= sum_values(through, pairs)
        grad = torch.where(above > 0, grad, 0.0)
        return grad.add_(through) if self.reaches_encoder else grad

    def finish(self, gradients: Weights) -> None:
        gradients["log_threshold"].add_(self.grad_threshold * self.threshold)


class _TargetJump(_Jump):
    """The squared distance of L0 from k, and the pre-activation loss on dead latents."""

    def __init__(self, weights: Weights, y: Tensor, context: LossContext) -> None:
        super().__init__(weights, context, JUMP_WIDTH, reaches_encoder=True)
        self.error_scale = 1 / y.shape[1]
        self.slope = PRE_ACTIVATION_COEFFICIENT / (context.n_rows * y.shape[1])
        self.dead = context.is_dead.nonzero().view(-1)
        self.push = latent_norms(weights["W_dec"][self.dead], context.widths) * self.slope
        self.silence = torch.zeros_like(self.push)

    def encode_first(self, x: Tensor, W_enc_T: Tensor, bias: Tensor) -> Tensor:
        """Count the whole batch's firings: the gradient of each depends on L0. The value of the loss is spread evenly over ranks."""
        context = self.context
        encoded = context.scratch.take("encoded", (len(x), len(bias)), x)
        for rows in row_blocks(*encoded.shape):
            pre = product(x[rows], W_enc_T.T, encoded[rows], bias=bias, dtype=context.dtype)
            for part in row_parts(*pre.shape):
                buffer = context.scratch.take("buffer", tuple(pre[part].shape), pre)
                self.n_fired += sum_rows(torch.sign(pre[part], out=buffer).relu_())
        n_fired = context.ranks.sum(self.n_fired.double().sum())
        miss = n_fired / (context.n_rows * context.k) - 1
        self.loss = (context.coefficient * miss.square() / context.ranks.size).float()
        self.grad_n_fired = (2 * context.coefficient * miss / (context.n_rows * context.k)).float()
        return encoded

    def activate(self, pre: Tensor, latents: Tensor, buffer: Tensor) -> None:  # noqa: ARG002 - counted already
        keep_above(torch.add(pre, self.threshold, out=latents), pre)

    def backward(self, pre: Tensor, latents: Tensor, grad: Tensor, buffer: Tensor) -> None:
        super().backward(pre, latents, grad, buffer)
        if len(self.dead):
            below = pre[:, self.dead].neg_().relu_()
            self.silence += below.sum(0)
            push = below.sign_().mul_(self.push)
            grad[:, self.dead] -= push
            self.grad_threshold[self.dead] += push.sum(0)

    def finish(self, gradients: Weights) -> None:
        self.auxiliary = self.silence @ self.push
        if len(self.dead):
            scale = torch.zeros_like(self.threshold)
            scale[self.dead] = self.silence * self.slope
            add_norm_gradient(gradients["W_dec"], self.weights["W_dec"], self.context.widths, scale)
        super().finish(gradients)


class _TanhJump(_Jump):
    """The tanh of decoder-weighted activations, and the pre-activation loss on every latent."""

    def __init__(self, weights: Weights, context: LossContext) -> None:
        super().__init__(weights, context, JUMP_WIDTH, reaches_encoder=True)
        norms = latent_norms(weights["W_dec"], context.widths)
        self.slope = context.coefficient / context.n_rows
        self.push = norms * (PRE_ACTIVATION_COEFFICIENT / context.n_rows)
        self.steepness, self.rise = norms * TANH_SCALE, norms * (TANH_SCALE * self.slope)
        self.grad_norms, self.latents, self.pre, self.n_rows = torch.zeros_like(norms), torch.zeros_like(norms), torch.zeros_like(norms), 0

    def activate(self, pre: Tensor, latents: Tensor, buffer: Tensor) -> None:
        super().activate(pre, latents, buffer)
        self.latents += sum_rows(latents)
        self.pre += sum_rows(pre)
        self.n_rows += len(pre)

    def backward(self, pre: Tensor, latents: Tensor, grad: Tensor, buffer: Tensor) -> None:
        # d tanh(c f n) = (1 - tanh^2) (c n df + c f dn), and tanh is 0 where a latent is silent: most of the block needs no tanh.
        places = nonzero(latents > 0)
        column, f = places % latents.shape[1], latents.view(-1)[places]
        tanh = (f * self.steepness[column]).tanh_()
        self.loss += tanh.sum() * self.slope
        squared = tanh.square_()
        self.grad_norms.index_add_(0, column, (1 - squared).mul_(f))
        grad.add_(self.rise)
        flat = grad.view(-1)
        flat[places] = flat[places] - squared * self.rise[column]
        super().backward(pre, latents, grad, buffer)

    def mask(self, pre: Tensor, grad: Tensor) -> None:
        """Keep the gradient of latents that fire; push the others up to their thresholds."""
        keep_above(grad.add_(self.push), pre)
        grad.sub_(self.push)

    def finish(self, gradients: Weights) -> None:
        # The sum of relu(threshold - pre) is that of the latents less their thresholds, less that of all values: no pass of its own.
        silence = self.latents - self.threshold * self.n_fired - self.pre
        self.auxiliary = silence @ self.push
        self.grad_threshold += self.push * (self.n_rows - self.n_fired)
        scale = self.grad_norms * (TANH_SCALE * self.slope) + silence * (PRE_ACTIVATION_COEFFICIENT / self.context.n_rows)
        add_norm_gradient(gradients["W_dec"], self.weights["W_dec"], self.context.widths, scale)
        super().finish(gradients)


class _StepJump(_Jump):
    """L0 itself; nothing but the mask reaches the encoder."""

    def __init__(self, weights: Weights, y: Tensor, context: LossContext) -> None:
        super().__init__(weights, context, STEP_WIDTH * weights["W_enc_T"].shape[1] ** 0.5, reaches_encoder=False)
        self.error_scale = 1 / y.shape[1]
        self.reach: float | None = self.width / 2
        self.grad_n_fired += context.coefficient / context.n_rows

    def finish(self, gradients: Weights) -> None:
        self.loss = self.n_fired.sum() * (self.context.coefficient / self.context.n_rows)
        super().finish(gradients)
