"""Pre-activations of a batch become the pairs that are active: the largest of each row, or of the whole batch over all ranks.

Both rules are stated by a threshold value, so that the answer is a pure function of the pre-activations, whatever algorithm finds it:

    per row      active where pre >= the k-th largest of its row, and pre > 0            (Gao et al. 2024)
    per batch    active where pre >= the (k * rows)-th largest of the batch, and pre > 0   (Bussmann et al. 2024)

Values that tie with the threshold are all active. The batch rule is global: with several ranks the threshold is that of the global
batch, found exactly from each rank's own largest values.

On the CPU the scans are NumPy's (vectorised partition and non-zero scan): 16.8M pre-activations take about 30 ms by batch and
90 ms by row, against 475 ms for `torch.topk` over the flat batch and 115 ms by row.
"""

from typing import Final

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from interp_assets.train.kernels import Pairs, make_pairs
from interp_assets.train.parallel import Ranks

_SAMPLE_ROWS: Final = 64
_MARGIN: Final = 1.5
"""How many times more candidates than active values the sampled guess aims at."""


def pick_per_row(pre: Float[Tensor, "batch n"], k: int) -> Int64[Tensor, " active"]:
    """Return the flat places of each row's `k` largest positive values, in order."""
    n = pre.shape[1]
    if k >= n:
        return nonzero(pre > 0)
    if pre.device.type == "cpu":
        threshold = torch.from_numpy(np.partition(pre.numpy(), n - k, axis=1)[:, n - k : n - k + 1])
    else:
        threshold = pre.topk(k, dim=1).values[:, -1:]
    return nonzero(pre >= threshold.clamp(min=torch.finfo(pre.dtype).tiny))


def pick_per_batch(pre: Float[Tensor, "batch n"], n_active: int, ranks: Ranks) -> Int64[Tensor, " active"]:
    """Return the flat places of this rank's share of the `n_active` largest positive values of the global batch, in order."""
    places = _candidates(pre, min(n_active, pre.numel()))
    values = pre.view(-1)[places]
    pool = ranks.gather_rows(largest(values, n_active)) if ranks.size > 1 else values
    if len(pool) <= n_active:
        return places
    threshold = largest(pool, n_active).min()
    return places[values >= threshold]


def make_active(pre: Float[Tensor, "batch n"], places: Int64[Tensor, " active"]) -> tuple[Pairs, Float[Tensor, " active"]]:
    """Turn flat places into pairs, and take their pre-activations."""
    n_rows, n = pre.shape
    return make_pairs(places // n, places % n, n_rows, n), pre.view(-1)[places]


def largest(values: Float[Tensor, " n"], n: int) -> Float[Tensor, " m"]:
    """Return the `n` largest values (or all), in no promised order."""
    if len(values) <= n:
        return values
    if values.device.type == "cpu":
        return torch.from_numpy(np.partition(values.numpy(), len(values) - n)[len(values) - n :])
    return values.topk(n, sorted=False).values


def nonzero(mask: Tensor) -> Int64[Tensor, " n"]:
    """Return the flat places where a mask is true, in order."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.view(-1).nonzero().view(-1)


def _candidates(pre: Tensor, n_active: int) -> Tensor:
    """Return the flat places of all positive values above a guessed bound that leaves at least `n_active` of them, if there are so many."""
    sample = pre[:: max(1, len(pre) // _SAMPLE_ROWS)].reshape(-1)
    n_wanted = int(_MARGIN * n_active * sample.numel() / pre.numel()) + 1
    bound = float(largest(sample, n_wanted).min()) if n_wanted < sample.numel() else 0.0
    if bound > 0:
        places = nonzero(pre >= bound)
        if len(places) >= n_active:
            return places
    return nonzero(pre > 0)
