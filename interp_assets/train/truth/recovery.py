"""An SAE of planted rows and the features that these are made of become how much of the truth it found.

As SynthSAEBench defines them (Chanin & Garriga-Alonso 2026, 2602.14687), over all latents, dead ones included:

    mcc            mean |cosine| of decoder rows and directions, paired one to one so that it is the largest
    uniqueness     features that are the nearest one of some latent, by the number of latents
    precision      of each latent as a detector of its nearest feature: of the rows on which it fires, the share on which that does; mean over latents
    recall         of the rows on which that feature fires, the share on which the latent does
    f1             the harmonic mean of both, of each latent; 0 where nothing fires
"""

from typing import Final, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from interp_assets.harvest.planted import planting_of, truth_of
from interp_assets.harvest.rows import iter_row_blocks
from interp_assets.planning.config import SaeConfig
from interp_assets.planning.pipeline import Pipeline
from interp_assets.storage.store import Store
from interp_assets.train.sae import Sae
from interp_assets.train.truth.matching import pair_best

_BLOCK_ROWS: Final = 4096


class Recovery(NamedTuple):
    """How much of the truth an SAE found."""

    mcc: float
    uniqueness: float
    precision: float
    recall: float
    f1: float
    true_l0: float
    """Features that fire on a row."""
    n_rows: int


class RecoverySums:
    """What is summed over rows to tell how well latents detect features."""

    def __init__(self, W_dec: Float[Tensor, "latents width"], directions: Float[Tensor, "features width"]) -> None:
        """Find the nearest feature of each latent."""
        cosine = (normalize(W_dec.double().cpu(), dim=1) @ normalize(directions.double(), dim=1).T).abs()
        self._nearest = cosine.argmax(1)
        rows, columns = pair_best(cosine.numpy())
        self._mcc = float(cosine.numpy()[rows, columns].mean())
        self._hits, self._fired, self._true = (torch.zeros(len(W_dec), dtype=torch.int64) for _ in range(3))
        self._n_active = self._n_rows = 0

    def add(self, latents: Float[Tensor, "n latents"], strengths: Float[Tensor, "n features"]) -> None:
        """Add the latents of some rows, and what these are made of."""
        fires, is_true = latents.cpu() > 0, (strengths > 0)[:, self._nearest]
        self._hits += (fires & is_true).sum(0)
        self._fired += fires.sum(0)
        self._true += is_true.sum(0)
        self._n_active += int((strengths > 0).sum())
        self._n_rows += len(latents)

    def finish(self) -> Recovery:
        """Return the means over latents."""
        precision, recall = (torch.where(n > 0, self._hits / n.clamp(min=1), 0.0).double() for n in (self._fired, self._true))
        both = precision + recall
        f1 = torch.where(both > 0, 2 * precision * recall / both.clamp(min=1e-300), 0.0)
        uniqueness = len(self._nearest.unique()) / len(self._nearest)
        means = float(precision.mean()), float(recall.mean()), float(f1.mean())
        return Recovery(self._mcc, uniqueness, means[0], means[1], means[2], self._n_active / max(1, self._n_rows), self._n_rows)


def measure_recovery(pipeline: Pipeline, store: Store, config: SaeConfig, sae: Sae) -> Recovery:
    """Compare an SAE with the features that the held-out rows are made of; a transcoder's latents are what it writes."""
    sums = RecoverySums(sae.W_dec, planting_of(pipeline).directions)
    for index in pipeline.held_out_indices:
        strengths = torch.cat([block.strengths for block in truth_of(pipeline, index)])
        for block in iter_row_blocks(pipeline, store, config.hook_point, index, _BLOCK_ROWS):
            x = block.rows.to(sae.W_enc)
            sums.add(sae.encode(x), strengths[block.first_row : block.first_row + len(x)])
    return sums.finish()
