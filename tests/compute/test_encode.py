"""The pre-activations that matter are, bit for bit, those that computing all of them finds, whatever finds them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from interp_assets.compute.coarse import Kind, fastest_kind, multiply
from interp_assets.compute.compiled import compiled
from interp_assets.compute.dots import dot
from interp_assets.compute.encode import Encoder, FewEncoder, find_damage, make_encoder
from interp_assets.compute.encode_loops import make_room, take_largest
from interp_assets.compute.kernels import Found, Scratch
from interp_assets.compute.loops import bound_largest
from interp_assets.errors import NonFiniteError
from interp_assets.planning.config import SaeConfig
from interp_assets.planning.options import Architecture
from interp_assets.train.losses.sparsify import encode_per_row
from interp_assets.train.parallel import ONE_RANK
from interp_assets.train.recipes import RECIPES, make_weights
from interp_assets.train.trainer import Trainer

KINDS: list[Kind] = ["int8", "float32"]
if fastest_kind(64) != "int8":  # a processor whose 8-bit products are wrong or slow never uses them
    KINDS = ["float32"]
TINY = torch.finfo(torch.float32).tiny


@compiled
def all_dots(rows, columns, bias, d, products):
    """Multiply every row with every column."""
    for i in range(products.shape[0]):
        for j in range(products.shape[1]):
            products[i, j] = dot(rows, i * d, columns, j * d, d) + bias[j]


def plain_pre(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
    """Return all pre-activations, in the fixed order."""
    found = np.empty((len(x), len(W)), np.float32)
    all_dots(x.numpy().reshape(-1), W.numpy().reshape(-1), b.numpy(), x.shape[1], found)
    return torch.from_numpy(found)


def draw(seed: int, shape: tuple[int, int, int], spread: float, *, coarse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Draw rows, columns and biases of unequal sizes; `coarse` ones are multiples of 1/4, so that ties are everywhere. Two rows are 0."""
    (n, m, d), generator = shape, torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator) * (spread * torch.randn(n, 1, generator=generator)).exp()
    x = x * (spread * torch.randn(d, generator=generator)).exp()
    W = torch.randn(m, d, generator=generator) * (spread * torch.randn(m, 1, generator=generator)).exp() / math.sqrt(d)
    b = torch.randn(m, generator=generator)
    if coarse:
        x, W, b = ((value * 4).round() / 4 for value in (x, W, b))
    x[::7] = 0
    return x.contiguous(), W.contiguous(), b


def assert_found(found: Found, pre: Tensor, mask: Tensor) -> None:
    """Compare places and values bit for bit."""
    assert torch.equal(found.places, mask.flatten().nonzero().flatten())
    assert torch.equal(found.values, pre[mask])


CASES = {
    "seed": st.integers(0, 10_000),
    "shape": st.sampled_from([(1, 1, 16), (9, 40, 16), (13, 130, 17), (20, 64, 100), (11, 200, 256), (15, 65, 5), (700, 24, 32)]),
    "spread": st.sampled_from([0.0, 0.5, 3.0]),
    "coarse": st.booleans(),
    "kind": st.sampled_from(KINDS),
    "threads": st.integers(1, 3),
}


def encode(x: Tensor, W: Tensor, b: Tensor, kind: Kind) -> Encoder:
    """Quantize."""
    return make_encoder(x, W, b, Scratch(), kind if x.shape[1] >= 16 else "float32")


def test_a_sum_beyond_float16_is_no_damage() -> None:
    """With `product_dtype: float16` the rows of a batch add up to more than the type holds: that ended the step as if a value were not finite."""
    rows = torch.ones(300, 300, dtype=torch.float16)
    assert float(find_damage(rows)) == 0
    rows[7, 8] = float("inf")
    assert math.isnan(float(find_damage(rows)))


def test_scales_that_overflow_are_no_damage() -> None:
    """Finite rows and biases near the ends of float32's range have no digits, but they have values; only what is not finite ends a step."""
    x, W, b = draw(3, (640, 24, 32), 0.0, coarse=False)
    x[::10] *= 1e-30  # the sample from which scales are made
    x[1::10] *= 1e25
    b[3] = 1e38
    encoder, pre = make_encoder(x, W, b, Scratch()), plain_pre(x, W, b)
    assert encoder.is_finite
    assert encoder.kind == "float32"
    assert_found(encoder.reaching(0.5), pre, pre >= 0.5)


@settings(max_examples=100, deadline=None)
@given(k=st.sampled_from([1, 2, 7, 32, 1000]), **CASES)
def test_the_largest_of_each_row_are_those_of_the_plain_formula(
    seed: int, shape: tuple[int, int, int], spread: float, coarse: bool, kind: Kind, threads: int, k: int
) -> None:
    """And of equal ones the first: ties, rows of zeros, few positive values and k beyond the width too."""
    torch.set_num_threads(threads)
    x, W, b = draw(seed, shape, spread, coarse=coarse)
    encoder, pre = encode(x, W, b, kind), plain_pre(x, W, b)
    in_order = pre.argsort(dim=1, descending=True, stable=True)[:, :k]
    expected = torch.zeros_like(pre, dtype=torch.bool).scatter(1, in_order, value=True) & (pre >= TINY)
    assert encoder.is_finite
    assert_found(encoder.largest_of_rows(k), pre, expected)
    assert_found(encode_per_row(encoder, k, ONE_RANK, len(W)), pre, expected)


