"""The sparse kernels against the dense formula, values and gradients."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from interp_assets.compute.kernels import (
    Scratch,
    add_by_latent,
    decode_pairs,
    decode_pairs_twice,
    find_few,
    make_pairs,
    product,
    sampled_product,
    sampled_product_twice,
    split_bags,
    sum_values,
)

BATCH, D_SAE = 7, 11


def draw(*shape: int, seed: int) -> Tensor:
    """Draw a double tensor that wants gradients."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def draw_mask(share: float, seed: int = 3) -> Tensor:
    """Draw which (row, latent) pairs are active; row 2 and latent 4 never are."""
    mask = torch.rand(BATCH, D_SAE, generator=torch.Generator().manual_seed(seed)) < share
    mask[2], mask[:, 4] = False, False
    return mask


@settings(max_examples=40, deadline=None)
@given(
    share=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    threads=st.integers(1, 3),
    d_in=st.sampled_from([5, 32, 96]),
)
def test_pairs_give_the_values_and_gradients_of_the_dense_formula(share: float, seed: int, dtype: torch.dtype, threads: int, d_in: int) -> None:
    """Rows without an active latent, latents that never fire and empty batches are where sparse code breaks.

    float32 in whole strips takes the compiled loops, on one thread or several; all else torch's bags, as other devices do.
    """
    x, W_enc_T, b_enc, W_dec = draw(BATCH, d_in, seed=0).detach(), draw(D_SAE, d_in, seed=1), draw(D_SAE, seed=2), draw(D_SAE, d_in, seed=4)
    mask, grad, other = draw_mask(share, seed), draw(BATCH, d_in, seed=5).detach(), draw(BATCH, d_in, seed=6).detach()
    pre = x @ W_enc_T.T + b_enc
    expected = (pre * mask) @ W_dec
    (expected * grad).sum().backward()
    assert W_dec.grad is not None
    assert W_enc_T.grad is not None
    assert b_enc.grad is not None
    rows, latents = mask.nonzero(as_tuple=True)
    pairs, values, W, scratch = make_pairs(rows * D_SAE + latents, BATCH, D_SAE), pre.detach()[mask].to(dtype), W_dec.detach().to(dtype), Scratch()
    assert torch.equal(torch.stack([pairs.bags, pairs.latents]), torch.stack([rows, latents]))
    torch.set_num_threads(threads)
    expected, grad, other, x = expected.detach().to(dtype), grad.to(dtype), other.to(dtype), x.to(dtype)
    torch.testing.assert_close(decode_pairs(values, W, pairs, scratch), expected)
    torch.testing.assert_close(torch.stack(decode_pairs_twice((values, 2 * values), W, pairs, scratch)), torch.stack([expected, 2 * expected]))
    grad_values = sampled_product(grad, W, pairs, scratch)
    twice = sampled_product_twice((other, grad), W, pairs, scratch)
    torch.testing.assert_close(torch.stack(twice), torch.stack([sampled_product(other, W, pairs, scratch), grad_values]))
    found = torch.ones_like(W)
    add_by_latent(found, grad, values, pairs, scratch)
    torch.testing.assert_close(found, W_dec.grad.to(dtype) + 1)
    found = torch.zeros_like(W)
    add_by_latent(found, x, grad_values, pairs, scratch)
    torch.testing.assert_close(found, W_enc_T.grad.to(dtype))
    torch.testing.assert_close(sum_values(grad_values, pairs), b_enc.grad.to(dtype))


def test_sums_of_pairs_do_not_depend_on_the_number_of_threads() -> None:
    """Two machines must train the same SAE bit for bit: each bag is summed in order by one thread."""
    mask = torch.rand(40, 30, generator=torch.Generator().manual_seed(0)) < 0.3
    rows, latents = mask.nonzero(as_tuple=True)
    values, W_dec, scratch = draw(len(rows), seed=1).detach().float(), draw(30, 64, seed=2).detach().float(), Scratch()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        pairs = make_pairs(rows * 30 + latents, 40, 30)
        x_hat, gradient = decode_pairs(values, W_dec, pairs, scratch).clone(), torch.zeros_like(W_dec)
        add_by_latent(gradient, x_hat, values, pairs, scratch)
        found.append((*pairs[:-1], x_hat, gradient, sampled_product(x_hat, W_dec, pairs, scratch), sum_values(values, pairs)))
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


