"""Activations become firings on a GPU without a pre-activation ever reaching memory: one Triton kernel multiplies, compares and appends.

T rows of a block     F latents of the slice, padded to tiles     D d_in     C places of a bin
x_TD, W_FD (both with D last), bias_F, threshold_F, limit_T; bins of `BN` latents: latent_BC, row_BC, value_BC, cursor_B

1. A program multiplies a [BM, BN] piece in float32 (IEEE products for float32 operands, never TF32) and adds the bias.
2. Where that exceeds the latent's threshold and the row's, it takes a place in the bin of these `BN` latents with one atomic add and
   writes (latent, row, value) there. Bins are the first digit of the counting sort.
3. A cursor beyond the bin's end means that the bin overflowed: the block runs again with longer bins. Nothing is ever dropped in silence.
4. Firings are sorted by (latent, row) on the device, because programs finish in any order, and only they travel to the host.

Traffic is the operands and 12 bytes a firing; a dense result costs 0.4 ps an element to write and as much to read, beside 13.7 ps of
products at d_in = 4096 and 1.7 at 512 (arithmetic for an H200, not measured yet). Tiles are visited in groups of `GM`
pieces of rows that share a piece of W in the L2 cache. The test runs the kernel in Triton's interpreter on a CPU, against the plain form.
"""

from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from interp_assets.visualize.kernels import TILE

BM: Final = 128
"""Rows of a piece."""
BN: Final = 128
"""Latents of a piece, and of a bin."""
BK: Final = 64
"""Dimensions that are multiplied at once."""
GM: Final = 8
"""Pieces of rows that share a piece of W."""
_FIRST_PLACES: Final = 4096

Found = tuple[NDArray[np.uint16], NDArray[np.uint32], NDArray[np.float32]]
"""Latents (counted from the tile's first), rows and activations."""


class Columns:
    """Encoder columns on a device, laid out for the kernel."""

    def __init__(self, W_tiles: list[Float[Tensor, "d_in tile"]], b_tiles: list[Float[Tensor, " tile"]]) -> None:
        """Join tiles of `TILE` columns, whose padding never fires because its threshold is infinite."""
        self._W_FD = torch.cat([W.T for W in W_tiles]).contiguous()
        self._bias_F = torch.cat(b_tiles).contiguous()
        self._n_places = _FIRST_PLACES

    def scan(self, x_TD: Float[Tensor, "rows d_in"], thresholds: list[NDArray[np.float32]], limits: NDArray[np.float32]) -> list[Found]:
        """Return the firings of each tile, sorted by latent and row, given the thresholds of tiles and rows."""
        device = x_TD.device
        threshold_F, limit_T = (torch.from_numpy(values).to(device) for values in (np.concatenate(thresholds), limits))
        while True:
            bins = self._launch(x_TD, threshold_F, limit_T)
            fullest = int(bins[3].max())
            if fullest <= self._n_places:
                return _split(bins, len(x_TD), len(thresholds))
            self._n_places = fullest + fullest // 4

    def _launch(self, x_TD: Tensor, threshold_F: Tensor, limit_T: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        from interp_assets.visualize.fused_kernel import encode_and_append  # noqa: PLC0415 - needs Triton

        (n_rows, d_in), n_latents = x_TD.shape, len(self._W_FD)
        n_bins, device = n_latents // BN, x_TD.device
        latent_BC = torch.empty((n_bins, self._n_places), dtype=torch.int32, device=device)
        row_BC = torch.empty_like(latent_BC)
        value_BC = torch.empty((n_bins, self._n_places), dtype=torch.float32, device=device)
        cursor_B = torch.zeros(n_bins, dtype=torch.int32, device=device)
        launch: Any = encode_and_append[(-(-n_rows // BM) * n_bins,)]
        launch(
            *(x_TD.contiguous(), self._W_FD, self._bias_F, threshold_F, limit_T, latent_BC, row_BC, value_BC, cursor_B),
            *(self._n_places, n_rows, n_latents, d_in),
            BM=BM,
            BN=BN,
            BK=BK,
            GM=GM,
            num_warps=8,
            num_stages=3,
        )
        return latent_BC, row_BC, value_BC, cursor_B


def _split(bins: tuple[Tensor, Tensor, Tensor, Tensor], n_rows: int, n_tiles: int) -> list[Found]:
    """Sort what the bins hold by latent and row, and cut it into tiles."""
    latent_BC, row_BC, value_BC, cursor_B = bins
    is_held = torch.arange(latent_BC.shape[1], device=latent_BC.device) < cursor_B[:, None]
    latents, rows, values = latent_BC[is_held], row_BC[is_held], value_BC[is_held]
    order = torch.argsort(latents.to(torch.int64) * n_rows + rows)
    columns = ((latents[order] % TILE).to(torch.int16), rows[order], values[order])
    latents_, rows_, values_ = (column.cpu().numpy() for column in columns)
    ends = np.cumsum(cursor_B.view(n_tiles, -1).sum(dim=1).cpu().numpy())
    parts = zip(ends - np.diff(ends, prepend=0), ends, strict=True)
    return [(latents_[low:high].view(np.uint16), rows_[low:high].view(np.uint32), values_[low:high]) for low, high in parts]
