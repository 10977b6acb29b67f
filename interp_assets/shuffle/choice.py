"""Rows, row size and memory become passes and fan-out, where the configuration leaves them to the plan: chosen once, and remembered there.

    rows fit one job                                 1 pass
    fewest passes whose ranges are large enough      2, else 3: a mixed shard just fits a job, so the fan-out is the smallest that is enough
    more mixed shards than Dagster shows             refused, with the memory that would do

A range is what a job's file holds for one bucket, and each is read by a request of its own: below `RANGE_BYTES`, requests cost more than one pass
more. Three passes are always enough, because 316 buckets of 316 are as many mixed shards as there may be.

**What was chosen stays.** The numbers decide the order of the rows, so they are in every id from here on. `settle` writes them into the plan
beside the ids of the token shards whose rows it counted; another `memory_bytes` later changes nothing that exists. Other tokens are another
shuffle anyway, and choose anew. A pipeline of a release that could not choose keeps the numbers that it was shuffled with.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from interp_assets.corpus.refs import token_ids
from interp_assets.corpus.sizes import bound_rows, rows_of
from interp_assets.errors import PlanError
from interp_assets.planning.config import FORMER_SHAPE, MAX_MIXED_SHARDS
from interp_assets.planning.pipeline import ChosenShuffle, Pipeline, load_pipeline, save_plan
from interp_assets.shuffle.generations import before, has_grown
from interp_assets.shuffle.plan import ShardRows, explain_memory, job_bytes, load_shard_rows, row_formats
from interp_assets.shuffle.refs import Shape, certificate_ref, find_shape, shuffle_plan_ref
from interp_assets.shuffle.rows import RowFormat
from interp_assets.shuffle.sizes import ShuffleSizes, largest_bucket, smallest_fan_out
from interp_assets.storage.manifest import find_manifest
from interp_assets.storage.store import Store

RANGE_BYTES: Final = 1 << 20
MAX_FAN_OUT: Final = 1 << 16
MAX_CHOSEN_PASSES: Final = 3


def choose(shards: Sequence[ShardRows], fmt: RowFormat, memory_bytes: int) -> Shape:
    """Choose passes and fan-out with which every mixed shard fits `memory_bytes`. Raises `PlanError` where none do, naming the memory that would."""
    limit = memory_bytes // job_bytes(1, fmt)
    n_rows = sum(shard.n_valid for shard in shards)
    if sum(shard.n_rows for shard in shards) <= limit:
        return Shape(1, 1)
    range_rows = max(1, RANGE_BYTES // fmt.record_bytes)
    largest = max(2, n_rows // len(shards) // range_rows)  # the fan-out at which ranges become too small
    for passes in range(2, MAX_CHOSEN_PASSES + 1):
        fan_out = smallest_fan_out(n_rows, limit, passes) if limit else MAX_MIXED_SHARDS
        if fan_out ** (passes - 1) <= MAX_MIXED_SHARDS and (fan_out <= min(largest, MAX_FAN_OUT) or passes == MAX_CHOSEN_PASSES):
            return Shape(passes, fan_out)
    side = math.isqrt(MAX_MIXED_SHARDS)
    need = job_bytes(largest_bucket(n_rows, MAX_CHOSEN_PASSES, side), fmt)
    raise PlanError(
        f"{n_rows:,} rows of {fmt.record_bytes:,} bytes make more than {MAX_MIXED_SHARDS:,} mixed shards that fit shuffle.memory_bytes = "
        f"{memory_bytes:,}, more than Dagster shows. Set shuffle.memory_bytes to {need:,} or more."
    )


def settle(pipeline: Pipeline, store: Store) -> Pipeline:
    """Return the pipeline with its shuffle's numbers; chosen now, and kept in the plan, where neither configuration nor plan has them.

    Raises `PlanError` when no numbers fit, and like `load_shard_rows`.
    """
    if find_shape(pipeline):
        return pipeline
    root = _first_generation(pipeline)
    chosen = _remember(root, _find_former(root, store) or _choose(root, load_shard_rows(root, store)))
    plan = replace(load_pipeline(pipeline.config, store).plan, shuffle=chosen)
    save_plan(store, plan, pipeline.config.execution.plan)
    return Pipeline(pipeline.config, replace(pipeline.plan, shuffle=chosen))


def foresee(pipeline: Pipeline, store: Store) -> Pipeline:
    """Return the pipeline with the numbers that it will have: where they are not chosen yet, for the rows that are expected. Raises `PlanError`."""
    if find_shape(pipeline):
        return pipeline
    root = _first_generation(pipeline)
    found = [(index, max(1, rows_of(pipeline, store, index))) for index in root.train_indices]
    rows = [ShardRows(index, n_rows, n_rows) for index, n_rows in found]
    chosen = _remember(root, _find_former(root, store) or _choose(root, rows))
    return Pipeline(pipeline.config, replace(pipeline.plan, shuffle=chosen), pipeline.empty_files)


def find_obstacles(pipeline: Pipeline, store: Store) -> list[str]:
    """Say why the shuffle cannot fit its memory, as far as the rows are known; nothing when it is done or may fit."""
    if find_shape(pipeline) and all(find_manifest(store, certificate_ref(pipeline, name)) for name in pipeline.config.harvest.hook_points):
        return []
    indices = pipeline.train_indices
    shards = [ShardRows(index, *found.fewest) for index, found in zip(indices, bound_rows(pipeline, store, indices), strict=True)]
    try:
        passes, fan_out = find_shape(pipeline) or _choose(pipeline, shards)
    except PlanError as error:
        return [str(error)]
    sizes = ShuffleSizes(passes=passes, fan_out=fan_out, shard_rows=tuple(shard.n_valid for shard in shards))
    return [problem] if (problem := explain_memory(pipeline, shards, sizes)) else []


def _choose(pipeline: Pipeline, shards: Sequence[ShardRows]) -> Shape:
    widest = max(row_formats(pipeline), key=lambda fmt: fmt.record_bytes)
    return choose(shards, widest, pipeline.config.shuffle.memory_bytes)


def _remember(root: Pipeline, shape: Shape) -> ChosenShuffle:
    return ChosenShuffle(shape.passes, shape.fan_out, token_ids(root, root.train_indices))


def _find_former(root: Pipeline, store: Store) -> Shape | None:
    """Return what a release without a choice took where nothing was stated, if these rows were shuffled so."""
    former = Shape(**FORMER_SHAPE)
    plan = replace(root.plan, shuffle=_remember(root, former))
    return former if find_manifest(store, shuffle_plan_ref(Pipeline(root.config, plan))) else None


def _first_generation(pipeline: Pipeline) -> Pipeline:
    while has_grown(pipeline):
        pipeline = before(pipeline)
    return pipeline
