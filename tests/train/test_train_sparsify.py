"""Which latents are active, against the obvious rule."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from interp_assets.train.losses.sparsify import level_rows, pick_per_batch, pick_per_row
from interp_assets.train.parallel import ONE_RANK
from interp_assets.train.sae import Sae

DTYPES = st.sampled_from([torch.float32, torch.float64])


CASES = {
    "seed": st.integers(0, 10_000),
    "shift": st.sampled_from([-3.0, -1.0, 0.0, 2.0]),
    "grain": st.sampled_from([0.0, 0.25, 1.0]),
}


def draw_pre(seed: int, shift: float, grain: float) -> Tensor:
    """Draw pre-activations; a shift makes positive ones rare, multiples of a grain make ties, and two rows are of one value."""
    pre = torch.randn(130, 40, generator=torch.Generator().manual_seed(seed)) + shift
    pre = (pre / grain).round() * grain if grain else pre
    pre[3], pre[7] = 0.5, -1.0
    return pre


@settings(max_examples=60, deadline=None)
@given(k=st.integers(1, 50), wide=st.booleans(), dtype=DTYPES, **CASES)
def test_the_k_largest_positive_values_of_each_row_are_active_and_of_equal_ones_the_first(
    seed: int, shift: float, grain: float, k: int, wide: bool, dtype: torch.dtype
) -> None:
    """Relu comes first: a row with fewer than k positive values has fewer active latents. float64 takes the path of other devices."""
    pre = draw_pre(seed, shift, grain)
    pre = (pre.view(10, -1) if wide else pre).to(dtype)
    expected = torch.zeros_like(pre, dtype=torch.bool)
    for row in range(len(pre)):
        top = pre[row].argsort(descending=True, stable=True)[:k]
        expected[row, top[pre[row, top] > 0]] = True
    found = pick_per_row(pre, k, ONE_RANK, pre.shape[1])
    assert torch.equal(found.places, expected.flatten().nonzero().flatten())
    assert torch.equal(found.values, pre[expected])
    left = pre.clone()
    assert torch.equal(left >= level_rows(left, k, ONE_RANK, pre.shape[1]), expected)


@settings(max_examples=60, deadline=None)
@given(n_active=st.integers(1, 6000), **CASES)
def test_the_largest_of_the_batch_are_active_and_of_equal_ones_the_first(seed: int, shift: float, grain: float, n_active: int) -> None:
    """The sampled guess must never change the answer."""
    pre = draw_pre(seed, shift, grain)
    flat = pre.flatten()
    top = flat.argsort(descending=True, stable=True)[:n_active]
    assert torch.equal(pick_per_batch(pre, n_active).places, top[flat[top] > 0].sort().values)


@settings(max_examples=60, deadline=None)
@given(k=st.integers(1, 50), **CASES)
def test_training_picks_the_latents_that_fire_afterwards(seed: int, shift: float, grain: float, k: int) -> None:
    """Latents that tied at place k all learned, and only the first of them fired when the SAE was used."""
    pre = draw_pre(seed, shift, grain)
    n = pre.shape[1]
    sae = Sae(kind="topk", W_enc=torch.eye(n), b_enc=torch.zeros(n), W_dec=torch.eye(n), b_dec=torch.zeros(n), threshold=torch.zeros(n), k=k)
    found = pick_per_row(pre, k, ONE_RANK, n)
    latents = torch.zeros(pre.numel()).index_put((found.places,), found.values)
    assert torch.equal(latents.view_as(pre), sae.encode(pre))


def test_a_guess_that_sees_only_large_rows_is_corrected() -> None:
    """The sample takes every n-th row; when only those are large, the guess is far too high."""
    pre = torch.rand(640, 10, generator=torch.Generator().manual_seed(0))
    pre[::10] += 100
    assert len(pick_per_batch(pre, 3000).places) == 3000


@pytest.mark.parametrize("threads", [1, 3])
def test_rows_with_ties_with_few_and_with_enough_positive_values_are_picked_apart(threads: int) -> None:
    """The compiled loop has room for k places a row: one row of equal values must not cost others theirs."""
    torch.set_num_threads(threads)
    pre = torch.randn(7, 40, generator=torch.Generator().manual_seed(0))
    pre[2] = -1.0
    pre[3, 5:] = -1.0
    pre[4] = 0.5
    places = pick_per_row(pre, 8, ONE_RANK, 40).places
    assert torch.bincount(places // 40, minlength=7).tolist() == [8, 8, 0, int((pre[3] > 0).sum()), 8, 8, 8]
    assert places[places // 40 == 4].tolist() == list(range(160, 168))
