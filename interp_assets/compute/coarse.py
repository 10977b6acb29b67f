"""Rows and encoder columns become 8-bit digits with a bound of what that changes: their product tells which pre-activations cannot reach a level.

Encoding is one large product of which few entries matter: those above a threshold. Processors multiply 8-bit integers four times as fast as
float32, and exactly. So, on a CPU:

1. `quantize_rows`: a row x becomes scale * digits + error, a latent's encoder column w likewise. Rows are first centred and scaled by dimension
   (`Frame`), columns the other way, which leaves products as they are but for a constant and keeps large dimensions from taking all digits.
2. One product of digits. By Cauchy and Schwarz it is wrong by at most |error_x| |w| + (|x| + |error_x|) |error_w|, times the scales; what the
   arithmetic of floating point adds is bounded too (`SLACK`). Entries that stay below the level by more than that are done.
3. What is left, two to three times as many as there are, is computed from the float32 rows in one fixed order (`dots.py`) and compared.

The bound holds always, not with high probability: the result is that of computing every pre-activation with `dot`, bit for bit, whatever finds
the candidates. So how to find them may be chosen by speed: without fast 8-bit products the digits are the values themselves, in float32
(`Kind`), and the bound is that of a library's rounding. Where a scale overflows, `are_bounded` says so, and digits are of no use.

What is rounded, and where it is covered: centring, scaling and quantizing, and the sum of a product turned into a float32 (`_MORE_ROUNDINGS`); `dot`
itself (`rounding`), and a library's product in any order; norms (`_inflation`); the offset, and the level in the units of the product (`SLACK`). The
bias is added by one rounding that is monotone: what exceeds a float32 level after it exceeded it before.

Measured with 512 dimensions (GFLOP/s of 2 cores of an AMD Zen 5): float32 213 by MKL and 470 by oneDNN, bfloat16 960, 8-bit 1,900. Rejected: bfloat16
with a narrower bound (half the speed), bounds by blocks of dimensions (no narrower where errors are spread evenly), dithering with a probabilistic
bound (five times narrower, but not certain).
"""

import math
import time
from collections.abc import Callable
from functools import cache
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32
from numpy.typing import NDArray
from torch import Tensor

from interp_assets.compute.compiled import compiled, reordered
from interp_assets.compute.dots import of_roundings, rounding
from interp_assets.compute.loops import over_rows
from interp_assets.compute.products import is_float32

Kind = Literal["int8", "float32"]
SLACK: Final = 1e-6
"""Relative error of a level in the units of a product, computed in float32: some eight roundings."""
_MORE_ROUNDINGS: Final = 64
"""Of centring, scaling, and turning a product into a float: some ten."""
_DIGITS: Final = 127
_DIMENSIONS: Final = range(16, (1 << 16) + 1)
"""Sums of more products of digits might not fit 32 bits; and torch's product of integers leaves its result unwritten where a row has one."""
_TINY: Final = 1e-15
"""Rows whose values are all smaller have no digits."""
_STILL: Final = 1e-6
"""Dimensions that vary so little, beside the one that varies most, do not vary at all: float32 may show as much."""
_SMALLEST: Final = float(np.finfo(np.float32).tiny)
_FAST: Final = 0.7
_INTEGER_PRODUCT: Final = torch.ops.aten._int_mm.out  # noqa: SLF001 - torch has no public product of integers
_TRIAL: Final = 512


class Frame(NamedTuple):
    """What is subtracted from rows, and what their dimensions are divided by then. Any will do; that of the data gives narrow bounds."""

    mean: Float32[np.ndarray, " d_in"]
    scale: Float32[np.ndarray, " d_in"]


class Rows(NamedTuple):
    """Quantized rows; `error` and `reach` are in units of a row's last digit."""

    values: Float32[np.ndarray, "n d_in"]
    """What they are exactly."""
    digits: Tensor
    """int8, or the values themselves."""
    inverse: Float32[np.ndarray, " n"]
    """Digits a unit."""
    error: Float32[np.ndarray, " n"]
    """Bound of the norm of what the digits leave out, with the rounding of everything that is computed."""
    reach: Float32[np.ndarray, " n"]
    """Bound of the norm of what the digits stand for."""

    def part(self, rows: slice) -> "Rows":
        """Return some rows."""
        return Rows(self.values[rows], self.digits[rows], self.inverse[rows], self.error[rows], self.reach[rows])


