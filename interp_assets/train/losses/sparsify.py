"""Pre-activations of a batch become the pairs that are active: the largest of each row, or of the whole batch over all ranks.

Both rules are stated by a threshold value, so that the answer is a pure function of the pre-activations, whatever algorithm finds it:

    per row      active where pre >= the k-th largest of its row, and pre > 0            (Gao et al. 2024)
    per batch    active where pre >= the (k * rows)-th largest of the batch, and pre > 0   (Bussmann et al. 2024)

Values that tie with the threshold are all active. Both rules are global: with several ranks the threshold is that of the whole row, or
of the global batch, found exactly from each rank's own largest values.

On a CPU, float32 pre-activations are not all computed: `compute/encode.py` finds those that reach a level, or the largest of each row, and the rules
are applied to these. The level of the batch rule is a guess, the quantile of a few strided rows, with a margin; should too few values reach it,
the search is repeated with 0.

Elsewhere, and where products are rounded, all pre-activations of a block are there, and a lower bound leaves few candidates in one pass:

    per row      the k-th largest of the maxima of 8k strided groups: 34 candidates on average for k = 32
    per batch    the guess

and only the candidates are compared further. On a CPU these scans are compiled loops (`compute/loops.py`): `pick_rows` does the whole row rule,
and halves an interval for the k-th largest; the batch rule counts and takes what reaches its bound, and NumPy partitions the candidates. Measured
on 16.8M pre-activations, 2 cores: `torch.topk` 475 ms over the flat batch and 115 by row; NumPy's partition of whole rows 90; group maxima and
candidates about 20, before they were compiled.
"""

from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp_assets.compute.encode import Encoder, group_size, sample_rows
from interp_assets.compute.kernels import Found, find_above, nonzero
from interp_assets.compute.loops import is_native, over_rows, pick_rows
from interp_assets.train.parallel import ONE_RANK, Ranks

_MARGIN: Final = 1.5
"""How many times more candidates than active values the sampled guess aims at."""
Active = Found
"""Flat places `row * n + column` of the active pre-activations, in order, and their values."""


def pick_per_row(pre: Float[Tensor, "batch n"], k: int, ranks: Ranks, n_total: int) -> Active:
    """Return each row's `k` largest positive values; with latent slices, this rank's share of the `k` largest of all `n_total`."""
    n_rows, n = pre.shape
    if k >= n_total:
        return candidates_above(pre, 0.0)
    if ranks.n_slices == 1 and is_native(pre) and (active := _pick_rows(pre, k)) is not None:
        return active
    return keep_largest_of_rows(candidates_above(pre, _row_bounds(pre, k) if k < n else 0.0), (n_rows, n), k, ranks)


def encode_per_row(encoder: Encoder, k: int, ranks: Ranks, n_total: int) -> Active:
    """Return the same of pre-activations that need not all be computed."""
    active, n = encoder.largest_of_rows(min(k, encoder.n_latents)), encoder.n_latents
    return active if ranks.n_slices == 1 or k >= n_total else keep_largest_of_rows(active, (encoder.n_rows, n), k, ranks)


def keep_largest_of_rows(candidates: Active, shape: tuple[int, int], k: int, ranks: Ranks) -> Active:
    """Keep this rank's share of the `k` largest candidates of each row of all slices. Each slice must bring all of its share."""
    (n_rows, n), (places, values) = shape, candidates
    rows = places // max(1, n)
    counts = torch.bincount(rows, minlength=n_rows)
    table = values.new_zeros(n_rows, max(k, int(counts.max()) if n_rows else 0))
    starts = counts.cumsum(0) - counts
    table.view(-1)[rows * table.shape[1] + torch.arange(len(rows), device=rows.device) - starts[rows]] = values
    largest_k = _largest_of_rows(table, k)
    if ranks.n_slices > 1:
        largest_k = _largest_of_rows(ranks.gather_slices(largest_k, dim=1), k)
    return _keep(candidates, values >= largest_k.amin(1)[rows])


def row_levels(pre: Float[Tensor, "batch n"], k: int, ranks: Ranks, n_total: int) -> Float[Tensor, "batch 1"]:
    """Return what a value of each row must reach to be among its `k` largest positive ones; with latent slices, those of all `n_total`."""
    tiny = torch.finfo(pre.dtype).tiny
    if k >= n_total:
        return pre.new_full((len(pre), 1), tiny)
    if ranks.n_slices == 1:
        return _nth_of_rows(pre, k).clamp_(min=tiny)
    own = torch.nn.functional.pad(_largest_of_rows(pre, k), (0, max(0, k - pre.shape[1])))
    return _nth_of_rows(ranks.gather_slices(own, dim=1), k).clamp_(min=tiny)