@settings(max_examples=100, deadline=None)
@given(share=st.sampled_from([0.0, 0.01, 0.2, 0.5, 1.0]), **CASES)
def test_what_reaches_a_level_is_that_of_the_plain_formula(
    seed: int, shape: tuple[int, int, int], spread: float, coarse: bool, kind: Kind, threads: int, share: float
) -> None:
    """The level is one of the values, so that something ties with it."""
    torch.set_num_threads(threads)
    x, W, b = draw(seed, shape, spread, coarse=coarse)
    pre = plain_pre(x, W, b)
    level = float(pre.flatten().sort(descending=True).values[int(share * (pre.numel() - 1))])
    encoder = encode(x, W, b, kind)
    assert_found(encoder.reaching(level), pre, pre >= level)
    rows = slice(len(x) // 3, None, 2)
    assert_found(encoder.part(rows).reaching(level), pre[rows], pre[rows] >= level)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 1000), above=st.sampled_from([-1.0, 0.0, 0.25, 3.0]), limit=st.sampled_from([0, 1, 50, 2000, 100_000]), coarse=st.booleans()
)
def test_few_pairs_are_those_of_the_plain_formula_or_refused(seed: int, above: float, limit: int, coarse: bool) -> None:
    """Some rows are looked at; a sample of one in 64 says whether it is worth it, and may be wrong."""
    x, W, b = draw(seed, (150, 40, 33), 0.5, coarse=coarse)
    pre, finder = plain_pre(x, W, b), FewEncoder(x, W, b, Scratch())
    for rows in (slice(0, 100), slice(100, 150)):
        few, expected = finder.find(rows, above, limit), pre[rows] > above
        if few is None:
            assert expected.sum() >= limit or 64 * int(expected[::64].sum()) > limit // 2
        else:
            assert len(few.values) < limit
            assert torch.equal(torch.stack([few.pairs.bags, few.pairs.latents]), expected.nonzero().T)
            assert torch.equal(few.values, pre[rows][expected])
    assert finder.damage == 0


@pytest.mark.parametrize("kind", KINDS)
def test_most_pre_activations_are_never_computed(kind: Kind) -> None:
    """A bound that lets everything through would be true as well, and worth nothing."""
    x, W, b = draw(0, (40, 2000, 256), 0.0, coarse=False)
    encoder = encode(x, W, b * 0.1, kind)
    columns, product = (encoder.columns.values.reshape(-1), encoder.columns.bias, encoder.terms), torch.empty(40 * 2000)
    block = (x.numpy().reshape(-1), encoder.rows.inverse, encoder.rows.error, encoder.rows.reach)
    n, n_computed, _ = take_largest(multiply(encoder.rows, encoder.columns, product), block, columns, (32, 256), 0, make_room(10))
    assert n == 40 * 32
    assert n_computed < 3 * n


def test_rows_that_leave_no_digits_give_the_same() -> None:
    """One value of each row, to which no latent listens, is so large that others have the digit 0: values are their own digits from then on."""
    x, W, b = draw(0, (1200, 50, 64), 0.0, coarse=False)
    x[torch.arange(1200), torch.arange(1200) % 29], W[:, :29] = 1e5, 0.0
    pre, encoder = plain_pre(x, W, b), encode(x, W, b, KINDS[0])
    assert_found(encoder.largest_of_rows(5), pre, pre >= pre.sort(dim=1, descending=True).values[:, 4:5].clamp(min=TINY))
    assert_found(encoder.reaching(2.0), pre, pre >= 2.0)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 1000), n=st.integers(1, 300), k=st.integers(1, 300), digits=st.sampled_from([0, 1, 9]), spread=st.sampled_from([1.0, 10.0])
)
def test_a_bound_parts_the_largest_from_all_others(seed: int, n: int, k: int, digits: int, spread: float) -> None:
    """Halving an interval must end among ties, and among values of very unequal sizes."""
    rng = np.random.default_rng(seed)
    values = (rng.standard_normal(n).round(digits) * np.exp(spread * rng.standard_normal(n))).astype(np.float32)
    kth = np.sort(values)[::-1][min(k, n) - 1]
    assert ((values >= bound_largest(values, k)) == (values >= kth)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["x", "W", "b"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_nan_or_an_infinity_is_told(kind: Kind, where: str, value: float) -> None:
    """It has no digits and every comparison with it is false, so nothing else would tell."""
    x, W, b = draw(0, (30, 50, 64), 0.0, coarse=False)
    assert encode(x, W, b, kind).is_finite
    {"x": x, "W": W, "b": b}[where].view(-1)[17] = value
    encoder = encode(x, W, b, kind)
    assert not encoder.is_finite
    encoder.largest_of_rows(3)
    encoder.reaching(0.0)


@pytest.mark.parametrize("architecture", list(RECIPES))
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("damage", ["row", "weight"])
@pytest.mark.parametrize(("shift", "dtype"), [(0.0, "float32"), (4.0, "float32"), (0.0, "bfloat16")])
def test_a_row_or_a_weight_that_is_not_finite_ends_the_training(
    architecture: Architecture, value: float, damage: str, shift: float, dtype: str
) -> None:
    """A transcoder reconstructs other rows: without a look at what is encoded, a damaged row would be one on which nothing fires."""
    sizes = {"d_sae": 64, "k": 4, "batch_rows": 48, "n_rows": 4800}
    config = SaeConfig.model_validate({"architecture": architecture, "product_dtype": dtype, **sizes})
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(48, 32, generator=generator)
    weights = make_weights(config, x, 32, generator)
    weights["b_enc"] -= shift
    trainer = Trainer(config, weights, torch.device("cpu"))
    trainer.train_step(x, x.clone())
    y = x.clone()
    if damage == "row":
        x[5, 3] = value
    else:
        trainer.weights["W_enc_T"][7, 3] = value
    before = {name: weight.clone() for name, weight in trainer.weights.items()}
    with pytest.raises(NonFiniteError):
        trainer.train_step(x, y)
    assert all(torch.equal(weight.nan_to_num(), before[name].nan_to_num()) for name, weight in trainer.weights.items())
