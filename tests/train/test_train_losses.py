"""Every loss against its plain formula, values and gradients."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from interp_assets.compute.kernels import Scratch
from interp_assets.planning.options import Architecture
from interp_assets.train.losses.loss import FEW, LossContext, StepLoss, Weights
from interp_assets.train.losses.topk import add_auxk, auxk_count, group_ends
from interp_assets.train.own.plain import make_plain
from interp_assets.train.parallel import ONE_RANK
from interp_assets.train.recipes import RECIPES

BATCH, D_IN, D_SAE, K, COEFFICIENT = 9, 32, 128, 3, 0.7


def draw(*shape: int, seed: int) -> Tensor:
    """Draw a float32 tensor."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_weights(architecture: Architecture, *, d_out: int = D_IN, shift: float = 0.0, with_skip: bool = False) -> Weights:
    """Draw weights of every kind an architecture has; `shift` lowers all pre-activations, so that few latents fire."""
    weights = {
        "W_enc_T": draw(D_SAE, D_IN, seed=1),
        "b_enc": draw(D_SAE, seed=2) * 0.3 - shift,
        "W_dec": draw(D_SAE, d_out, seed=3),
        "b_dec": draw(d_out, seed=4),
    }
    if with_skip:
        weights["W_skip"] = draw(D_IN, d_out, seed=8)
    if architecture == "gated":
        weights |= {"r_mag": draw(D_SAE, seed=5) * 0.2, "b_mag": draw(D_SAE, seed=6)}
    if architecture.startswith("jump_relu"):
        weights |= {"log_threshold": draw(D_SAE, seed=7)}
    return {name: value.requires_grad_() for name, value in weights.items()}


def make_context(*, dead: list[int] | None = None, widths: tuple[int, ...] = (D_IN,)) -> LossContext:
    """Describe a batch in which `dead` latents are dead."""
    is_dead = torch.zeros(D_SAE, dtype=torch.bool)
    is_dead[dead or []] = True
    return LossContext(k=K, coefficient=COEFFICIENT, n_rows=BATCH, is_dead=is_dead, ranks=ONE_RANK, scratch=Scratch(), widths=widths)


def find_loss(architecture: Architecture, weights: Weights, x: Tensor, context: LossContext, y: Tensor | None = None) -> StepLoss:
    """Compute what the trainer would, without autograd."""
    with torch.no_grad():
        return RECIPES[architecture].loss(weights, x, x if y is None else y, context)


def plain_options(architecture: Architecture, context: LossContext) -> dict[str, Any]:
    """Return the constants of a loss by the names that people have for them."""
    given = context.constants._asdict()
    given["bandwidth"] = given["step_width" if architecture == "jump_relu_step" else "jump_width"]
    return given


