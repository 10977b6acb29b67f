"""Which latents are active, against the obvious rule."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from interp_assets.train.losses.sparsify import pick_per_batch, pick_per_row, row_levels
from interp_assets.train.parallel import ONE_RANK

DTYPES = st.sampled_from([torch.float32, torch.float64])


def draw_pre(seed: int, shift: float) -> Tensor:
    """Draw pre-activations; a shift makes positive ones rare."""
    return torch.randn(130, 40, generator=torch.Generator().manual_seed(seed)) + shift


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 50), wide=st.booleans(), shift=st.sampled_from([-3.0, -1.0, 0.0, 2.0]), dtype=DTYPES)
def test_the_largest_positive_values_of_each_row_are_active(seed: int, k: int, wide: bool, shift: float, dtype: torch.dtype) -> None:
    """Relu comes first: a row with fewer than k positive values has fewer active latents. float64 takes the path of other devices."""
    pre = draw_pre(seed, shift)
    pre = (pre.view(10, -1) if wide else pre).to(dtype)
    expected = torch.zeros_like(pre, dtype=torch.bool)
    for row in range(len(pre)):
        top = pre[row].argsort(descending=True)[:k]
        expected[row, top[pre[row, top] > 0]] = True
    found = pick_per_row(pre, k, ONE_RANK, pre.shape[1])
    assert torch.equal(found.places, expected.flatten().nonzero().flatten())
    assert torch.equal(found.values, pre[expected])
    assert torch.equal(pre >= row_levels(pre, k, ONE_RANK, pre.shape[1]), expected)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), n_active=st.integers(1, 6000), shift=st.sampled_from([-3.0, -1.0, 0.0, 2.0]))
def test_the_largest_positive_values_of_the_batch_are_active(seed: int, n_active: int, shift: float) -> None:
    """The sampled guess must never change the answer."""
    pre = draw_pre(seed, shift)
    flat = pre.flatten()
    top = flat.argsort(descending=True)[:n_active]
    assert torch.equal(pick_per_batch(pre, n_active).places, top[flat[top] > 0].sort().values)


def test_a_guess_that_sees_only_large_rows_is_corrected() -> None:
    """The sample takes every n-th row; when only those are large, the guess is far too high."""
    pre = torch.rand(640, 10, generator=torch.Generator().manual_seed(0))
    pre[::10] += 100
    assert len(pick_per_batch(pre, 3000).places) == 3000


def test_ties_with_the_threshold_are_all_active() -> None:
    """So the answer does not depend on the order in which an algorithm meets equal values."""
    pre = torch.tensor([[1.0, 1.0, 1.0, 0.5]])
    assert pick_per_row(pre, 2, ONE_RANK, 4).places.tolist() == [0, 1, 2]
    assert pick_per_batch(pre, 2).places.tolist() == [0, 1, 2]


@pytest.mark.parametrize("threads", [1, 3])
def test_rows_with_ties_with_few_and_with_enough_positive_values_are_picked_apart(threads: int) -> None:
    """The compiled loop has room for k places a row: one row of equal values must not cost others theirs."""
    torch.set_num_threads(threads)
    pre = torch.randn(7, 40, generator=torch.Generator().manual_seed(0))
    pre[2] = -1.0
    pre[3, 5:] = -1.0
    rows = [pre, pre.clone()]
    rows[1][4] = 0.5
    for values in rows:
        level = values.sort(dim=1, descending=True).values[:, 7:8].clamp(min=1e-30)
        assert torch.equal(pick_per_row(values, 8, ONE_RANK, 40).places, (values >= level).flatten().nonzero().flatten())
