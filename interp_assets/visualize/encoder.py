"""Activations become firings of one latent slice: a matrix product in tiles, and a scan for what exceeds its threshold.

On a CPU:

1. Rows and encoder columns are quantized (compute/coarse.py). Each thread multiplies the digits of its own tiles of `TILE` latents, `STRIP` latents
   and at most `MOST_ROWS` rows at a time, and scans the product while it is in the core's cache. A thread's product is 1 MiB; nothing of size
   [rows of the shard x latents] ever exists.
2. The scan: whole vectors of latents are compared, `GROUP` rows together, with what their product must exceed (kernels.py). The pre-activations that
   may exceed their thresholds are computed from the rows themselves in a fixed order, so what fires, and how strongly, is a function of row and
   latent alone: neither library nor processor, block or slice change a bit of it.
3. Where a look finds many more pre-activations than fire, as in rows of very unequal values, digits are the values themselves from then on.

Elsewhere a block of rows, always the same number (the last is padded with zeros), is multiplied in float32 or bfloat16 with tiles of latents,
always as many (the last is padded with columns that cannot fire): one shape means one kernel.

A latent fires where its pre-activation exceeds both thresholds, its own (`relu`, `jump_relu`) and the row's:

- the row's is minus infinity, or plus infinity where the row is not valid;
- for `topk` it is the midpoint between the row's k-th and (k+1)-th largest pre-activation over *all* latents. The midpoint rather than the
  k-th value, because a pre-activation recomputed in another order differs in its last bits: that flips 1% of all firings at the k-th
  value, none at the midpoint. On a CPU, `begin_scan_topk` finds it and the firings in one pass: the (k+1)-th largest so far is a bound that rises
  (rising.py). Elsewhere the thresholds are found first, by torch's top-k over some tiles at a time, and then what exceeds them.

With `dtype` bfloat16, rows and columns are rounded to it; products and sums are float32, on every device. (Torch's bfloat16 product on a CPU
rounds its result as well: 48% of rows then tie at k.)

Comparisons with NaN are false, so a NaN would silently not fire: rows and weights are checked to be finite, and small enough that a sum
of products cannot overflow.
"""

import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Empty, SimpleQueue
from threading import Lock
from typing import Final, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from interp_assets.compute.coarse import Columns, Frame, Kind, Rows, are_bounded, fastest_kind, make_frame, multiply, quantize_columns, quantize_rows
from interp_assets.compute.fused import has_triton
from interp_assets.compute.products import make_product_pool
from interp_assets.errors import NonFiniteError
from interp_assets.train.sae import Sae
from interp_assets.visualize import fused, kernels
from interp_assets.visualize.kernels import GROUP, STRIP, TILE
from interp_assets.visualize.rising import Guess, RisingBounds, certain, find_thresholds, guess

MOST_ROWS: Final = 2048
"""Rows of one matrix product: 2,048 x 128 products of digits are 1 MiB. 1,024 rows are 5% slower, 4,096 as fast."""
_MOST_LOOKS: Final = 1 / 32
"""Share of pre-activations that may be computed one by one. Each takes as long as 15 products of the matrix, or as 60 of digits."""
_MOST_MISSES: Final = 8
"""How many of them may be computed for one that fires before digits are given up."""
_LARGEST: Final = 1e37
_TILES_AT_ONCE: Final = 16
_ROWS_AGAIN: Final = 64
"""Rows whose bound was a wrong guess are scanned so many at a time, always as many."""
_MOST_FAILURES: Final = 0.01
Path = Literal["auto", "plain", "fused", "int8", "float32"]
"""How to scan: on a CPU compiled loops after a product of `int8` digits or of `float32` values, on CUDA the fused kernel, else torch alone
(`plain`). `auto` takes what is fastest."""


class Scan(NamedTuple):
    """Firings of one tile on one block of rows; each latent's in order of row."""

    tile: int
    latents: NDArray[np.uint16]
    """Counted from the tile's first latent."""
    rows: NDArray[np.uint32]
    """Counted from the block's first row."""
    activations: NDArray[np.float32]

    def above(self, row_thresholds: NDArray[np.float32]) -> "Scan":
        """Return the firings that exceed their row's threshold."""
        latents, rows, activations = np.empty_like(self.latents), np.empty_like(self.rows), np.empty_like(self.activations)
        n = kernels.keep_above(self.latents, self.rows, self.activations, row_thresholds, (latents, rows, activations))
        return Scan(self.tile, latents[:n].copy(), rows[:n].copy(), activations[:n].copy())


