"""Encoder and decoder of the few latents that are active, and the buffers that a step uses again: time proportional to what fires.

    B rows of the batch     R bags that are decoded apart (B, or B times the groups of a Matryoshka SAE)
    D d_in or d_out         S d_sae                  N active (row, latent) pairs

A TopK-like SAE needs one product of all latents, of 8-bit digits or dense, to know which are active (`encode.py`). All else touches only
the N pairs, with k/S of the dense arithmetic:

    decode        x_hat[r] = sum over the pairs of bag r of value * W_dec[latent]           bags of decoder rows, by row
    grad values   <grad_x_hat[r], W_dec[latent]>                                            a sampled product
    grad W_dec    sum over the pairs of a latent of value * grad_x_hat[r]                   bags of gradient rows, by latent
    grad W_enc    sum over the pairs of a latent of grad_value * x[b]                       bags of input rows, by latent

On the CPU these are compiled loops (`bags.py`; D a multiple of 32), elsewhere `embedding_bag`. Either sums each bag in order on one thread:
bit-exact whatever the number of threads. Pairs are ordered by latent by counting (torch's stable sort took 110-290 ms for 131,072 pairs).

Fresh memory costs more than arithmetic: filling a new tensor of 64 MB takes 31 ms (page faults), multiplying one that is there 4 ms.
So large intermediate tensors live in a `Scratch` and are written in place.
"""

import math
from typing import Final, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import embedding_bag

from interp_assets.compute import loops
from interp_assets.compute.bags import dot_bags, dot_bags_twice, is_packable, pack, see_strips, sum_bags, sum_bags_twice
from interp_assets.compute.products import multiply

_PAIRS_A_ROW: Final = 16
"""From how many pairs for each row of a table on it is worth copying: 2 ns for each row's value that is copied, 20 ns a pair and loop saved."""


class Pairs(NamedTuple):
    """The active (row, latent) pairs of a batch, ordered by bag, and the same pairs ordered by latent."""

    bags: Int64[Tensor, " N"]
    """Bag of each pair: its row, or row * groups + group."""
    latents: Int64[Tensor, " N"]
    bag_starts: Int64[Tensor, " R"]
    """Place of the first pair of every bag."""
    by_latent: Int64[Tensor, " N"]
    """Places of the pairs, ordered by latent, then by row."""
    bags_by_latent: Int64[Tensor, " N"]
    """Bag of each pair, in that order."""
    counts: Int64[Tensor, " S"]
    """Number of pairs of every latent."""
    n_groups: int = 1

    @property
    def latent_starts(self) -> Int64[Tensor, " S"]:
        """Place in `by_latent` of the first pair of every latent."""
        return self.counts.cumsum(0) - self.counts


