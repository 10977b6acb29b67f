"""Products of digits: the bound always holds, so what is found is what computing everything finds, bit for bit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp_assets.compute.coarse import (
    Frame,
    Kind,
    are_bounded,
    fastest_kind,
    least,
    make_frame,
    multiply,
    quantize_columns,
    quantize_rows,
)
from interp_assets.compute.compiled import compiled
from interp_assets.compute.dots import dot, rounding

KINDS: list[Kind] = ["int8", "float32"]
if fastest_kind(64) != "int8":  # a processor whose 8-bit products are wrong or slow never uses them
    KINDS = ["float32"]


def plain_frame(d_in: int) -> Frame:
    """Return the frame that leaves rows as they are."""
    return Frame(np.zeros(d_in, np.float32), np.ones(d_in, np.float32))


@compiled
def all_dots(rows, columns, d, products):
    """Multiply every row with every column."""
    for i in range(products.shape[0]):
        for j in range(products.shape[1]):
            products[i, j] = dot(rows, i * d, columns, j * d, d)


@compiled
def all_least(level, rows, columns, found):
    """Compute what each product of digits must exceed."""
    for i in range(found.shape[0]):
        for j in range(found.shape[1]):
            found[i, j] = least(level[i, j], columns[0][j], columns[1][j], columns[2][j], columns[3][j], rows[0][i], rows[1][i], rows[2][i])


def products_of(x, w):
    """Return the products in the fixed order."""
    found = np.empty((len(x), len(w)), np.float32)
    all_dots(x.reshape(-1), w.reshape(-1), x.shape[1], found)
    return found


def make_pair(seed, n, m, d, spread, centre):
    """Draw rows and columns whose dimensions have very unequal sizes, and rows that lie away from 0."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(spread * rng.standard_normal(d))
    x = ((rng.standard_normal((n, d)) + centre * rng.standard_normal(d)) * sizes).astype(np.float32)
    w = (rng.standard_normal((m, d)) * np.exp(spread * rng.standard_normal((m, 1)))).astype(np.float32)
    return x, w, rng.standard_normal(m).astype(np.float32)


@pytest.mark.parametrize("d", [1, 3, 16, 63, 64, 65, 200, 512])
def test_a_product_is_as_exact_as_promised(d):
    """The bound that everything rests on begins with the rounding of the value itself."""
    x, w, _ = make_pair(d, 20, 30, d, 1.0, 1.0)
    exact = x.astype(np.float64) @ w.astype(np.float64).T
    norms = np.linalg.norm(x.astype(np.float64), axis=1)[:, None] * np.linalg.norm(w.astype(np.float64), axis=1)
    assert (abs(products_of(x, w) - exact) <= rounding(d) * norms).all()
    assert rounding(d) < 1e-5


@given(
    seed=st.integers(0, 2**32 - 1),
    d=st.sampled_from([1, 7, 16, 17, 64, 100, 256]),
    spread=st.sampled_from([0.0, 0.5, 2.0, 5.0]),
    centre=st.sampled_from([0.0, 1.0, 100.0]),
    framing=st.sampled_from(["made", "plain", "strange"]),
    kind=st.sampled_from(KINDS),
)
@settings(max_examples=150, deadline=None)
def test_what_reaches_a_level_is_never_ruled_out(seed, d, spread, centre, framing, kind):
    """One pre-activation that is ruled out wrongly would be a firing lost in silence. Levels stand exactly at the pre-activations, and just below."""
    kind = kind if d >= 16 else "float32"
    x, w, bias = make_pair(seed, 9, 17, d, spread, centre)
    rng = np.random.default_rng(seed + 1)
    strange = Frame(rng.standard_normal(d).astype(np.float32), np.exp(rng.standard_normal(d)).astype(np.float32))
    frame = {"made": make_frame(torch.from_numpy(x)), "plain": plain_frame(d), "strange": strange}[framing]
    rows, columns = quantize_rows(x, frame, kind), quantize_columns(w, bias, frame, kind)
    coarse = multiply(rows, columns, torch.empty(9 * 17)).astype(np.float32)
    pre = products_of(x, w) + bias
    needed = np.empty_like(pre)
    parts = (rows.inverse, rows.error, rows.reach), (columns.offset, columns.inverse, columns.norm, columns.error)
    for level in (np.nextafter(pre, np.float32(-np.inf)), pre - np.float32(1), np.minimum(pre, 0) - np.float32(1e-20)):
        all_least(level, *parts, needed)
        assert (coarse > needed).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_rules_out_most_of_what_is_far_below(kind):
    """A bound that lets everything through would be true as well, and worth nothing."""
    x, w, bias = make_pair(3, 200, 300, 256, 1.0, 3.0)
    frame = make_frame(torch.from_numpy(x))
    rows, columns = quantize_rows(x, frame, kind), quantize_columns(w, bias, frame, kind)
    coarse = multiply(rows, columns, torch.empty(200 * 300)).astype(np.float32)
    pre = products_of(x, w) + bias
    deviation = pre.std(axis=0)
    needed = np.empty_like(pre)
    level = (pre.mean(axis=0) + 2 * deviation)[None].repeat(200, axis=0).astype(np.float32)
    all_least(level, (rows.inverse, rows.error, rows.reach), (columns.offset, columns.inverse, columns.norm, columns.error), needed)
    share, found = (pre > level).mean(), (coarse > needed).mean()
    assert 0.01 < share < 0.05
    assert found < 4 * share


