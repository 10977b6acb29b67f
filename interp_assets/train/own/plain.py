"""Each built-in architecture as a person would write it: a function whose gradients autograd finds, the reference of the fast losses.

The losses that train (`train/losses/`) are written for speed, with gradients by hand; these are the papers' formulas, and tests hold the ones against
the others, values and every gradient. Each is also an architecture of one's own: copy one into a file, change a line, and train it.

    interp check interp_assets/train/own/plain.py:topk
"""

from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from interp_assets.planning.options import Architecture
from interp_assets.planning.own import fill_options, read_declaration
from interp_assets.train.losses.loss import Weights
from interp_assets.train.losses.topk import auxk_count, group_ends
from interp_assets.train.own.loss import OwnLoss, Step
from interp_assets.train.own.terms import Terms, architecture

_LEAST: Final = 1e-6


@architecture(kind="relu")
def relu(w: Weights, x: Tensor, y: Tensor, step: Step, *, p: float = 1.0) -> Terms:  # noqa: ARG001 - all of them are handed the same
    """ReLU with a penalty on the p-th power of the latents, weighted by decoder norms (Anthropic, April 2024; Karvonen et al. 2024)."""
    f = _encode(w, x).relu()
    power = f.clamp(min=_LEAST).pow(p) * (f >= _LEAST)
    return Terms(f @ w["W_dec"] + _offset(w, x), latents=f, penalty=step.coefficient * (power * step.norms(w)).sum(1).mean())


@architecture(kind="gated", surrogate_gradient=True)
def gated(w: Weights, x: Tensor, y: Tensor, step: Step) -> Terms:
    """Which latents fire and how strongly are apart; the gates have a reconstruction of their own (Rajamanoharan et al. 2024, 2404.16014, eq. 8)."""
    gate, magnitude = _encode(w, x), (x @ w["W_enc_T"].T) * w["r_mag"].exp() + w["b_mag"]
    f = (gate > 0) * magnitude.relu()
    missed = y - gate.relu() @ w["W_dec"].detach() - _offset(w, x).detach()
    penalty = step.coefficient * gate.relu().sum(1).mean()
    return Terms(f @ w["W_dec"] + _offset(w, x), latents=f, penalty=penalty, gate_error=missed.square().sum(1).mean())


@architecture(kind="topk", whole_batch=True, surrogate_gradient=True)
def topk(w: Weights, x: Tensor, y: Tensor, step: Step, *, auxk_weight: float = 0.03125) -> Terms:
    """The k largest of each row (Gao et al. 2024)."""
    f = _encode(w, x).relu()
    f = f * torch.zeros_like(f).scatter(1, _competing(w, f, step).topk(step.k, dim=1).indices, 1.0)
    y_hat = f @ w["W_dec"] + _offset(w, x)
    return Terms(y_hat, latents=f, **_auxk(w, x, y - y_hat, step, auxk_weight))


@architecture(kind="batch_topk", surrogate_gradient=True)
def batch_topk(w: Weights, x: Tensor, y: Tensor, step: Step, *, auxk_weight: float = 0.03125) -> Terms:
    """The k times rows largest of the batch (Bussmann et al. 2024)."""
    f = _keep_of_batch(w, x, step)
    y_hat = f @ w["W_dec"] + _offset(w, x)
    return Terms(y_hat, latents=f, **_auxk(w, x, y - y_hat, step, auxk_weight))


@architecture(kind="matryoshka_batch_topk", surrogate_gradient=True)
def matryoshka_batch_topk(
    w: Weights,
    x: Tensor,
    y: Tensor,
    step: Step,
    *,
    auxk_weight: float = 0.03125,
    groups: tuple[float, ...] = (0.0625, 0.0625, 0.125, 0.25, 0.5),
) -> Terms:
    """BatchTopK of which every prefix of groups, none included, reconstructs alone (Bussmann et al. 2025, 2503.17547)."""
    f = _keep_of_batch(w, x, step)
    prefixes = [f[:, :end] @ w["W_dec"][:end] + _offset(w, x) for end in (0, *group_ends(f.shape[1], groups))]
    errors = torch.stack([(y - y_hat).square().mean() for y_hat in prefixes])
    return Terms(prefixes[-1], latents=f, shorter=errors.mean() - errors[-1], **_auxk(w, x, y - prefixes[-1], step, auxk_weight))


@architecture(kind="jump_relu", surrogate_gradient=True)
def jump_relu(w: Weights, x: Tensor, y: Tensor, step: Step, *, bandwidth: float = 2.0, pre_activation_weight: float = 3e-6) -> Terms:
    """Learned thresholds; the batch's L0 is pulled to k, and dead latents are pulled back (after Anthropic, January 2025)."""
    pre, threshold = _encode(w, x), _threshold(w)
    f, fires = _jump(pre, threshold, bandwidth, reaches_encoder=True)
    silence = (threshold - pre).relu() * step.norms(w) * step.is_dead
    penalty = step.coefficient * (fires.sum(1).mean() / step.k - 1) ** 2
    return Terms(f @ w["W_dec"] + _offset(w, x), latents=f, penalty=penalty, silence=pre_activation_weight * silence.mean(0).sum() / y.shape[1])


