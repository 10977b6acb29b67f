"""The shuffle as assets: its plan, one asset per distribution pass, the mixed shards and their certificate."""

from collections.abc import Callable
from typing import Any

from interp_assets.corpus.sizes import count_rows, rows_of
from interp_assets.planning.asset import (
    SHARDS,
    Asset,
    Axis,
    Job,
    Load,
    Markdown,
    Needs,
    Reads,
    Shown,
    every,
    name_facts,
    parent_bucket,
    per_hook_point,
    same,
    training,
    whole,
)
from interp_assets.planning.config import PipelineConfig, code_version
from interp_assets.planning.pipeline import Pipeline, shard_index
from interp_assets.shuffle.checks import CERTIFICATE_PASSED, MIXED_ROW_COUNTS
from interp_assets.shuffle.choice import MAX_CHOSEN_PASSES, find_obstacles, settle
from interp_assets.shuffle.generations import generation_of, newest
from interp_assets.shuffle.lineage import middle_lineages, mixed_lineages, plan_lineage, split_lineage
from interp_assets.shuffle.plan import make_shuffle_plan, row_formats, split_bucket_refs
from interp_assets.shuffle.refs import (
    SHUFFLE_VERSION,
    bucket_index,
    bucket_key,
    certificate_ref,
    find_shape,
    mixed_shard_ref,
    pass_name,
    shape_of,
    shuffle_plan_ref,
    split_shard_ref,
)
from interp_assets.shuffle.rows import ID_BYTES, SORT_BYTES
from interp_assets.storage.lineage import Lineage
from interp_assets.storage.manifest import ArtifactRef, Produced
from interp_assets.storage.store import Store

GROUP = "shuffle"
_PROCESS_MIB = 1536
"""What a shuffle job's process needs beside its rows."""


def make_assets(config: PipelineConfig) -> list[Asset]:
    """List the assets of this stage: with P passes there are P - 1 distribution passes before the mixed shards.

    Where the plan chooses, there are as many as it may take, and those that it does not take have no partitions, or empty ones.
    """
    passes = config.shuffle.stated[0] if config.shuffle.stated else MAX_CHOSEN_PASSES
    first = [_first_pass(config)] if passes > 1 else []
    return [_plan(config), *first, *(_middle_pass(config, pass_index) for pass_index in range(2, passes)), _mixed_shards(config), _certificate()]


def _plan(config: PipelineConfig) -> Asset:
    return Asset(
        key=("shuffle_plan",),
        group=GROUP,
        kinds=("python", "json"),
        description=(
            "How many rows go from every job to every bucket, in every pass, drawn from the exact joint law, and what the shuffle will cost. "
            "It needs only the row counts of the token shards, so it can be read before a single activation exists."
        ),
        reads=(every("token_shards"),),
        artifacts=lambda pipeline, _store, _key: [shuffle_plan_ref(pipeline)],
        lineage=lambda pipeline, _store, _key: [plan_lineage(pipeline)],
        make=_make_plan,
        takes=lambda pipeline, _store, _key: Load(n_inputs=len(pipeline.train_indices)),
        obstacles=find_obstacles,
        completes_plan=config.shuffle.stated is None,
        code_version=_version(config),
    )


def _first_pass(config: PipelineConfig) -> Asset:
    return Asset(
        key=(pass_name(1),),
        description=(
            "The rows of one corpus shard, permuted in memory and written as one file with a contiguous range for every bucket. The unit of work is "
            "a corpus shard, so a lost shard is one partition all the way to here. Held-out shards measure and are not shuffled: their partitions "
            "finish at once and hold nothing."
        ),
        axis=SHARDS,
        reads=(same("activations"), whole("shuffle_plan")),
        artifacts=_splits_of_shard,
        lineage=_lineage_of_splits,
        may_go=True,
        make=_split_shards,
        shows=_explain_nothing,
        takes=_splitting,
        lightens="lower corpus.shard_bytes",
        **_common(config),
    )


def _middle_pass(config: PipelineConfig, pass_index: int) -> Asset:
    return Asset(
        key=(pass_name(pass_index),),
        description=(
            f"One bucket of pass {pass_index - 1}, gathered from all its jobs, permuted and divided over {_show_fan_out(config)} smaller buckets. "
            "The unit of work is a bucket; several jobs share one when it exceeds the memory of a job."
            + ("" if config.shuffle.stated else " There are none unless the plan has chosen three passes.")
        ),
        axis=_buckets(config, pass_index - 1, pass_name(pass_index)),
        reads=(every(pass_name(1)) if pass_index == 2 else parent_bucket(pass_name(pass_index - 1)), whole("shuffle_plan")),
        artifacts=lambda pipeline, store, key: split_bucket_refs(pipeline, store, pass_index, bucket_index(key)),
        lineage=lambda pipeline, store, key: middle_lineages(pipeline, store, pass_index, bucket_index(key)),
        may_go=True,
        make=lambda job: _split_buckets(job, pass_index),
        takes=_gathering(lambda _passes: pass_index - 1),
        lightens="lower shuffle.memory_bytes with passes: auto, or raise shuffle.fan_out or passes",
        **_common(config),
    )


