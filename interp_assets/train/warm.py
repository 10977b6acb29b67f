"""A published SAE becomes the weights that a retraining starts from: the inverse of folding, under the new data's normalisation.

A `Sae` acts on raw activations, a trainer on z = scale (x - mean). With c_i such that decoder rows get the recipe's norm (1 for the free
decoders of TopK transcoders):

    W_dec_z = scale_out c W_dec             W_enc_z = W_enc / (scale_in c)          b_enc_z = (b_enc + mean_in W_enc) / c
    W_skip_z = scale_out W_skip / scale_in  b_dec_z = scale_out (b_dec - mean_out + mean_in W_skip)

and thresholds scale like the biases. A gated SAE comes back with a gain of 1. Folding these weights again under the same
normalisation gives the same SAE, which a test holds. The optimizer starts anew, and so does the learning rate's warm-up.
"""

import torch

from interp_assets.planning.config import SaeConfig
from interp_assets.train.losses.loss import Weights
from interp_assets.train.recipes import RECIPES, Normalization
from interp_assets.train.sae import Sae


def unfold_weights(config: SaeConfig, sae: Sae, source: Normalization, target: Normalization) -> Weights:
    """Return the weights of a trainer that starts as `sae`."""
    W_enc, W_dec, b_dec = sae.W_enc.double(), sae.W_dec.double() * target.scale, sae.b_dec.double() - target.mean
    norm = W_dec.norm(dim=1)
    c = torch.where(norm > 0, RECIPES[config.architecture].decoder_norm / norm, 1.0)
    if RECIPES[config.architecture].is_sparse and config.is_transcoder:
        c = torch.ones_like(norm)
    b_enc, threshold = (sae.b_enc.double() + source.mean @ W_enc) / c, sae.threshold.double() / c
    weights = {"W_enc_T": (W_enc / c).T / source.scale, "b_enc": b_enc, "W_dec": W_dec * c[:, None]}
    if sae.W_skip is not None:
        W_skip = sae.W_skip.double()
        weights["W_skip"] = W_skip * target.scale / source.scale[:, None]
        b_dec = b_dec + source.mean @ W_skip
    weights["b_dec"] = b_dec * target.scale
    if config.architecture == "gated":
        weights |= {"r_mag": torch.zeros(config.d_sae), "b_mag": b_enc, "b_enc": b_enc - threshold}
    if config.architecture == "jump_relu_step":
        weights["threshold"] = threshold
    elif config.architecture.startswith("jump_relu"):
        weights["log_threshold"] = threshold.clamp(min=torch.finfo(torch.float32).tiny).log()
    return {name: value.float().contiguous() for name, value in weights.items()}