def test_levels_of_plus_and_minus_infinity_rule_out_all_and_nothing():
    """Padding and rows that are not valid have the one, rows without a bound the other."""
    x, w, bias = make_pair(4, 8, 8, 64, 1.0, 1.0)
    for kind in KINDS:
        frame = make_frame(torch.from_numpy(x))
        rows, columns = quantize_rows(x, frame, kind), quantize_columns(w, bias, frame, kind)
        coarse, needed = multiply(rows, columns, torch.empty(64)).astype(np.float32), np.empty((8, 8), np.float32)
        for level, expected in ((np.inf, False), (-np.inf, True)):
            levels = np.full((8, 8), level, np.float32)
            all_least(levels, (rows.inverse, rows.error, rows.reach), (columns.offset, columns.inverse, columns.norm, columns.error), needed)
            assert ((coarse > needed) == expected).all()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_zeros_and_of_tiny_values_keep_their_bound(kind):
    """They have no digits, or none that a scale of 32 bits could hold."""
    x, w, _ = make_pair(5, 6, 7, 64, 0.0, 0.0)
    x[0], x[1], x[2] = 0, x[1] * 1e-20, x[2] * 1e-38
    w[0], w[1] = 0, w[1] * 1e-30
    bias = np.zeros(7, np.float32)
    frame = plain_frame(64)
    rows, columns = quantize_rows(x, frame, kind), quantize_columns(w, bias, frame, kind)
    coarse, needed, pre = multiply(rows, columns, torch.empty(42)).astype(np.float32), np.empty((6, 7), np.float32), products_of(x, w)
    level = np.nextafter(pre, np.float32(-np.inf))
    all_least(level, (rows.inverse, rows.error, rows.reach), (columns.offset, columns.inverse, columns.norm, columns.error), needed)
    assert (coarse > needed).all()


def test_rows_of_few_dimensions_have_no_digits():
    """Torch's product of integers leaves its result unwritten where rows have one dimension (2.13, on a CPU)."""
    assert fastest_kind(1) == fastest_kind(1 << 20) == "float32"


@pytest.mark.skipif("int8" not in KINDS, reason="8-bit products are not fast here")
@pytest.mark.parametrize("unit", [1e-3, 1.0, 1e3])
def test_the_unit_of_rows_does_not_matter_to_the_bound(unit):
    """Dimensions that do not vary had a scale of 1 whatever the others had: in small units they took all digits."""
    x, w, bias = make_pair(7, 200, 300, 64, 0.3, 1.0)
    x *= np.float32(unit)
    w /= np.float32(unit)
    still = x.copy()
    still[:, :4] = x[0, :4]
    frame = make_frame(torch.from_numpy(still))
    rows, columns = quantize_rows(x, frame, "int8"), quantize_columns(w, bias, frame, "int8")
    pre = products_of(x, w) + bias
    level = np.quantile(pre, 0.97, axis=0).astype(np.float32)[None].repeat(200, axis=0)
    needed = np.empty_like(pre)
    all_least(level, (rows.inverse, rows.error, rows.reach), (columns.offset, columns.inverse, columns.norm, columns.error), needed)
    coarse = multiply(rows, columns, torch.empty(200 * 300)).astype(np.float32)
    assert (coarse > needed)[pre > level].all()
    assert (coarse > needed).mean() < 3 * (pre > level).mean()


@pytest.mark.skipif("int8" not in KINDS, reason="8-bit products are not fast here")
def test_a_frame_that_overflows_is_noticed():
    """A bound that is not a number compares as false: whoever multiplies must ask."""
    x, w, bias = make_pair(8, 6, 7, 64, 0.0, 0.0)
    frame = make_frame(torch.from_numpy(x * np.float32(1e-30)))
    with np.errstate(over="ignore", invalid="ignore"):
        assert not are_bounded(quantize_rows(x * np.float32(1e25), frame, "int8"))
    assert are_bounded(quantize_rows(x, make_frame(torch.from_numpy(x)), "int8"), quantize_columns(w, bias, plain_frame(64), "int8"))


@pytest.mark.skipif("int8" not in KINDS, reason="8-bit products are not fast here")
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 70), m=st.integers(1, 70), d=st.integers(16, 200))
@settings(max_examples=60, deadline=None)
def test_products_of_digits_are_exact(seed, n, m, d):
    """Everything rests on torch's product of integers, at sizes that its own tests may not have."""
    rng = np.random.default_rng(seed)
    a, b = (torch.from_numpy(rng.integers(-127, 128, shape, dtype=np.int8)) for shape in ((n, d), (m, d)))
    found = torch.ops.aten._int_mm.out(a, b.T, out=torch.empty((n, m), dtype=torch.int32))
    assert torch.equal(found, (a.long() @ b.long().T).int())


def test_dimensions_that_never_change_and_infinities_make_a_usable_frame():
    """A frame is a hint: it must not divide by zero or spread a NaN of one row."""
    rows = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    rows[:, 1], rows[3, 2], rows[:, 3] = 7.0, float("nan"), 0.0
    frame = make_frame(rows)
    assert np.isfinite(frame.mean).all()
    assert np.isfinite(frame.scale).all()
    assert (frame.scale > 0).all()