class Scratch:
    """Named buffers that are used again at every step; their content is undefined when they are taken."""

    def __init__(self) -> None:
        """Start without buffers: each grows to the largest size it was asked for."""
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return the buffer `name` as a contiguous tensor of `shape`, on the device of `like` and, unless `dtype` says another, in its dtype."""
        n, dtype = math.prod(shape), dtype or like.dtype
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < n or buffer.dtype != dtype or buffer.device != like.device:
            buffer = self._buffers[name] = torch.empty(n, dtype=dtype, device=like.device)
        return buffer[:n].view(shape)

    def cast(self, name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
        """Return `value` rounded to `dtype`, in the buffer `name`; itself where there is nothing to round."""
        return value if value.dtype == dtype else self.take(name, tuple(value.shape), value, dtype).copy_(value)


def make_pairs(place_N: Int64[Tensor, " N"], n_rows: int, d_sae: int) -> Pairs:
    """Index the pairs of flat places `row * d_sae + latent`, which are in order."""
    if place_N.device.type != "cpu":
        row_N, latent_N = place_N // d_sae, place_N % d_sae
        order = latent_N.argsort(stable=True)
        return Pairs(row_N, latent_N, _starts(row_N, n_rows), order, row_N[order], torch.bincount(latent_N, minlength=d_sae))
    places, n_parts = place_N.numpy(), torch.get_num_threads()
    row_N, latent_N, order, ordered = (np.empty(len(places), np.int64) for _ in range(4))
    counts = np.zeros((n_parts, d_sae), np.int64)
    loops.over_parts(loops.split_places, len(places), [(places, d_sae, row_N, latent_N, counts[i]) for i in range(n_parts)])
    total = counts.sum(0)
    starts = total.cumsum() - total + counts.cumsum(0) - counts
    loops.over_parts(loops.order_latents, len(places), [(row_N, latent_N, starts[i], order, ordered) for i in range(n_parts)])
    row_starts = np.searchsorted(row_N, np.arange(n_rows))
    bags, latents, bag_starts, by_latent = (torch.from_numpy(values) for values in (row_N, latent_N, row_starts, order))
    return Pairs(bags, latents, bag_starts, by_latent, torch.from_numpy(ordered), torch.from_numpy(total))


def split_bags(pairs: Pairs, ends: list[int]) -> Pairs:
    """Give each row one bag per group of latents, the groups ending at `ends`. Pairs must be ordered by row, then by latent: they stay."""
    group_N = torch.bucketize(pairs.latents, torch.tensor(ends, device=pairs.latents.device), right=True)
    bag_N = pairs.bags * len(ends) + group_N
    bag_starts = _starts(bag_N, len(pairs.bag_starts) * len(ends))
    return pairs._replace(bags=bag_N, bag_starts=bag_starts, bags_by_latent=bag_N[pairs.by_latent], n_groups=len(ends))


def decode_pairs(
    value_N: Float[Tensor, " N"], W_dec_SD: Float[Tensor, "S D"], pairs: Pairs, scratch: Scratch, name: str = "decoded"
) -> Float[Tensor, "R D"]:
    """Sum the decoder rows of each bag's pairs, weighted by their values; where that is possible into the buffer `name`."""
    if loops.is_native(value_N, W_dec_SD) and is_packable(W_dec_SD):
        x_hat = scratch.take(name, (len(pairs.bag_starts), W_dec_SD.shape[1]), W_dec_SD).zero_()
        index, values, out = loops.as_arrays(pairs.latents, value_N, x_hat)
        loops.over_bags(sum_bags, _ends(pairs.bag_starts, pairs), index, values, _strips(W_dec_SD, len(pairs.latents), scratch), out)
        return x_hat
    return _sum_bags(W_dec_SD, pairs.latents, pairs.bag_starts, value_N)


def decode_pairs_twice(
    values: tuple[Float[Tensor, " N"], Float[Tensor, " N"]], W_dec_SD: Float[Tensor, "S D"], pairs: Pairs, scratch: Scratch
) -> tuple[Float[Tensor, "R D"], Float[Tensor, "R D"]]:
    """Decode two values of each pair."""
    if loops.is_native(*values, W_dec_SD) and is_packable(W_dec_SD):
        shape = len(pairs.bag_starts), W_dec_SD.shape[1]
        x_hats = [scratch.take(name, shape, W_dec_SD).zero_() for name in ("decoded", "decoded twice")]
        strips = _strips(W_dec_SD, len(pairs.latents), scratch)
        factors, out = tuple(loops.as_arrays(*values)), tuple(loops.as_arrays(*x_hats))
        loops.over_bags(sum_bags_twice, _ends(pairs.bag_starts, pairs), pairs.latents.numpy(), factors, strips, out)
        return x_hats[0], x_hats[1]
    return decode_pairs(values[0], W_dec_SD, pairs, scratch), decode_pairs(values[1], W_dec_SD, pairs, scratch)


def sampled_product(grad_RD: Float[Tensor, "R D"], W_dec_SD: Float[Tensor, "S D"], pairs: Pairs, scratch: Scratch) -> Float[Tensor, " N"]:
    """Multiply each pair's gradient row and decoder row: what `embedding_bag` calls the gradient of its weights."""
    if loops.is_native(grad_RD, W_dec_SD) and is_packable(W_dec_SD):
        out = grad_RD.new_zeros(len(pairs.latents))
        index, grad, found = loops.as_arrays(pairs.latents, grad_RD, out)
        loops.over_bags(dot_bags, _ends(pairs.bag_starts, pairs), index, _strips(W_dec_SD, len(pairs.latents), scratch), grad, found)
        return out
    product = torch.ops.aten._embedding_bag_per_sample_weights_backward  # noqa: SLF001 - no public name, and nothing public is as fast
    return product(grad_RD, W_dec_SD, pairs.latents, pairs.bag_starts, pairs.bags, 0)


