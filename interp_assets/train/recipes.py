"""What an architecture is besides its loss: initial weights, optimizer constants, schedules, and how its weights fold into a `Sae`.

Rows enter training as z = scale * (x - mean): `mean` and `scale` come from the merged statistics of *all* training shards, never from
a first batch or shard, and `scale` is one constant that gives centred rows a mean squared norm of `d_in` (centring: 2605.31518; it is also
what initialises `b_dec` to the mean). Folding undoes it, and moves decoder norms into the encoder:

    c_i = |d_i| / scale                     latent i of the artifact is c_i times the trained one
    W_enc' = scale * W_enc * c              W_dec' = W_dec / |d|
    b_enc' = (b_enc - scale * mean W_enc) * c
    threshold' = threshold * c              b_dec' = b_dec / scale + mean

Sources of the constants: Anthropic April 2024 (relu) and January 2025 (jump_relu), Rajamanoharan et al. 2024 (gated), Gao et al. 2024
(topk, AuxK), Bussmann et al. 2024 and 2025 (batch_topk, matryoshka_batch_topk). Peak learning rate and batch are the user's.
"""

from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from interp_assets.config import Architecture, SaeConfig
from interp_assets.harvest.statistics import ActivationStatistics
from interp_assets.train.losses import LossFunction, Weights, batch_topk_loss, gated_loss, jump_relu_loss, matryoshka_loss, relu_loss, topk_loss
from interp_assets.train.sae import Sae, SaeKind

GRADIENT_CLIP: Final = 1.0
WARMUP_STEPS: Final = 1000
WARMUP_SHARE: Final = 0.05
"""The learning rate rises over `WARMUP_STEPS`, and over no more than this share of all steps."""
DECAY_SHARE: Final = 0.2
"""The learning rate falls linearly to 0 over this last share of the steps."""
JUMP_THRESHOLD: Final = 0.1
_INITIAL_L0: Final = 2.0
"""`jump_relu` starts with this many times k active latents."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The constants of one architecture."""

    loss: LossFunction
    decoder_norm: float
    """Norm of the initial decoder rows."""
    is_unit_norm: bool
    """Decoder rows are kept at norm 1, and their gradients orthogonal to them."""
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    coefficient_warmup: float = 0.0
    """Share of the steps over which the sparsity coefficient rises from 0."""
    is_calibrated: bool = False
    """The artifact fires by one threshold, calibrated so that the mean L0 is k."""


RECIPES: Final[dict[Architecture, Recipe]] = {
    "relu": Recipe(loss=relu_loss, decoder_norm=0.1, is_unit_norm=False, coefficient_warmup=0.05),
    "gated": Recipe(loss=gated_loss, decoder_norm=1.0, is_unit_norm=True, betas=(0.0, 0.999), coefficient_warmup=0.05),
    "topk": Recipe(loss=topk_loss, decoder_norm=1.0, is_unit_norm=True, epsilon=6.25e-10),
    "batch_topk": Recipe(loss=batch_topk_loss, decoder_norm=1.0, is_unit_norm=True, betas=(0.9, 0.99), is_calibrated=True),
    "matryoshka_batch_topk": Recipe(loss=matryoshka_loss, decoder_norm=1.0, is_unit_norm=True, betas=(0.9, 0.99), is_calibrated=True),
    "jump_relu": Recipe(loss=jump_relu_loss, decoder_norm=1.0, is_unit_norm=False),
}


