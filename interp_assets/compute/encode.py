"""A batch of rows becomes the pre-activations that matter, those above a level or the largest of each row, without computing the others.

    1. `make_encoder` quantizes the rows and the encoder of a step (`coarse.py`), in the frame of a few of the rows
    2. each thread multiplies the digits of some of its rows at a time, and looks at what may matter (`encode_loops.py`)
    3. what may is computed in float32 in one fixed order (`dots.py`), and compared

Results are those of computing every pre-activation with `dot` and the bias, bit for bit: they depend neither on the kind of digits, nor on the
library, the number of threads, or how rows are cut. With 512 dimensions, 4,096 rows and 16,384 latents, in times of the float32 product by MKL on 2
cores of an AMD Zen 5: digits 0.12, the largest 32 of each row 0.22, what reaches the level of 32 a row 0.2; float32 values instead of digits 1.1,
as much as a product and a scan of it. For rows on a CPU in float32; elsewhere the product is computed as a whole (`train/losses/sparsify.py`).

A NaN or an infinity has no digits, and comparisons with it are false: a damaged row would be one on which nothing fires. `damage` tells.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from interp_assets.compute import coarse
from interp_assets.compute.encode_loops import make_room, take_largest, take_reaching
from interp_assets.compute.kernels import Few, Found, Scratch, count_true, make_pairs
from interp_assets.compute.loops import is_native
from interp_assets.compute.products import make_product_pool, multiply

_PRODUCT_VALUES: Final[dict[coarse.Kind, int]] = {"int8": 1 << 20, "float32": 1 << 23}
"""Of a thread's product: 4 MiB of digits, which are looked at before they leave the cache; a slow product had better be a large one.

