"""The loss of every architecture, for one batch of normalised rows: a function of the weights, never a trainer.

Rows are centred and scaled (`recipes.py`), so a row has mean 0 and its squared norm has mean `d_in`. With pre = x W_enc + b_enc:

    relu                    sum error^2 + lambda sum_i f_i |d_i|                                Anthropic, April 2024 update
    gated                   sum error^2 + lambda sum_i relu(gate_i) + sum gate_error^2          Rajamanoharan et al. 2024 (2404.16014), eq. 8
    topk, batch_topk        mean error^2 + AuxK / 32                                            Gao et al. 2024 (2406.04093), Bussmann et al. 2024
    matryoshka_batch_topk   mean over prefixes of mean error^2, + AuxK / 32                     Bussmann et al. 2025 (2503.17547)
    jump_relu               mean error^2 + lambda (L0 / k - 1)^2 + pre-activation loss          Anthropic, January 2025, with a target L0

"sum" is over dimensions and "mean" over rows and dimensions; errors are the batch aggregate, never relative to a row's own norm, which
would starve the rows of high variance. Every returned loss is this rank's share: the global loss is the sum over ranks.
"""

import math
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.autograd import Function

from interp_assets.train.kernels import Pairs, decode_pairs, encode_pairs, group_pairs, make_pairs
from interp_assets.train.parallel import Ranks
from interp_assets.train.sparsify import make_active, pick_per_batch, pick_per_row

Weights = dict[str, Tensor]
"""Trained tensors by name; the encoder lies as `W_enc_T [d_sae, d_in]`, so that a latent's weights are contiguous."""