def _mixed_shards(config: PipelineConfig) -> Asset:
    return Asset(
        key=("mixed_shards",),
        description=(
            "One bucket of the shuffled data: its ranges gathered from the files of the pass before and permuted once more, so that all mixed shards "
            "in order are one uniform permutation of the training rows. The unit of work is a bucket. Every row keeps its row id."
        ),
        axis=_buckets(config, None, "mixed_shards"),
        reads=(*_mixed_from(config), whole("shuffle_plan")),
        artifacts=_mixed,
        lineage=_lineage_of_mixed,
        make=_mix,
        takes=_gathering(lambda passes: passes - 1),
        lightens="lower shuffle.memory_bytes with passes: auto, or raise shuffle.fan_out or passes",
        **_common(config),
    )


def _certificate() -> Asset:
    return Asset(
        key=("shuffle_certificate",),
        group=GROUP,
        kinds=("python", "json"),
        description=(
            "Proof that no row was lost or doubled (equal multiset hashes before and after) and that the order looks uniform (chi-square of "
            "destinations, autocorrelation of documents). Training refuses data without it. Look at the verdicts and at the lag plot."
        ),
        reads=(every("activations"), every("mixed_shards").remember(may_be_gone=True), whole("shuffle_plan")),
        artifacts=per_hook_point(certificate_ref),
        make=_certify,
        shows=_show_mixing,
        takes=_certifying,
        checks=(CERTIFICATE_PASSED, MIXED_ROW_COUNTS),
        code_version=code_version(SHUFFLE_VERSION),
    )


def _version(config: PipelineConfig) -> str:
    """Return the code version; numbers that the plan has chosen are in the ids, and memory decides no byte."""
    return code_version(SHUFFLE_VERSION, shuffle=config.shuffle) if config.shuffle.stated else code_version(SHUFFLE_VERSION)


def _show_fan_out(config: PipelineConfig) -> str:
    return str(config.shuffle.stated[1]) if config.shuffle.stated else "as many"


def _buckets(config: PipelineConfig, n_passes: int | None, name: str) -> Axis:
    """Return the buckets that there are after `n_passes` distribution passes, or after all; where the plan chooses, those that it has chosen."""
    if config.shuffle.stated:
        passes, fan_out = config.shuffle.stated
        return Axis("bucket", fixed=tuple(_bucket_keys(fan_out ** (passes - 1 if n_passes is None else n_passes))))

    def list_keys(pipeline: Pipeline) -> list[str]:
        if (shape := find_shape(pipeline)) is None or (n_passes is not None and shape.passes < MAX_CHOSEN_PASSES):
            return []
        return _bucket_keys(shape.fan_out ** (shape.passes - 1 if n_passes is None else n_passes))

    return Axis("bucket", planned=list_keys, registered=f"{name} buckets")


def _bucket_keys(n_buckets: int) -> list[str]:
    return [bucket_key(bucket) for bucket in range(n_buckets)]