def check(architecture: Architecture, x: Tensor, y: Tensor, context: LossContext, **weights_like) -> StepLoss:
    """Compare loss, gradients and firings with the plain formula (`own/plain.py`) in float64; errors are measured against the largest element."""
    fast = make_weights(architecture, **weights_like)
    exact = {name: weight.detach().double() for name, weight in fast.items()}
    found = find_loss(architecture, fast, x, context, y)
    plain = make_plain(architecture, **plain_options(architecture, context))
    expected = plain(exact, x.double(), y.double(), context._replace(scratch=Scratch()))
    torch.testing.assert_close(found.loss.double(), expected.loss, rtol=1e-5, atol=0.0)
    assert torch.equal(found.n_fired, expected.n_fired)
    for name, wanted in expected.gradients.items():
        atol = 1e-6 + 1e-5 * float(wanted.abs().max())
        torch.testing.assert_close(found.gradients[name].double(), wanted, rtol=0.0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
    return found


@pytest.mark.parametrize("dead", [[], [1, 5], list(range(10, 40)), list(range(1, 125))])
@pytest.mark.parametrize("architecture", list(RECIPES))
def test_loss_and_gradients_equal_the_plain_formula(architecture: Architecture, dead: list[int]) -> None:
    """The hand-made backward (blocks in place, k-sparse pairs, prefix sums, AuxK with few and with many dead latents) must change nothing."""
    x = draw(BATCH, D_IN, seed=9)
    check(architecture, x, x, make_context(dead=dead))


@pytest.mark.parametrize("shift", [0.0, 14.0])
@pytest.mark.parametrize(
    ("architecture", "constants"),
    [
        ("relu", {"p": 0.5}),
        ("relu", {"p": 2.0}),
        ("topk", {"auxk_weight": 0.5}),
        ("matryoshka_batch_topk", {"groups": (0.25, 0.75), "auxk_weight": 0.0}),
        ("jump_relu", {"jump_width": 0.5, "pre_activation_weight": 0.1}),
        ("jump_relu_tanh", {"tanh_scale": 1.5, "jump_width": 3.0}),
        ("jump_relu_step", {"step_width": 0.5}),
    ],
)
def test_other_constants_are_those_of_the_formula(architecture: Architecture, constants: dict, shift: float) -> None:
    """What researchers vary: it must reach the loss and every gradient, by pairs too."""
    x = draw(BATCH, D_IN, seed=9)
    context = make_context(dead=[1, 5])
    other = context._replace(constants=context.constants._replace(**constants))
    found = check(architecture, x, x, other, shift=shift)
    usual = find_loss(architecture, make_weights(architecture, shift=shift), x, make_context(dead=[1, 5]))
    assert any(not torch.equal(found.gradients[name], gradient) for name, gradient in usual.gradients.items())


@pytest.mark.parametrize("architecture", ["relu", "gated", "jump_relu_step"])
def test_few_active_latents_give_the_same_by_pairs(architecture: Architecture) -> None:
    """Dense architectures go through pairs when few latents fire, which is most of a training."""
    x = draw(BATCH, D_IN, seed=9)
    found = check(architecture, x, x, make_context(), shift=18.0)
    assert 0 < int(found.n_fired.sum()) < FEW * BATCH * D_SAE


@pytest.mark.parametrize("dead", [[], [1, 5]])
@pytest.mark.parametrize("architecture", ["jump_relu", "jump_relu_tanh"])
def test_few_firings_under_a_wide_rectangle_are_decoded_by_pairs(architecture: Architecture, dead: list[int]) -> None:
    """Where little fires but much gets a gradient, two of five products are by pairs: same numbers."""
    x = draw(BATCH, D_IN, seed=9)
    found = check(architecture, x, x, make_context(dead=dead), shift=14.0)
    assert 0 < int(found.n_fired.sum()) < FEW * BATCH * D_SAE


@pytest.mark.parametrize("architecture", ["relu", "gated", "jump_relu", "jump_relu_tanh", "jump_relu_step"])
def test_many_and_few_firings_may_take_turns(architecture: Architecture) -> None:
    """A training passes from dense to sparse states and, when the coefficient is low, back: buffers of one must not leak into the other."""
    x, context = draw(BATCH, D_IN, seed=9), make_context(dead=[1, 5])
    for shift in (0.0, 14.0, 1.0, 18.0, 0.0):
        check(architecture, x, x, context, shift=shift)


@pytest.mark.parametrize("with_skip", [False, True])
@pytest.mark.parametrize("architecture", list(RECIPES))
def test_transcoders_reconstruct_other_rows(architecture: Architecture, with_skip: bool) -> None:
    """Another width, and a linear map beside the latents."""
    x, y = draw(BATCH, D_IN, seed=9), draw(BATCH, 5, seed=11)
    check(architecture, x, y, make_context(dead=[1, 2, 3], widths=(5,)), d_out=5, with_skip=with_skip)


@pytest.mark.parametrize("architecture", ["relu", "topk", "batch_topk", "jump_relu_tanh"])
def test_crosscoders_weigh_latents_by_the_norms_of_all_their_decoders(architecture: Architecture) -> None:
    """sum_l |d_il|, not |d_i|: in the penalty, and in the competition for the top k."""
    x = draw(BATCH, D_IN, seed=9)
    check(architecture, x, x, make_context(widths=(12, 20)))


@pytest.mark.parametrize("architecture", list(RECIPES))
def test_rounded_products_stay_near_the_exact_ones(architecture: Architecture) -> None:
    """bfloat16 rounds operands only: sums, thresholds and weights stay float32."""
    x, weights = draw(BATCH, D_IN, seed=9), make_weights(architecture)
    exact = find_loss(architecture, weights, x, make_context())
    rounded = find_loss(architecture, weights, x, make_context()._replace(dtype=torch.bfloat16))
    assert rounded.loss.dtype == torch.float32
    assert not torch.equal(rounded.gradients["W_enc_T"], exact.gradients["W_enc_T"])
    assert rounded.loss.item() == pytest.approx(exact.loss.item(), rel=0.1)


KINKS = ("W_enc_T", "b_enc", "b_mag", "r_mag")


@pytest.mark.parametrize("architecture", ["relu", "gated", "jump_relu", "jump_relu_tanh", "jump_relu_step"])
@pytest.mark.parametrize("shift", [0.0, 10.0])
def test_gradients_of_rounded_products_are_off_by_their_rounding(architecture: Architecture, shift: float) -> None:
    """Dense products and pairs, each tensor as a whole.

    A rounded number is off by up to 2^-9. What reaches the decoder has been through four roundings: 2^-6 in all. A share of some 2^-8 of all
    latents comes to lie on the other side of a threshold, and loses or gains a gradient of the usual size: sqrt(2^-8) = 2^-4. Of the
    rectangle of JumpReLU fewer are inside, so that fewer changes weigh more: 2^-3. That of `jump_relu_step` is narrower
    than a rounding: not compared.
    """
    n_rows = 256
    x, weights = draw(n_rows, D_IN, seed=9), make_weights(architecture, shift=shift)
    context = make_context(dead=[1, 2, 3])._replace(n_rows=n_rows)
    exact = find_loss(architecture, weights, x, context)
    assert (int(exact.n_fired.sum()) < FEW * n_rows * D_SAE) == (shift > 0)
    rounded = find_loss(architecture, weights, x, context._replace(dtype=torch.bfloat16, scratch=Scratch()))
    assert rounded.loss.item() == pytest.approx(exact.loss.item(), rel=2**-8)
    assert int((rounded.n_fired - exact.n_fired).abs().sum()) < 2**-6 * int(exact.n_fired.sum())
    for name, gradient in exact.gradients.items():
        if name == "log_threshold" and architecture == "jump_relu_step":
            continue
        limit = 2**-3 if name == "log_threshold" else 2**-4 if shift or name in KINKS else 2**-6
        assert rounded.gradients[name].dtype == torch.float32
        assert float((rounded.gradients[name] - gradient).norm() / gradient.norm()) < limit, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scratch_that_was_used_before_changes_nothing(dtype: torch.dtype) -> None:
    """Buffers keep the last step's content: nothing may read it."""
    x, context = draw(BATCH, D_IN, seed=9), make_context(dead=[1, 2])._replace(dtype=dtype)
    for architecture in RECIPES:
        weights = make_weights(architecture)
        first = find_loss(architecture, weights, x, context)
        kept = {name: value.clone() for name, value in first.gradients.items()}
        find_loss(architecture, weights, x * 3, context)
        again = find_loss(architecture, weights, x, context)
        assert torch.equal(first.loss, again.loss)
        assert all(torch.equal(kept[name], again.gradients[name]) for name in kept)


@pytest.mark.parametrize("architecture", ["jump_relu", "jump_relu_tanh", "jump_relu_step"])
def test_a_small_threshold_still_gets_a_gradient(architecture: Architecture) -> None:
    """A kernel that saw activations (zero below the threshold) would leave thresholds of silent latents where they are."""
    weights = {name: value.detach() for name, value in make_weights(architecture).items()}
    weights["log_threshold"].fill_(math.log(0.001))
    weights["W_enc_T"].zero_()
    weights["b_enc"].fill_(0.0005)
    found = find_loss(architecture, weights, draw(BATCH, D_IN, seed=9), make_context())
    assert int(found.n_fired.sum()) == 0
    assert float(found.gradients["log_threshold"].abs().min()) > 0


def test_a_threshold_and_its_logarithm_have_one_gradient() -> None:
    """`jump_relu_step` is trained by the threshold itself: d/d log t = t d/dt."""
    by_logarithm = {name: value.detach() for name, value in make_weights("jump_relu_step").items()}
    by_itself = {**by_logarithm, "threshold": by_logarithm["log_threshold"].exp()}
    del by_itself["log_threshold"]
    x = draw(BATCH, D_IN, seed=9)
    first, again = (find_loss("jump_relu_step", weights, x, make_context()) for weights in (by_logarithm, by_itself))
    assert torch.equal(first.loss, again.loss)
    torch.testing.assert_close(first.gradients["log_threshold"], again.gradients["threshold"] * by_itself["threshold"])
    assert int(again.gradients["threshold"].count_nonzero()) > 0


def test_jump_relu_loss_pulls_l0_to_its_target() -> None:
    """Above the target the sparsity loss pushes pre-activations down, below it up."""
    x, weights = draw(BATCH, D_IN, seed=9), make_weights("jump_relu")
    for k, sign in ((1, 1.0), (D_SAE, -1.0)):
        context = make_context()._replace(k=k)
        result = find_loss("jump_relu", weights, x, context)
        l0 = int(result.n_fired.sum()) / BATCH
        assert result.sparsity_loss.item() == pytest.approx(COEFFICIENT * (l0 / k - 1) ** 2, rel=1e-5)
        pull = result.gradients["b_enc"].clone()
        reconstruction = find_loss("jump_relu", weights, x, context._replace(coefficient=0.0))
        assert float((pull - reconstruction.gradients["b_enc"]).sum()) * sign > 0


def test_the_target_of_auxk_gets_no_gradient() -> None:
    """A gradient through the error would let dead latents pull the living ones away."""
    x, weights, context = draw(BATCH, D_IN, seed=9), make_weights("topk"), make_context(dead=[0, 1])
    gradients = {name: torch.zeros_like(value) for name, value in weights.items()}
    with torch.no_grad():
        assert add_auxk(weights, gradients, x, draw(BATCH, D_IN, seed=10), context).item() > 0
    assert not gradients["b_dec"].any()
    assert not gradients["W_dec"][2:].any()
    assert not gradients["W_enc_T"][2:].any()
    assert gradients["W_dec"][:2].any()


def test_auxk_of_a_perfect_reconstruction_is_zero_not_nan() -> None:
    """0 / 0 in one batch would poison all weights."""
    x, weights, context = draw(BATCH, D_IN, seed=9), make_weights("topk"), make_context(dead=[0, 1])
    gradients = {name: torch.zeros_like(value) for name, value in weights.items()}
    with torch.no_grad():
        assert add_auxk(weights, gradients, x, torch.zeros(BATCH, D_IN), context).item() == 0
    assert all(not gradient.any() for gradient in gradients.values())


def test_reconstruction_is_the_batch_aggregate() -> None:
    """Relative to each row's own norm, rows of high variance would hardly count: scaling one row up must dominate the loss."""
    x, weights = draw(BATCH, D_IN, seed=9), make_weights("topk")
    x[0] *= 1000
    result = find_loss("topk", weights, x, make_context())
    row = find_loss("topk", weights, x[:1], make_context())
    assert row.squared_error.item() / result.squared_error.item() > 0.999


def test_groups_are_nested_prefixes_of_the_recipe() -> None:
    """Groups of m/16, m/16, m/8, m/4 and m/2."""
    assert group_ends(32) == [2, 4, 8, 16, 32]
    assert group_ends(3)[-1] == 3


def test_auxk_takes_half_the_width_rounded_to_a_power_of_two() -> None:
    """Gao et al. 2024, appendix A.2."""
    assert [auxk_count(d_in) for d_in in (2, 256, 768)] == [1, 128, 1 << round(math.log2(384))]


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("n_dead", [2, D_SAE])
def test_auxk_is_zero_where_all_rows_have_the_same_error(scale: float, n_dead: int) -> None:
    """Divided by what rounding leaves of a variance it was 2.5e7; errors that do vary a little are measured as in float64."""
    weights, context = {name: value.detach() for name, value in make_weights("topk").items()}, make_context(dead=list(range(n_dead)))
    x, row = draw(BATCH, D_IN, seed=9) * scale, draw(1, D_IN, seed=10) * scale
    steps = torch.tensor([0.0, 1e-7, 1e-2])[:, None, None] * draw(3, BATCH, D_IN, seed=11) * scale
    with torch.no_grad():
        found = []
        for error in (row + step for step in steps):
            gradients = {name: torch.zeros_like(value) for name, value in weights.items()}
            found.append((float(add_auxk(weights, gradients, x, error, context)), any(gradient.any() for gradient in gradients.values())))
    assert found[:2] == [(0.0, False)] * 2
    dead = torch.arange(n_dead)
    pre = x.double() @ weights["W_enc_T"][dead].double().T + weights["b_enc"][dead].double()
    level = pre.topk(min(auxk_count(D_IN), n_dead), dim=1).values[:, -1:]
    missed = row.double() + steps[2].double() - torch.where((pre >= level) & (pre > 0), pre, 0.0) @ weights["W_dec"][dead].double()
    error = row.double() + steps[2].double()
    assert found[2][0] == pytest.approx(float(missed.square().sum() / (error - error.mean(0)).square().sum()), rel=1e-3)
