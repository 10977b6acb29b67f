"""What an architecture is besides its loss: initial weights, optimizer constants and schedules.

Rows enter training as z = scale * (x - mean): `mean` and `scale` come from the merged statistics of *all* training shards, never from
a first batch or shard, and `scale` is one constant per hook point that gives centred rows a mean squared norm of their width (centring:
2605.31518; it is also what initialises `b_dec` to the mean). `fold.py` undoes it in the artifact.

An architecture says how latents fire and are trained; the **task** says what is encoded and what is reconstructed, and any architecture
does any task:

    sae               a hook point reconstructs itself
    transcoder        `hook_point` reconstructs `target_hook_point`; `skip_transcoder` adds a linear map beside the latents (2501.18823)
    crosscoder        several hook points side by side reconstruct themselves, by shared latents (2504.02922)

Sources of the constants: Anthropic April 2024 (relu) and January 2025 (jump_relu), Rajamanoharan et al. 2024 (gated, jump_relu_step),
Gao et al. 2024 (topk, AuxK), Bussmann et al. 2024 and 2025 (batch_topk, matryoshka_batch_topk), Paulo et al. 2025 (transcoders: decoder
and skip start at 0). Peak learning rate and batch are the user's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from interp_assets.compute.products import multiply
from interp_assets.harvest.statistics import ActivationStatistics
from interp_assets.planning.config import SaeConfig
from interp_assets.planning.options import Architecture
from interp_assets.train.losses.dense import jump_relu_loss, jump_relu_step_loss, jump_relu_tanh_loss, relu_loss
from interp_assets.train.losses.gated import gated_loss
from interp_assets.train.losses.loss import USUAL, Constants, LossFunction, Weights
from interp_assets.train.losses.topk import batch_topk_loss, matryoshka_loss, topk_loss

_PROJECTED_ROWS: Final = 1024
"""Decoder rows whose gradient is projected at once on a CPU: buffers that fit the second-level cache and are used again."""
_INITIAL_L0: Final = 2.0
"""`jump_relu` starts with this many times k active latents."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The constants of one architecture."""

    base: Architecture
    """The built-in architecture that it is, or is made of: initial weights and saved function are by this."""
    loss: LossFunction
    decoder_norm: float = 1.0
    """Norm of the initial decoder rows."""
    is_unit_norm: bool = False
    """Decoder rows are kept at norm 1, and their gradients orthogonal to them."""
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    coefficient_warmup: float = 0.0
    """Share of the steps over which the sparsity coefficient rises from 0."""
    warmup_steps: float = 1000.0
    warmup_share: float = 0.05
    """The learning rate rises over `warmup_steps`, and over no more than this share of all steps."""
    decay_share: float = 0.2
    """The learning rate falls linearly to 0 over this last share of the steps."""
    gradient_clip: float = 1.0
    initial_threshold: float = 0.1
    """Of `jump_relu` and `jump_relu_tanh`."""
    constants: Constants = USUAL
    """Those of its loss."""
    is_sparse: bool = False
    """A fixed number of latents is active: the TopK family."""
    is_calibrated: bool = False
    """The artifact fires by one threshold, calibrated so that the mean L0 is k."""
    init: Callable[[Weights, Tensor, torch.Generator], Weights] | None = None
    """Of an architecture of one's own: makes weights from a sample of rows, besides those of its base or in their place."""
    fold: Callable[[Weights], Weights] | None = None
    """Likewise: turns trained weights into those of its base, which are saved."""


RECIPES: Final[dict[Architecture, Recipe]] = {
    "relu": Recipe(base="relu", loss=relu_loss, decoder_norm=0.1, coefficient_warmup=0.05),
    "gated": Recipe(base="gated", loss=gated_loss, is_unit_norm=True, betas=(0.0, 0.999), coefficient_warmup=0.05),
    "topk": Recipe(base="topk", loss=topk_loss, is_unit_norm=True, epsilon=6.25e-10, is_sparse=True),
    "batch_topk": Recipe(base="batch_topk", loss=batch_topk_loss, is_unit_norm=True, betas=(0.9, 0.99), is_sparse=True, is_calibrated=True),
    "matryoshka_batch_topk": Recipe(
        base="matryoshka_batch_topk", loss=matryoshka_loss, is_unit_norm=True, betas=(0.9, 0.99), is_sparse=True, is_calibrated=True
    ),
    "jump_relu": Recipe(base="jump_relu", loss=jump_relu_loss),
    "jump_relu_tanh": Recipe(base="jump_relu_tanh", loss=jump_relu_tanh_loss, coefficient_warmup=1.0),
    "jump_relu_step": Recipe(base="jump_relu_step", loss=jump_relu_step_loss, is_unit_norm=True, betas=(0.0, 0.999), coefficient_warmup=0.1),
}


def make_recipe(config: SaeConfig) -> Recipe:
    """Return the constants of an SAE of a built-in architecture: its own, but for the SAE's `options`."""
    return vary(RECIPES[config.architecture], config.options)  # pyright: ignore[reportArgumentType] - what else it may be, `own/load.py` makes


def vary(recipe: Recipe, options: Mapping[str, Any]) -> Recipe:
    """Return a recipe with some of its constants replaced."""
    if not options:
        return recipe
    given: dict[str, Any] = dict(options)
    if "bandwidth" in given:
        given["step_width" if recipe.base == "jump_relu_step" else "jump_width"] = given.pop("bandwidth")
    today = {**vars(recipe), **recipe.constants._asdict()}
    for name, value in given.items():
        if isinstance(value, int) and isinstance(today[name], float):
            given[name] = float(value)  # YAML writes 7 for 7.0
    of_loss = {name: given.pop(name) for name in Constants._fields if name in given}
    return replace(recipe, **given, constants=recipe.constants._replace(**of_loss))


