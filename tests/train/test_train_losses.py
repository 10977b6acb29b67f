"""Every loss against its plain formula, values and gradients."""

import math

import pytest
import torch
from torch import Tensor

from interp_assets.config import Architecture
from interp_assets.train.losses import (
    AUXK_COEFFICIENT,
    JUMP_WIDTH,
    PRE_ACTIVATION_COEFFICIENT,
    LossContext,
    Weights,
    auxk_count,
    auxk_loss,
    group_bounds,
    jump_relu,
)
from interp_assets.train.parallel import ONE_RANK
from interp_assets.train.recipes import RECIPES

BATCH, D_IN, D_SAE, K, COEFFICIENT = 9, 8, 32, 3, 0.7


def draw(*shape: int, seed: int) -> Tensor:
    """Draw a float32 tensor."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_weights(architecture: Architecture) -> Weights:
    """Draw weights of every kind an architecture has."""
    weights = {
        "W_enc_T": draw(D_SAE, D_IN, seed=1),
        "b_enc": draw(D_SAE, seed=2) * 0.3,
        "W_dec": draw(D_SAE, D_IN, seed=3),
        "b_dec": draw(D_IN, seed=4),
    }
    if architecture == "gated":
        weights |= {"r_mag": draw(D_SAE, seed=5) * 0.2, "b_mag": draw(D_SAE, seed=6)}
    if architecture == "jump_relu":
        weights |= {"log_threshold": draw(D_SAE, seed=7)}
    return {name: value.requires_grad_() for name, value in weights.items()}


def make_context(*, dead: list[int] | None = None) -> LossContext:
    """Describe a batch in which `dead` latents are dead."""
    is_dead = torch.zeros(D_SAE, dtype=torch.bool)
    is_dead[dead or []] = True
    return LossContext(k=K, coefficient=COEFFICIENT, n_rows=BATCH, is_dead=is_dead, ranks=ONE_RANK)


def plain_loss(architecture: Architecture, weights: Weights, x: Tensor, context: LossContext) -> Tensor:
    """Write each loss densely, as the papers do; autograd does the rest."""
    W_enc, W_dec, b_dec = weights["W_enc_T"].T, weights["W_dec"], weights["b_dec"]
    pre = x @ W_enc + weights["b_enc"]
    if architecture == "relu":
        latents = pre.relu()
        error = (x - latents @ W_dec - b_dec).square().sum(1)
        return (error + COEFFICIENT * (latents * W_dec.norm(dim=1)).sum(1)).mean()
    if architecture == "gated":
        gate, magnitude = pre, (x @ W_enc) * weights["r_mag"].exp() + weights["b_mag"]
        latents = (gate > 0) * magnitude.relu()
        error = (x - latents @ W_dec - b_dec).square().sum(1)
        gate_error = (x - gate.relu() @ W_dec.detach() - b_dec.detach()).square().sum(1)
        return (error + gate_error + COEFFICIENT * gate.relu().sum(1)).mean()
    values = pre.relu()
    if architecture == "topk":
        mask = torch.zeros_like(pre).scatter(1, values.topk(K, dim=1).indices, 1.0)
    else:
        mask = torch.zeros(pre.numel()).scatter(0, values.flatten().topk(K * BATCH).indices, 1.0).view_as(pre)
    latents = values * mask
    prefixes = [0, *group_bounds(D_SAE)] if architecture == "matryoshka_batch_topk" else [D_SAE]
    errors = [x - latents[:, :end] @ W_dec[:end] - b_dec for end in prefixes]
    loss = torch.stack([error.square().mean() for error in errors]).mean()
    return loss + AUXK_COEFFICIENT * plain_auxk(weights, x, errors[-1].detach(), context)


def plain_auxk(weights: Weights, x: Tensor, error: Tensor, context: LossContext) -> Tensor:
    """Reconstruct the error with the strongest dead latents of each row."""
    if not context.is_dead.any():
        return torch.zeros(())
    pre = (x @ weights["W_enc_T"].T + weights["b_enc"]).relu() * context.is_dead
    k_aux = min(auxk_count(D_IN), int(context.is_dead.sum()))
    latents = pre * torch.zeros_like(pre).scatter(1, pre.topk(k_aux, dim=1).indices, 1.0)
    missed = (error - latents @ weights["W_dec"]).square().sum()
    return missed / (error - error.mean(0)).square().sum()


@pytest.mark.parametrize("dead", [[], [1, 5], list(range(10, 24)), list(range(1, 31))])
@pytest.mark.parametrize("architecture", ["relu", "gated", "topk", "batch_topk", "matryoshka_batch_topk"])
def test_loss_and_gradients_equal_the_plain_formula(architecture: Architecture, dead: list[int]) -> None:
    """The fast paths (k-sparse decode and backward, prefix sums, AuxK with few and with many dead latents) must change nothing."""
    x, context = draw(BATCH, D_IN, seed=9) * 2, make_context(dead=dead)
    fast, plain = make_weights(architecture), make_weights(architecture)
    found = RECIPES[architecture].loss(fast, x, context)
    expected = plain_loss(architecture, plain, x, context)
    torch.testing.assert_close(found.loss, expected)
    found.loss.backward()
    expected.backward()
    for name in fast:
        wanted = plain[name].grad
        torch.testing.assert_close(fast[name].grad, torch.zeros_like(fast[name]) if wanted is None else wanted, rtol=1e-4, atol=1e-4)


def test_jump_relu_has_the_straight_through_gradient_of_its_recipe() -> None:
    """The rectangle sees pre-activations; the threshold's gradient reaches the pre-activation with the opposite sign, on top of the mask."""
    pre = draw(40, 6, seed=0).requires_grad_()
    threshold = draw(6, seed=1).exp().requires_grad_()
    weight = draw(40, 6, seed=2)
    latents, n_fired = jump_relu(pre, threshold)
    torch.testing.assert_close(latents, pre * (pre > threshold))
    torch.testing.assert_close(n_fired, (pre > threshold).float().sum(0))
    (latents * weight).sum().backward()
    inside = ((pre - threshold).abs() < JUMP_WIDTH / 2).float() / JUMP_WIDTH
    torch.testing.assert_close(threshold.grad, -(threshold * inside * weight).sum(0))
    torch.testing.assert_close(pre.grad, (pre > threshold) * weight + threshold * inside * weight)
    pre.grad = threshold.grad = None
    (jump_relu(pre, threshold)[1] * weight[0]).sum().backward()
    torch.testing.assert_close(threshold.grad, -(inside * weight[0]).sum(0))
    torch.testing.assert_close(pre.grad, inside * weight[0])


