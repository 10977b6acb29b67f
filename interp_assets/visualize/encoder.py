"""Activations become firings of one latent slice: a matrix product in tiles, and a scan for what exceeds its threshold.

1. A block of rows, always the same number (the last is padded with zeros), times a tile of `TILE` encoder columns, always as many (the last is
   padded with columns that cannot fire). One shape means one kernel, so results do not depend on how rows or latents are cut.
2. Scan the tile for pre-activation > threshold: the product is compared with threshold - bias, a little lowered, and only what passes gets its
   bias added and is compared exactly, so the bias costs no pass over the tile. Nothing of size [rows of the shard x latents] ever exists; a
   tile is 8 MiB at 4,096 rows.

The threshold is the latent's own (`relu`, `jump_relu`), or the row's (`topk`): the midpoint between its k-th and (k+1)-th largest
pre-activation over *all* latents, so a slice first goes over the other slices' columns too. The midpoint rather than the k-th value, because
a pre-activation recomputed in another order differs in its last bits: that flips 1% of all firings at the k-th value, none at the midpoint.

Comparisons with NaN are false, so a NaN would silently not fire: rows and weights are checked to be finite, and small enough that a sum
of products cannot overflow.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from interp_assets.errors import NonFiniteError
from interp_assets.train.sae import Sae

TILE: Final = 512
"""Latents per matrix product."""
_LARGEST: Final = 1e37


class Scan(NamedTuple):
    """Firings of one tile on one block of rows, in order of row."""

    tile: int
    latents: NDArray[np.uint16]
    """Counted from the tile's first latent."""
    rows: NDArray[np.int64]
    """Counted from the block's first row."""
    activations: NDArray[np.float32]


class Encoder:
    """The encoder columns [start, stop) of an SAE on a device, as tiles of constant width."""

    def __init__(self, sae: Sae, start: int, stop: int, device: torch.device) -> None:
        """Copy the slice's columns (all columns for `topk`) into tiles. Raises `NonFiniteError` for a NaN or infinity in the weights."""
        for name in ("W_enc", "b_enc", "threshold"):
            if not torch.isfinite(getattr(sae, name)).all():
                raise NonFiniteError(f"The SAE's {name} holds a NaN or an infinity. Train it again with a lower learning rate.")
        self.start, self.stop = start, stop
        self.n_tiles = -(-(stop - start) // TILE)
        self._kind, self._k, self._d_in, self._d_sae = sae.kind, sae.k, sae.d_in, sae.d_sae
        self._device = device
        self._tiles = [_make_tile(sae, first, min(first + TILE, stop), device) for first in range(start, stop, TILE)]
        self._all_tiles = (
            [_make_tile(sae, first, min(first + TILE, sae.d_sae), device) for first in range(0, sae.d_sae, TILE)] if sae.kind == "topk" else []
        )
        self._n_threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self._n_threads)
        self._scratch = torch.empty((0, TILE), device=device)
        self._answers = np.empty((0, TILE), np.bool_)
        self._row_limit = _LARGEST / max(1.0, sae.d_in * float(sae.W_enc.abs().max()))

    def tile_bounds(self, tile: int) -> tuple[int, int]:
        """Return the latents [start, stop) of a tile, without padding."""
        first = self.start + tile * TILE
        return first, min(first + TILE, self.stop)

    def prepare(self, rows: Float[Tensor, "n d_in"], n_block: int, where: str) -> Float[Tensor, "block d_in"]:
        """Return a block of `n_block` rows in float32 on the device, padded with zeros. Raises `NonFiniteError`, naming `where`."""
        block = torch.empty((n_block, self._d_in), device=self._device)
        block[: len(rows)].copy_(rows)
        block[len(rows) :].zero_()
        low, high = (float(value) for value in torch.aminmax(block))
        if not max(-low, high) < self._row_limit:
            bad = int(torch.nonzero(~(block.abs().amax(dim=1) < self._row_limit))[0])
            raise NonFiniteError(
                f"{where} + {bad}: a NaN, an infinity or a value above {self._row_limit:.1e} stands there. Harvest this shard again."
            )
        return block

    def row_thresholds(self, block: Float[Tensor, "block d_in"]) -> Float[Tensor, " block"] | None:
        """Return what a pre-activation of each row must exceed, for `topk`; None for the kinds whose latents decide alone."""
        if self._kind != "topk":
            return None
        if self._k >= self._d_sae:
            return block.new_zeros(len(block))
        largest = block.new_empty((len(block), 0))
        for tile in self._all_tiles:
            pre = torch.addmm(tile.b, block, tile.W)
            pre[:, tile.width :] = -torch.inf
            best = torch.cat([largest, pre.topk(min(self._k + 1, TILE), dim=1).values], dim=1)
            largest = best.topk(min(self._k + 1, best.shape[1]), dim=1).values
        return largest[:, -2:].mean(dim=1).clamp_min_(0.0)

    def scan(self, block: Float[Tensor, "block d_in"], row_thresholds: Float[Tensor, " block"] | None) -> Iterator[Scan]:
        """Yield the firings of each tile on a block of rows."""
        if len(self._scratch) != len(block):
            self._scratch = torch.empty((len(block), TILE), device=self._device)
            self._answers = np.empty((len(block), TILE), np.bool_)
        for i, tile in enumerate(self._tiles):
            product = torch.mm(block, tile.W, out=self._scratch)
            if row_thresholds is not None:
                product += tile.b
                product[:, tile.width :] = -torch.inf
                places = self._find_above(product, row_thresholds[:, None])
                activations = _take(product, places)
            else:
                places = self._find_above(product, tile.limit)
                activations = _take(product, places) + tile.bias[places & (TILE - 1)]
                exceeds = activations > tile.threshold[places & (TILE - 1)]
                places, activations = places[exceeds], activations[exceeds]
            yield Scan(i, (places & (TILE - 1)).astype(np.uint16), places >> (TILE.bit_length() - 1), activations)

    def _find_above(self, values: Tensor, limit: Tensor) -> NDArray[np.int64]:
        """Return the flat places of the elements above their limit; on a CPU by NumPy, each thread its own rows."""
        if self._device.type != "cpu":
            return torch.nonzero((values > limit).view(-1)).view(-1).cpu().numpy()
        limits = np.broadcast_to(limit.numpy(), values.shape)
        if self._n_threads == 1:
            return _find_part(values.numpy(), limits, self._answers, 0, len(values))
        edges = np.linspace(0, len(values), self._n_threads + 1).astype(np.int64).tolist()
        parts = self._pool.map(lambda low, high: _find_part(values.numpy(), limits, self._answers, low, high), edges[:-1], edges[1:])
        return np.concatenate(list(parts))


