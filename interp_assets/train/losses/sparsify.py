"""Pre-activations of a batch become the pairs that are active: the largest of each row, or of the whole batch over all ranks.

Both rules are stated by a threshold value, so that the answer is a pure function of the pre-activations, whatever algorithm finds it:

    per row      active where pre >= the k-th largest of its row, and pre > 0            (Gao et al. 2024)
    per batch    active where pre >= the (k * rows)-th largest of the batch, and pre > 0   (Bussmann et al. 2024)

Of values that tie with the threshold the first are active, by latent, or by row and latent: no more than k, or k * rows, in all. Both rules are
global: with several ranks the threshold is that of the whole row, or of the global batch, found exactly from each rank's own largest values, and the
first are those of the whole row, or of the global batch.

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

from interp_assets.compute.elementwise import reach
from interp_assets.compute.encode import Encoder, group_size, sample_rows
from interp_assets.compute.kernels import Found, count_reaching, count_true, find_above, nonzero
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
    if ranks.n_slices == 1 and is_native(pre):
        return _pick_rows(pre, k)
    return keep_largest_of_rows(candidates_above(pre, _row_bounds(pre, k) if k < n else 0.0), (n_rows, n), k, ranks, n_total)


def encode_per_row(encoder: Encoder, k: int, ranks: Ranks, n_total: int) -> Active:
    """Return the same of pre-activations that need not all be computed."""
    active, n = encoder.largest_of_rows(min(k, encoder.n_latents)), encoder.n_latents
    return active if ranks.n_slices == 1 or k >= n_total else keep_largest_of_rows(active, (encoder.n_rows, n), k, ranks, n_total)


def keep_largest_of_rows(candidates: Active, shape: tuple[int, int], k: int, ranks: Ranks, n_total: int) -> Active:
    """Keep this rank's share of the `k` largest candidates of each row of all slices. Each slice must bring all of its share."""
    (n_rows, n), (places, values) = shape, candidates
    rows = places // max(1, n)
    counts = torch.bincount(rows, minlength=n_rows)
    table = values.new_zeros(n_rows, max(k, int(counts.max()) if n_rows else 0))
    starts = counts.cumsum(0) - counts
    at = rows * table.shape[1] + torch.arange(len(rows), device=rows.device) - starts[rows]
    table.view(-1)[at] = values
    levels = level_rows(table, k, ranks, n_total)
    return _keep(candidates, table.view(-1)[at] >= levels.view(-1)[rows])


def level_rows(pre: Float[Tensor, "batch n"], k: int, ranks: Ranks, n_total: int) -> Float[Tensor, "batch 1"]:
    """Return what only the `k` largest positive values of each row reach; with latent slices, those of all `n_total`.

    Of values that tie with the k-th the last, which would be too many, become 0 in `pre`.
    """
    tiny = torch.finfo(pre.dtype).tiny
    if k >= n_total:
        return pre.new_full((len(pre), 1), tiny)
    own = pre if ranks.n_slices == 1 else torch.nn.functional.pad(_largest_of_rows(pre, k), (0, max(0, k - pre.shape[1])))
    levels = _nth_of_rows(ranks.gather_slices(own, dim=1), k).clamp_(min=tiny)
    n_reaching = ranks.sum_slices(count_reaching(pre, levels))
    is_crowded = n_reaching > k
    if count_true(is_crowded):
        _silence_ties(pre, levels, k, ranks, is_crowded)
    return levels


def _silence_ties(pre: Tensor, levels: Tensor, k: int, ranks: Ranks, is_crowded: Tensor) -> None:
    values, level = pre[is_crowded], levels[is_crowded]
    counts = torch.stack([(values > level).sum(1), (values == level).sum(1)], dim=1)
    n_above, n_tied = ranks.gather_slices(counts[:, None], dim=1).unbind(2)
    n_left = k - n_above.sum(1) - n_tied[:, : ranks.slice_index].sum(1)
    pre[is_crowded] = torch.where(reach(values, level, n_left[:, None]), values, 0.0)


def pick_per_batch(pre: Float[Tensor, "batch n"], n_active: int) -> Active:
    """Return the `n_active` largest positive values of a batch that is here as a whole."""
    bound = guess_bound(sample_rows(pre), n_active / pre.numel())
    candidates = candidates_above(pre, bound)
    if len(candidates.values) < n_active and bound > 0:
        candidates = candidates_above(pre, 0.0)
    return keep_largest(candidates, n_active, ONE_RANK, (len(pre), pre.shape[1]))


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


def keep_largest(candidates: Active, n_active: int, ranks: Ranks, shape: tuple[int, int]) -> Active:
    """Keep this rank's share of the `n_active` largest candidates of all ranks, `shape` being that of its pre-activations.

    Each rank must bring all of its share.
    """
    places, values = candidates
    pool = values if ranks.size == 1 else ranks.gather_rows(largest(values, n_active + 1))
    if len(pool) <= n_active:
        return candidates
    level = largest(pool, n_active).min()
    mask = values >= level
    if count_true(pool >= level) > n_active:
        tied, n_left = nonzero(values == level), n_active - count_true(pool > level)
        in_order = _global_places(places[tied], shape, ranks)
        last = ranks.gather_rows(in_order[:n_left]).sort().values[n_left - 1]
        mask[tied[in_order > last]] = False
    return _keep(candidates, mask)


def _global_places(places: Tensor, shape: tuple[int, int], ranks: Ranks) -> Tensor:
    """Return the places that flat places of this rank have in the global batch and width."""
    n_rows, n = shape
    row, latent = places // n + ranks.rank // ranks.n_slices * n_rows, places % n + ranks.slice_index * n
    return row * (n * ranks.n_slices) + latent


def largest(values: Float[Tensor, " n"], n: int) -> Float[Tensor, " m"]:
    """Return the `n` largest values (or all), in no promised order."""
    if len(values) <= n:
        return values
    if values.device.type == "cpu":
        return torch.from_numpy(np.partition(values.numpy(), len(values) - n)[len(values) - n :])
    return values.topk(n, sorted=False).values


def _pick_rows(pre: Tensor, k: int) -> Active:
    """Pick by the compiled loop."""
    places, values = np.empty((len(pre), k), np.int64), np.empty((len(pre), k), np.float32)
    counts = np.empty(len(pre), np.int64)
    over_rows(pick_rows, len(pre), (0, 0), pre.numpy(), pre.shape[1] // group_size(pre.shape[1], k), places, values, counts)
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
