"""The compiled passes between the dense products against their definition in torch."""

import pytest
import torch
from torch import Tensor

from interp_assets.compute.elementwise import Gates, Slopes, close_gates, fire, keep_above, open_gates, pull, sum_squares
from interp_assets.train.recipes import project_decoder_gradient

ROWS, LATENTS = 13, 29


def draw(*shape: int, seed: int) -> Tensor:
    """Draw a double tensor with a few exact zeros, where "above 0" and "at least 0" part."""
    values = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    values.view(-1)[::7] = 0.0
    return values


def assert_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Compare single with double precision."""
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
def test_firing_equals_its_definition(threads: int) -> None:
    """A latent at exactly its threshold does not fire."""
    torch.set_num_threads(threads)
    pre, offset, latents = draw(ROWS, LATENTS, seed=0), draw(LATENTS, seed=1), torch.empty(ROWS, LATENTS, dtype=torch.float64)
    single = torch.empty(ROWS, LATENTS)
    expected, found = fire(pre, offset, latents), fire(pre.float(), offset.float(), single)
    assert_same((single, *found), (latents, *expected))
    assert torch.equal(latents == 0, (pre <= 0) | (pre + offset == 0))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("width", [0.0, 0.8])
@pytest.mark.parametrize("reaches_encoder", [False, True])
def test_pulling_back_equals_its_definition(width: float, reaches_encoder: bool, threads: int) -> None:
    """The straight-through gradient is the part of JumpReLU that fails without a sign."""
    torch.set_num_threads(threads)
    pre, grad, columns = draw(ROWS, LATENTS, seed=0), draw(ROWS, LATENTS, seed=1), draw(3, LATENTS, seed=2)
    slopes = Slopes(columns[0], columns[1], columns[2], torch.tensor(0.3, dtype=torch.float64), width, reaches_encoder)
    single = grad.float()
    expected = pull(pre, grad, slopes)
    found = pull(pre.float(), single, slopes._replace(rise=columns[0].float(), drop=columns[1].float(), threshold=columns[2].float()))
    assert_same((single, *found), (grad, *expected))
    if width:
        inside = pre.abs() < width / 2
        through = inside * (0.3 + (draw(ROWS, LATENTS, seed=1) + columns[0]) * columns[2]) / width
        torch.testing.assert_close(expected.through, through.sum(0))
        fires = torch.where(pre > 0, draw(ROWS, LATENTS, seed=1) + columns[0], columns[1])
        torch.testing.assert_close(grad, fires + through * reaches_encoder)


@pytest.mark.parametrize("threads", [1, 2])
def test_gates_equal_their_definition(threads: int) -> None:
    """An open gate whose magnitude is negative has an auxiliary gradient and no other."""
    torch.set_num_threads(threads)
    gate, gates = draw(ROWS, LATENTS, seed=0), Gates(*draw(3, LATENTS, seed=1))
    opened, latents, grad, grad_gate = (draw(ROWS, LATENTS, seed=seed) for seed in range(2, 6))
    singles = tuple(value.float() for value in (opened, latents, grad, grad_gate))
    single_gates = Gates(*(value.float() for value in gates))
    expected = open_gates(gate, gates, opened, latents)
    found = open_gates(gate.float(), single_gates, singles[0], singles[1])
    assert_same((*singles[:2], *found), (opened, latents, *expected))
    assert int(((opened > 0) & (latents == 0)).sum()) > 0
    closed = close_gates(gate, gates, (grad, grad_gate), latents, 0.25)
    found_closed = close_gates(gate.float(), single_gates, (singles[2], singles[3]), singles[1], 0.25)
    assert_same((singles[2], *found_closed), (grad, *closed))


@pytest.mark.parametrize("is_compiled", [True, False])
@pytest.mark.parametrize("width", [0.0, 0.8])
def test_latents_and_gradients_in_bfloat16_are_the_rounded_ones(width: float, is_compiled: bool) -> None:
    """Each number that is written is off by half a step of bfloat16 at most, and sums are those of what was written, or was to be.

    In torch's form, which other devices take, pre-activations in double precision stand for them.
    """
    kind = torch.float32 if is_compiled else torch.float64
    pre, columns = draw(ROWS, LATENTS, seed=0).to(kind), draw(3, LATENTS, seed=1).to(kind)
    halves = [draw(ROWS, LATENTS, seed=seed).to(torch.bfloat16) for seed in range(2, 6)]
    wholes = [half.to(kind) for half in halves]
    slopes = Slopes(columns[0], columns[1], columns[2], torch.tensor(0.3, dtype=kind), width, reaches_encoder=True)
    sums = [(fire(pre, columns[0], values[0]), pull(pre, values[1], slopes)) for values in (halves, wholes)]
    assert torch.equal(halves[0], wholes[0].to(torch.bfloat16))
    opened = [open_gates(pre, Gates(*columns), values[2], values[0]) for values in (halves, wholes)]
    wholes[0] = halves[0].to(kind)  # what fires decides on gradients: they shall see the same
    closed = [close_gates(pre, Gates(*columns), (values[3], values[1]), values[0], 0.25) for values in (halves, [w.clone() for w in wholes])]
    for half, whole in zip(halves[1:3], wholes[1:3], strict=True):
        torch.testing.assert_close(half.to(kind), whole, rtol=2**-8, atol=1e-6)
    found, expected = ([*fired, *pulled] for fired, pulled in sums)
    for one, other in zip([*found, *opened[0]], [*expected, *opened[1]], strict=True):
        assert one.dtype == kind
        torch.testing.assert_close(one, other, rtol=2**-8, atol=ROWS * 2**-8)
    for one, other in zip(*closed, strict=True):
        torch.testing.assert_close(one, other, rtol=2**-7, atol=ROWS * 2**-7)


def test_small_helpers_equal_the_formula() -> None:
    """They exist to save memory, not to change numbers."""
    grad, level = draw(ROWS, LATENTS, seed=0), draw(ROWS, LATENTS, seed=1)
    torch.testing.assert_close(sum_squares(grad), grad.square().sum())
    expected = grad * (level > 0)
    assert torch.equal(keep_above(grad, level), expected)
    rows, gradient = draw(2100, LATENTS, seed=2), draw(2100, LATENTS, seed=3)
    expected = gradient - (gradient * rows).sum(1, keepdim=True) * rows
    project_decoder_gradient(rows, gradient)
    torch.testing.assert_close(gradient, expected)
