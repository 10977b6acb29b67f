"""A dataset shard becomes firings, block by block; a `topk` SAE's thresholds per row are found once and shared by all latent slices.

Which latents of a `topk` SAE fire on a row depends on all of them. A job that has all latents finds thresholds and firings in one pass. With
several slices, the first job of a shard goes over all latents and publishes the thresholds; the jobs of the other slices read them and
multiply their own columns only: two encodes of the data in all, not one for each slice. Jobs that begin at the same time do that pass each
and publish equal bytes. Pass C reads the same thresholds, so windows and candidates agree on what fires.

The artifact `row_thresholds` holds `thresholds.safetensors`: `threshold` float32 and `last` int32 (encoder.RowLimits), one for each row of the shard.
"""

from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from interp_assets.garcon.device import choose_device
from interp_assets.harvest.rows import iter_row_blocks
from interp_assets.planning.pipeline import Pipeline
from interp_assets.storage.lineage import Digests, create_current, find_current, trace
from interp_assets.storage.store import Store
from interp_assets.storage.tensors import load_tensors, save_tensors
from interp_assets.train.sae import Sae
from interp_assets.visualize.encoder import Encoder, RowLimits, Scan, row_limits
from interp_assets.visualize.lineage import load_current, thresholds_lineage

THRESHOLDS: Final = "thresholds.safetensors"


class BlockFirings(NamedTuple):
    """Firings of one block of rows, tile by tile; rows are counted from `first_row`."""

    first_row: int
    n_rows: int
    scans: list[Scan]
    limits: RowLimits | None
    """The rows' limits where they were found on the way."""


class Dataset(NamedTuple):
    """The shard that is read, and the SAE that reads it."""

    name: str
    """The SAE's name."""
    shard: int
    is_valid: NDArray[np.bool_]


def iter_firings(pipeline: Pipeline, store: Store, sae: Sae, data: Dataset, encoder: Encoder) -> Iterator[BlockFirings]:
    """Yield what fires of the encoder's latents on the valid rows of a shard. Publishes a `topk` SAE's thresholds when nobody has."""
    is_topk, is_whole = sae.kind == "topk", (encoder.start, encoder.stop) == (0, sae.d_sae)
    if is_topk and is_whole:
        found = []
        for block in _iter_blocks(pipeline, store, data, encoder, None):
            assert block.limits is not None
            found.append(block.limits)
            yield block
        _publish(pipeline, store, data, found)
        return
    if not is_topk:
        yield from _iter_blocks(pipeline, store, data, encoder, row_limits(data.is_valid, -np.inf))
        return
    _find_thresholds(pipeline, store, sae, data)
    limits = load_thresholds(pipeline, store, data.name, data.shard)
    for block in _iter_blocks(pipeline, store, data, encoder, row_limits(data.is_valid, limits.threshold)):
        own = limits.part(slice(block.first_row, block.first_row + block.n_rows))
        yield block._replace(scans=[scan.within(own, encoder.start) for scan in block.scans])


def load_thresholds(pipeline: Pipeline, store: Store, name: str, index: int) -> RowLimits:
    """Read the limits of a shard's rows. Raises `ArtifactMissingError` before any slice has been through pass A."""
    lineages = thresholds_lineage(pipeline, name, index)
    (manifest,) = load_current(store, [lineages], Digests(store))
    tensors = load_tensors(store, lineages[0].ref.path, manifest, THRESHOLDS)
    return RowLimits(tensors["threshold"].numpy(), tensors["last"].numpy())


def _find_thresholds(pipeline: Pipeline, store: Store, sae: Sae, data: Dataset) -> None:
    """Go over all latents and publish the thresholds, unless they are there."""
    lineages = thresholds_lineage(pipeline, data.name, data.shard)
    if find_current(store, lineages[0].ref, trace(Digests(store), lineages)):
        return
    device, dtype = choose_device(pipeline.config.execution.device), pipeline.config.features.encode_dtype
    encoder = Encoder(sae, 0, sae.d_sae, device, dtype=dtype)
    found = [block.limits for block in _iter_blocks(pipeline, store, data, encoder, None)]
    _publish(pipeline, store, data, [part for part in found if part is not None])


def _iter_blocks(pipeline: Pipeline, store: Store, data: Dataset, encoder: Encoder, limits: NDArray[np.float32] | None) -> Iterator[BlockFirings]:
    """Yield the firings above the rows' limits, or with no limits those of a `topk` SAE."""
    hook_point, n_block = pipeline.config.sae(data.name).hook_point, pipeline.config.execution.rows_per_block
    begun: list[Callable[[], BlockFirings]] = []
    for first_row, rows in iter_row_blocks(pipeline, store, hook_point, data.shard, n_block):
        block = encoder.prepare(rows, n_block, f"Activation shard {data.shard} at {hook_point}, from row {first_row:,}")
        here = slice(first_row, first_row + len(rows))
        begun.append(_begin(encoder, block, here, data.is_valid[here], None if limits is None else limits[here]))
        if len(begun) > 1:
            yield begun.pop(0)()
    for finish in begun:
        yield finish()


def _begin(
    encoder: Encoder, block: Tensor, here: slice, is_valid: NDArray[np.bool_], limits: NDArray[np.float32] | None
) -> Callable[[], BlockFirings]:
    """Begin to scan one block, and return what waits for its firings."""
    n_rows = here.stop - here.start
    if limits is not None:
        finish_scan = encoder.begin_scan(block, limits)
        return lambda: BlockFirings(here.start, n_rows, finish_scan(), None)
    finish_topk = encoder.begin_scan_topk(block, is_valid)

    def finish() -> BlockFirings:
        found = finish_topk()
        return BlockFirings(here.start, n_rows, found.scans, found.limits)

    return finish


def _publish(pipeline: Pipeline, store: Store, data: Dataset, limits: list[RowLimits]) -> None:
    lineages = thresholds_lineage(pipeline, data.name, data.shard)
    ref, kept = lineages[0].ref, trace(Digests(store), lineages)
    if find_current(store, ref, kept):
        return
    with create_current(store, ref, kept) as art:
        columns = zip(RowLimits(np.empty(0, np.float32), np.empty(0, np.int32)), *limits, strict=True)
        save_tensors(art, THRESHOLDS, dict(zip(RowLimits._fields, (torch.from_numpy(np.concatenate(parts)) for parts in columns), strict=True)))
        art.facts |= {"n_rows": len(data.is_valid)}