def test_a_small_threshold_still_gets_a_gradient() -> None:
    """A kernel that saw activations (zero below the threshold) would leave thresholds of silent latents where they are."""
    pre, log_threshold = torch.full((4, 1), 0.05), torch.tensor([0.1]).log().requires_grad_()
    jump_relu(pre, log_threshold.exp())[0].sum().backward()
    assert log_threshold.grad is not None
    assert float(log_threshold.grad.abs().min()) > 0


def test_jump_relu_loss_pulls_l0_to_its_target() -> None:
    """Above the target the sparsity loss pushes pre-activations down, below it up."""
    x = draw(BATCH, D_IN, seed=9)
    for k, sign in ((1, 1.0), (D_SAE, -1.0)):
        weights = make_weights("jump_relu")
        context = make_context()._replace(k=k)
        result = RECIPES["jump_relu"].loss(weights, x, context)
        l0 = int(result.n_fired.sum()) / BATCH
        assert result.sparsity_loss.item() == pytest.approx(COEFFICIENT * (l0 / k - 1) ** 2, rel=1e-5)
        quiet = make_weights("jump_relu")
        reconstruction = RECIPES["jump_relu"].loss(quiet, x, context._replace(coefficient=0.0))
        result.loss.backward()
        reconstruction.loss.backward()
        assert weights["b_enc"].grad is not None
        assert quiet["b_enc"].grad is not None
        assert float((weights["b_enc"].grad - quiet["b_enc"].grad).sum()) * sign > 0


def test_only_dead_latents_get_the_pre_activation_loss() -> None:
    """It would push living latents over their thresholds too."""
    x, weights = draw(BATCH, D_IN, seed=9), make_weights("jump_relu")
    result = RECIPES["jump_relu"].loss(weights, x, make_context(dead=[3]))
    pre = x @ weights["W_enc_T"].T + weights["b_enc"]
    silence = ((weights["log_threshold"].exp() - pre).relu() * weights["W_dec"].norm(dim=1))[:, 3].sum()
    assert result.auxk_loss.item() == pytest.approx(PRE_ACTIVATION_COEFFICIENT * silence.item() / (BATCH * D_IN), rel=1e-4)


def test_the_target_of_auxk_gets_no_gradient() -> None:
    """A gradient through the error would let dead latents pull the living ones away."""
    x, weights, context = draw(BATCH, D_IN, seed=9), make_weights("topk"), make_context(dead=[0, 1])
    error = draw(BATCH, D_IN, seed=10).requires_grad_()
    pre = (x @ weights["W_enc_T"].T + weights["b_enc"]).detach()
    auxk_loss(weights, x, error, pre, context).backward()
    assert error.grad is None
    living = torch.arange(2, D_SAE)
    assert weights["W_dec"].grad is not None
    assert weights["W_enc_T"].grad is not None
    assert not weights["W_dec"].grad[living].any()
    assert not weights["W_enc_T"].grad[living].any()
    assert weights["W_dec"].grad[:2].any()


def test_auxk_of_a_perfect_reconstruction_is_zero_not_nan() -> None:
    """0 / 0 in one batch would poison all weights."""
    x, weights, context = draw(BATCH, D_IN, seed=9), make_weights("topk"), make_context(dead=[0, 1])
    pre = (x @ weights["W_enc_T"].T + weights["b_enc"]).detach()
    loss = auxk_loss(weights, x, torch.zeros(BATCH, D_IN), pre, context)
    loss.backward()
    assert loss.item() == 0
    assert weights["W_dec"].grad is not None
    assert bool(torch.isfinite(weights["W_dec"].grad).all())


def test_reconstruction_is_the_batch_aggregate() -> None:
    """Relative to each row's own norm, rows of high variance would hardly count: scaling one row up must dominate the loss."""
    x, weights = draw(BATCH, D_IN, seed=9), make_weights("topk")
    x[0] *= 1000
    result = RECIPES["topk"].loss(weights, x, make_context())
    row = RECIPES["topk"].loss(weights, x[:1], make_context())
    assert row.squared_error.item() / result.squared_error.item() > 0.999


def test_groups_are_nested_prefixes_of_the_recipe() -> None:
    """Groups of m/16, m/16, m/8, m/4 and m/2."""
    assert group_bounds(32) == [2, 4, 8, 16, 32]
    assert group_bounds(3)[-1] == 3


def test_auxk_takes_half_the_width_rounded_to_a_power_of_two() -> None:
    """Gao et al. 2024, appendix A.2."""
    assert [auxk_count(d_in) for d_in in (2, 256, 768)] == [1, 128, 1 << round(math.log2(384))]