class TopKScan(NamedTuple):
    """Firings of one block of a `topk` SAE, and what a pre-activation of each row had to exceed."""

    scans: list[Scan]
    thresholds: NDArray[np.float32]


class Encoder:
    """The encoder columns [start, stop) of an SAE on a device, as tiles of constant width."""

    def __init__(
        self, sae: Sae, start: int, stop: int, device: torch.device, *, dtype: Literal["float32", "bfloat16"] = "float32", path: Path = "auto"
    ) -> None:
        """Copy the slice's columns into tiles. Raises `NonFiniteError` for a NaN or infinity in the weights."""
        largest = {name: float(torch.stack(torch.aminmax(getattr(sae, name))).abs().max()) for name in ("W_enc", "b_enc", "threshold")}
        for name, value in largest.items():
            if not math.isfinite(value):
                raise NonFiniteError(f"The SAE's {name} holds a NaN or an infinity. Train it again with a lower learning rate.")
        self.start, self.stop = start, stop
        self.n_tiles = -(-(stop - start) // TILE)
        self._sae, self._device, self._rounds = sae, device, dtype == "bfloat16"
        if path == "auto":
            path = fastest_kind(sae.d_in) if device.type == "cpu" else "fused" if device.type == "cuda" and has_triton() else "plain"
        self.kind: Kind | None = path if path in ("int8", "float32") else None
        """Which digits the compiled scan multiplies; None where it is not used."""
        self._is_compiled = self.kind is not None
        self._native = torch.bfloat16 if self._rounds and device.type == "cuda" else torch.float32
        tiles = range(start, stop, TILE)
        how = (self._round, device, self._native)
        self._tiles = [_make_tile(sae, first, min(first + TILE, stop), *how, is_compiled=self._is_compiled) for first in tiles]
        self._fused = fused.Columns([tile.W() for tile in self._tiles], [tile.b for tile in self._tiles]) if path == "fused" else None
        self.guess = guess(sae.k, self.n_tiles)
        """How the next block's bounds are found, for `topk`."""
        self._no_thresholds = [np.where(np.isinf(tile.threshold), tile.threshold, -np.inf).astype(np.float32) for tile in self._tiles]
        n_threads = torch.get_num_threads()
        self._pool = make_product_pool(n_threads, "scan")
        self._device_thread = ThreadPoolExecutor(1)  # waits for a GPU, while the caller works on the firings of the block before
        self._scratch: SimpleQueue[_Scratch] = SimpleQueue()
        self._n_threads = n_threads
        self._blocks = [torch.empty((0, sae.d_in), device=device)] * 2
        self._digits = [torch.empty((0, sae.d_in), dtype=torch.int8)] * 2
        self._quantized: _Quantized | None = None
        self._looks = np.zeros(3, np.int64)
        """Pre-activations that were scanned, computed one by one, and found to fire; one thread may forget another's: it is a hint."""
        self._row_limit = _LARGEST / max(1.0, sae.d_in * largest["W_enc"])

    def tile_bounds(self, tile: int) -> tuple[int, int]:
        """Return the latents [start, stop) of a tile, without padding."""
        first = self.start + tile * TILE
        return first, min(first + TILE, self.stop)

    def prepare(self, rows: Float[Tensor, "n d_in"], n_block: int, where: str) -> Float[Tensor, "block d_in"]:
        """Return a block of `n_block` rows on the device, padded with zeros to a multiple of `GROUP`.

        The call after the next overwrites it, so one block can be scanned while the next is prepared. Raises `NonFiniteError`, naming `where`.
        """
        shape = (-(-n_block // GROUP) * GROUP, rows.shape[1])
        self._blocks.reverse()
        if self._blocks[0].shape != shape:
            self._blocks[0] = torch.empty(shape, device=self._device)
        block = self._blocks[0]
        block[: len(rows)].copy_(rows.to(self._device))
        block[len(rows) :].zero_()
        low, high = (float(value) for value in torch.aminmax(block))
        if not max(-low, high) < self._row_limit:
            bad = int(torch.nonzero(~(block.abs().amax(dim=1) < self._row_limit))[0])
            raise NonFiniteError(
                f"{where} + {bad}: a NaN, an infinity or a value above {self._row_limit:.1e} stands there. Harvest this shard again."
            )
        return self._round(block).to(self._native)

    def scan(self, block: Float[Tensor, "block d_in"], row_thresholds: NDArray[np.float32]) -> list[Scan]:
        """Return the firings of each tile on a block of rows, given what a pre-activation of each row must exceed."""
        return self.begin_scan(block, row_thresholds)()

    def begin_scan(self, block: Float[Tensor, "block d_in"], row_thresholds: NDArray[np.float32]) -> Callable[[], list[Scan]]:
        """Begin what `scan` does and return what waits for it: with the next block begun before, no thread waits for another at a block's end."""
        limits = np.full(len(block), np.inf, np.float32)
        limits[: len(row_thresholds)] = row_thresholds
        thresholds = [tile.threshold for tile in self._tiles]
        if self._is_compiled:
            rows = self._quantize(block)
            futures = [self._pool.submit(self._scan_compiled, i, rows, limits, threshold) for i, threshold in enumerate(thresholds)]
            return lambda: [future.result() for future in futures]
        return self._device_thread.submit(self._scan_on_device, block, thresholds, limits).result

    def _scan_on_device(self, block: Tensor, thresholds: list[NDArray[np.float32]], limits: NDArray[np.float32]) -> list[Scan]:
        if self._fused is not None:
            return [Scan(i, *columns) for i, columns in enumerate(self._fused.scan(block, thresholds, limits))]
        rows, tiles = torch.from_numpy(limits).to(self._device), zip(self._tiles, thresholds, strict=True)
        return [_scan_plainly(i, block, tile, torch.from_numpy(own).to(self._device), rows) for i, (tile, own) in enumerate(tiles)]

    def begin_scan_topk(self, block: Float[Tensor, "block d_in"], is_valid: NDArray[np.bool_]) -> Callable[[], TopKScan]:
        """Begin to find the firings of a `topk` SAE on the valid rows of a block, and all rows' thresholds; return what waits for them.

        Needs the columns of all latents.
        """
        k, d_sae, n_rows = self._sae.k, self._sae.d_sae, len(is_valid)
        assert (self.start, self.stop) == (0, d_sae)
        if k >= d_sae or not self._is_compiled:
            thresholds = np.zeros(n_rows, np.float32) if k >= d_sae else self._find_thresholds(block)[:n_rows]
            finish_scan = self.begin_scan(block, row_limits(is_valid, thresholds))
            return lambda: TopKScan(finish_scan(), thresholds)
        rows, bounds = self._quantize(block), RisingBounds(len(block), n_rows, self.guess, self._n_threads)
        result, lock = Future[tuple[TopKScan, int]](), Lock()
        scans: dict[int, Scan] = {}

        def work(i: int) -> None:
            if i >= bounds.how.n_tiles:
                bounds.has_begun.wait()
            try:
                scan = self._scan_compiled(i, rows, bounds, self._no_thresholds[i])
            except BaseException:
                bounds.has_begun.set()
                raise
            with lock:
                scans[i] = scan
                is_last = len(scans) == self.n_tiles
            if is_last:  # so that nobody waits for the slowest: the other threads are in the next block
                result.set_result(self._choose_topk(rows, is_valid, bounds, [scans[j] for j in range(self.n_tiles)]))

        futures = [self._pool.submit(work, i) for i in range(self.n_tiles)]

        def finish() -> TopKScan:
            for future in futures:
                future.result()
            found, n_failed = result.result()
            if n_failed > n_rows * _MOST_FAILURES:  # latents are in an order: guess more carefully
                self.guess = Guess(self.guess.n_tiles, 2 * self.guess.n_kept) if 2 * self.guess.n_kept <= k else certain(k, self.n_tiles)
            return found

        return finish

    def _choose_topk(self, block: "_Block", is_valid: NDArray[np.bool_], bounds: RisingBounds, scans: list[Scan]) -> tuple[TopKScan, int]:
        """Find the thresholds of a block's rows and the firings above them; rows whose bound was too high are scanned again, and counted."""
        k, n_rows = self._sae.k, len(is_valid)
        thresholds, is_unknown = find_thresholds(bounds, n_rows, k, [scan.rows for scan in scans], [scan.activations for scan in scans])
        values = block.rows.values
        limits = np.full(len(values), np.inf, np.float32)
        limits[:n_rows] = row_limits(is_valid & ~is_unknown, thresholds)
        scans, failed = [scan.above(limits) for scan in scans], np.flatnonzero(is_unknown)
        for first in range(0, len(failed), _ROWS_AGAIN):
            rows = failed[first : first + _ROWS_AGAIN]
            some = np.zeros((_ROWS_AGAIN, values.shape[1]), np.float32)
            some[: len(rows)] = values[rows]
            again = _Block(quantize_rows(some, block.columns.frame, block.columns.kind), block.columns)
            sure = RisingBounds(_ROWS_AGAIN, len(rows), certain(k, self.n_tiles), 1)
            more = [self._scan_compiled(i, again, sure, self._no_thresholds[i]) for i in range(self.n_tiles)]
            found, _ = self._choose_topk(again, is_valid[rows], sure, more)
            thresholds[rows] = found.thresholds
            scans = [_insert(scan, other, rows) for scan, other in zip(scans, found.scans, strict=True)]
        return TopKScan(scans, thresholds), len(failed)

    def _find_thresholds(self, block: Tensor) -> NDArray[np.float32]:
        """Return each row's midpoint between its k-th and next largest pre-activation, at least 0, with a few tiles in memory at a time."""
        largest = torch.empty((len(block), 0), device=self._device)
        for first in range(0, self.n_tiles, _TILES_AT_ONCE):
            tiles = self._tiles[first : first + _TILES_AT_ONCE]
            pre = torch.cat([(_multiply(block, tile.W()) + tile.b)[:, : tile.width] for tile in tiles] + [largest], dim=1)
            largest = pre.topk(min(self._sae.k + 1, pre.shape[1]), dim=1).values
        return ((largest[:, -1] + largest[:, -2 if self._sae.k else -1]) / 2).clamp_min(0).cpu().numpy()

    def _quantize(self, block: Tensor) -> "_Block":
        """Quantize a block that will be scanned, and before the first one the columns. The call after the next overwrites its digits.

        Where digits rule out too little, or have no bound, they are given up for this and all later blocks.
        """
        if self.kind == "int8" and self._looks[1] > max(_MOST_LOOKS * self._looks[0], _MOST_MISSES * self._looks[2]):
            self.kind, self._quantized = "float32", None
        self._digits.reverse()
        if self._digits[0].shape != block.shape:
            self._digits[0] = torch.empty(block.shape, dtype=torch.int8)
        found = self._try_to_quantize(block)
        if self.kind == "int8" and not (are_bounded(found.rows) and found.columns.are_bounded):
            self.kind, self._quantized = "float32", None
            found = self._try_to_quantize(block)
        return found

    def _try_to_quantize(self, block: Tensor) -> "_Block":
        assert self.kind
        with np.errstate(over="ignore", invalid="ignore"):
            if self._quantized is None:
                frame = make_frame(block)
                tiles = [_quantize_tile(tile, frame, self.kind) for tile in self._tiles]
                self._quantized = _Quantized(self.kind, frame, tiles, all(are_bounded(*tile) for tile in tiles))
            return _Block(quantize_rows(block.numpy(), self._quantized.frame, self.kind, self._digits[0]), self._quantized)

    def _scan_compiled(self, i: int, block: "_Block", limits: NDArray[np.float32] | RisingBounds, threshold: NDArray[np.float32]) -> Scan:
        """Multiply and scan one tile with one thread, given what rows must exceed, or bounds that it raises."""
        try:
            scratch = self._scratch.get_nowait()
        except Empty:
            scratch = _Scratch(MOST_ROWS)
        n, looks = 0, np.zeros(3, np.int64)
        for j, columns in enumerate(block.columns.tiles[i]):
            own, flat = threshold[j * STRIP : (j + 1) * STRIP], columns.values.reshape(-1)
            strip = (flat, columns.bias, own, columns.offset, columns.inverse, columns.norm, columns.error)
            for first in range(0, len(block.rows.values), MOST_ROWS):
                rows, is_known = block.rows.part(slice(first, first + MOST_ROWS)), True
                product = multiply(rows, columns, scratch.product).reshape(-1)
                row_limits = (limits.values if isinstance(limits, RisingBounds) else limits)[first : first + len(rows.values)]
                if isinstance(limits, RisingBounds) and i < limits.how.n_tiles:
                    is_known = limits.fill(rows.values, strip[:3], first)
                part = (rows.values.reshape(-1), row_limits, rows.inverse, rows.error, rows.reach)
                arguments = (product, strip, part, (j * STRIP, first), (scratch.flags, scratch.places))
                n_found, n_computed = kernels.append_firings(*arguments, scratch.columns, n)
                if n_found > len(scratch.columns[0]):
                    scratch.grow(n_found)
                    n_found, _ = kernels.append_firings(*arguments, scratch.columns, n)
                if isinstance(limits, RisingBounds) and not is_known:
                    limits.fold(scratch.columns[1][n:n_found], scratch.columns[2][n:n_found])
                looks += (product.size, n_computed, n_found - n)
                n = n_found
        self._looks += looks
        latents, rows, activations = scratch.columns
        scan = Scan(i, latents[:n].copy(), rows[:n].copy(), activations[:n].copy())
        self._scratch.put(scratch)
        return scan

    def _round(self, values: Tensor) -> Tensor:
        return values.to(torch.bfloat16).to(values.dtype) if self._rounds else values


def row_limits(is_valid: NDArray[np.bool_], thresholds: NDArray[np.float32] | float) -> NDArray[np.float32]:
    """Return what pre-activations of each row must exceed: the row's threshold, or infinity where the row is not valid."""
    return np.where(is_valid, thresholds, np.inf).astype(np.float32)


def _insert(scan: Scan, other: Scan, places: NDArray[np.int64]) -> Scan:
    """Add firings of rows that stand at `places` in the block, each latent's in order of row."""
    rows = np.concatenate([scan.rows, places[other.rows].astype(np.uint32)])
    latents, activations = np.concatenate([scan.latents, other.latents]), np.concatenate([scan.activations, other.activations])
    order = np.argsort(rows, kind="stable")
    return Scan(scan.tile, latents[order], rows[order], activations[order])


class _Tile(NamedTuple):
    strips: tuple[Tensor, ...]
    """The columns: one strip of all, or for the compiled scan several of `STRIP`, each with one latent after the other."""
    b: Tensor
    bias: NDArray[np.float32]
    threshold: NDArray[np.float32]
    """What a pre-activation must exceed; infinite in the padding, which therefore never fires."""
    width: int
    """Latents without padding."""

    def W(self) -> Tensor:
        """Return the columns side by side."""
        return self.strips[0] if len(self.strips) == 1 else torch.cat(self.strips).T


class _Quantized(NamedTuple):
    """All columns, quantized in the frame of the first block."""

    kind: Kind
    frame: Frame
    tiles: list[list[Columns]]
    are_bounded: bool


class _Block(NamedTuple):
    """Rows to be scanned, and the columns that were quantized as they were."""

    rows: Rows
    columns: _Quantized


class _Scratch:
    """Memory of one thread: a product, and what was found in it."""

    def __init__(self, n_rows: int) -> None:
        self.product, self.flags = torch.empty(n_rows, STRIP), np.empty(n_rows // GROUP * STRIP, np.uint8)
        self.places = np.empty(n_rows * STRIP, np.int32)
        self.columns = (np.empty(1 << 14, np.uint16), np.empty(1 << 14, np.uint32), np.empty(1 << 14, np.float32))

    def grow(self, n: int) -> None:
        """Make room for `n` firings, and half as many again."""
        old, self.columns = self.columns, (np.empty(n + n // 2, np.uint16), np.empty(n + n // 2, np.uint32), np.empty(n + n // 2, np.float32))
        for one, other in zip(self.columns, old, strict=True):
            one[: len(other)] = other


def _make_tile(
    sae: Sae, first: int, last: int, rounding: Callable[[Tensor], Tensor], device: torch.device, native: torch.dtype, *, is_compiled: bool
) -> _Tile:
    width = last - first
    W, b = torch.zeros((sae.d_in, TILE)), torch.zeros(TILE)
    W[:, :width] = rounding(sae.W_enc[:, first:last].float())
    b[:width] = sae.b_enc[first:last]
    threshold = torch.full((TILE,), math.inf)
    threshold[:width] = sae.threshold[first:last].clamp_min(0.0)
    W = W.to(device, native)
    strips = W.T.contiguous().split(STRIP) if is_compiled else (W,)
    return _Tile(strips, b.to(device), b.numpy(), threshold.numpy(), width)


def _quantize_tile(tile: _Tile, frame: Frame, kind: Kind) -> list[Columns]:
    biases = np.split(tile.bias, range(STRIP, TILE, STRIP))
    return [quantize_columns(strip.numpy(), bias, frame, kind) for strip, bias in zip(tile.strips, biases, strict=True)]


def _multiply(block: Tensor, W: Tensor) -> Tensor:
    """Multiply with float32 sums and a float32 result, whatever the type of the operands."""
    return torch.mm(block, W) if block.dtype == torch.float32 else torch.mm(block, W, out_dtype=torch.float32)


def _scan_plainly(i: int, block: Tensor, tile: _Tile, threshold: Tensor, limits: Tensor) -> Scan:
    """Scan one tile the obvious way, on any device."""
    pre = _multiply(block, tile.W()) + tile.b
    rows, latents = torch.nonzero((pre > threshold) & (pre > limits[:, None]), as_tuple=True)
    columns = (latents.to(torch.int16), rows.to(torch.int32), pre[rows, latents])
    latents_, rows_, activations = (column.cpu().numpy() for column in columns)
    return Scan(i, latents_.view(np.uint16), rows_.view(np.uint32), activations)
