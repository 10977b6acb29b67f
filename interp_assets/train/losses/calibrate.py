"""A folded SAE and the rows that follow its training become its firing threshold, its firing frequencies, L0 and FVU.

BatchTopK has no threshold of its own: during training it depends on the batch. A running mean of the smallest active value, the usual
substitute, is far too low after a short training. Here the threshold is measured on the SAE that will be saved: the value that exactly
k * n of all n * d_sae pre-activations of the calibration rows exceed, so that the mean L0 is k.

Only the largest values of each block are kept (twice k per row); should a block have had more above the final threshold, the pass is
repeated with twice as many. Exact, in O(k) memory a row.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from interp_assets.compute.elementwise import sum_all
from interp_assets.harvest.statistics import squared_deviation
from interp_assets.train.losses.sparsify import largest, pick_per_batch
from interp_assets.train.sae import Sae

CALIBRATION_ROWS: Final = 1 << 16
"""Calibration rows: those that follow the training rows, unseen while training is shorter than one epoch; fewer when the data has fewer."""


class SaeMeasures(NamedTuple):
    """How an SAE behaves on some rows."""

    n_rows: int
    n_fired: Int64[Tensor, " d_sae"]
    l0: float
    fvu: float
    """Squared error over squared deviation from the rows' mean."""
    dead_share: float
    """Share of the latents that fire on none of these rows."""


def calibrate_threshold(sae: Sae, blocks: Sequence[Float[Tensor, "batch d_in"]], k: int) -> Sae:
    """Return the SAE with the one threshold at which its mean L0 over the rows of `blocks` is `k` (less, if fewer latents are ever positive)."""
    n_rows = sum(len(block) for block in blocks)
    open_sae = replace(sae, threshold=torch.zeros_like(sae.threshold))
    factor = 2
    while True:
        threshold, is_exact = _find_threshold(open_sae, blocks, k * n_rows, factor * k)
        if is_exact:
            return replace(sae, threshold=torch.full_like(sae.threshold, threshold))
        factor *= 2


def measure_sae(sae: Sae, blocks: Sequence[Float[Tensor, "batch d_in"]], targets: Sequence[Float[Tensor, "batch d_out"]]) -> SaeMeasures:
    """Encode raw rows, reconstruct their `targets` (the same blocks, but for transcoders), and count."""
    n_rows = sum(len(block) for block in blocks)
    n_fired = torch.zeros(sae.d_sae, dtype=torch.int64, device=sae.b_enc.device)
    squared_error, total, squares = 0.0, torch.zeros(sae.d_out, dtype=torch.float64), 0.0
    for block, target in zip(blocks, targets, strict=True):
        x, y = block.to(sae.W_enc), target.to(sae.W_enc)
        latents = sae.encode(x)
        n_fired += (latents > 0).sum(0)
        squared_error += float(sum_all((y - sae.reconstruct(x, latents)).double().square().sum(1)))
        total += y.double().sum(0).cpu()
        squares += float(sum_all(y.double().square().sum(1)))
    deviation = squared_deviation(squares, total, n_rows)
    return SaeMeasures(
        n_rows=n_rows,
        n_fired=n_fired.cpu(),
        l0=int(n_fired.sum()) / max(1, n_rows),
        fvu=squared_error / deviation if deviation else 0.0,
        dead_share=float((n_fired == 0).double().mean()),
    )


def _find_threshold(open_sae: Sae, blocks: Sequence[Tensor], n_active: int, kept_per_row: int) -> tuple[float, bool]:
    """Return the threshold that `n_active` values exceed, and whether no block had dropped a value above it."""
    kept: list[Tensor] = []
    lowest_kept = 0.0
    for block in blocks:
        pre = open_sae.pre_activations(block)
        n_kept = kept_per_row * len(block)
        values = pick_per_batch(pre, n_kept).values
        if len(values) >= n_kept:
            lowest_kept = max(lowest_kept, float(values.min()))
        kept.append(values)
    pool = torch.cat(kept)
    if len(pool) <= n_active:
        return 0.0, lowest_kept == 0.0
    edge = largest(pool, n_active + 1)
    last_active, first_silent = float(largest(pool, n_active).min()), float(edge.min())
    middle = float(np.float32((last_active + first_silent) / 2))
    threshold = first_silent if middle >= last_active else middle
    return threshold, first_silent >= lowest_kept
