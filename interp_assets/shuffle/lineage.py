"""Whose digests the shuffle's artifacts keep: row counts for the plan; the plan and the rows that were read for all others.

    plan            token shards of the training shards (of the newest generation, where the pipeline has grown)
    split shard     its activation shard, or all files of its bucket in the pass before; and the plan
    mixed shard     the files of its bucket in the last distributing pass, with one pass the activation shards; and the plan
    merged shard    the mixed shards of both generations, whose own lineages lie between it and what the road lists

Rows may be deleted once they have gone through: what is gone says nothing.
"""

from interp_assets.corpus.refs import token_shard_ref
from interp_assets.harvest.refs import activation_shard_ref
from interp_assets.planning.pipeline import Pipeline
from interp_assets.shuffle.generations import before, generation_of, has_grown, newest
from interp_assets.shuffle.plan import load_shard_rows, make_sizes, split_bucket_refs
from interp_assets.shuffle.refs import list_inputs, mixed_shard_ref, n_mixed_shards, shape_of, shuffle_plan_ref, split_shard_ref
from interp_assets.storage.lineage import Lineage
from interp_assets.storage.manifest import ArtifactRef
from interp_assets.storage.store import Store


def plan_lineage(pipeline: Pipeline) -> Lineage:
    """Return what the shuffle's plan keeps."""
    own = newest(pipeline)
    return Lineage(shuffle_plan_ref(own), [token_shard_ref(own, index) for index in own.train_indices])


def split_lineage(pipeline: Pipeline, hook_point: str, index: int) -> Lineage:
    """Return what pass 1's output for one training shard keeps."""
    own = generation_of(pipeline, index)
    sources = [activation_shard_ref(own, hook_point, index), shuffle_plan_ref(own)]
    return Lineage(split_shard_ref(own, hook_point, index), sources, may_be_gone=True)


def bucket_lineage(pipeline: Pipeline, store: Store, ref: ArtifactRef, pass_index: int, bucket: int) -> Lineage:
    """Return what `ref`, made of input bucket `bucket` of a pass, keeps. Raises `ArtifactMissingError` without token shards."""
    own = newest(pipeline)
    sizes = make_sizes(own, load_shard_rows(own, store)) if pass_index > 2 else None
    return Lineage(ref, [*list_inputs(own, ref.hook_point, sizes, pass_index, bucket), shuffle_plan_ref(own)], may_be_gone=True)


def middle_lineages(pipeline: Pipeline, store: Store, pass_index: int, bucket: int) -> list[Lineage]:
    """Return what the files of all jobs and hook points of a bucket of a middle pass keep."""
    return [bucket_lineage(pipeline, store, ref, pass_index, bucket) for ref in split_bucket_refs(pipeline, store, pass_index, bucket)]


def mixed_lineages(pipeline: Pipeline, store: Store, hook_point: str, bucket: int) -> list[Lineage]:
    """Return what a mixed shard keeps, and before it what any mixed shards keep that it is merged from."""
    ref = mixed_shard_ref(pipeline, hook_point, bucket)
    if not has_grown(pipeline):
        return [bucket_lineage(pipeline, store, ref, shape_of(pipeline).passes, bucket)]
    parts = [(part, own) for part in (before(pipeline), newest(pipeline)) for own in range(n_mixed_shards(pipeline))]

    def collect() -> list[Lineage]:
        return [lineage for part, own in parts for lineage in mixed_lineages(part, store, hook_point, own)]

    between = pipeline.remember(("merged from", hook_point), collect)
    return [*between, Lineage(ref, [mixed_shard_ref(part, hook_point, own) for part, own in parts], may_be_gone=True)]
