"""Trained weights and the normalisation of their rows become a `Sae` that acts on raw activations; and back, for a retraining that starts from it.

With z = scale * (x - mean), and decoder norms moved into the encoder (c_i = |d_i| / scale_out, so latent i of the artifact is c_i times
the trained one):

    W_enc' = scale_in * W_enc * c           W_dec' = W_dec / scale_out / c
    b_enc' = (b_enc - (scale_in * mean_in) W_enc) * c
    threshold' = threshold * c              b_dec' = b_dec / scale_out + mean_out - mean_in W_skip'
    W_skip' = scale_in * W_skip / scale_out

Forgetting one of them (usually the threshold) is the classic export bug. A crosscoder has a scale per hook point and |d_i| is the sum of
the norms of its parts, the weight by which latents competed in training: there c_i = |d_i|, and decoder rows are not of norm 1 in raw
units. The decoders of TopK transcoders are free and were not part of the competition: they keep their norms (c_i = 1).

Unfolding is the inverse, under the new rows' normalisation: with c_i such that decoder rows get the recipe's norm,

    W_dec_z = scale_out c W_dec             W_enc_z = W_enc / (scale_in c)          b_enc_z = (b_enc + mean_in W_enc) / c
    W_skip_z = scale_out W_skip / scale_in  b_dec_z = scale_out (b_dec - mean_out + mean_in W_skip)

and thresholds scale like the biases. A gated SAE comes back with a gain of 1. Folding these weights again under the same
normalisation gives the same SAE, which a test holds. The optimizer starts anew, and so does the learning rate's warm-up.
"""

from collections.abc import Callable

import torch

from interp_assets.errors import OwnCodeError
from interp_assets.planning.config import SaeConfig
from interp_assets.train.losses.loss import Weights, latent_norms
from interp_assets.train.recipes import Normalization, Recipe, make_recipe
from interp_assets.train.sae import Sae, SaeKind


def fold_weights(
    config: SaeConfig, weights: Weights, source: Normalization, target: Normalization, widths: tuple[int, ...], recipe: Recipe | None = None
) -> Sae:
    """Fold normalisation, decoder norms and gates into the tensors of a `Sae`, in float64.

    `widths` are those of the hook points that are reconstructed. A calibrated architecture comes back with threshold 0: `calibrate.py` sets it.
    """
    recipe = recipe or make_recipe(config)
    if recipe.fold:
        weights = _fold_own(recipe.fold, weights)
    exact = {name: value.detach().to("cpu", torch.float64) for name, value in weights.items()}
    W_enc, b_enc, threshold = exact["W_enc_T"].T, exact["b_enc"], torch.zeros(config.d_sae, dtype=torch.float64)
    kind: SaeKind = "topk" if recipe.base == "topk" else "jump_relu"
    if recipe.base == "relu":
        kind = "relu"
    if recipe.base == "gated":
        gain = exact["r_mag"].exp()
        W_enc, b_enc, threshold = W_enc * gain, exact["b_mag"], (exact["b_mag"] - gain * b_enc).clamp(min=0)
    if "threshold" in exact:
        threshold = exact["threshold"]
    if "log_threshold" in exact:
        threshold = exact["log_threshold"].exp()
    norm = _gains(config, recipe, exact["W_dec"], target, widths)
    b_dec = exact["b_dec"] / target.scale + target.mean
    W_skip = None
    if "W_skip" in exact:
        W_skip = source.scale[:, None] * exact["W_skip"] / target.scale
        b_dec = b_dec - source.mean @ W_skip
    return Sae(
        kind=kind,
        W_enc=(source.scale[:, None] * W_enc * norm).float().contiguous(),
        b_enc=((b_enc - (source.scale * source.mean) @ W_enc) * norm).float(),
        W_dec=(exact["W_dec"] / target.scale / norm[:, None]).float(),
        b_dec=b_dec.float(),
        threshold=(threshold * norm).float(),
        k=config.k if kind == "topk" else 0,
        W_skip=None if W_skip is None else W_skip.float(),
    )


def _fold_own(fold: Callable[[Weights], Weights], weights: Weights) -> Weights:
    """Let a person's own function make the weights of its base; those that it does not name stay."""
    folded = fold(weights)
    for name in ("W_enc_T", "b_enc", "W_dec", "b_dec"):
        if name in folded and folded[name].shape != weights[name].shape:
            raise OwnCodeError(f"fold= returned {name} of shape {tuple(folded[name].shape)}, expected {tuple(weights[name].shape)}.")
    return {**weights, **folded}


def unfold_weights(config: SaeConfig, sae: Sae, source: Normalization, target: Normalization, recipe: Recipe | None = None) -> Weights:
    """Return the weights of a trainer that starts as `sae`. Raises `OwnCodeError` for an architecture with a fold= of its own."""
    recipe = recipe or make_recipe(config)
    if recipe.fold:
        raise OwnCodeError(f"SAE {config.name!r} cannot go on from the one before it: {config.architecture} has a fold= without an inverse.")
    W_enc, W_dec, b_dec = sae.W_enc.double(), sae.W_dec.double() * target.scale, sae.b_dec.double() - target.mean
    norm = W_dec.norm(dim=1)
    c = torch.where(norm > 0, recipe.decoder_norm / norm, 1.0)
    if recipe.is_sparse and config.is_transcoder:
        c = torch.ones_like(norm)
    b_enc, threshold = (sae.b_enc.double() + source.mean @ W_enc) / c, sae.threshold.double() / c
    weights = {"W_enc_T": (W_enc / c).T / source.scale, "b_enc": b_enc, "W_dec": W_dec * c[:, None]}
    if sae.W_skip is not None:
        W_skip = sae.W_skip.double()
        weights["W_skip"] = W_skip * target.scale / source.scale[:, None]
        b_dec = b_dec + source.mean @ W_skip
    weights["b_dec"] = b_dec * target.scale
    if recipe.base == "gated":
        weights |= {"r_mag": torch.zeros(config.d_sae), "b_mag": b_enc, "b_enc": b_enc - threshold}
    if recipe.base == "jump_relu_step":
        weights["threshold"] = threshold
    elif recipe.base.startswith("jump_relu"):
        weights["log_threshold"] = threshold.clamp(min=torch.finfo(torch.float32).tiny).log()
    return {name: value.float().contiguous() for name, value in weights.items()}


def _gains(config: SaeConfig, recipe: Recipe, W_dec: torch.Tensor, target: Normalization, widths: tuple[int, ...]) -> torch.Tensor:
    """Return by what each latent is multiplied, at least where its decoder row is not zero."""
    if recipe.is_sparse and config.is_transcoder:
        return torch.ones(len(W_dec), dtype=torch.float64)
    norm = latent_norms(W_dec, widths)
    if len(widths) == 1:
        norm = norm / target.scale[0]
    return torch.where(norm > 0, norm, 1.0)
