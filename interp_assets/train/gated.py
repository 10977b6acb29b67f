"""The loss of a gated SAE: which latents fire and how strongly are separate, and the gates have their own reconstruction.

Rajamanoharan et al. 2024 (2404.16014), eq. 8. With p = x W_enc, gate = p + b_enc and magnitude = p e^r + b_mag:

    f = [gate > 0] relu(magnitude)        o = relu(gate)        d, b = decoder and its bias, which get no gradient through the gates
    loss = sum (y - decode f)^2 + lambda sum o + sum (y - o d - b)^2

Seven dense products a block (five for one reconstruction, two for the second), in place, as in `dense.py`; by pairs where few gates are open.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from interp_assets.train.kernels import Pairs, decode_pairs, find_few, product, sampled_product, sum_by_latent, sum_values, take_pairs
from interp_assets.train.losses import (
    FEW,
    LossContext,
    StepLoss,
    Weights,
    add_offset_gradients,
    add_offsets,
    count_fired,
    keep_above,
    make_gradients,
    reconstruct,
    row_blocks,
    row_parts,
    sum_rows,
)


def gated_loss(weights: Weights, x: Tensor, y: Tensor, context: LossContext) -> StepLoss:
    """Gated latents with an L1 penalty and an auxiliary reconstruction on the gates."""
    scratch, dtype, width = context.scratch, context.dtype, len(weights["b_enc"])
    gradients, gain = make_gradients(weights, scratch), weights["r_mag"].exp()
    W_enc_T, cast = weights["W_enc_T"].to(dtype), {**weights, "W_dec": weights["W_dec"].to(dtype)}
    sums = torch.zeros(3, dtype=torch.float64, device=x.device)
    n_fired, scale, penalty = torch.zeros_like(gain), 2 / context.n_rows, context.coefficient / context.n_rows
    buffer = scratch.take("buffer", (next(row_parts(len(x), width)).stop, width), x)
    for rows in row_blocks(len(x), width):
        shape = (rows.stop - rows.start, width)
        gate = product(x[rows], W_enc_T.T, scratch.take("pre", shape, x), bias=weights["b_enc"], dtype=dtype)
        pairs = find_few(gate, 0.0, int(FEW * gate.numel()))
        if pairs is not None:
            block = _add_pairs(weights, gradients, x[rows], y[rows], context, _Opened(pairs, take_pairs(gate, pairs)))
            sums += block.sums
            n_fired += block.n_fired
            continue
        projection = gate.sub_(weights["b_enc"])
        opened, latents = scratch.take("opened", shape, x), scratch.take("latents", shape, x)
        for part in row_parts(*shape):
            torch.add(projection[part], weights["b_enc"], out=opened[part]).relu_()
            torch.addcmul(weights["b_mag"], projection[part], gain, out=latents[part]).relu_()
            keep_above(latents[part], opened[part])
            n_fired += count_fired(latents[part], buffer[: part.stop - part.start])
        error = reconstruct(cast, x[rows], latents, context, "error").sub_(y[rows])
        gate_error = reconstruct(cast, x[rows], opened, context, "gate_error").sub_(y[rows])
        sums += torch.stack([error.square().sum(), gate_error.square().sum(), opened.sum()])
        error.mul_(scale)
        product(latents.T, error, gradients["W_dec"], is_added=True, dtype=dtype)
        # The skip of a transcoder, unlike the gates, has no sparsity to gain: it learns from the first error only.
        add_offset_gradients(weights, gradients, x[rows], error)
        grad = product(error, cast["W_dec"].T, scratch.take("gradient", shape, x), dtype=dtype)
        for part in row_parts(*shape):
            keep_above(grad[part], latents[part])
        grad_gate = product(gate_error.mul_(scale), cast["W_dec"].T, latents, dtype=dtype)
        for part in row_parts(*shape):
            gradients["b_mag"].add_(sum_rows(grad[part]))
            grad[part].mul_(gain)
            gradients["r_mag"].add_(sum_rows(torch.mul(grad[part], projection[part], out=buffer[: part.stop - part.start])))
            keep_above(grad_gate[part].add_(penalty), opened[part])
            gradients["b_enc"].add_(sum_rows(grad_gate[part]))
            grad[part].add_(grad_gate[part])
        product(grad.T, x[rows], gradients["W_enc_T"], is_added=True, dtype=dtype)
    squared_error, gate_error_sum, opened_sum = sums.float().unbind()
    squared_error, sparsity = squared_error / context.ranks.n_slices, opened_sum * penalty
    loss = (squared_error + gate_error_sum / context.ranks.n_slices) / context.n_rows + sparsity
    return StepLoss(loss, squared_error, sparsity, loss.new_zeros(()), n_fired.long(), gradients)


class _Opened(NamedTuple):
    pairs: Pairs
    gates: Tensor
    """Pre-activations of the open gates."""


class _Block(NamedTuple):
    sums: Tensor
    """Squared error, squared error of the gates, sum of the gates."""
    n_fired: Tensor


def _add_pairs(weights: Weights, gradients: Weights, x: Tensor, y: Tensor, context: LossContext, opened: _Opened) -> _Block:
    """Add the gradients of a block in which few gates are open."""
    pairs, gates, W_dec = opened.pairs, opened.gates, weights["W_dec"]
    gain = weights["r_mag"].exp()[pairs.latents]
    projection = gates - weights["b_enc"][pairs.latents]
    values = torch.addcmul(weights["b_mag"][pairs.latents], projection, gain).relu_()
    fires = values.sign()
    error, gate_error = (
        add_offsets(weights, x, context.ranks.sum_slices(decode_pairs(strengths, W_dec, pairs))).sub_(y) for strengths in (values, gates)
    )
    sums = torch.stack([error.square().sum(), gate_error.square().sum(), gates.sum()])
    error.mul_(2 / context.n_rows)
    gate_error.mul_(2 / context.n_rows)
    add_offset_gradients(weights, gradients, x, error)
    gradients["W_dec"].add_(sum_by_latent(error, pairs.bags, values, pairs))
    grad = sampled_product(error, W_dec, pairs).mul_(fires)
    gradients["b_mag"].add_(sum_values(grad, pairs))
    grad.mul_(gain)
    gradients["r_mag"].add_(sum_values(grad * projection, pairs))
    grad_gate = sampled_product(gate_error, W_dec, pairs).add_(context.coefficient / context.n_rows)
    gradients["b_enc"].add_(sum_values(grad_gate, pairs))
    gradients["W_enc_T"].add_(sum_by_latent(x, pairs.bags, grad.add_(grad_gate), pairs))
    return _Block(sums, sum_values(fires, pairs))
