"""Rows of an activation shard, read at once."""

from torch import Tensor

from interp_assets.harvest.refs import activation_shard_ref
from interp_assets.harvest.rows import ROWS
from interp_assets.planning.pipeline import Pipeline
from interp_assets.storage.manifest import load_manifest
from interp_assets.storage.store import Store
from interp_assets.storage.tensors import read_rows, read_spans


def load_rows(pipeline: Pipeline, store: Store, hook_point: str, index: int, start: int, stop: int) -> Tensor:
    """Read and verify rows [start, stop) of corpus shard `index` at `hook_point`: `[stop - start, d_in]` in the stored dtype."""
    ref = activation_shard_ref(pipeline, hook_point, index)
    manifest = load_manifest(store, ref)
    span = read_spans(store, ref.path, manifest, ROWS)["rows"]
    return read_rows(store, ref.path, manifest, ROWS, span, start, stop)