class _Tile(NamedTuple):
    W: Tensor
    b: Tensor
    limit: Tensor
    """What `x W` must exceed at least, a little below threshold - b; infinite in the padding, which therefore never fires."""
    bias: NDArray[np.float32]
    threshold: NDArray[np.float32]
    width: int
    """Latents without padding."""


def _make_tiles(sae: Sae, start: int, stop: int, device: torch.device) -> list[_Tile]:
    return [_make_tile(sae, first, min(first + TILE, stop), device) for first in range(start, stop, TILE)]


def _make_tile(sae: Sae, first: int, last: int, device: torch.device) -> _Tile:
    width = last - first
    W = torch.zeros((sae.d_in, TILE))
    W[:, :width] = sae.W_enc[:, first:last]
    b = torch.zeros(TILE)
    b[:width] = sae.b_enc[first:last]
    threshold = torch.full((TILE,), torch.inf)
    threshold[:width] = sae.threshold[first:last].clamp_min(0.0)
    exact = threshold.double() - b.double()
    limit = (exact - 2.0**-20 * (threshold.double() + b.double().abs())).nan_to_num(posinf=torch.inf).float()
    limit[width:] = torch.inf
    return _Tile(W.to(device), b.to(device), limit.to(device), b.numpy(), threshold.numpy(), width)


def _find_part(values: NDArray[np.float32], limits: NDArray[np.float32], answers: NDArray[np.bool_], low: int, high: int) -> NDArray[np.int64]:
    """Return the flat places above the limit in the rows [low, high): compare, then look at the answers eight at a time. 0.5 ns an element."""
    words = np.greater(values[low:high], limits[low:high], out=answers[low:high]).reshape(-1).view(np.uint64)
    occupied = np.flatnonzero(words != 0)
    inside = np.flatnonzero(words[occupied].view(np.bool_))
    return (occupied[inside >> 3] << 3) + (inside & 7) + low * TILE


def _take(values: Tensor, places: NDArray[np.int64]) -> NDArray[np.float32]:
    if values.device.type == "cpu":
        return values.numpy().reshape(-1)[places]
    return values.view(-1)[torch.from_numpy(places).to(values.device)].cpu().numpy()
