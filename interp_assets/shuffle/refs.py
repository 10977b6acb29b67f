"""Where the shuffle's plan, split files, mixed shards and certificates lie."""

from typing import NamedTuple

from interp_assets.corpus.refs import token_ids
from interp_assets.errors import ArtifactMissingError
from interp_assets.harvest.refs import activation_ids, activation_shard_ref, hook_folder
from interp_assets.planning.pipeline import Pipeline, shard_key
from interp_assets.shuffle.generations import before, generation_of, has_grown, newest
from interp_assets.shuffle.sizes import ShuffleSizes
from interp_assets.storage.manifest import ArtifactRef, combine_ids, make_ref

FOLDER = "3-shuffle"
SHUFFLE_VERSION = 2
"""Raise it when the same plan would give another order, or its artifacts keep other digests."""


class Shape(NamedTuple):
    """The two numbers that decide a shuffle's sizes and order."""

    passes: int
    fan_out: int


def find_shape(pipeline: Pipeline) -> Shape | None:
    """Return the shuffle's numbers, as the configuration states or the plan has chosen them; None before it has."""
    if stated := pipeline.config.shuffle.stated:
        return Shape(*stated)
    chosen = pipeline.plan.shuffle
    return Shape(chosen.passes, chosen.fan_out) if chosen else None


def shape_of(pipeline: Pipeline) -> Shape:
    """Return the shuffle's numbers. Raises `ArtifactMissingError` before they are chosen."""
    if (shape := find_shape(pipeline)) is None:
        raise ArtifactMissingError(
            f"The plan of pipeline {pipeline.config.name!r} has not chosen passes and fan-out of the shuffle yet: that takes the token shards' rows. "
            "Materialize `shuffle_plan` (or `interp run`) first."
        )
    return shape


def shuffle_plan_ref(pipeline: Pipeline) -> ArtifactRef:
    """Address the plan: row counts of the training shards, seed, passes and fan-out. Shared by all hook points, so their rows align.

    A pipeline that has grown has the plan of its newest generation.
    """
    pipeline = newest(pipeline)
    return pipeline.remember("shuffle_plan_ref", lambda: _plan_ref(pipeline))


def split_shard_ref(pipeline: Pipeline, hook_point: str, index: int) -> ArtifactRef:
    """Address pass 1's output for one corpus shard: one file with a contiguous range of rows for each bucket."""
    pipeline = generation_of(pipeline, index)
    inputs = {"plan": shuffle_plan_ref(pipeline).artifact_id, "activation_shard": activation_shard_ref(pipeline, hook_point, index).artifact_id}
    return _ref("split_shard", hook_point, "/pass-1", shard_key(index), {"pass": 1, "shard": index}, inputs)


def split_bucket_ref(pipeline: Pipeline, hook_point: str, pass_index: int, bucket: int, job: int) -> ArtifactRef:
    """Address the output of job `job` on bucket `bucket` of pass `pass_index` - 1 (`pass_index` >= 2)."""
    identity = {"pass": pass_index, "bucket": bucket, "job": job}
    label = f"{bucket_key(bucket)}.job-{job:03d}"
    return _ref("split_shard", hook_point, f"/pass-{pass_index}", label, identity, _inputs(newest(pipeline), hook_point))