class Normalization(NamedTuple):
    """The one affine map of the data set: z = scale * (x - mean)."""

    mean: Float64[Tensor, " d_in"]
    scale: float

    def apply(self, rows: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
        """Normalise raw rows of any floating dtype, in float32."""
        return (rows.float() - self.mean.to(rows.device, torch.float32)).mul_(self.scale)


def make_normalization(statistics: ActivationStatistics) -> Normalization:
    """Take mean and scale from the merged statistics; rows without variance keep their scale."""
    d_in = len(statistics.sum)
    variance = statistics.variance
    return Normalization(statistics.mean, (d_in / variance) ** 0.5 if variance > 0 else 1.0)


def make_weights(config: SaeConfig, z: Float[Tensor, "sample d_in"], generator: torch.Generator) -> Weights:
    """Draw initial weights: random decoder directions, the encoder their transpose.

    `z` is a sample of normalised rows: it sets the biases of `jump_relu`, so that each latent starts to fire at the same rate
    (Anthropic January 2025, where the rate is 10,000 / d_sae; here a few times k / d_sae).
    """
    recipe, d_sae, d_in = RECIPES[config.architecture], config.d_sae, z.shape[1]
    directions = torch.randn(d_sae, d_in, generator=generator)
    W_dec = directions / directions.norm(dim=1, keepdim=True) * recipe.decoder_norm
    weights = {"W_enc_T": W_dec.clone(), "b_enc": torch.zeros(d_sae), "W_dec": W_dec, "b_dec": torch.zeros(d_in)}
    if config.architecture == "gated":
        weights |= {"r_mag": torch.zeros(d_sae), "b_mag": torch.zeros(d_sae)}
    if config.architecture == "jump_relu":
        rate = min(0.5, _INITIAL_L0 * config.k / d_sae)
        n_fire = max(1, round(rate * len(z)))
        level = (z.cpu() @ W_dec.T).topk(n_fire, dim=0).values[-1]
        weights |= {"b_enc": JUMP_THRESHOLD - level, "log_threshold": torch.full((d_sae,), JUMP_THRESHOLD).log()}
    return weights


def learning_rate_at(config: SaeConfig, step: int, n_steps: int) -> float:
    """Return the learning rate of a step: linear warm-up, plateau, linear decay to 0 over the last part."""
    warmup = min(WARMUP_STEPS, WARMUP_SHARE * n_steps)
    decay = DECAY_SHARE * n_steps
    return config.learning_rate * min(1.0, (step + 1) / (warmup + 1), (n_steps - step) / decay)


def coefficient_at(config: SaeConfig, step: int, n_steps: int) -> float:
    """Return the sparsity coefficient of a step: linear warm-up from 0 over the recipe's share of the steps."""
    warmup = RECIPES[config.architecture].coefficient_warmup * n_steps
    return config.sparsity_coefficient * min(1.0, (step + 1) / (warmup + 1))


def project_decoder_gradient(W_dec: Tensor, gradient: Tensor) -> None:
    """Remove from each decoder row's gradient, in place, the part along the row, which renormalising would undo."""
    gradient.sub_((gradient * W_dec).sum(dim=1, keepdim=True) * W_dec)


def normalize_decoder(W_dec: Tensor) -> None:
    """Bring decoder rows back to norm 1, in place."""
    W_dec.div_(W_dec.norm(dim=1, keepdim=True).clamp_(min=torch.finfo(W_dec.dtype).tiny))


def fold_weights(config: SaeConfig, weights: Weights, normalization: Normalization) -> Sae:
    """Fold normalisation, decoder norms and gates into the four tensors of a `Sae`, in float64.

    A calibrated architecture comes back with threshold 0: `calibrate.py` sets it.
    """
    exact = {name: value.detach().to("cpu", torch.float64) for name, value in weights.items()}
    W_enc, b_enc, threshold = exact["W_enc_T"].T, exact["b_enc"], torch.zeros(config.d_sae, dtype=torch.float64)
    kind: SaeKind = "topk" if config.architecture == "topk" else "jump_relu"
    if config.architecture == "relu":
        kind = "relu"
    if config.architecture == "gated":
        gain = exact["r_mag"].exp()
        W_enc, b_enc, threshold = W_enc * gain, exact["b_mag"], (exact["b_mag"] - gain * b_enc).clamp(min=0)
    if config.architecture == "jump_relu":
        threshold = exact["log_threshold"].exp()
    norm = exact["W_dec"].norm(dim=1)
    norm = torch.where(norm > 0, norm, 1.0)
    factor = norm / normalization.scale
    return Sae(
        kind=kind,
        W_enc=(W_enc * norm).float().contiguous(),
        b_enc=((b_enc - normalization.scale * (normalization.mean @ W_enc)) * factor).float(),
        W_dec=(exact["W_dec"] / norm[:, None]).float(),
        b_dec=(exact["b_dec"] / normalization.scale + normalization.mean).float(),
        threshold=(threshold * factor).float(),
        k=config.k if kind == "topk" else 0,
    )
