"""One job's rows become one file with a contiguous range of records for every output bucket.

1. Read the job's rows into memory: an activation shard's in pass 1, a part of a bucket later (`sources.py`).
2. Draw the job's uniform order and its counts (`permutation.py`).
3. Write the records in that order as one stream, `rows.bin`: range j is bucket j's. N jobs and K buckets make N files, not N*K.

A job depends on the plan and on its own rows only. It may run anywhere, twice, or at the same time as any other: its bytes are the same.
Format: `docs/formats/split_shard.md`.
"""

import math
from typing import Final

from interp_assets.errors import ArtifactCorruptError, PlanError
from interp_assets.planning.pipeline import Pipeline
from interp_assets.planning.progress import Advance, unheard
from interp_assets.shuffle.lineage import bucket_lineage, split_lineage
from interp_assets.shuffle.multiset import MultisetHash, hash_kept, hash_records
from interp_assets.shuffle.permutation import Draws, JobSplit, split_job
from interp_assets.shuffle.plan import ShufflePlan, load_shuffle_plan, row_format
from interp_assets.shuffle.refs import bucket_key, split_bucket_ref, split_shard_ref
from interp_assets.shuffle.rows import Records, RowFormat, RowSource, iter_chunks
from interp_assets.shuffle.sizes import offsets
from interp_assets.shuffle.sources import SPLIT_ROWS, InputRange, load_records, load_shards
from interp_assets.storage.direct import Workspace
from interp_assets.storage.lineage import Digests, create_current, find_current, trace
from interp_assets.storage.manifest import BLOCK_BYTES, ArtifactRef, Produced, timed
from interp_assets.storage.store import Store

_MIN_BLOCK_BYTES: Final = 64 << 10
_ENTRY_BYTES: Final = 36
"""A checksum in the manifest."""
_BLOCK_ROWS: Final = 1 << 14


@timed
def split_shard(
    pipeline: Pipeline, store: Store, hook_point: str, index: int, progress: Advance = unheard, space: Workspace | None = None
) -> Produced:
    """Distribute the valid rows of training shard `index` over the buckets of pass 1. Holds the shard in memory, that of `space` if given.

    Raises `ArtifactCorruptError` when the shard's rows differ from its manifest, from its token shard or from the plan.
    """
    ref = split_shard_ref(pipeline, hook_point, index)
    kept = trace(Digests(store), [split_lineage(pipeline, hook_point, index)])
    if (manifest := find_current(store, ref, kept)) is not None:
        return Produced(ref, manifest, is_cached=True)
    plan = load_shuffle_plan(pipeline, store)
    if plan.sizes.passes == 1:
        raise PlanError(f"A shuffle of one pass splits nothing (shuffle.passes is 1): gather {bucket_key(0)} of {hook_point} directly.")
    job = plan.job(index)
    split = draw_split(plan, 1, 0, job, store.url)
    fmt = row_format(pipeline, hook_point)
    with (space or Workspace()).lend(plan.shards[job].n_rows * fmt.row_bytes) as buffer:
        source = load_shards(pipeline, store, hook_point, [plan.shards[job]], buffer)
        rows_hash = hash_kept(source.row_ids, source.rows, source.kept)
        return _write_split(store, ref, kept, source, split, fmt, rows_hash, progress)


def split_bucket(pipeline: Pipeline, store: Store, hook_point: str, pass_index: int, bucket: int, progress: Advance = unheard) -> list[Produced]:
    """Run all jobs of input bucket `bucket` of a middle pass, one after the other. See `split_bucket_job`."""
    n_jobs = len(_middle_plan(pipeline, store, pass_index).sizes.job_rows(pass_index, bucket))
    space = Workspace()
    return [split_bucket_job(pipeline, store, hook_point, (pass_index, bucket, job), progress, space) for job in range(n_jobs)]