def pick_per_batch(pre: Float[Tensor, "batch n"], n_active: int) -> Active:
    """Return the `n_active` largest positive values of a batch that is here as a whole."""
    bound = guess_bound(sample_rows(pre), n_active / pre.numel())
    candidates = candidates_above(pre, bound)
    if len(candidates.values) < n_active and bound > 0:
        candidates = candidates_above(pre, 0.0)
    return keep_largest(candidates, n_active, ONE_RANK)


def guess_bound(sample: Float[Tensor, "rows n"], share: float) -> float:
    """Guess a value that somewhat more than `share` of all pre-activations exceed; 0 when they may be all that are positive."""
    n_wanted = int(_MARGIN * share * sample.numel()) + 1
    return max(0.0, float(largest(sample.reshape(-1), n_wanted).min())) if n_wanted < sample.numel() else 0.0


def candidates_above(pre: Float[Tensor, "batch n"], bound: Float[Tensor, "batch 1"] | float) -> Active:
    """Return all values that are positive and at least `bound`, one for all or one a row."""
    tiny = torch.finfo(pre.dtype).tiny
    found = find_above(pre, bound.clamp(min=tiny) if isinstance(bound, Tensor) else max(bound, tiny))
    assert found is not None
    return Active(*found)


def keep_largest(candidates: Active, n_active: int, ranks: Ranks) -> Active:
    """Keep this rank's share of the `n_active` largest candidates of all ranks. Each rank must bring all of its share."""
    pool = candidates.values if ranks.size == 1 else ranks.gather_rows(largest(candidates.values, n_active))
    if len(pool) <= n_active:
        return candidates
    return _keep(candidates, candidates.values >= largest(pool, n_active).min())


def largest(values: Float[Tensor, " n"], n: int) -> Float[Tensor, " m"]:
    """Return the `n` largest values (or all), in no promised order."""
    if len(values) <= n:
        return values
    if values.device.type == "cpu":
        return torch.from_numpy(np.partition(values.numpy(), len(values) - n)[len(values) - n :])
    return values.topk(n, sorted=False).values


def _pick_rows(pre: Tensor, k: int) -> Active | None:
    """Pick by the compiled loop; None where so many values tie with a threshold that they don't fit."""
    places, values = np.empty((len(pre), k), np.int64), np.empty((len(pre), k), np.float32)
    counts = np.empty(len(pre), np.int64)
    over_rows(pick_rows, len(pre), (0, 0), pre.numpy(), pre.shape[1] // group_size(pre.shape[1], k), places, values, counts)
    if (counts < 0).any():
        return None
    if (counts < k).any():
        is_there = np.arange(k) < counts[:, None]
        places, values = places[is_there], values[is_there]
    return Active(torch.from_numpy(places.reshape(-1)), torch.from_numpy(values.reshape(-1)))


def _row_bounds(pre: Tensor, k: int) -> Tensor:
    """Return for each row a value that at least `k` of its values reach: the k-th largest maximum of disjoint groups."""
    group = group_size(pre.shape[1], k)
    width = pre.shape[1] // group
    maxima = pre[:, : width * group]
    while group > 1:
        group //= 2
        maxima = torch.maximum(maxima[:, : width * group], maxima[:, width * group :])
    return _largest_of_rows(maxima, k).amin(1, keepdim=True)


def _nth_of_rows(values: Tensor, k: int) -> Tensor:
    """Return the k-th largest of each row, as a column."""
    if values.device.type != "cpu":
        return values.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
    nth = torch.empty(len(values), 1, dtype=values.dtype)
    over_rows(_partition, len(values), (0, 0), values.numpy(), k, nth.numpy())
    return nth


def _partition(values: Any, k: Any, nth: Any, _: Any, first: Any, last: Any) -> None:
    place = values.shape[1] - k
    nth[first:last, 0] = np.partition(values[first:last], place, axis=1)[:, place]


def _largest_of_rows(values: Tensor, k: int) -> Tensor:
    """Return the `k` largest of each row, in no promised order."""
    n = values.shape[1]
    if k >= n:
        return values
    if values.device.type == "cpu":
        return torch.from_numpy(np.partition(values.numpy(), n - k, axis=1)[:, n - k :])
    return values.topk(k, dim=1, sorted=False).values


def _keep(candidates: Active, mask: Tensor) -> Active:
    kept = nonzero(mask)
    return Active(candidates.places[kept], candidates.values[kept])