class Normalization(NamedTuple):
    """The affine map of the data set: z = scale * (x - mean), with one scale per hook point."""

    mean: Float64[Tensor, " d_in"]
    scale: Float64[Tensor, " d_in"]

    def apply(self, rows: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
        """Normalise raw rows of any floating dtype, in float32."""
        mean, scale = (value.to(rows.device, torch.float32) for value in self)
        return (rows.float() - mean).mul_(scale)


def make_normalization(statistics: Sequence[ActivationStatistics]) -> Normalization:
    """Take mean and scale from the merged statistics of the hook points that lie side by side; rows without variance keep their scale."""
    scales = []
    for item in statistics:
        d_in, variance = len(item.sum), item.variance
        scales.append(torch.full((d_in,), (d_in / variance) ** 0.5 if variance > 0 else 1.0, dtype=torch.float64))
    return Normalization(torch.cat([item.mean for item in statistics]), torch.cat(scales))


def keeps_unit_norm(config: SaeConfig, recipe: Recipe) -> bool:
    """Tell whether decoder rows stay at norm 1: a TopK transcoder's start at 0 and are free (Paulo et al. 2025)."""
    return recipe.is_unit_norm and not (recipe.is_sparse and config.is_transcoder)


def make_weights(config: SaeConfig, z: Float[Tensor, "sample d_in"], d_out: int, generator: torch.Generator, recipe: Recipe | None = None) -> Weights:
    """Draw initial weights: random encoder directions, the decoder their transpose where input and output are the same rows.

    `z` is a sample of normalised rows: it sets the biases of `jump_relu` and `jump_relu_tanh`, so that each latent starts to fire at the same rate
    (Anthropic January 2025, where the rate is 10,000 / d_sae; here a few times k / d_sae).
    """
    recipe = recipe or make_recipe(config)
    d_sae, d_in = config.d_sae, z.shape[1]
    W_enc_T = _directions(d_sae, d_in, generator) * recipe.decoder_norm
    W_dec = W_enc_T.clone()
    if config.is_transcoder:
        W_dec = torch.zeros(d_sae, d_out) if recipe.is_sparse else _directions(d_sae, d_out, generator) * recipe.decoder_norm
    weights = {"W_enc_T": W_enc_T, "b_enc": torch.zeros(d_sae), "W_dec": W_dec, "b_dec": torch.zeros(d_out)}
    if config.task == "skip_transcoder":
        weights["W_skip"] = torch.zeros(d_in, d_out)
    if recipe.base == "gated":
        weights |= {"r_mag": torch.zeros(d_sae), "b_mag": torch.zeros(d_sae)}
    if recipe.base in ("jump_relu", "jump_relu_tanh"):
        rate = min(0.5, _INITIAL_L0 * config.k / d_sae)
        n_fire = max(1, round(rate * len(z)))
        level = multiply(z.cpu(), W_enc_T.T, torch.empty(len(z), d_sae)).topk(n_fire, dim=0).values[-1]
        threshold = recipe.initial_threshold
        weights |= {"b_enc": threshold - level, "log_threshold": torch.full((d_sae,), threshold).log()}
    if recipe.base == "jump_relu_step":
        weights["threshold"] = torch.full((d_sae,), recipe.constants.step_width * d_in**0.5)
    return weights | recipe.init(weights, z.cpu(), generator) if recipe.init else weights


def learning_rate_at(config: SaeConfig, recipe: Recipe, step: int, n_steps: int) -> float:
    """Return the learning rate of a step: linear warm-up, plateau, linear decay to 0 over the last part."""
    warmup = min(recipe.warmup_steps, recipe.warmup_share * n_steps)
    decay = recipe.decay_share * n_steps
    return config.learning_rate * min(1.0, (step + 1) / (warmup + 1), (n_steps - step) / decay if decay else 1.0)


def coefficient_at(config: SaeConfig, recipe: Recipe, step: int, n_steps: int) -> float:
    """Return the sparsity coefficient of a step: linear warm-up from 0 over the recipe's share of the steps."""
    warmup = recipe.coefficient_warmup * n_steps
    return config.sparsity_coefficient * min(1.0, (step + 1) / (warmup + 1))


def project_decoder_gradient(W_dec: Tensor, gradient: Tensor) -> None:
    """Remove from each decoder row's gradient, in place, the part along the row, which renormalising would undo.

    On a CPU a block of rows at a time: products of all elements would fill new memory, which takes longer than all else here.
    """
    n = _PROJECTED_ROWS if W_dec.device.type == "cpu" else max(1, len(W_dec))
    for rows, part in zip(W_dec.split(n), gradient.split(n), strict=True):
        part.addcmul_(rows, torch.linalg.vecdot(part, rows)[:, None], value=-1)


def normalize_decoder(W_dec: Tensor) -> None:
    """Bring decoder rows back to norm 1, in place."""
    W_dec.div_(W_dec.norm(dim=1, keepdim=True).clamp_(min=torch.finfo(W_dec.dtype).tiny))


def _directions(n: int, d: int, generator: torch.Generator) -> Tensor:
    directions = torch.randn(n, d, generator=generator)
    return directions / directions.norm(dim=1, keepdim=True)