@architecture(kind="jump_relu_tanh", surrogate_gradient=True)
def jump_relu_tanh(
    w: Weights,
    x: Tensor,
    y: Tensor,  # noqa: ARG001 - as above
    step: Step,
    *,
    bandwidth: float = 2.0,
    pre_activation_weight: float = 3e-6,
    tanh_scale: float = 4.0,
) -> Terms:
    """The tanh of decoder-weighted latents is penalized, and every latent pulled back (Anthropic, January 2025)."""
    pre, threshold, norms = _encode(w, x), _threshold(w), step.norms(w)
    f, _ = _jump(pre, threshold, bandwidth, reaches_encoder=True)
    penalty = step.coefficient * (tanh_scale * f * norms).tanh().sum(1).mean()
    silence = pre_activation_weight * ((threshold - pre).relu() * norms).sum(1).mean()
    return Terms(f @ w["W_dec"] + _offset(w, x), latents=f, penalty=penalty, silence=silence)


@architecture(kind="jump_relu_step", surrogate_gradient=True)
def jump_relu_step(w: Weights, x: Tensor, y: Tensor, step: Step, *, bandwidth: float = 0.001) -> Terms:  # noqa: ARG001 - as above
    """L0 itself is penalized; its gradient reaches the thresholds only (Rajamanoharan et al. 2024, 2407.14435)."""
    f, fires = _jump(_encode(w, x), _threshold(w), bandwidth * x.shape[1] ** 0.5, reaches_encoder=False)
    return Terms(f @ w["W_dec"] + _offset(w, x), latents=f, penalty=step.coefficient * fires.sum(1).mean())


def make_plain(kind: Architecture, **options: Any) -> OwnLoss:
    """Return the plain loss of a built-in architecture, as the trainer takes it."""
    function = globals()[kind]
    declared = read_declaration(Path(__file__).read_bytes(), Path(__file__).name, kind)
    filled = fill_options(declared.options, options)
    return OwnLoss(lambda w, x, y, step: function(w, x, y, step, **filled), declared, f"{Path(__file__).name}:{kind}")


def _encode(w: Weights, x: Tensor) -> Tensor:
    return x @ w["W_enc_T"].T + w["b_enc"]


def _offset(w: Weights, x: Tensor) -> Tensor:
    """Return what is added to what the latents decode to; the skip of a skip transcoder too."""
    return w["b_dec"] + x @ w["W_skip"] if "W_skip" in w else w["b_dec"]


def _competing(w: Weights, f: Tensor, step: Step) -> Tensor:
    """Return by what latents compete: a crosscoder's by their values times the norms of their decoders, others by their values."""
    return f * step.norms(w).detach() if step.is_crosscoder else f


def _keep_of_batch(w: Weights, x: Tensor, step: Step) -> Tensor:
    f = _encode(w, x).relu()
    kept = _competing(w, f, step).flatten().topk(step.k * len(x)).indices
    return f * torch.zeros_like(f.flatten()).scatter(0, kept, 1.0).view_as(f)


def _auxk(w: Weights, x: Tensor, error: Tensor, step: Step, weight: float) -> dict[str, Tensor]:
    """Reconstruct the error, which is detached, by the strongest dead latents of each row (Gao et al. 2024, appendix A.2)."""
    if not bool(step.is_dead.any()):
        return {}
    error, dead = error.detach(), _encode(w, x).relu() * step.is_dead
    n_active = min(auxk_count(x.shape[1]), int(step.is_dead.sum()))
    latents = dead * torch.zeros_like(dead).scatter(1, dead.topk(n_active, dim=1).indices, 1.0)
    missed = (error - latents @ w["W_dec"]).square().sum()
    return {"auxk": weight * missed / (error - error.mean(0)).square().sum()}


def _threshold(w: Weights) -> Tensor:
    return w["threshold"] if "threshold" in w else w["log_threshold"].exp()


class _Jump(torch.autograd.Function):
    """JumpReLU and its step, with the straight-through gradients as the papers write them."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, width: float, reaches_encoder: bool) -> tuple[Tensor, Tensor]:  # noqa: FBT001 - torch's way
        """Return latents and firings."""
        ctx.save_for_backward(pre, threshold)
        ctx.width, ctx.reaches_encoder = width, reaches_encoder
        return pre * (pre > threshold), (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Return the gradients of pre-activations and thresholds."""
        (pre, threshold), (grad_latents, grad_fires) = ctx.saved_tensors, grads
        rectangle = ((pre - threshold).abs() < ctx.width / 2).to(pre.dtype) / ctx.width
        through = rectangle * (threshold * grad_latents + grad_fires)
        return (pre > threshold) * grad_latents + through * ctx.reaches_encoder, -through.sum(0), None, None


def _jump(pre: Tensor, threshold: Tensor, width: float, *, reaches_encoder: bool) -> tuple[Tensor, Tensor]:
    latents, fires = _Jump.apply(pre, threshold, width, reaches_encoder)
    return latents, fires
