"""A published SAE becomes the weights that a retraining starts from: the inverse of folding, under the new data's normalisation.

A `Sae` acts on raw activations x, a trainer on z = scale (x - mean). With decoder rows of norm n (the recipe's),

    W_enc_z = W_enc / n      b_enc_z = scale / n (mean W_enc + b_enc)      W_dec_z = n W_dec      b_dec_z = scale (b_dec - mean)

and thresholds scale like the biases. A gated SAE comes back with a gain of 1. Folding these weights again under the same
normalisation gives the same SAE, which a test holds. The optimizer starts anew, and so does the learning rate's warm-up.
"""

import torch

from interp_assets.config import SaeConfig
from interp_assets.train.losses import Weights
from interp_assets.train.recipes import RECIPES, Normalization
from interp_assets.train.sae import Sae


def unfold_weights(config: SaeConfig, sae: Sae, normalization: Normalization) -> Weights:
    """Return the weights of a trainer that starts as `sae`."""
    norm = RECIPES[config.architecture].decoder_norm
    mean, factor = normalization.mean.double(), normalization.scale / norm
    W_enc, W_dec = sae.W_enc.double() / norm, sae.W_dec.double() * norm
    b_enc = (sae.b_enc.double() + mean @ sae.W_enc.double()) * factor
    threshold = sae.threshold.double() * factor
    weights = {"W_enc_T": W_enc.T, "b_enc": b_enc, "W_dec": W_dec, "b_dec": (sae.b_dec.double() - mean) * normalization.scale}
    if config.architecture == "gated":
        weights |= {"r_mag": torch.zeros(config.d_sae), "b_mag": b_enc, "b_enc": b_enc - threshold}
    if config.architecture == "jump_relu":
        weights["log_threshold"] = threshold.clamp(min=torch.finfo(torch.float32).tiny).log()
    return {name: value.float().contiguous() for name, value in weights.items()}
