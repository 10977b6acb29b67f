"""The loss of a gated SAE: which latents fire and how strongly are separate, and the gates have their own reconstruction.

Rajamanoharan et al. 2024 (2404.16014), eq. 8. With p = x W_enc, gate = p + b_enc and magnitude = p e^r + b_mag:

    f = [gate > 0] relu(magnitude)        o = relu(gate)        d, b = decoder and its bias, which get no gradient through the gates
    loss = sum (y - decode f)^2 + lambda sum o + sum (y - o d - b)^2

Seven dense products a block (five for one reconstruction, two for the second), in place, as in `dense.py`; where few gates are open, these
are found without a dense product (`compute/encode.py`), and each decoder row is read once for both reconstructions.
"""

from typing import Final, NamedTuple

import torch
from torch import Tensor

from interp_assets.compute import kernels
from interp_assets.compute.elementwise import Gates, close_gates, open_gates, sum_all, sum_squares
from interp_assets.compute.encode import FewEncoder
from interp_assets.train.losses.loss import (
    LossContext,
    StepLoss,
    Weights,
    add_offset_gradients,
    add_offsets,
    make_gradients,
    reconstruct,
    row_blocks,
)

FEW_GATES: Final = 1 / 7
"""Share of open gates below which pairs are faster than dense products."""


def gated_loss(weights: Weights, x: Tensor, y: Tensor, context: LossContext) -> StepLoss:
    """Gated latents with an L1 penalty and an auxiliary reconstruction on the gates."""
    scratch, dtype, width = context.scratch, context.dtype, len(weights["b_enc"])
    gradients, gates = make_gradients(weights, scratch), Gates(weights["b_enc"], weights["r_mag"].exp(), weights["b_mag"])
    W_enc_T, cast = scratch.cast("W_enc_T", weights["W_enc_T"], dtype), {**weights, "W_dec": scratch.cast("W_dec", weights["W_dec"], dtype)}
    operand = scratch.cast("x", x, dtype)
    sums = torch.zeros(3, dtype=torch.float64, device=x.device)
    n_fired = torch.zeros_like(gates.gain)
    finder = FewEncoder(operand, W_enc_T, weights["b_enc"], scratch)
    for rows in row_blocks(x, width):
        shape, limit = (rows.stop - rows.start, width), int(FEW_GATES * (rows.stop - rows.start) * width)
        few, gate = finder.find(rows, 0.0, limit), scratch.take("pre", shape, x)
        if few is None:
            kernels.product(operand[rows], W_enc_T.T, gate, bias=weights["b_enc"], dtype=dtype, scratch=scratch)
            few = kernels.find_few(gate, 0.0, limit)
        if few is None:
            block = _add_dense(cast, gradients, (x[rows], operand[rows]), y[rows], context, gate, gates)
        else:
            block = _add_pairs(weights, gradients, x[rows], y[rows], context, few)
        sums += block.sums
        n_fired += block.n_fired
    squared_error, gate_error_sum, opened_sum = sums.float().unbind()
    squared_error, sparsity = squared_error / context.ranks.n_slices, opened_sum * (context.coefficient / context.n_rows)
    loss = (squared_error + gate_error_sum / context.ranks.n_slices) / context.n_rows + sparsity + finder.damage
    return StepLoss(loss, squared_error, sparsity, loss.new_zeros(()), n_fired.long(), gradients)


class _Block(NamedTuple):
    sums: Tensor
    """Squared error, squared error of the gates, sum of the gates."""
    n_fired: Tensor


def _add_dense(
    weights: Weights, gradients: Weights, rows: tuple[Tensor, Tensor], y: Tensor, context: LossContext, gate: Tensor, gates: Gates
) -> _Block:
    """Add the gradients of a block in which many gates are open; `rows` are what was encoded, in float32 and as products take it."""
    scratch, dtype, shape, (x, operand) = context.scratch, context.dtype, tuple(gate.shape), rows
    opened, latents = scratch.take("opened", shape, x, dtype), scratch.take("latents", shape, x, dtype)
    counts = open_gates(gate, gates, opened, latents)
    error = reconstruct(weights, x, latents, context, "error").sub_(y)
    gate_error = reconstruct(weights, x, opened, context, "gate_error").sub_(y)
    sums = torch.stack([sum_squares(error), sum_squares(gate_error), sum_all(counts.opened)])
    errors = [scratch.cast(f"{i} operand", value.mul_(2 / context.n_rows), dtype) for i, value in enumerate((error, gate_error))]
    kernels.product(latents.T, errors[0], gradients["W_dec"], is_added=True, dtype=dtype, scratch=scratch)
    # The skip of a transcoder, unlike the gates, has no sparsity to gain: it learns from the first error only.
    add_offset_gradients(weights, gradients, x, error)
    grad = kernels.product(errors[0], weights["W_dec"].T, scratch.take("gradient", shape, x, dtype), dtype=dtype)
    grad_gate = kernels.product(errors[1], weights["W_dec"].T, opened, dtype=dtype)
    closed = close_gates(gate, gates, (grad, grad_gate), latents, context.coefficient / context.n_rows)
    for name, gradient in (("b_mag", closed.bias_magnitude), ("r_mag", closed.log_gain), ("b_enc", closed.bias)):
        gradients[name].add_(gradient)
    kernels.product(grad.T, operand, gradients["W_enc_T"], is_added=True, dtype=dtype, scratch=scratch)
    return _Block(sums, counts.n_fired)


def _add_pairs(weights: Weights, gradients: Weights, x: Tensor, y: Tensor, context: LossContext, opened: kernels.Few) -> _Block:
    """Add the gradients of a block in which few gates are open."""
    pairs, gates, W_dec, scratch = opened.pairs, opened.values, weights["W_dec"], context.scratch
    gain = weights["r_mag"].exp()[pairs.latents]
    projection = gates - weights["b_enc"][pairs.latents]
    values = torch.addcmul(weights["b_mag"][pairs.latents], projection, gain).relu_()
    fires = values.sign()
    x_hat, gate_x_hat = kernels.decode_pairs_twice((values, gates), W_dec, pairs, scratch)
    error = add_offsets(weights, x, context.ranks.sum_slices(x_hat)).sub_(y)
    gate_error = add_offsets(weights, x, context.ranks.sum_slices(gate_x_hat)).sub_(y)
    sums = torch.stack([sum_squares(error), sum_squares(gate_error), sum_all(gates)])
    error.mul_(2 / context.n_rows)
    gate_error.mul_(2 / context.n_rows)
    add_offset_gradients(weights, gradients, x, error)
    kernels.add_by_latent(gradients["W_dec"], error, values, pairs, scratch)
    grad, grad_gate = kernels.sampled_product_twice((error, gate_error), W_dec, pairs, scratch)
    gradients["b_mag"].add_(kernels.sum_values(grad.mul_(fires), pairs))
    grad.mul_(gain)
    gradients["r_mag"].add_(kernels.sum_values(grad * projection, pairs))
    gradients["b_enc"].add_(kernels.sum_values(grad_gate.add_(context.coefficient / context.n_rows), pairs))
    kernels.add_by_latent(gradients["W_enc_T"], x, grad.add_(grad_gate), pairs, scratch)
    return _Block(sums, kernels.sum_values(fires, pairs))