def sampled_product_twice(
    grads: tuple[Float[Tensor, "R D"], Float[Tensor, "R D"]], W_dec_SD: Float[Tensor, "S D"], pairs: Pairs, scratch: Scratch
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Multiply each pair's decoder row with both of its gradient rows."""
    if loops.is_native(*grads, W_dec_SD) and is_packable(W_dec_SD):
        outs = [W_dec_SD.new_zeros(len(pairs.latents)) for _ in grads]
        strips = _strips(W_dec_SD, len(pairs.latents), scratch)
        grad, out = tuple(loops.as_arrays(*grads)), tuple(loops.as_arrays(*outs))
        loops.over_bags(dot_bags_twice, _ends(pairs.bag_starts, pairs), pairs.latents.numpy(), strips, grad, out)
        return outs[0], outs[1]
    return sampled_product(grads[0], W_dec_SD, pairs, scratch), sampled_product(grads[1], W_dec_SD, pairs, scratch)


def add_by_latent(
    gradient_SD: Float[Tensor, "S D"], table: Float[Tensor, "_ D"], weight_N: Float[Tensor, " N"], pairs: Pairs, scratch: Scratch
) -> None:
    """Add for every latent the weighted rows that its pairs name: the gradient of a decoder or an encoder.

    `table` holds a row for each bag, or one for each row of the batch.
    """
    rows, weights = pairs.bags_by_latent, weight_N[pairs.by_latent]
    if len(table) < len(pairs.bag_starts):
        rows = rows // pairs.n_groups
    if loops.is_native(gradient_SD, table, weight_N) and is_packable(gradient_SD):
        index, factors, out = loops.as_arrays(rows, weights, gradient_SD)
        loops.over_bags(sum_bags, _ends(pairs.latent_starts, pairs), index, factors, _strips(table, len(rows), scratch), out)
    else:
        gradient_SD.add_(_sum_bags(table, rows, pairs.latent_starts, weights))


def sum_values(value_N: Float[Tensor, " N"], pairs: Pairs) -> Float[Tensor, " S"]:
    """Sum values by latent."""
    if loops.is_native(value_N):
        sums = torch.empty(len(pairs.counts))
        loops.over_bags(loops.sum_latents, _ends(pairs.latent_starts, pairs), *loops.as_arrays(value_N, pairs.by_latent, sums))
        return sums
    return torch.segment_reduce(value_N[pairs.by_latent], "sum", lengths=pairs.counts)


class Few(NamedTuple):
    """Pairs that were found, with their values."""

    pairs: Pairs
    values: Float[Tensor, " N"]


def find_few(values: Float[Tensor, "rows S"], above: float, limit: int) -> Few | None:
    """Return the pairs whose value exceeds `above`, or None when they are `limit` or more."""
    sample = values[: -(-len(values) // 16)] > above
    if count_true(sample) * values.numel() > 2 * limit * sample.numel():
        return None
    least = np.nextafter(np.float32(above), np.float32(np.inf)) if values.dtype == torch.float32 else np.nextafter(above, np.inf)
    found = find_above(values, float(least), limit)
    return None if found is None else Few(make_pairs(found.places, *values.shape), found.values)


class Found(NamedTuple):
    """Flat places `row * S + latent`, in order, and the values there."""

    places: Int64[Tensor, " N"]
    values: Float[Tensor, " N"]


def find_above(values: Float[Tensor, "rows S"], bound: Float[Tensor, "rows 1"] | float, limit: int | None = None) -> Found | None:
    """Return what is at least `bound`, one for all or one a row; None when that is `limit` or more."""
    if not loops.is_native(values):
        mask = values >= bound
        if limit is not None and count_true(mask) >= limit:
            return None
        places = nonzero(mask)
        return Found(places, values.reshape(-1)[places])
    bounds = bound.reshape(-1).numpy() if isinstance(bound, Tensor) else np.full(len(values), bound, np.float32)
    counts = _count_above(values, bounds)
    ends = counts.cumsum()
    n = int(ends[-1]) if len(ends) else 0
    if limit is not None and n >= limit:
        return None
    columns = np.empty(n, np.int64), np.empty(n, np.float32)
    loops.over_rows(loops.take_above, len(values), (0, 0), values.numpy(), bounds, ends - counts, columns)
    return Found(torch.from_numpy(columns[0]), torch.from_numpy(columns[1]))


def count_reaching(values: Float[Tensor, "rows S"], bounds: Float[Tensor, "rows 1"]) -> Int64[Tensor, " rows"]:
    """Count in each row what is at least the row's bound."""
    return torch.from_numpy(_count_above(values, bounds.reshape(-1).numpy())) if loops.is_native(values) else (values >= bounds).sum(1)


def nonzero(mask: Tensor) -> Int64[Tensor, " n"]:
    """Return the flat places where a mask is true, in order; on the CPU by NumPy's scan, 4 to 14 times faster than torch's."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.view(-1).nonzero().view(-1)


def count_true(mask: Tensor) -> int:
    """Count where a mask is true; on the CPU by NumPy, which adds bytes as bits."""
    return int(np.count_nonzero(mask.numpy())) if mask.device.type == "cpu" else int(mask.sum())


def product(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    is_added: bool = False,
    dtype: torch.dtype = torch.float32,
    scratch: Scratch | None = None,
) -> Tensor:
    """Write (or add) the matrix product into `out`, plus a row vector; operands are rounded to `dtype`, unless they are of it already.

    Where `dtype` is smaller than `out`'s, a CPU rounds the product itself too, as autocast does, before it comes to a bias or to a sum in `out`'s
    type; a GPU writes its float32 sums. `scratch` spares a new tensor for that.
    """
    a, b = a.to(dtype), b.to(dtype)
    if dtype == out.dtype:
        return multiply(a, b, out, bias=bias, is_added=is_added)
    if out.is_cuda and out.dtype == torch.float32 and torch.version.hip is None:  # torch has it for CUDA alone
        found = torch.mm(a, b, out_dtype=torch.float32) if is_added else torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        found = multiply(a, b, torch.empty_like(out, dtype=dtype) if scratch is None else scratch.take("product", tuple(out.shape), out, dtype))
    return _widen(found, out, bias, is_added=is_added)


def _widen(found: Tensor, out: Tensor, bias: Tensor | None, *, is_added: bool) -> Tensor:
    """Write (or add) a product of any type, plus a row vector."""
    if loops.is_native(out) and loops.is_readable(found):
        if is_added:
            loops.over_rows(loops.add_widened, len(out), (0, 0), *loops.as_arrays(found, out))
        else:
            row = out.new_zeros(out.shape[1]) if bias is None else bias
            loops.over_rows(loops.write_widened, len(out), (0, 0), *loops.as_arrays(found, row, out))
        return out
    if is_added:
        return out.add_(found)
    if found is not out:
        out.copy_(found)
    return out if bias is None else out.add_(bias)


def _count_above(values: Tensor, bounds: NDArray[np.float32]) -> NDArray[np.int64]:
    counts = np.zeros(len(values), np.int64)
    loops.over_rows(loops.count_above, len(values), (0, 0), values.numpy(), bounds, counts)
    return counts


def _ends(starts: Tensor, pairs: Pairs) -> NDArray[np.int64]:
    """Return the places where bags start, and that where the last one ends."""
    return np.append(starts.numpy(), len(pairs.latents))


def _strips(table: Tensor, n_pairs: int, scratch: Scratch) -> NDArray[np.float32]:
    """Return the strips of a table, copied where enough pairs read them."""
    return (see_strips(table) if n_pairs < _PAIRS_A_ROW * len(table) else pack(table, scratch.take("strips", tuple(table.shape), table))).numpy()


def _sum_bags(table: Tensor, index_N: Tensor, first: Tensor, weight_N: Tensor) -> Tensor:
    return embedding_bag(index_N, table, first, mode="sum", per_sample_weights=weight_N)


def _starts(key_N: Tensor, n_keys: int) -> Tensor:
    counts = torch.bincount(key_N, minlength=n_keys)
    return counts.cumsum(0) - counts
