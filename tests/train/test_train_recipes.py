"""Initial weights, schedules and the fold into a frozen SAE."""

from typing import Any

import pytest
import torch
from torch import Tensor

from interp_assets.compute.kernels import Scratch
from interp_assets.harvest.statistics import ActivationStatistics
from interp_assets.planning.config import SaeConfig
from interp_assets.planning.options import OPTIONS, Architecture
from interp_assets.train.fold import fold_weights
from interp_assets.train.losses.loss import LossContext, Weights
from interp_assets.train.own.plain import make_plain
from interp_assets.train.parallel import ONE_RANK
from interp_assets.train.recipes import (
    RECIPES,
    Normalization,
    coefficient_at,
    learning_rate_at,
    make_normalization,
    make_recipe,
    make_weights,
    normalize_decoder,
    project_decoder_gradient,
)

D_IN, D_SAE, K = 6, 40, 4
ARCHITECTURES: list[Architecture] = list(RECIPES)


def make_config(architecture: Architecture) -> SaeConfig:
    """Configure a tiny SAE."""
    return SaeConfig(architecture=architecture, d_sae=D_SAE, k=K)


def make_statistics(rows: Tensor) -> ActivationStatistics:
    """Sum rows as the harvest does."""
    exact = rows.double()
    return ActivationStatistics(len(rows), exact.sum(0), exact.square().sum(0), float(exact.norm(dim=1).sum()), torch.zeros(64, dtype=torch.int64))


def draw_trained(architecture: Architecture) -> Weights:
    """Draw weights as they might be after training: nothing is zero, norms differ where the recipe lets them."""
    generator = torch.Generator().manual_seed(1)
    weights = make_weights(make_config(architecture), torch.randn(100, D_IN, generator=generator), D_IN, generator)
    weights = {name: value + 0.3 * torch.randn(value.shape, generator=generator) for name, value in weights.items()}
    if RECIPES[architecture].is_unit_norm:
        normalize_decoder(weights["W_dec"])
    if "threshold" in weights:
        weights["threshold"].clamp_(min=0)
    return weights


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_folded_sae_reconstructs_raw_rows_as_training_did(architecture: Architecture) -> None:
    """Scale, mean, decoder norms and gates must all reach encoder, bias and threshold: forgetting one of them is the usual export bug."""
    config, weights = make_config(architecture), draw_trained(architecture)
    normalization = Normalization(
        torch.randn(D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(2)), torch.full((D_IN,), 0.37, dtype=torch.float64)
    )
    raw = torch.randn(50, D_IN, generator=torch.Generator().manual_seed(3)) * 3 + 1
    z = normalization.apply(raw)
    context = LossContext(K, 1.0, len(z), torch.zeros(D_SAE, dtype=torch.bool), ONE_RANK, Scratch(), (D_IN,))
    latents = make_plain(architecture).answer(weights, z, z, context).latents
    if RECIPES[architecture].is_calibrated:  # until then its threshold is 0
        latents = (z @ weights["W_enc_T"].T + weights["b_enc"]).relu()
    x_hat = (latents @ weights["W_dec"] + weights["b_dec"]) / 0.37 + normalization.mean.float()
    sae = fold_weights(config, weights, normalization, normalization, (D_IN,))
    torch.testing.assert_close(sae.decode(sae.encode(raw)), x_hat, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae.encode(raw), latents * weights["W_dec"].norm(dim=1) / 0.37, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))
    assert bool((sae.threshold >= 0).all())


def test_normalization_is_one_constant_of_all_rows() -> None:
    """Centred rows get a mean squared norm of d_in; the first rows alone would give another constant."""
    rows = torch.randn(1000, D_IN, generator=torch.Generator().manual_seed(0)) * torch.linspace(1, 5, 1000)[:, None] + 7
    z = make_normalization([make_statistics(rows)]).apply(rows)
    torch.testing.assert_close(z.square().sum(1).mean(), torch.tensor(float(D_IN)))
    torch.testing.assert_close(z.mean(0), torch.zeros(D_IN), atol=1e-5, rtol=0)
    assert make_normalization([make_statistics(torch.ones(10, D_IN))]).scale.tolist() == [1.0] * D_IN


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_encoder_starts_as_the_transposed_decoder(architecture: Architecture) -> None:
    """Most latents die at once from independent random encoders and decoders."""
    weights = make_weights(make_config(architecture), torch.randn(100, D_IN), D_IN, torch.Generator().manual_seed(0))
    assert torch.equal(weights["W_enc_T"], weights["W_dec"])
    torch.testing.assert_close(weights["W_dec"].norm(dim=1), torch.full((D_SAE,), RECIPES[architecture].decoder_norm))