AUXK_COEFFICIENT: Final = 1 / 32
JUMP_WIDTH: Final = 2.0
"""Width of the rectangle through which thresholds get gradients, in units of a normalised row's dimensions (Anthropic, January 2025)."""
PRE_ACTIVATION_COEFFICIENT: Final = 3e-6
"""Weight of the loss that pulls dead latents back (Anthropic, January 2025; on dead latents only, as SAELens found enough)."""
_DENSE_AUXK_FACTOR: Final = 6
GROUP_SHARES: Final = (1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Nested groups of a Matryoshka SAE, as shares of `d_sae`."""


class LossContext(NamedTuple):
    """What a loss depends on besides weights and rows."""

    k: int
    coefficient: float
    """Sparsity coefficient after its warm-up."""
    n_rows: int
    """Rows of the global batch."""
    is_dead: Bool[Tensor, " d_sae"]
    ranks: Ranks


class StepLoss(NamedTuple):
    """This rank's share of a step's loss, and what it saw."""

    loss: Float[Tensor, ""]
    squared_error: Float[Tensor, ""]
    """Sum over rows and dimensions."""
    sparsity_loss: Float[Tensor, ""]
    auxk_loss: Float[Tensor, ""]
    n_fired: Int64[Tensor, " d_sae"]
    """Number of rows on which each latent fired."""


LossFunction = Callable[[Weights, Float[Tensor, "batch d_in"], LossContext], StepLoss]


def relu_loss(weights: Weights, x: Float[Tensor, "batch d_in"], context: LossContext) -> StepLoss:
    """ReLU with an L1 penalty weighted by decoder norms."""
    latents = _pre(weights, x).relu()
    squared_error = (x - _decode(weights, latents)).square().sum()
    sparsity = context.coefficient * (latents.sum(0) @ weights["W_dec"].norm(dim=1)) / context.n_rows
    return _step(squared_error / context.n_rows + sparsity, squared_error, latents, sparsity=sparsity)


def gated_loss(weights: Weights, x: Float[Tensor, "batch d_in"], context: LossContext) -> StepLoss:
    """Gated: which latents fire and how strongly are separate; the gates get their own reconstruction through a frozen decoder."""
    projection = x @ weights["W_enc_T"].T
    gate = projection + weights["b_enc"]
    magnitude = projection * weights["r_mag"].exp() + weights["b_mag"]
    latents = magnitude.relu() * gate.detach().sign().relu_()
    squared_error = (x - _decode(weights, latents)).square().sum()
    opened = gate.relu()
    gate_error = (x - torch.addmm(weights["b_dec"].detach(), opened, weights["W_dec"].detach())).square().sum()
    sparsity = context.coefficient * opened.sum() / context.n_rows
    return _step((squared_error + gate_error) / context.n_rows + sparsity, squared_error, latents, sparsity=sparsity)


def topk_loss(weights: Weights, x: Float[Tensor, "batch d_in"], context: LossContext) -> StepLoss:
    """TopK: the k largest pre-activations of each row are active."""
    pre = _pre_detached(weights, x)
    return _sparse_loss(weights, x, context, pre, pick_per_row(pre, context.k), n_groups=1)


def batch_topk_loss(weights: Weights, x: Float[Tensor, "batch d_in"], context: LossContext) -> StepLoss:
    """BatchTopK: the k * rows largest pre-activations of the global batch are active."""
    pre = _pre_detached(weights, x)
    return _sparse_loss(weights, x, context, pre, pick_per_batch(pre, context.k * context.n_rows, context.ranks), n_groups=1)


def matryoshka_loss(weights: Weights, x: Float[Tensor, "batch d_in"], context: LossContext) -> StepLoss:
    """BatchTopK over the full width; every prefix of groups must reconstruct alone."""
    pre = _pre_detached(weights, x)
    places = pick_per_batch(pre, context.k * context.n_rows, context.ranks)
    return _sparse_loss(weights, x, context, pre, places, n_groups=len(GROUP_SHARES))


def jump_relu_loss(weights: Weights, x: Float[Tensor, "batch d_in"], context: LossContext) -> StepLoss:
    """JumpReLU with learned thresholds and the straight-through gradient to all parameters; L0 is pulled to `k`.

    Anthropic's January 2025 recipe with another sparsity loss: its tanh penalty has no target and wants a coefficient search per
    width and model, the squared distance of the batch's mean L0 from `k` (Gemma Scope 2; dictionary_learning) does not.
    """
    pre, threshold = _pre(weights, x), weights["log_threshold"].exp()
    latents, n_fired = jump_relu(pre, threshold)
    squared_error = (x - _decode(weights, latents)).square().sum()
    l0 = n_fired.sum() / context.n_rows
    miss = context.ranks.sum(l0.detach().clone()) / context.k - 1
    # The gradient of (L0 / k - 1)^2 by this rank's share of L0; the value is spread evenly over ranks.
    sparsity = context.coefficient * (2 * miss / context.k * (l0 - l0.detach()) + miss**2 / context.ranks.size)
    dead = context.is_dead.nonzero().view(-1)
    silence = ((threshold[dead] - pre[:, dead]).relu() @ weights["W_dec"][dead].norm(dim=1)).sum() if len(dead) else pre.new_zeros(())
    auxiliary = PRE_ACTIVATION_COEFFICIENT * silence / (context.n_rows * x.shape[1])
    loss = squared_error / (context.n_rows * x.shape[1]) + sparsity + auxiliary
    return StepLoss(loss, squared_error.detach(), sparsity.detach(), auxiliary.detach(), n_fired.detach().long())


def auxk_loss(
    weights: Weights, x: Float[Tensor, "batch d_in"], error: Float[Tensor, "batch d_in"], pre: Float[Tensor, "batch d_sae"], context: LossContext
) -> Float[Tensor, ""]:
    """Let the strongest dead latents of each row reconstruct the error, which gets no gradient (Gao et al. 2024, appendix A.2).

    Relative to the error's variance over the global batch; 0 when nothing is dead, and 0 rather than NaN when the error has no variance.
    """
    dead = context.is_dead.nonzero().view(-1)
    if len(dead) == 0:
        return error.new_zeros(())
    target = error.detach()
    places = pick_per_row(pre[:, dead], min(auxk_count(x.shape[1]), len(dead)))
    moments = context.ranks.sum(torch.cat([target.sum(0), target.square().sum()[None]]))
    variance = moments[-1] - (moments[:-1] / context.n_rows).square().sum() * context.n_rows
    missed = (target - _decode_dead(weights, x, dead, places)).square().sum()
    return missed / variance if float(variance) > 0 else missed * 0.0


def auxk_count(d_in: int) -> int:
    """Return how many dead latents of a row take part in AuxK: `d_in` / 2, rounded to a power of two."""
    return 1 << max(0, round(math.log2(d_in / 2)))


def group_bounds(d_sae: int) -> list[int]:
    """Return where each Matryoshka group ends; the last is `d_sae`."""
    shares = torch.tensor(GROUP_SHARES, dtype=torch.float64).cumsum(0)
    return [max(1, round(float(share) * d_sae)) for share in shares]


def jump_relu(pre: Float[Tensor, "batch d_sae"], threshold: Float[Tensor, " d_sae"]) -> tuple[Float[Tensor, "batch d_sae"], Float[Tensor, " d_sae"]]:
    """Return `pre` where it exceeds its threshold, else 0, and how many rows did, both with the straight-through gradient."""
    return _JumpRelu.apply(pre, threshold)  # pyright: ignore[reportReturnType]


def _sparse_loss(weights: Weights, x: Tensor, context: LossContext, pre: Tensor, places: Tensor, n_groups: int) -> StepLoss:
    pairs, active = make_active(pre, places)
    values = encode_pairs(x, weights["W_enc_T"], weights["b_enc"], active, pairs)
    if n_groups == 1:
        x_hat = (decode_pairs(values, weights["W_dec"], pairs) + weights["b_dec"])[None]
    else:
        x_hat = _decode_prefixes(weights, values, pairs, len(x))
    errors = x - x_hat
    squared = errors.square().sum(dim=(1, 2))
    auxk = auxk_loss(weights, x, errors[-1], pre, context)
    loss = squared.mean() / (context.n_rows * x.shape[1]) + AUXK_COEFFICIENT * auxk
    zero = loss.new_zeros(())
    return StepLoss(loss, squared[-1].detach(), zero, auxk.detach(), pairs.counts)


def _decode_prefixes(weights: Weights, values: Tensor, pairs: Pairs, n_rows: int) -> Tensor:
    """Return the reconstructions `[1 + groups, batch, d_in]` of the empty prefix (`b_dec` alone) and of each prefix of groups."""
    d_sae, d_in = weights["W_dec"].shape
    bounds = group_bounds(d_sae)
    group = torch.bucketize(pairs.latents, torch.tensor(bounds, device=values.device), right=True)
    place, grouped = group_pairs(pairs, group, len(bounds))
    parts = decode_pairs(values[place], weights["W_dec"], grouped).view(len(bounds), n_rows, d_in)
    return torch.cat([parts.new_zeros(1, n_rows, d_in), parts.cumsum(0)]) + weights["b_dec"]


def _decode_dead(weights: Weights, x: Tensor, dead: Tensor, places: Tensor) -> Tensor:
    """Decode the dead latents picked at `places` of `[batch, len(dead)]`: densely when they are few, by pairs when they are many.

    Measured at d_in 512: 0.3 us a pair, 47 us a latent and 1024 rows, so pairs pay above about six times `auxk_count` dead latents.
    """
    n_rows, n_dead = len(x), len(dead)
    if n_dead > _DENSE_AUXK_FACTOR * auxk_count(x.shape[1]):
        pre = _pre_detached({"W_enc_T": weights["W_enc_T"][dead], "b_enc": weights["b_enc"][dead]}, x)
        pairs = make_pairs(places // n_dead, dead[places % n_dead], n_rows, len(weights["b_enc"]))
        return decode_pairs(encode_pairs(x, weights["W_enc_T"], weights["b_enc"], pre.view(-1)[places], pairs), weights["W_dec"], pairs)
    mask = x.new_zeros(n_rows * n_dead)
    mask[places] = 1.0
    latents = torch.addmm(weights["b_enc"][dead], x, weights["W_enc_T"][dead].T) * mask.view(n_rows, n_dead)
    return latents @ weights["W_dec"][dead]


def _pre(weights: Weights, x: Tensor) -> Tensor:
    return torch.addmm(weights["b_enc"], x, weights["W_enc_T"].T)


def _pre_detached(weights: Weights, x: Tensor) -> Tensor:
    with torch.no_grad():
        return _pre(weights, x)


def _decode(weights: Weights, latents: Tensor) -> Tensor:
    return torch.addmm(weights["b_dec"], latents, weights["W_dec"])


def _step(loss: Tensor, squared_error: Tensor, latents: Tensor, *, sparsity: Tensor) -> StepLoss:
    # Signs are summed as floats: counting booleans by column takes five times as long.
    n_fired = latents.detach().sign().sum(0).long()
    return StepLoss(loss, squared_error.detach(), sparsity.detach(), loss.new_zeros(()), n_fired)


class _JumpRelu(Function):
    """Masks are made by `sign` and `relu` in place: `torch.where` takes seven times as long as a product."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(pre, threshold)
        fires = (pre - threshold).sign_().relu_()
        return pre * fires, fires.sum(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (pre, threshold), (grad_latents, grad_n_fired) = ctx.saved_tensors, grads
        above = pre - threshold
        # The rectangle is around the pre-activation, never the activation: 1 where it is within half a width of its threshold.
        inside = above.abs().sub_(JUMP_WIDTH / 2).sign_().neg_().relu_()
        through = (grad_latents * threshold).add_(grad_n_fired).mul_(inside).div_(JUMP_WIDTH)
        return above.sign_().relu_().mul_(grad_latents).add_(through), -through.sum(0)
