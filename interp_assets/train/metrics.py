"""Rows and their latents become the numbers by which SAEs are compared, in SAEBench's core key names.

Sums are collected block by block in float64, so that the result does not depend on how rows were cut into blocks beyond rounding. Where
SAEBench averages over its batches what is a ratio of data-set sums (its explained variance uses each batch's own mean), the data set's
own sums are used here; `explained_variance` is 1 - FVU and `explained_variance_legacy` the mean over rows of 1 - error^2 / deviation^2.
"""

from functools import cached_property
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float, Float64
from numpy.typing import NDArray
from torch import Tensor

from interp_assets.compute.products import multiply
from interp_assets.train.sae import Sae

_BLOCK_LATENTS: Final = 2048
_LOG_BINS: Final = np.arange(-9.0, 0.25, 0.25)
"""Edges of the histogram of log10 firing frequency."""
_PERCENTILES: Final = (5, 25, 50, 75, 95)


class ReconstructionSums:
    """What is summed over rows to measure an SAE's reconstruction and sparsity."""

    def __init__(self, sae: Sae, mean: Float64[Tensor, " d_out"]) -> None:
        """Measure `sae`; `mean` is that of the training rows that it reconstructs, the reference of the deviation of a single row."""
        self._sae, self._mean = sae, mean.to(sae.b_dec)
        self.n_rows = 0
        self._sums: dict[str, float] = {}
        self._row_sum = torch.zeros(sae.d_out, dtype=torch.float64)
        self._row_fvu: list[Tensor] = []
        self._row_l0: list[Tensor] = []
        self.n_fired = torch.zeros(sae.d_sae, dtype=torch.int64)
        self.maximum = torch.zeros(sae.d_sae)

    def add(self, x: Float[Tensor, "batch d_in"], y: Float[Tensor, "batch d_out"] | None = None) -> None:
        """Encode a block of raw rows, reconstruct `y` (by default the rows themselves) and add what they say."""
        if len(x) == 0:
            return
        x = x.to(self._sae.b_dec)
        y = x if y is None else y.to(x)
        latents = self._sae.encode(x)
        y_hat = self._sae.reconstruct(x, latents)
        error, norm_in, norm_out, dot = (y - y_hat).square().sum(1), y.norm(dim=1), y_hat.norm(dim=1), (y * y_hat).sum(1)
        deviation = (y - self._mean).square().sum(1)
        row_fvu = error / deviation.clamp(min=torch.finfo(x.dtype).tiny)
        values = {
            "squared_error": error,
            "squared_norm": norm_in.square(),
            "squared_norm_out": norm_out.square(),
            "dot": dot,
            "norm_in": norm_in,
            "norm_out": norm_out,
            "norm_ratio": norm_out / norm_in.clamp(min=1e-4),
            "cosine": dot / (norm_in * norm_out).clamp(min=torch.finfo(x.dtype).tiny),
            "l1": latents.sum(1),
            "row_fvu": row_fvu,
        }
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value.double().sum())
        self.n_rows += len(x)
        self._row_sum += y.double().sum(0).cpu()
        self._row_fvu.append(row_fvu.cpu())
        fires = latents > 0
        self.n_fired += fires.sum(0).cpu()
        self._row_l0.append(fires.sum(1).cpu())
        self.maximum = torch.maximum(self.maximum, latents.amax(0).cpu())

    @property
    def fvu(self) -> float:
        """Squared error over squared deviation from the mean of these rows."""
        deviation = self._sums["squared_norm"] - float(self._row_sum.square().sum()) / self.n_rows
        return self._sums["squared_error"] / deviation if deviation > 0 else 0.0

    @property
    def median_row_fvu(self) -> float:
        """Median over rows of squared error over squared deviation from the training rows' mean."""
        return float(torch.cat(self._row_fvu).median())

    @property
    def l0(self) -> float:
        """Mean number of latents that fire on a row."""
        return int(self.n_fired.sum()) / self.n_rows

    @property
    def dead_share(self) -> float:
        """Share of the latents that fire on no row."""
        return float((self.n_fired == 0).double().mean())

    def saebench(self) -> dict[str, Any]:
        """Return the sections of SAEBench's core output that need no language model."""
        mean = {name: value / self.n_rows for name, value in self._sums.items()}
        frequency = (self.n_fired.double() / self.n_rows).numpy()
        return {
            "reconstruction_quality": {
                "explained_variance": 1 - self.fvu,
                "explained_variance_legacy": 1 - mean["row_fvu"],
                "mse": mean["squared_error"] / self._sae.d_out,
                "cossim": mean["cosine"],
            },
            "shrinkage": {
                "l2_norm_in": mean["norm_in"],
                "l2_norm_out": mean["norm_out"],
                "l2_ratio": mean["norm_ratio"],
                "relative_reconstruction_bias": mean["squared_norm_out"] / mean["dot"] if mean["dot"] else 0.0,
            },
            "sparsity": {"l0": self.l0, "l1": mean["l1"]},
            "misc": {
                "freq_over_1_percent": float((frequency > 0.01).mean()),
                "freq_over_10_percent": float((frequency > 0.1).mean()),
                "normalized_freq_over_1_percent": _share_of_firings(frequency, 0.01),
                "normalized_freq_over_10_percent": _share_of_firings(frequency, 0.1),
                "average_max_encoder_cosine_sim": float(self._max_encoder_cosine.mean()),
                "average_max_decoder_cosine_sim": float(self._max_decoder_cosine.mean()),
                "frac_alive": 1 - self.dead_share,
            },
        }

    def l0_percentiles(self) -> dict[str, int]:
        """Return how many latents fire on a row, at some percentiles of the rows."""
        counts = torch.cat(self._row_l0).sort().values
        return {f"p{share}": int(counts[min(len(counts) - 1, len(counts) * share // 100)]) for share in _PERCENTILES}

    def latent_columns(self) -> dict[str, Tensor]:
        """Return what is known of each latent: one value each, in SAEBench's names where it has one (its feature density is ours)."""
        encoder, decoder = self._sae.W_enc.T, self._sae.W_dec
        # transcoders read and write different spaces: the cosine of the two directions means nothing there
        cosine = torch.cosine_similarity(encoder, decoder, dim=1) if encoder.shape == decoder.shape else torch.full_like(self._sae.b_enc, torch.nan)
        return {
            "firing_frequency": self.n_fired.double() / self.n_rows,
            "max_activation": self.maximum,
            "encoder_bias": self._sae.b_enc.cpu(),
            "encoder_norm": encoder.norm(dim=1).cpu(),
            "encoder_decoder_cosine_sim": cosine.cpu(),
            "max_encoder_cosine_sim": self._max_encoder_cosine.cpu(),
            "max_decoder_cosine_sim": self._max_decoder_cosine.cpu(),
            "threshold": self._sae.threshold.cpu(),
        }

    @cached_property
    def _max_encoder_cosine(self) -> Tensor:
        return max_cosines(self._sae.W_enc.T)

    @cached_property
    def _max_decoder_cosine(self) -> Tensor:
        return max_cosines(self._sae.W_dec)

    def frequency_histogram(self) -> dict[str, Any]:
        """Return the histogram over latents of log10 firing frequency; dead latents are in no bin."""
        fired = self.n_fired[self.n_fired > 0].double().numpy()
        counts, _ = np.histogram(np.log10(fired / self.n_rows), bins=_LOG_BINS)
        return {"log10_edges": _LOG_BINS.tolist(), "counts": counts.tolist(), "n_dead": int((self.n_fired == 0).sum())}


def max_cosines(vectors: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Return each vector's largest cosine similarity with another one, by blocks: n^2 d multiplications, n * `_BLOCK_LATENTS` values."""
    unit = vectors / vectors.norm(dim=1, keepdim=True).clamp(min=torch.finfo(vectors.dtype).tiny)
    if len(unit) < 2:
        return unit.new_zeros(len(unit))
    parts: list[Tensor] = []
    for start in range(0, len(unit), _BLOCK_LATENTS):
        block = unit[start : start + _BLOCK_LATENTS]
        cosine = multiply(block, unit.T, block.new_empty(len(block), len(unit)))
        cosine[torch.arange(len(cosine)), torch.arange(start, start + len(cosine))] = -1.0
        parts.append(cosine.amax(1))
    return torch.cat(parts)


def _share_of_firings(frequency: NDArray[np.float64], above: float) -> float:
    total = frequency.sum()
    return float(frequency[frequency > above].sum() / total) if total else 0.0
