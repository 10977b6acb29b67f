"""Trained weights and the normalisation of their rows become a `Sae` that acts on raw activations.

With z = scale * (x - mean), and decoder norms moved into the encoder (c_i = |d_i| / scale_out, so latent i of the artifact is c_i times
the trained one):

    W_enc' = scale_in * W_enc * c           W_dec' = W_dec / scale_out / c
    b_enc' = (b_enc - (scale_in * mean_in) W_enc) * c
    threshold' = threshold * c              b_dec' = b_dec / scale_out + mean_out - mean_in W_skip'
    W_skip' = scale_in * W_skip / scale_out

Forgetting one of them (usually the threshold) is the classic export bug. A crosscoder has a scale per hook point and |d_i| is the sum of
the norms of its parts, the weight by which latents competed in training: there c_i = |d_i|, and decoder rows are not of norm 1 in raw
units. The decoders of TopK transcoders are free and were not part of the competition: they keep their norms (c_i = 1).
"""

import torch

from interp_assets.planning.config import SaeConfig
from interp_assets.train.losses.loss import Weights, latent_norms
from interp_assets.train.recipes import RECIPES, Normalization
from interp_assets.train.sae import Sae, SaeKind


def fold_weights(config: SaeConfig, weights: Weights, source: Normalization, target: Normalization, widths: tuple[int, ...]) -> Sae:
    """Fold normalisation, decoder norms and gates into the tensors of a `Sae`, in float64.

    `widths` are those of the hook points that are reconstructed. A calibrated architecture comes back with threshold 0: `calibrate.py` sets it.
    """
    exact = {name: value.detach().to("cpu", torch.float64) for name, value in weights.items()}
    W_enc, b_enc, threshold = exact["W_enc_T"].T, exact["b_enc"], torch.zeros(config.d_sae, dtype=torch.float64)
    kind: SaeKind = "topk" if config.architecture == "topk" else "jump_relu"
    if config.architecture == "relu":
        kind = "relu"
    if config.architecture == "gated":
        gain = exact["r_mag"].exp()
        W_enc, b_enc, threshold = W_enc * gain, exact["b_mag"], (exact["b_mag"] - gain * b_enc).clamp(min=0)
    if "threshold" in exact:
        threshold = exact["threshold"]
    if "log_threshold" in exact:
        threshold = exact["log_threshold"].exp()
    norm = _gains(config, exact["W_dec"], target, widths)
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


def _gains(config: SaeConfig, W_dec: torch.Tensor, target: Normalization, widths: tuple[int, ...]) -> torch.Tensor:
    """Return by what each latent is multiplied, at least where its decoder row is not zero."""
    if RECIPES[config.architecture].is_sparse and config.is_transcoder:
        return torch.ones(len(W_dec), dtype=torch.float64)
    norm = latent_norms(W_dec, widths)
    if len(widths) == 1:
        norm = norm / target.scale[0]
    return torch.where(norm > 0, norm, 1.0)