With more than 8,192 latents that would be fewer rows than make a fast product: it grows, to 32 MiB."""
_ROWS: Final[dict[coarse.Kind, range]] = {"int8": range(128, 513), "float32": range(128, 1025)}
"""Of one product. Digits: 520 GFLOP/s with 64 rows, 680 with 128, 800 with 256, 910 with 512."""
_MOST_VALUES: Final = 1 << 23
_FEWEST_ROWS: Final = 8
_MOST_WASTED: Final = 1 / 8
"""Share of pre-activations that may be computed in vain before a thread does without digits: 25 ns each, where digits save 3 or more."""
SAMPLE_ROWS: Final = 64
"""Rows of a batch from which frames are made and bounds guessed."""
_GROUPS_PER_ACTIVE: Final = 8
_SAMPLED: Final = 64
"""One of so many rows is multiplied to see whether few pre-activations exceed a level."""
_SAFELY: Final = 0.9
"""Share of the limit below which they are looked for."""


class Encoder(NamedTuple):
    """Quantized rows and encoder columns."""

    rows: coarse.Rows
    columns: coarse.Columns
    terms: Float32[np.ndarray, "6 latents"]
    """Of each column: digits a unit; its bias, norm and error in digits, rounded so that bounds hold; one digit, and the bias."""
    scratch: Scratch
    is_finite: bool

    @property
    def kind(self) -> coarse.Kind:
        """What the digits are."""
        return "int8" if self.rows.digits.dtype == torch.int8 else "float32"

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return len(self.rows.values)

    @property
    def n_latents(self) -> int:
        """Number of latents."""
        return len(self.columns.bias)

    @property
    def damage(self) -> Float[Tensor, ""]:
        """NaN where a row or a weight is not finite, or too large to be measured; else 0."""
        return torch.tensor(0.0 if self.is_finite else math.nan)

    def part(self, rows: slice) -> "Encoder":
        """Return the encoder of some of the rows."""
        return self._replace(rows=self.rows.part(rows))

    def sample(self) -> "Encoder":
        """Return the encoder of at most `SAMPLE_ROWS` rows, evenly strided."""
        return self.part(slice(None, None, _stride(self.n_rows)))

    def reaching(self, level: float | np.floating) -> Found:
        """Return all pre-activations that are at least `level`; places are `row * latents + latent`."""
        return self._find(take_reaching, np.float32(level))

    def largest_of_rows(self, k: int) -> Found:
        """Return the `k` largest positive pre-activations of each row, of equal ones the first."""
        n = self.n_latents
        return self._find(take_largest, (k, n // group_size(n, k) if k < n else 1))

    def about(self) -> Float32[Tensor, "rows latents"]:
        """Return all pre-activations, wrong by as much as digits are."""
        product = coarse.multiply(self.rows, self.columns, torch.empty(self.n_rows * self.n_latents))
        inverse, unit, bias = (torch.from_numpy(values) for values in (self.rows.inverse, self.terms[4], self.terms[5]))
        return torch.from_numpy(product) * (unit / inverse[:, None]) + bias

    def _find(self, loop: Callable[..., Any], argument: Any) -> Found:
        n_rows, n_threads = self.n_rows, torch.get_num_threads()
        edges = [n_rows * i // n_threads for i in range(n_threads + 1)]
        rooms = [self.scratch.take(f"product {i}", (self._rows_at_once() * self.n_latents,), torch.empty(0)) for i in range(n_threads)]
        work = [(loop, argument, slice(edges[i], edges[i + 1]), rooms[i]) for i in range(n_threads) if edges[i] < edges[i + 1]]
        futures = [_pool(n_threads).submit(self._find_part, *each) for each in work]
        found = [columns for future in futures for columns in future.result()] or [(np.empty(0, np.int64), np.empty(0, np.float32))]
        places, values = (torch.from_numpy(np.concatenate(columns)) for columns in zip(*found, strict=True))
        return Found(places, values)

    def _find_part(self, loop: Callable[..., Any], argument: Any, rows: slice, product: Tensor) -> list[tuple[Any, Any]]:
        encoder, n, n_wasted, found, room = self, self._rows_at_once(), 0, [], make_room(4 * self.n_latents)
        for start in range(rows.start, rows.stop, n):
            if n_wasted > _MOST_WASTED * (start - rows.start) * self.n_latents and encoder.kind == "int8":
                encoder = self._without_digits()
            part = encoder.rows.part(slice(start, min(start + n, rows.stop)))
            block, columns = (part.values.reshape(-1), part.inverse, part.error, part.reach), encoder.columns
            arrays = columns.values.reshape(-1), columns.bias, encoder.terms
            n_found, n_computed, room = loop(coarse.multiply(part, columns, product), block, arrays, argument, start * self.n_latents, room)
            n_wasted += n_computed - n_found
            found.append((room[1][:n_found].copy(), room[0][:n_found].copy()))
        return found

    def _without_digits(self) -> "Encoder":
        """Return the encoder whose digits are the values themselves: for rows in which a few values leave no digits to all others."""
        x, W_enc_T, b_enc = (torch.from_numpy(values) for values in (self.rows.values, self.columns.values, self.columns.bias))
        return make_encoder(x, W_enc_T, b_enc, self.scratch, "float32")

    def _rows_at_once(self) -> int:
        n = min(max(_PRODUCT_VALUES[self.kind] // self.n_latents, _ROWS[self.kind][0]), _ROWS[self.kind][-1])
        return max(min(n, _MOST_VALUES // self.n_latents), _FEWEST_ROWS)


class FewEncoder:
    """Finds the pre-activations above a level where these are few. Rows and weights are quantized once, when some are first looked for."""

    def __init__(self, x: Tensor, W_enc_T: Tensor, b_enc: Tensor, scratch: Scratch) -> None:
        """Look among rows and latents of a step, which must stay as they are."""
        self._x, self._W_enc_T, self._b_enc, self._scratch = x, W_enc_T, b_enc, scratch
        self._encoder: Encoder | None = None

    @property
    def damage(self) -> Float[Tensor, ""]:
        """NaN where a row or a weight is not finite, which hides pairs and firings; else 0: a term of the loss."""
        return find_damage(self._x, self._W_enc_T, self._b_enc) if self._encoder is None else self._encoder.damage

    def find(self, rows: slice, above: float, limit: int) -> Few | None:
        """Return the pairs of some rows whose value exceeds `above`; None when they are `limit` or more, or seem so by the product of a few rows."""
        if not can_encode(self._x, self._W_enc_T, self._W_enc_T.dtype):
            return None
        sample = self._x[rows][::_SAMPLED]
        values = multiply(sample, self._W_enc_T.T, self._scratch.take("sample", (len(sample), len(self._b_enc)), sample), bias=self._b_enc)
        shape = rows.stop - rows.start, len(self._b_enc)
        if count_true(values > above) * shape[0] > _SAFELY * limit * len(sample):
            return None
        if self._encoder is None:
            self._encoder = make_encoder(self._x, self._W_enc_T, self._b_enc, self._scratch)
        found = self._encoder.part(rows).reaching(float(np.nextafter(np.float32(above), np.float32(np.inf))))
        return None if len(found.values) >= limit else Few(make_pairs(found.places, *shape), found.values)


def find_damage(*values: Tensor) -> Float[Tensor, ""]:
    """Return NaN where a value is not finite, else 0."""
    return torch.stack([value.sum(dtype=torch.float32) for value in values]).sum() * 0.0


def can_encode(x: Tensor, W_enc_T: Tensor, dtype: torch.dtype) -> bool:
    """Tell whether rows and weights have digits here."""
    return is_native(x, W_enc_T) and dtype == torch.float32


def make_encoder(
    x: Float32[Tensor, "rows d_in"],
    W_enc_T: Float32[Tensor, "latents d_in"],
    b_enc: Float32[Tensor, " latents"],
    scratch: Scratch,
    kind: coarse.Kind | None = None,
) -> Encoder:
    """Quantize a step's rows and encoder, into buffers that the next step will use again; both must stay as they are.

    Digits whose scales overflow are of no use; the values themselves are finite, unless a row or a weight is not.
    """
    (n, d), room = W_enc_T.shape, torch.empty(0, dtype=torch.int8)
    digit_kind = kind or coarse.fastest_kind(d)
    row_digits, digits = (scratch.take(name, shape, room) for name, shape in (("row digits", (len(x), d)), ("digits", (n, d))))
    frame = coarse.Frame(np.zeros(d, np.float32), coarse.make_frame(sample_rows(x)).scale)
    with np.errstate(all="ignore"):
        rows = coarse.quantize_rows(x.numpy(), frame, digit_kind, row_digits)
        columns = coarse.quantize_columns(W_enc_T.numpy(), b_enc.numpy(), frame, digit_kind, digits)
        offset = (columns.offset + abs(columns.offset) * np.float32(coarse.SLACK)) * columns.inverse
        terms = np.stack([columns.inverse, offset, columns.norm, columns.error, 1 / columns.inverse, columns.bias])
    is_finite = bool(np.isfinite(terms).all()) and coarse.are_bounded(rows)
    if not is_finite and kind is None and digit_kind == "int8":
        return make_encoder(x, W_enc_T, b_enc, scratch, "float32")
    return Encoder(rows, columns, terms, scratch, is_finite)


def sample_rows(rows: Tensor) -> Tensor:
    """Return at most `SAMPLE_ROWS` rows, evenly strided."""
    return rows[:: _stride(len(rows))]


def _stride(n_rows: int) -> int:
    return max(1, -(-n_rows // SAMPLE_ROWS))


def group_size(n: int, k: int) -> int:
    """Return a power of two that makes of `n` values at least `_GROUPS_PER_ACTIVE` groups for each of `k`, or 1 where there are too few."""
    group = 1
    while n // (2 * group) >= _GROUPS_PER_ACTIVE * k:
        group *= 2
    return group


@cache
def _pool(n_threads: int) -> ThreadPoolExecutor:
    return make_product_pool(n_threads, "encode")