def test_split_bags_decode_each_group_apart() -> None:
    """A Matryoshka prefix is a sum of groups; a pair in the wrong group would leak."""
    W_dec, mask = draw(D_SAE, 5, seed=4).detach(), draw_mask(0.5)
    rows, latents = mask.nonzero(as_tuple=True)
    pairs = make_pairs(rows * D_SAE + latents, BATCH, D_SAE)
    values = draw(len(rows), seed=6).detach()
    bags = split_bags(pairs, [6, D_SAE])
    parts = decode_pairs(values, W_dec, bags, Scratch()).view(BATCH, 2, 5)
    latent_values = torch.zeros(BATCH, D_SAE, dtype=torch.float64).index_put((rows, latents), values)
    torch.testing.assert_close(parts[:, 0], latent_values[:, :6] @ W_dec[:6])
    torch.testing.assert_close(parts[:, 1], latent_values[:, 6:] @ W_dec[6:])
    assert torch.equal(bags.bags // 2, rows)


@settings(max_examples=30, deadline=None)
@given(limit=st.integers(0, 80), share=st.sampled_from([0.0, 0.1, 0.9]))
def test_few_pairs_are_found_or_refused(limit: int, share: float) -> None:
    """What is left out below the limit would be a lost gradient."""
    values = draw_mask(share).float()
    few, n = find_few(values, 0.5, limit), int(values.sum())
    if few is None:
        assert 2 * n >= limit or n == 0 == limit or int(values[:1].sum()) * BATCH > 2 * limit
    else:
        assert n < limit
        assert torch.equal(torch.stack([few.pairs.bags, few.pairs.latents]), values.nonzero().T)
        assert torch.equal(few.values, values[values > 0.5])


def test_scratch_gives_the_same_memory_again() -> None:
    """Fresh memory costs more than the arithmetic on it."""
    scratch, like = Scratch(), torch.zeros(1)
    first = scratch.take("a", (4, 3), like)
    assert scratch.take("a", (2, 3), like).data_ptr() == first.data_ptr()
    assert scratch.take("b", (4, 3), like).data_ptr() != first.data_ptr()
    assert scratch.take("a", (5, 3), like).shape == (5, 3)
    assert scratch.take("a", (1,), like.double()).dtype == torch.float64
    assert scratch.take("a", (1,), like, torch.bfloat16).dtype == torch.bfloat16
    assert scratch.cast("c", like, torch.float32) is like
    assert scratch.cast("c", like + 1 / 3, torch.bfloat16).item() == torch.tensor(1 / 3).to(torch.bfloat16)


def test_rounded_products_are_summed_in_float32() -> None:
    """A gradient that is added up in bfloat16 loses what is small."""
    a, b = torch.full((1, 1), 1.0), torch.full((1, 1), 1.0 + 2**-12)
    out = torch.full((1, 1), 1000.0)
    assert product(a, b, out, is_added=True, dtype=torch.bfloat16).item() == 1001.0
    assert product(a, b, out, dtype=torch.float32).item() == 1.0 + 2**-12
    assert product(a, b, out, bias=torch.tensor([0.25]), dtype=torch.bfloat16).item() == 1.25


@settings(max_examples=20, deadline=None)
@given(
    dtype=st.sampled_from([torch.bfloat16, torch.float16]), threads=st.integers(1, 3), turned=st.booleans(), spared=st.booleans(), cast=st.booleans()
)
def test_rounded_products_are_the_formula(dtype: torch.dtype, *, threads: int, turned: bool, spared: bool, cast: bool) -> None:
    """Written, with a bias, added, or in the operands' own type; compiled or not; with a buffer or without; operands rounded before or not."""
    torch.set_num_threads(threads)
    a, b, bias = (torch.randn(*shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate([(9, 33), (33, 17), (17,)]))
    a_half, b_half = a.to(dtype), b.to(dtype)
    rounded = torch.mm(a_half, b_half)
    scratch, operands = Scratch() if spared else None, (a_half, b_half) if cast else (a, b)
    out = torch.zeros(17, 9).T if turned else torch.zeros(9, 17)
    assert torch.equal(product(*operands, out, dtype=dtype, scratch=scratch), rounded.float())
    assert torch.equal(product(*operands, out, bias=bias, dtype=dtype, scratch=scratch), rounded.float() + bias)
    expected = out + rounded.float()
    assert torch.equal(product(*operands, out, is_added=True, dtype=dtype, scratch=scratch), expected)
    assert torch.equal(product(*operands, torch.empty(9, 17, dtype=dtype), dtype=dtype), rounded)


def test_order_by_latent_is_stable_whatever_the_width() -> None:
    """The gradient of a latent is summed in order of rows, or it would depend on how pairs are found."""
    latents = torch.tensor([70_000, 3, 70_000, 65_539, 3, 131_072])
    pairs = make_pairs(torch.arange(6) * 131_073 + latents, 6, 131_073)
    assert pairs.by_latent.tolist() == [1, 4, 3, 0, 2, 5]
    assert int(pairs.counts[70_000]) == 2