def test_jump_relu_starts_with_every_latent_firing_at_one_rate() -> None:
    """Otherwise half of all latents fire and a short training never gets down to the target."""
    z = torch.randn(2000, D_IN, generator=torch.Generator().manual_seed(0))
    weights = make_weights(make_config("jump_relu"), z, D_IN, torch.Generator().manual_seed(0))
    fires = (z @ weights["W_enc_T"].T + weights["b_enc"]) > weights["log_threshold"].exp()
    assert abs(float(fires.sum(1).double().mean()) - 2 * K) < 0.1 * K
    assert float(fires.double().mean(0).min()) > 0.5 * 2 * K / D_SAE


def test_the_learning_rate_rises_stays_and_falls_to_zero() -> None:
    """Linear warm-up; linear decay over the last fifth."""
    config, n = make_config("topk"), 1000
    rates = [learning_rate_at(config, make_recipe(config), step, n) for step in range(n)]
    assert rates[0] < 0.05 * config.learning_rate
    assert rates[100] == rates[799] == config.learning_rate
    assert rates[900] == pytest.approx(0.5 * config.learning_rate)
    assert 0 < rates[-1] <= config.learning_rate / (RECIPES[config.architecture].decay_share * n) * 1.001
    assert [coefficient_at(make_config("relu"), RECIPES["relu"], step, n) for step in (49, 50, 999)][1:] == [5.0, 5.0]
    assert coefficient_at(make_config("relu"), RECIPES["relu"], 9, n) < 1.0


def test_the_decoder_gradient_is_orthogonal_to_unit_rows() -> None:
    """What lies along a row would be undone by renormalising, but would stay in Adam's moments."""
    W_dec = torch.nn.functional.normalize(torch.randn(5, 3), dim=1)
    gradient = torch.randn(5, 3)
    project_decoder_gradient(W_dec, gradient)
    torch.testing.assert_close((gradient * W_dec).sum(1), torch.zeros(5), atol=1e-6, rtol=0)


def test_options_take_the_place_of_a_recipes_constants() -> None:
    """Each reaches what it names, and nothing else moves."""
    usual = SaeConfig(architecture="jump_relu_tanh", learning_rate=1.0, sparsity_coefficient=1.0)
    given = {
        "warmup_steps": 0,
        "decay_share": 0.0,
        "betas": (0.5, 0.9),
        "gradient_clip": 7,
        "coefficient_warmup": 0,
        "bandwidth": 0.5,
        "epsilon": 1e-6,
    }
    other = usual.model_copy(update={"options": given})
    assert [learning_rate_at(other, make_recipe(other), step, 100) for step in (0, 50, 99)] == [1.0, 1.0, 1.0]
    assert learning_rate_at(usual, make_recipe(usual), 99, 100) == pytest.approx(0.05)
    assert (coefficient_at(other, make_recipe(other), 0, 100), coefficient_at(usual, make_recipe(usual), 0, 100) < 0.01) == (1.0, True)
    recipe = make_recipe(other)
    assert (recipe.betas, recipe.gradient_clip, recipe.constants.jump_width) == ((0.5, 0.9), 7, 0.5)
    assert make_recipe(usual) is RECIPES["jump_relu_tanh"]
    step = make_recipe(SaeConfig(architecture="jump_relu_step", options={"bandwidth": 0.5}))
    assert (step.constants.step_width, step.constants.jump_width) == (0.5, 2.0)


def test_every_option_reaches_the_recipe() -> None:
    """One that is accepted and read by nobody would look like a result."""
    for name, option in OPTIONS.items():
        architecture = (option.architectures or ("relu",))[0]
        value: Any = {"betas": (0.1, 0.2), "groups": (0.5, 0.5)}.get(name, 0.125)
        config = SaeConfig(architecture=architecture, options={name: value})
        assert make_recipe(config) != RECIPES[architecture], name


def test_decoder_norm_and_threshold_of_the_options_are_those_of_the_weights() -> None:
    """The two that show in what training begins with."""
    config = SaeConfig(architecture="jump_relu", d_sae=8, k=2, options={"decoder_norm": 3.0, "initial_threshold": 0.5})
    weights = make_weights(config, torch.randn(16, 4, generator=torch.Generator().manual_seed(0)), 4, torch.Generator().manual_seed(0))
    assert weights["W_dec"].norm(dim=1).tolist() == pytest.approx([3.0] * 8)
    assert weights["log_threshold"].exp().tolist() == pytest.approx([0.5] * 8)
