"""Losses of the TopK family: one product, of 8-bit digits where that is fast, finds the active latents; all else touches only those.

    1. encode some rows at a time, keep what may be active (`compute/encode.py`), choose what is (`sparsify.py`): O(k) memory a row
    2. decode the active pairs; error; gradients of values, decoder and encoder from the pairs (`compute/kernels.py`)
    3. AuxK: the strongest dead latents of each row reconstruct the error, which is detached

A Matryoshka SAE decodes each row once per group of latents; prefix x_hat_g is the sum of the first g parts, and the gradient of part g
is the sum of the errors of the prefixes that contain it. Pairs lie by row, then by latent, so groups need no sorting.

AuxK (Gao et al. 2024, appendix A.2) is relative to the variance of the error over the global batch; 0 when nothing is dead, and 0
when the error has no variance but that of rounding. Few dead latents are decoded densely, many by pairs: 0.1 us a pair against 16 ns a latent and
row at d_in 512, so pairs pay above about six times `auxk_count` dead latents.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from interp_assets.compute import kernels
from interp_assets.compute.elementwise import keep_above, sum_rows, sum_squares
from interp_assets.compute.encode import can_encode, find_damage, make_encoder, sample_rows
from interp_assets.compute.loops import SMALLEST, is_native, over_rows, sum_prefixes
from interp_assets.compute.products import multiply
from interp_assets.train.losses.loss import (
    USUAL,
    LossContext,
    StepLoss,
    Weights,
    add_offset_gradients,
    add_offsets,
    latent_norms,
    make_gradients,
    row_blocks,
)
from interp_assets.train.losses.sparsify import Active, candidates_above, encode_per_row, guess_bound, keep_largest, level_rows, pick_per_row

_NO_VARIANCE: Final = (8 * torch.finfo(torch.float32).eps) ** 2
"""Squared deviation, relative to the squares of error and rows, that rounding alone may leave where all rows have the same error."""
_DENSE_AUXK_FACTOR: Final = 6


def topk_loss(weights: Weights, x: Tensor, y: Tensor, context: LossContext) -> StepLoss:
    """TopK: the k largest pre-activations of each row are active."""
    return _pairs_loss(weights, x, y, context, _pick_per_row(weights, x, context), [])


def batch_topk_loss(weights: Weights, x: Tensor, y: Tensor, context: LossContext) -> StepLoss:
    """BatchTopK: the k * rows largest pre-activations of the global batch are active, weighted by decoder norms where these may differ."""
    return _pairs_loss(weights, x, y, context, _pick_per_batch(weights, x, context), [])


def matryoshka_loss(weights: Weights, x: Tensor, y: Tensor, context: LossContext) -> StepLoss:
    """BatchTopK over the full width; every prefix of groups must reconstruct alone."""
    n_local = len(weights["b_enc"])
    ends = group_ends(n_local * context.ranks.n_slices, context.constants.groups)
    first = context.ranks.slice_index * n_local
    return _pairs_loss(weights, x, y, context, _pick_per_batch(weights, x, context), [min(n_local, max(0, end - first)) for end in ends])


def auxk_count(d_in: int) -> int:
    """Return how many dead latents of a row take part in AuxK: `d_in` / 2, rounded to a power of two."""
    return 1 << max(0, round(math.log2(d_in / 2)))


def group_ends(d_sae: int, groups: Sequence[float] = USUAL.groups) -> list[int]:
    """Return where each Matryoshka group ends, given their shares of `d_sae`; the last is `d_sae`."""
    shares = torch.tensor(groups, dtype=torch.float64).cumsum(0)
    return [max(1, round(float(share) * d_sae)) for share in shares]


def add_auxk(weights: Weights, gradients: Weights, x: Tensor, error: Float[Tensor, "batch d_out"], context: LossContext) -> Float[Tensor, ""]:
    """Return this rank's share of the AuxK loss for the detached `error`, and add its gradients times its weight."""
    ranks = context.ranks
    dead = context.is_dead.nonzero().view(-1)
    n_dead = int(ranks.sum_slices(torch.tensor([len(dead)], device=x.device)))
    if n_dead == 0:
        return error.new_zeros(())
    mean = ranks.sum(sum_rows(error)) / (ranks.n_slices * context.n_rows)
    centred = torch.sub(error, mean, out=context.scratch.take("centred", tuple(error.shape), error))
    variance, size = (ranks.sum(torch.stack([sum_squares(centred), sum_squares(error) + sum_squares(x)])) / ranks.n_slices).unbind()
    scale = torch.where(variance > _NO_VARIANCE * size, 1 / variance, 0.0)
    W_enc_T, W_dec = weights["W_enc_T"][dead], weights["W_dec"][dead]
    n_active = min(auxk_count(x.shape[1]), n_dead)
    pre = kernels.product(x, W_enc_T.T, context.scratch.take("dead", (len(x), len(dead)), x), bias=weights["b_enc"][dead], dtype=context.dtype)
    if len(dead) > _DENSE_AUXK_FACTOR * n_active:
        # Whole rows are partitioned: for so large a share of a row `pick_per_row` takes 1.2 to 1.7 times as long.
        active = candidates_above(pre, level_rows(pre, n_active, ranks, n_dead))
        pairs = kernels.make_pairs(active.places, len(x), len(dead))
        missed = ranks.sum_slices(kernels.decode_pairs(active.values, W_dec, pairs, context.scratch, "missed")).sub_(error)
        loss = sum_squares(missed) * scale / ranks.n_slices
        missed.mul_(2 * context.constants.auxk_weight * scale)
        found = {"W_dec": torch.zeros_like(W_dec), "W_enc_T": torch.zeros_like(W_enc_T), "b_enc": x.new_zeros(len(dead))}
        _pair_gradients({"W_dec": W_dec}, x, missed, active.values, pairs, found, context.scratch)
    else:
        latents = pre.mul_(pre >= level_rows(pre, n_active, ranks, n_dead))
        missed = ranks.sum_slices(kernels.product(latents, W_dec, context.scratch.take("missed", tuple(error.shape), error))).sub_(error)
        loss = sum_squares(missed) * scale / ranks.n_slices
        missed.mul_(2 * context.constants.auxk_weight * scale)
        grad = keep_above(kernels.product(missed, W_dec.T, context.scratch.take("dead_gradient", tuple(pre.shape), x)), latents)
        found = {name: torch.empty_like(value) for name, value in (("W_dec", W_dec), ("W_enc_T", W_enc_T))} | {"b_enc": sum_rows(grad)}
        multiply(latents.T, missed, found["W_dec"])
        multiply(grad.T, x, found["W_enc_T"])
    for name, gradient in found.items():
        gradients[name].index_add_(0, dead, gradient)
    return loss


