"""The sparse kernels against the dense formula, values and gradients."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from interp_assets.train.kernels import decode_pairs, encode_pairs, group_pairs, make_pairs

BATCH, D_IN, D_SAE = 7, 5, 11


def draw(*shape: int, seed: int) -> Tensor:
    """Draw a double tensor that wants gradients."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def draw_mask(share: float, seed: int = 3) -> Tensor:
    """Draw which (row, latent) pairs are active; row 2 and latent 4 never are."""
    mask = torch.rand(BATCH, D_SAE, generator=torch.Generator().manual_seed(seed)) < share
    mask[2], mask[:, 4] = False, False
    return mask


@settings(max_examples=20, deadline=None)
@given(share=st.sampled_from([0.0, 0.05, 0.3, 1.0]), seed=st.integers(0, 1000))
def test_pairs_give_the_values_and_gradients_of_the_dense_formula(share: float, seed: int) -> None:
    """Rows without an active latent, latents that never fire and empty batches are where sparse code breaks."""
    x, W_enc_T, b_enc, W_dec = draw(BATCH, D_IN, seed=0).detach(), draw(D_SAE, D_IN, seed=1), draw(D_SAE, seed=2), draw(D_SAE, D_IN, seed=4)
    mask, weight = draw_mask(share, seed), draw(BATCH, D_IN, seed=5).detach()
    pre = x @ W_enc_T.T + b_enc
    expected = (pre * mask) @ W_dec
    (expected * weight).sum().backward()
    dense = [value.grad for value in (W_enc_T, b_enc, W_dec)]
    for value in (W_enc_T, b_enc, W_dec):
        value.grad = None
    rows, latents = mask.nonzero(as_tuple=True)
    pairs = make_pairs(rows, latents, BATCH, D_SAE)
    found = decode_pairs(encode_pairs(x, W_enc_T, b_enc, pre.detach()[mask], pairs), W_dec, pairs)
    (found * weight).sum().backward()
    torch.testing.assert_close(found, expected)
    for value, gradient in zip((W_enc_T, b_enc, W_dec), dense, strict=True):
        torch.testing.assert_close(value.grad, gradient)


def test_grouped_pairs_decode_each_group_apart() -> None:
    """A Matryoshka prefix is a sum of groups; a pair in the wrong group would leak."""
    W_dec, mask = draw(D_SAE, D_IN, seed=4).detach(), draw_mask(0.5)
    rows, latents = mask.nonzero(as_tuple=True)
    pairs = make_pairs(rows, latents, BATCH, D_SAE)
    values = draw(len(rows), seed=6).detach()
    group = (latents >= 6).long()
    place, grouped = group_pairs(pairs, group, 2)
    parts = decode_pairs(values[place], W_dec, grouped).view(2, BATCH, D_IN)
    latent_values = torch.zeros(BATCH, D_SAE, dtype=torch.float64).index_put((rows, latents), values)
    torch.testing.assert_close(parts[0], latent_values[:, :6] @ W_dec[:6])
    torch.testing.assert_close(parts[1], latent_values[:, 6:] @ W_dec[6:])


def test_order_by_latent_is_stable_beyond_sixteen_bits() -> None:
    """Wide SAEs have more latents than one radix digit."""
    latents = torch.tensor([70_000, 3, 70_000, 65_539, 3, 131_072])
    pairs = make_pairs(torch.arange(6), latents, 6, 131_073)
    assert pairs.by_latent.tolist() == [1, 4, 3, 0, 2, 5]
    assert int(pairs.counts[70_000]) == 2