class Columns(NamedTuple):
    """Quantized encoder columns, one for each latent; `norm` and `error` are in units of a column's last digit."""

    values: Float32[np.ndarray, "latents d_in"]
    digits: Tensor
    inverse: Float32[np.ndarray, " latents"]
    norm: Float32[np.ndarray, " latents"]
    error: Float32[np.ndarray, " latents"]
    offset: Float32[np.ndarray, " latents"]
    """The bias, and what rows lost when they were centred: what is added to the product of digits."""
    bias: Float32[np.ndarray, " latents"]


def fastest_kind(d_in: int) -> Kind:
    """Return which digits are faster here, measured once in some milliseconds. What is found with them is the same."""
    return "int8" if d_in in _DIMENSIONS and _are_integers_fast() else "float32"


@cache
def _are_integers_fast() -> bool:
    """Tell whether a product of 8-bit integers is right, and faster than one of float32.

    Processors without instructions for four products at once add pairs in 16 bits, which the largest digits overflow: such a product is wrong.
    """
    signs = (2 * torch.randint(0, 2, (2, _TRIAL, _TRIAL), generator=torch.Generator().manual_seed(0), dtype=torch.int8) - 1) * _DIGITS
    signs[:, : _TRIAL // 2] = _DIGITS
    x, w, out = signs[0], signs[1], torch.empty((_TRIAL, _TRIAL), dtype=torch.int32)
    a, b, product = x.float(), w.float(), torch.empty(_TRIAL, _TRIAL)
    try:
        narrow_s = _seconds(lambda: _INTEGER_PRODUCT(x, w.T, out=out))
    except RuntimeError:
        return False
    wide_s = _seconds(lambda: torch.mm(a, b.T, out=product))
    return narrow_s < _FAST * wide_s and torch.equal(out.double(), product.double())


def make_frame(rows: Float[Tensor, "n d_in"]) -> Frame:
    """Return the frame in which rows like these need few digits: their mean, and the roots of their standard deviations.

    The root shares the width of a dimension between rows and columns. Dimensions that do not vary here take part as the others do in the middle.
    """
    sample = rows.double()
    deviation, mean = sample.std(dim=0, correction=0), sample.mean(dim=0)
    usable = torch.isfinite(deviation) & (deviation > deviation.nan_to_num(posinf=0.0).max() * _STILL)
    usual = deviation[usable].median() if usable.any() else torch.ones((), dtype=torch.float64)
    scale = torch.where(usable, deviation, usual).sqrt()
    return Frame(torch.where(torch.isfinite(mean), mean, 0.0).float().numpy(), scale.float().numpy())


def are_bounded(*sets: Rows | Columns) -> bool:
    """Tell whether all bounds are finite. Those of values near the ends of float32's range may not be, and comparisons with NaN are false."""
    return all(bool(np.isfinite(column).all()) for quantized in sets for column in quantized if isinstance(column, np.ndarray) and column.ndim == 1)


def quantize_rows(values: Float32[np.ndarray, "n d_in"], frame: Frame, kind: Kind, digits: Tensor | None = None) -> Rows:
    """Quantize rows, into `digits` where it is given. `Rows` keeps the values themselves: they must stay as they are."""
    d = values.shape[1]
    share, more = rounding(d) + of_roundings(_MORE_ROUNDINGS), np.float32(_inflation(d))
    if kind == "float32":  # a library adds in any order: at most one rounding a product; it may take what is tiny for 0
        error = _norms(values) * np.float32(share + of_roundings(d) + _rounding_of_operands()) * more + np.float32(d * _SMALLEST)
        return Rows(values, torch.from_numpy(values), np.ones_like(error), error, np.full_like(error, d * _SMALLEST))
    assert d in _DIMENSIONS
    digits = torch.empty(values.shape, dtype=torch.int8) if digits is None else digits
    inverse, error, norm = _quantize(values, frame.mean, 1 / frame.scale, digits)
    centre = np.float32(np.linalg.norm(frame.mean.astype(np.float64) / frame.scale)) * inverse
    return Rows(values, digits, inverse, (error + np.float32(share) * (norm + centre)) * more, (norm + error) * more)


def quantize_columns(
    values: Float32[np.ndarray, "latents d_in"], bias: Float32[np.ndarray, " latents"], frame: Frame, kind: Kind, digits: Tensor | None = None
) -> Columns:
    """Quantize encoder columns, which lie one latent after the other, for rows that are quantized in the same frame."""
    more = np.float32(_inflation(values.shape[1]))
    if kind == "float32":
        norms = _norms(values)
        return Columns(values, torch.from_numpy(values), np.ones_like(norms), norms * more, np.ones_like(norms), bias, bias)
    assert values.shape[1] in _DIMENSIONS
    digits = torch.empty(values.shape, dtype=torch.int8) if digits is None else digits
    inverse, error, norm = _quantize(values, np.zeros_like(frame.mean), frame.scale, digits)
    offset = (bias + values @ frame.mean.astype(np.float64)).astype(np.float32) if frame.mean.any() else bias
    return Columns(values, digits, inverse, norm * more, error * more, offset, bias)


def multiply(rows: Rows, columns: Columns, out: Tensor) -> NDArray[np.float32] | NDArray[np.int32]:
    """Return the products of digits, `[rows, latents]`, in the memory of `out`, a float32 tensor of at least that size."""
    out = out.view(-1)[: len(rows.digits) * len(columns.digits)].view(len(rows.digits), len(columns.digits))
    if rows.digits.dtype == torch.int8:
        return _INTEGER_PRODUCT(rows.digits, columns.digits.T, out=out.view(torch.int32)).numpy()
    return torch.mm(rows.digits, columns.digits.T, out=out).numpy()


@compiled
def least(level, offset, unit, norm, error, inverse, row_error, row_reach):  # noqa: ANN001, ANN201 - compiled into its callers
    """Return what the product of digits of a row and a column exceeds if its pre-activation exceeds `level`, a float32; NaN for plus infinity.

    `offset`, `unit` (its `inverse`), `norm` and `error` are the column's; `inverse`, `row_error` and `row_reach` the row's.
    """
    unit = unit * inverse
    return (level - offset) * unit - norm * row_error - error * row_reach - (abs(level) + abs(offset)) * unit * np.float32(SLACK)


def _quantize(values: NDArray[np.float32], mean: NDArray[np.float32], factor: NDArray[Any], digits: Tensor) -> NDArray[np.float32]:
    """Fill the digits of `(values - mean) * factor`; return digits a unit, and the norms of the error and of the row in digits: `[3, n]`."""
    measures = np.empty((3, len(values)), np.float32)
    over_rows(_quantize_rows, len(values), (0, 0), values, mean, factor.astype(np.float32), digits.numpy(), measures)
    return measures


@reordered
def _quantize_rows(values: Any, mean: Any, factor: Any, digits: Any, measures: Any, sums: Any, first: Any, last: Any) -> None:  # noqa: ARG001
    """Fill digits and measures of some rows; it sums nothing."""
    d = values.shape[1]
    framed = np.empty(d, np.float32)
    bits = framed.view(np.int32)
    for row in range(first, last):
        v, q = values[row], digits[row]
        for j in range(d):
            framed[j] = (v[j] - mean[j]) * factor[j]
        largest = np.int32(0)
        for j in range(d):
            largest = max(largest, bits[j] & np.int32(0x7FFFFFFF))  # as integers, floats keep their order
        size = np.array([largest], np.int32).view(np.float32)[0]
        inverse = np.float32(_DIGITS) / size if size > np.float32(_TINY) else np.float32(1)
        square, left = np.float32(0), np.float32(0)
        for j in range(d):
            framed[j] *= inverse
        for j in range(d):
            digit = np.rint(framed[j])
            q[j] = np.int8(digit)
            left += (framed[j] - digit) * (framed[j] - digit)
            square += framed[j] * framed[j]
        measures[0, row], measures[1, row], measures[2, row] = inverse, math.sqrt(left), math.sqrt(square)
        if size <= np.float32(_TINY):  # whose squares might be 0
            measures[1, row] = measures[2, row] = size * math.sqrt(np.float32(d))


@cache
def _rounding_of_operands() -> float:
    """Return by how much products of float32 are wrong because operands are rounded, which only whoever uses this process can have allowed."""
    return 0.0 if is_float32(torch.mm) else 2.0**-7


def _inflation(d: int) -> float:
    """Return the factor that covers the rounding of a norm, which is the root of a sum of `d` squares."""
    return 1 + of_roundings(d) + 1e-5


def _norms(values: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.sqrt(np.einsum("ij,ij->i", values, values, dtype=np.float64)).astype(np.float32)


def _seconds(work: Callable[[], object]) -> float:
    """Return the fastest of a few calls."""
    found = []
    for _ in range(4):
        begun = time.perf_counter()
        work()
        found.append(time.perf_counter() - begun)
    return min(found)
