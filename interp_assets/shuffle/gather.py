"""All ranges of one bucket become one mixed shard: gathered from the files of the pass before, permuted, written with their row ids.

With one pass only there is one bucket and nothing to gather: the activation shards are read as they are. The rows are hashed on their way
out, chunk by chunk, so that the certificate (`certificate.py`) can compare what came out with what went in without reading it again.
Format: `docs/formats/mixed_shard.md`.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from interp_assets.errors import PlanError
from interp_assets.planning.pipeline import Pipeline
from interp_assets.planning.progress import Advance, unheard
from interp_assets.shuffle.lineage import bucket_lineage
from interp_assets.shuffle.mixed import save_mixed
from interp_assets.shuffle.multiset import hash_kept
from interp_assets.shuffle.permutation import Draws
from interp_assets.shuffle.plan import ShufflePlan, load_shuffle_plan, row_format
from interp_assets.shuffle.refs import bucket_key, mixed_shard_ref
from interp_assets.shuffle.rows import ID_BYTES, RowFormat, RowSource, iter_chunks, record_ids
from interp_assets.shuffle.sources import InputRange, load_records, load_shards
from interp_assets.storage.direct import Workspace
from interp_assets.storage.lineage import Digests, create_current, find_current, trace
from interp_assets.storage.manifest import Produced, timed
from interp_assets.storage.store import Store


@timed
def gather_bucket(
    pipeline: Pipeline,
    store: Store,
    hook_point: str,
    bucket: int,
    progress: Advance = unheard,
    space: Workspace | None = None,
    known: Digests | None = None,
) -> Produced:
    """Make the mixed shard `bucket`. Holds its rows in memory, that of `space` if given; `known` digests are not read again.

    Raises `ArtifactMissingError` that names every job file which is missing, `ArtifactCorruptError` when rows or ranges differ from
    the manifests or the plan, and `PlanError` for a bucket that the plan does not have.
    """
    ref = mixed_shard_ref(pipeline, hook_point, bucket)
    plan = load_shuffle_plan(pipeline, store)
    if not 0 <= bucket < plan.sizes.n_buckets:
        raise PlanError(
            f"There is no {bucket_key(bucket)}: the shuffle of {plan.sizes.passes} passes and fan-out {plan.sizes.fan_out} "
            f"has {plan.sizes.n_buckets} mixed shards."
        )
    kept = trace(known or Digests(store), [bucket_lineage(pipeline, store, ref, plan.sizes.passes, bucket)])
    if (manifest := find_current(store, ref, kept)) is not None:
        return Produced(ref, manifest, is_cached=True)
    fmt = row_format(pipeline, hook_point)
    with create_current(store, ref, kept) as art, (space or Workspace()).lend(_buffer_bytes(plan, bucket, fmt)) as buffer:
        order = Draws(plan.seed).gather_order(bucket, plan.sizes.input_rows(plan.sizes.passes, bucket))  # its working space is free again
        source, facts = _load_bucket(pipeline, store, hook_point, plan, bucket, buffer)
        assert source.n_rows == len(order), f"{source.n_rows} rows read, {len(order)} ordered"
        save_mixed(art, _iter_rows(source, order, fmt), source.n_rows, fmt, progress)
        art.facts |= facts
    return art.produced


def _buffer_bytes(plan: ShufflePlan, bucket: int, fmt: RowFormat) -> int:
    if plan.sizes.passes == 1:
        return sum(shard.n_rows for shard in plan.shards) * fmt.row_bytes
    return plan.sizes.input_rows(plan.sizes.passes, bucket) * fmt.record_bytes


def _load_bucket(
    pipeline: Pipeline, store: Store, hook_point: str, plan: ShufflePlan, bucket: int, buffer: NDArray[np.uint8]
) -> tuple[RowSource, dict[str, str]]:
    """Read a bucket's rows; with one pass they come from the activation shards, and their hash as read becomes a fact."""
    if plan.sizes.passes > 1:
        n_rows = plan.sizes.input_rows(plan.sizes.passes, bucket)
        return load_records(pipeline, store, hook_point, plan, InputRange(plan.sizes.passes, bucket, 0, n_rows), buffer), {}
    raw = load_shards(pipeline, store, hook_point, plan.shards, buffer)
    return raw, {"source_multiset_hash": hash_kept(raw.row_ids, raw.rows, raw.kept).encode()}


def _iter_rows(source: RowSource, order: NDArray[np.int64], fmt: RowFormat) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.uint8]]]:
    """Yield row ids and rows of a source in a given order, some at a time. Rows lie in the same memory each time."""
    rows = np.empty((0, fmt.row_bytes), np.uint8)
    for records in iter_chunks(source, order, fmt.record_bytes):
        if len(rows) < len(records):
            rows = np.empty((len(records), fmt.row_bytes), np.uint8)
        part = rows[: len(records)]
        np.copyto(part, records[:, ID_BYTES:])
        yield record_ids(records), part