def _competing(weights: Weights, context: LossContext, factor: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the encoder and its bias, times a positive factor per latent."""
    W_enc_T, b_enc = weights["W_enc_T"], weights["b_enc"]
    if factor is None:
        return W_enc_T, b_enc
    scaled = context.scratch.take("scaled", tuple(W_enc_T.shape), W_enc_T)
    return torch.mul(W_enc_T, factor[:, None], out=scaled), b_enc * factor


def _encode(W_enc_T: Tensor, b_enc: Tensor, x: Tensor, context: LossContext) -> Iterator[tuple[slice, Tensor]]:
    """Yield the pre-activations of each block of rows; they last until the next block."""
    W_enc_T = W_enc_T.to(context.dtype)
    for rows in row_blocks(x, len(b_enc)):
        buffer = context.scratch.take("pre", (rows.stop - rows.start, len(b_enc)), x)
        yield rows, kernels.product(x[rows], W_enc_T.T, buffer, bias=b_enc, dtype=context.dtype)


class _Picked(NamedTuple):
    """What is active, by places and values."""

    active: Active
    damage: Tensor
    """NaN where a row or a weight is not finite, which comparisons may have hidden; else 0."""


def _pick_per_row(weights: Weights, x: Tensor, context: LossContext) -> _Picked:
    factor, k, ranks, n_latents = _selection_factor(weights, context), context.k, context.ranks, len(weights["b_enc"])
    W_enc_T, b_enc = _competing(weights, context, factor)
    if can_encode(x, W_enc_T, context.dtype):
        encoder = make_encoder(x, W_enc_T, b_enc, context.scratch)
        return _Picked(_unscale(encode_per_row(encoder, k, ranks, n_latents * ranks.n_slices), factor), encoder.damage)
    blocks = [
        _shift(pick_per_row(pre, k, ranks, n_latents * ranks.n_slices), rows.start * n_latents) for rows, pre in _encode(W_enc_T, b_enc, x, context)
    ]
    return _Picked(_unscale(_join(blocks), factor), find_damage(x, W_enc_T, b_enc))


def _pick_per_batch(weights: Weights, x: Tensor, context: LossContext) -> _Picked:
    factor, ranks, n_latents = _selection_factor(weights, context), context.ranks, len(weights["b_enc"])
    n_active, (W_enc_T, b_enc) = context.k * context.n_rows, _competing(weights, context, factor)
    encoder = make_encoder(x, W_enc_T, b_enc, context.scratch) if can_encode(x, W_enc_T, context.dtype) else None
    if encoder:
        sample = encoder.sample().about()
    else:
        ((_, sample),) = _encode(W_enc_T, b_enc, sample_rows(x), context)
    bound = guess_bound(sample, n_active / (context.n_rows * n_latents * ranks.n_slices))
    if ranks.size > 1:
        # One bound for all: a rank with a higher one could leave out values that belong to the largest of the global batch.
        bound = float(ranks.sum(torch.tensor([bound / ranks.size], dtype=torch.float64, device=x.device)))
    while True:
        if encoder:
            candidates = encoder.reaching(max(bound, SMALLEST))
        else:
            candidates = _join([_shift(candidates_above(pre, bound), rows.start * n_latents) for rows, pre in _encode(W_enc_T, b_enc, x, context)])
        if bound == 0 or int(ranks.sum(torch.tensor([len(candidates.values)], device=x.device))) >= n_active:
            active = keep_largest(candidates, n_active, ranks, (len(x), n_latents))
            return _Picked(_unscale(active, factor), encoder.damage if encoder else find_damage(x, W_enc_T, b_enc))
        bound = 0.0


def _selection_factor(weights: Weights, context: LossContext) -> Tensor | None:
    """A crosscoder's latents compete by f_i |d_i|, with |d_i| summed over its hook points; elsewhere the decoder's rows have norm 1."""
    return latent_norms(weights["W_dec"], context.widths) if len(context.widths) > 1 else None


def _unscale(active: Active, factor: Tensor | None) -> Active:
    return active if factor is None else active._replace(values=active.values / factor[active.places % len(factor)])


def _pairs_loss(weights: Weights, x: Tensor, y: Tensor, context: LossContext, picked: _Picked, ends: list[int]) -> StepLoss:
    """Return loss and gradients of the active pairs; `ends` are those of a Matryoshka SAE's groups in this slice."""
    active = picked.active
    n_latents, (n_rows, d_out), scratch = len(weights["b_enc"]), y.shape, context.scratch
    pairs = kernels.make_pairs(active.places, n_rows, n_latents)
    gradients = make_gradients(weights, scratch)
    bags = kernels.split_bags(pairs, ends) if ends else pairs
    parts = context.ranks.sum_slices(kernels.decode_pairs(active.values, weights["W_dec"], bags, scratch))
    scale = 2 / (context.n_rows * d_out * (len(ends) + 1 if ends else 1))
    if ends:
        errors = _prefix_errors(weights, x, y, parts.view(n_rows, len(ends), d_out), scratch)
        error, squared, grad = errors.whole, errors.squared, parts
        add_offset_gradients(weights, gradients, x, errors.total, scale)
    else:
        error = add_offsets(weights, x, parts).sub_(y)
        squared = sum_squares(error)[None]
        grad = error
        add_offset_gradients(weights, gradients, x, error, scale)
    _pair_gradients(weights, x, grad, active.values, bags, gradients, scratch, scale)
    auxk = add_auxk(weights, gradients, x, error.neg_(), context)
    squared = squared / context.ranks.n_slices
    loss = squared.mean() / (context.n_rows * d_out) + context.constants.auxk_weight * auxk + picked.damage
    return StepLoss(loss, squared[-1], loss.new_zeros(()), auxk, pairs.counts, gradients)


class _PrefixErrors(NamedTuple):
    whole: Float[Tensor, "batch d_out"]
    """Error of the longest prefix."""
    squared: Float[Tensor, " prefixes"]
    """Squared errors of all prefixes, the empty one first."""
    total: Float[Tensor, "batch d_out"]
    """Sum of the errors of all prefixes."""


def _prefix_errors(weights: Weights, x: Tensor, y: Tensor, parts: Float[Tensor, "batch groups d_out"], scratch: kernels.Scratch) -> _PrefixErrors:
    """Turn each group's part of the reconstruction, in place, into the sum of the errors of the prefixes that contain it."""
    empty, whole = (scratch.take(name, tuple(y.shape), y) for name in ("empty", "whole"))
    add_offsets(weights, x, empty.zero_()).sub_(y)
    if is_native(parts, empty):
        squared = over_rows(sum_prefixes, len(parts), (1, parts.shape[1] + 1), parts.numpy(), empty.numpy(), whole.numpy())
        return _PrefixErrors(whole, torch.from_numpy(squared[0]), empty)
    squared = [sum_squares(empty)]
    for group in range(parts.shape[1]):
        parts[:, group].add_(parts[:, group - 1] if group else empty)
        squared.append(sum_squares(parts[:, group]))
    whole.copy_(parts[:, -1])
    for group in reversed(range(parts.shape[1] - 1)):
        parts[:, group].add_(parts[:, group + 1])
    return _PrefixErrors(whole, torch.stack(squared), empty.add_(parts[:, 0]))


def _pair_gradients(
    weights: Weights,
    x: Tensor,
    grad: Float[Tensor, "bags d_out"],
    values: Tensor,
    pairs: kernels.Pairs,
    gradients: Weights,
    scratch: kernels.Scratch,
    scale: float = 1.0,
) -> None:
    """Add the gradients of decoder, encoder and its bias, given that of each bag's reconstruction as `scale` times `grad`."""
    grad_values = kernels.sampled_product(grad, weights["W_dec"], pairs, scratch).mul_(scale)
    kernels.add_by_latent(gradients["W_dec"], grad, values * scale, pairs, scratch)
    kernels.add_by_latent(gradients["W_enc_T"], x, grad_values, pairs, scratch)
    gradients["b_enc"].add_(kernels.sum_values(grad_values, pairs))


def _shift(active: Active, start: int) -> Active:
    return active._replace(places=active.places.add_(start))


def _join(blocks: list[Active]) -> Active:
    if len(blocks) == 1:
        return blocks[0]
    return Active(torch.cat([block.places for block in blocks]), torch.cat([block.values for block in blocks]))