def _common(config: PipelineConfig) -> dict[str, Any]:
    """Return what all passes share; a job gets the memory that the configuration allows its rows, and what a process needs besides."""
    needs = Needs(memory_bytes=(-(-config.shuffle.memory_bytes // (1 << 20)) + _PROCESS_MIB) << 20)
    return {"group": GROUP, "kinds": ("python", "numpy"), "needs": needs, "code_version": _version(config)}


def _mixed_from(config: PipelineConfig) -> list[Reads]:
    """Say what mixed shards are gathered from: where the plan chooses, of all that it might choose."""
    if config.shuffle.stated is None:
        return [training("activations"), every(pass_name(1)), parent_bucket(pass_name(2))]
    passes = config.shuffle.stated[0]
    if passes > 2:
        return [parent_bucket(pass_name(passes - 1))]
    return [every(pass_name(1)) if passes == 2 else training("activations")]


def _splits_of_shard(pipeline: Pipeline, _store: Store, key: str) -> list[ArtifactRef]:
    """Held-out and pending shards have none, nor has any where one pass is enough."""
    index = shard_index(key)
    is_shuffled = pipeline.trains_on(index) and shape_of(pipeline).passes > 1
    return [split_shard_ref(pipeline, hook_point, index) for hook_point in pipeline.config.harvest.hook_points] if is_shuffled else []


def _lineage_of_splits(pipeline: Pipeline, _store: Store, key: str) -> list[Lineage]:
    index = shard_index(key)
    is_shuffled = pipeline.trains_on(index)
    return [split_lineage(pipeline, hook_point, index) for hook_point in pipeline.config.harvest.hook_points] if is_shuffled else []


def _lineage_of_mixed(pipeline: Pipeline, store: Store, key: str) -> list[Lineage]:
    hook_points = pipeline.config.harvest.hook_points
    return [lineage for hook_point in hook_points for lineage in mixed_lineages(pipeline, store, hook_point, bucket_index(key))]


def _mixed(pipeline: Pipeline, _store: Store, key: str) -> list[ArtifactRef]:
    return [mixed_shard_ref(pipeline, hook_point, bucket_index(key)) for hook_point in pipeline.config.harvest.hook_points]


def _make_plan(job: Job) -> Callable[[str], list[Produced]]:
    return lambda _key: [make_shuffle_plan(newest(settle(job.pipeline, job.store)), job.store)]


def _split_shards(job: Job) -> Callable[[str], list[Produced]]:
    from interp_assets.shuffle.split import split_shard

    def make(key: str) -> list[Produced]:
        index = shard_index(key)
        if not _splits_of_shard(job.pipeline, job.store, key):
            return []
        own = generation_of(job.pipeline, index)
        return [split_shard(own, job.store, hook_point, index, job.progress.advance) for hook_point in job.hook_points]

    return make


def _explain_nothing(job: Job, key: str, made: list[Produced]) -> dict[str, Shown]:
    if made:
        return {}
    index = shard_index(key)
    if job.pipeline.trains_on(index):
        return {"note": "one pass is enough: the mixed shard is gathered from the activations"}
    is_held_out = index in job.pipeline.held_out_indices
    return {"note": "held out: measured, not shuffled" if is_held_out else "waits for the next retraining"}


def _split_buckets(job: Job, pass_index: int) -> Callable[[str], list[Produced]]:
    from interp_assets.shuffle.split import split_bucket

    def make(key: str) -> list[Produced]:
        own, bucket = newest(job.pipeline), bucket_index(key)
        split = [split_bucket(own, job.store, hook_point, pass_index, bucket, job.progress.advance) for hook_point in job.hook_points]
        return [item for items in split for item in items]

    return make


def _mix(job: Job) -> Callable[[str], list[Produced]]:
    from interp_assets.shuffle.append import mix_bucket

    def make(key: str) -> list[Produced]:
        return [mix_bucket(job.pipeline, job.store, hook_point, bucket_index(key), job.progress.advance) for hook_point in job.hook_points]

    return make


def _certify(job: Job) -> Callable[[str], list[Produced]]:
    from interp_assets.shuffle.certificate import certify

    return lambda _key: [certify(job.pipeline, job.store, hook_point, job.progress.advance) for hook_point in job.hook_points]


def _show_mixing(job: Job, _key: str, made: list[Produced]) -> dict[str, Shown]:
    from interp_assets.shuffle.plots import plot_certificate

    drawn = {f"mixing.{hook_point}": Markdown(plot_certificate(job.store, item)) for hook_point, item in zip(job.hook_points, made, strict=True)}
    return {**name_facts(made, job.hook_points, "passed", "lowest_p", "p_values", "failed"), **drawn}


def _held_bytes(pipeline: Pipeline) -> int:
    """Return what a job holds of each row: one hook point at a time."""
    return max(item.record_bytes for item in row_formats(pipeline)) + SORT_BYTES


def _splitting(pipeline: Pipeline, store: Store, key: str) -> Load:
    index = shard_index(key)
    n_rows = rows_of(pipeline, store, index) if _splits_of_shard(pipeline, store, key) else 0
    n_bytes = n_rows * sum(item.record_bytes for item in row_formats(pipeline))
    return Load(n_rows, n_bytes, n_bytes, 3, 1 if n_bytes else 0, memory_bytes=n_rows * _held_bytes(pipeline))


def _gathering(n_passes: Callable[[int], int]) -> Callable[[Pipeline, Store, str], Load]:
    """Say what a bucket takes that there is after `n_passes(passes)` distribution passes."""

    def take(pipeline: Pipeline, store: Store, _key: str) -> Load:
        passes, fan_out = shape_of(pipeline)
        n_rows = count_rows(pipeline, store, pipeline.train_indices) / fan_out ** n_passes(passes)
        n_bytes = n_rows * sum(item.record_bytes for item in row_formats(pipeline))
        return Load(n_rows, n_bytes, n_bytes, 2 * len(pipeline.train_indices), 1, memory_bytes=n_rows * _held_bytes(pipeline))

    return take


def _certifying(pipeline: Pipeline, store: Store, _key: str) -> Load:
    n_rows = count_rows(pipeline, store, pipeline.train_indices)
    return Load(n_rows, n_rows * ID_BYTES * len(row_formats(pipeline)), 0, 2 * len(pipeline.train_indices), 1)  # ids alone are read