def list_inputs(pipeline: Pipeline, hook_point: str, sizes: ShuffleSizes | None, pass_index: int, bucket: int) -> list[ArtifactRef]:
    """Address what input bucket `bucket` of a pass is read from: activation shards in pass 1, the files of its parent's jobs later.

    `sizes` are needed from pass 3 on.
    """
    if pass_index == 1:
        return [activation_shard_ref(pipeline, hook_point, index) for index in newest(pipeline).train_indices]
    return list_splits(pipeline, hook_point, sizes, pass_index - 1, bucket // shape_of(pipeline).fan_out)


def list_splits(pipeline: Pipeline, hook_point: str, sizes: ShuffleSizes | None, pass_index: int, bucket: int) -> list[ArtifactRef]:
    """Address the files of all jobs of input bucket `bucket` of a distributing pass, in order of job; `sizes` are needed from pass 2 on."""
    if pass_index == 1:
        own = newest(pipeline)
        return own.remember(("splits", hook_point), lambda: [split_shard_ref(own, hook_point, index) for index in own.train_indices])
    assert sizes is not None
    return [split_bucket_ref(pipeline, hook_point, pass_index, bucket, job) for job in range(len(sizes.job_rows(pass_index, bucket)))]


def mixed_shard_ref(pipeline: Pipeline, hook_point: str, bucket: int) -> ArtifactRef:
    """Address a final, uniformly mixed shard; in a pipeline that has grown, one that old and new rows were merged into."""
    if has_grown(pipeline):
        return merged_shard_ref(pipeline, hook_point, bucket, n_mixed_shards(pipeline), mixed_sources(pipeline, hook_point))
    return _ref("mixed_shard", hook_point, "/mixed", bucket_key(bucket), {"bucket": bucket}, _inputs(pipeline, hook_point))


def merged_shard_ref(pipeline: Pipeline, hook_point: str, bucket: int, n_buckets: int, inputs: dict[str, str]) -> ArtifactRef:
    """Address a merged shard; `inputs` are the combined ids of the mixed shards it was merged from, `old` and `new`."""
    identity = {"seed": pipeline.config.seed, "bucket": bucket, "n_buckets": n_buckets}
    return _ref("mixed_shard", hook_point, "/appended", bucket_key(bucket), identity, inputs)


def mixed_sources(pipeline: Pipeline, hook_point: str) -> dict[str, str]:
    """Return the combined ids of the mixed shards that a pipeline which has grown is merged from."""
    return {"old": mixed_ids(before(pipeline), hook_point), "new": mixed_ids(newest(pipeline), hook_point)}


def certificate_ref(pipeline: Pipeline, hook_point: str) -> ArtifactRef:
    """Address the proof that the mixed shards hold the same rows in an order that looks uniform."""
    inputs = {**_inputs(pipeline, hook_point), **(mixed_sources(pipeline, hook_point) if has_grown(pipeline) else {})}
    return _ref("shuffle_certificate", hook_point, "", "certificate", {}, inputs)


def n_mixed_shards(pipeline: Pipeline) -> int:
    """Return how many mixed shards there are. Raises like `shape_of`."""
    passes, fan_out = shape_of(pipeline)
    return fan_out ** (passes - 1)


def mixed_ids(pipeline: Pipeline, hook_point: str) -> str:
    """Combine the ids of all mixed shards of a hook point into one input id."""
    buckets = range(n_mixed_shards(pipeline))
    question = ("mixed_ids", hook_point)
    return pipeline.remember(question, lambda: combine_ids([mixed_shard_ref(pipeline, hook_point, bucket).artifact_id for bucket in buckets]))


def pass_name(pass_index: int) -> str:
    """Name the asset of a distribution pass; the last pass makes `mixed_shards`."""
    return f"shuffle_pass_{pass_index}"


def bucket_key(bucket: int) -> str:
    """Return the partition key of a bucket, for example `bucket-00003`."""
    return f"bucket-{bucket:05d}"


def bucket_index(key: str) -> int:
    """Return the bucket of a partition key."""
    return int(key.removeprefix("bucket-"))


def _ref(kind: str, hook_point: str, folder: str, label: str, identity: dict[str, int], inputs: dict[str, str]) -> ArtifactRef:
    """Address what is made of one hook point's rows."""
    where = f"{FOLDER}/{hook_folder(hook_point)}{folder}"
    return make_ref(kind, where, identity={"code": SHUFFLE_VERSION, **identity}, inputs=inputs, label=label, hook_point=hook_point)


def _inputs(pipeline: Pipeline, hook_point: str) -> dict[str, str]:
    return {"plan": shuffle_plan_ref(pipeline).artifact_id, "activation_shards": activation_ids(pipeline, hook_point, pipeline.train_indices)}


def _plan_ref(pipeline: Pipeline) -> ArtifactRef:
    passes, fan_out = shape_of(pipeline)
    identity = {"code": SHUFFLE_VERSION, "seed": pipeline.config.seed, "passes": passes, "fan_out": fan_out}
    inputs = {"token_shards": token_ids(pipeline, pipeline.train_indices)}
    return make_ref("shuffle_plan", FOLDER, identity=identity, inputs=inputs, label="plan")