@timed
def split_bucket_job(
    pipeline: Pipeline,
    store: Store,
    hook_point: str,
    address: tuple[int, int, int],
    progress: Advance = unheard,
    space: Workspace | None = None,
) -> Produced:
    """Distribute one job's rows of a bucket over the buckets of a middle pass; `address` is (pass >= 2, input bucket, job).

    Raises like `load_records`. Holds the job's rows in memory.
    """
    pass_index, bucket, job = address
    ref = split_bucket_ref(pipeline, hook_point, pass_index, bucket, job)
    plan = _middle_plan(pipeline, store, pass_index)
    kept = trace(Digests(store), [bucket_lineage(pipeline, store, ref, pass_index, bucket)])
    if (manifest := find_current(store, ref, kept)) is not None:
        return Produced(ref, manifest, is_cached=True)
    split = draw_split(plan, pass_index, bucket, job, store.url)
    starts = offsets(plan.sizes.job_rows(pass_index, bucket))
    wanted, fmt = InputRange(pass_index, bucket, starts[job], starts[job + 1]), row_format(pipeline, hook_point)
    with (space or Workspace()).lend((wanted.stop - wanted.start) * fmt.record_bytes) as buffer:
        source = load_records(pipeline, store, hook_point, plan, wanted, buffer)
        return _write_split(store, ref, kept, source, split, fmt, _hash_all(source), progress)


def draw_split(plan: ShufflePlan, pass_index: int, bucket: int, job: int, where: str) -> JobSplit:
    """Draw a job's split and compare its counts with the plan's, where they are listed; `where` names the store in the message.

    Raises `ArtifactCorruptError` when this machine draws other numbers than the one that planned.
    """
    split = split_job(Draws(plan.seed), plan.sizes, pass_index, bucket, job)
    tables = plan.counts[pass_index - 1]
    if tables is not None and offsets(tables[bucket][job]) != split.offsets:
        raise ArtifactCorruptError(
            f"This machine draws other counts for job {job} of pass {pass_index} than the shuffle plan in {where} lists: its arithmetic or its "
            "release of interp-assets differs. Materialize `shuffle_plan` again here, or run the job where the plan was made."
        )
    return split


def _middle_plan(pipeline: Pipeline, store: Store, pass_index: int) -> ShufflePlan:
    plan = load_shuffle_plan(pipeline, store)
    if not 2 <= pass_index < plan.sizes.passes:
        raise PlanError(f"Pass {pass_index} splits no buckets: of {plan.sizes.passes} passes, those after the first and before the last do.")
    return plan


def _hash_all(source: Records) -> MultisetHash:
    """Hash the records as they were read, block by block."""
    total = MultisetHash()
    for start in range(0, source.n_rows, _BLOCK_ROWS):
        total = total.merge(hash_records(source.records[start : start + _BLOCK_ROWS]))
    return total


def _write_split(
    store: Store,
    ref: ArtifactRef,
    kept: dict[str, str],
    source: RowSource,
    split: JobSplit,
    fmt: RowFormat,
    rows_hash: MultisetHash,
    progress: Advance,
) -> Produced:
    """Write a source's rows in the order of a split; `kept` are the digests of what it is made from, `rows_hash` is that of the rows as read."""
    assert source.n_rows == len(split.order) == split.offsets[-1], f"{source.n_rows} rows read, {len(split.order)} ordered"
    n_rows = source.n_rows
    shape = [n_rows, fmt.record_bytes]
    n_block = block_bytes(n_rows * fmt.record_bytes)
    with create_current(store, ref, kept) as art:
        art.facts |= {
            "n_rows": n_rows,
            "d_in": fmt.d_in,
            "dtype": fmt.dtype,
            "ranges": split.offsets,
            "multiset_hash": rows_hash.encode(),
        }
        with art.open(SPLIT_ROWS, n_rows=n_rows, dtype="uint8", shape=shape, block_bytes=n_block) as sink:
            for chunk in iter_chunks(source, split.order, fmt.record_bytes):
                sink.write(chunk.reshape(-1).data)
                progress(len(chunk))
    return art.produced


def block_bytes(file_bytes: int) -> int:
    """Return how many bytes of a split file one checksum covers: a power of two, 64 KiB to 4 MiB.

    Who reads a range reads about one block too much and the whole manifest, so the sum of the two is kept small: at sqrt(36 * file_bytes),
    for example 128 KiB for 512 MB and 2 MiB for 100 GB.
    """
    return max(_MIN_BLOCK_BYTES, min(BLOCK_BYTES, 1 << round(math.log2(max(1, _ENTRY_BYTES * file_bytes)) / 2)))
