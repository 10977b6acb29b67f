"""The shuffle as assets: its plan, one asset per distribution pass, the mixed shards and their certificate."""

import dagster as dg

from interp_assets.graph.faces import OWNERS, RETRIES, Events, Made, code_version, made, partition_keys, record
from interp_assets.graph.fanout import start_fanout
from interp_assets.graph.partitions import Layout, every, parent_bucket, same, whole
from interp_assets.planning.pipeline import shard_index
from interp_assets.planning.plots import plot_certificate
from interp_assets.planning.progress import Progress
from interp_assets.shuffle.generations import generation_of, newest
from interp_assets.shuffle.grown import certify_mixed, mix_bucket
from interp_assets.shuffle.plan import make_shuffle_plan
from interp_assets.shuffle.refs import SHUFFLE_VERSION, bucket_index, pass_name
from interp_assets.shuffle.split import split_bucket, split_shard
from interp_assets.storage.manifest import Produced
from resources.world import World

GROUP = "shuffle"


def make_assets(layout: Layout) -> list[dg.AssetsDefinition]:
    """Make the assets of this stage: with P passes there are P - 1 distribution passes before the mixed shards."""
    first = [_first_pass(layout)] if layout.config.shuffle.passes > 1 else []
    middle = [_middle_pass(layout, pass_index) for pass_index in range(2, layout.config.shuffle.passes)]
    return [_shuffle_plan(layout), *first, *middle, _mixed_shards(layout), _shuffle_certificate(layout)]


def _shuffle_plan(layout: Layout) -> dg.AssetsDefinition:
    @dg.asset(
        deps=[every("token_shards")],
        group_name=GROUP,
        owners=OWNERS,
        retry_policy=RETRIES,
        kinds=layout.kinds("python", "json"),
        code_version=code_version(SHUFFLE_VERSION, layout.config.shuffle),
        description=(
            "How many rows go from every job to every bucket, in every pass, drawn from the exact joint law, and what the shuffle will cost. "
            "It needs only the row counts of the token shards, so it can be read before a single activation exists."
        ),
    )
    def shuffle_plan(context: dg.AssetExecutionContext, world: World, progress: dg.ResourceParam[Progress]) -> Events:
        pipeline, store = world.open()
        yield from record(context, lambda _key: made([make_shuffle_plan(newest(pipeline), store)], store.url), progress)

    return shuffle_plan


def make_partition(config_json: str, key: str) -> list[Produced]:
    """Split one shard in pass 1, wherever this runs; a shard that is not shuffled has nothing."""
    pipeline, store = World(config_json=config_json).open()
    index, hook_points = shard_index(key), pipeline.config.harvest.hook_points
    own = generation_of(pipeline, index)
    return [split_shard(own, store, hook_point, index) for hook_point in hook_points] if index in pipeline.train_indices else []


def _first_pass(layout: Layout) -> dg.AssetsDefinition:
    @dg.asset(
        partitions_def=layout.shards,
        deps=[same("activations"), whole("shuffle_plan")],
        group_name=GROUP,
        owners=OWNERS,
        retry_policy=RETRIES,
        op_tags=layout.in_memory(),
        kinds=layout.kinds("python", "numpy"),
        code_version=code_version(SHUFFLE_VERSION, layout.config.shuffle),
        backfill_policy=layout.spread(),
        description=(
            "The rows of one corpus shard, permuted in memory and written as one file with a contiguous range for every bucket. The unit of work is "
            "a corpus shard, so a lost shard is one partition all the way to here. Held-out shards measure and are not shuffled: their partitions "
            "finish at once and hold nothing."
        ),
    )
    def shuffle_pass_1(context: dg.AssetExecutionContext, world: World, progress: dg.ResourceParam[Progress]) -> Events:
        pipeline, store = world.open()
        fanout = start_fanout(make_partition, world.config_json, partition_keys(context))

        def work(key: str) -> Made:
            index = shard_index(key)
            if fanout and index in pipeline.train_indices:
                return made(fanout.take(key), store.url)
            if index in pipeline.held_out_indices:
                return made([], store.url, note="held out: measured, not shuffled")
            if index in pipeline.pending_indices:
                return made([], store.url, note="waits for the next retraining")
            hook_points, own = pipeline.config.harvest.hook_points, generation_of(pipeline, index)
            return made([split_shard(own, store, hook_point, index, progress.advance) for hook_point in hook_points], store.url)

        yield from record(context, work, progress)

    return shuffle_pass_1


def _middle_pass(layout: Layout, pass_index: int) -> dg.AssetsDefinition:
    fan_out = layout.config.shuffle.fan_out
    before = pass_name(pass_index - 1)

    @dg.asset(
        name=pass_name(pass_index),
        partitions_def=layout.buckets(pass_index - 1),
        deps=[every(before) if pass_index == 2 else parent_bucket(before, fan_out ** (pass_index - 2), fan_out), whole("shuffle_plan")],
        group_name=GROUP,
        owners=OWNERS,
        retry_policy=RETRIES,
        op_tags=layout.in_memory(),
        kinds=layout.kinds("python", "numpy"),
        code_version=code_version(SHUFFLE_VERSION, layout.config.shuffle),
        backfill_policy=layout.spread(),
        description=(
            f"One bucket of pass {pass_index - 1}, gathered from all its jobs, permuted and divided over {fan_out} smaller buckets. The unit of work "
            "is a bucket; several jobs share one when it exceeds the memory of a job."
        ),
    )
    def shuffle_pass(context: dg.AssetExecutionContext, world: World, progress: dg.ResourceParam[Progress]) -> Events:
        pipeline, store = world.open()

        def work(key: str) -> Made:
            bucket, hook_points = bucket_index(key), pipeline.config.harvest.hook_points
            split = [split_bucket(newest(pipeline), store, hook_point, pass_index, bucket, progress.advance) for hook_point in hook_points]
            return made([item for items in split for item in items], store.url)

        yield from record(context, work, progress)

    return shuffle_pass


def _mixed_shards(layout: Layout) -> dg.AssetsDefinition:
    passes, fan_out = layout.config.shuffle.passes, layout.config.shuffle.fan_out
    sources = {1: every("activations"), 2: every(pass_name(1))}
    source = sources[passes] if passes in sources else parent_bucket(pass_name(passes - 1), fan_out ** (passes - 2), fan_out)

    @dg.asset(
        partitions_def=layout.buckets(passes - 1),
        deps=[source, whole("shuffle_plan")],
        group_name=GROUP,
        owners=OWNERS,
        retry_policy=RETRIES,
        op_tags=layout.in_memory(),
        kinds=layout.kinds("python", "numpy"),
        code_version=code_version(SHUFFLE_VERSION, layout.config.shuffle),
        backfill_policy=layout.spread(),
        description=(
            "One bucket of the shuffled data: its ranges gathered from the files of the pass before and permuted once more, so that all mixed shards "
            "in order are one uniform permutation of the training rows. The unit of work is a bucket. Every row keeps its row id."
        ),
    )
    def mixed_shards(context: dg.AssetExecutionContext, world: World, progress: dg.ResourceParam[Progress]) -> Events:
        pipeline, store = world.open()

        def work(key: str) -> Made:
            bucket, hook_points = bucket_index(key), pipeline.config.harvest.hook_points
            return made([mix_bucket(pipeline, store, hook_point, bucket, progress.advance) for hook_point in hook_points], store.url)

        yield from record(context, work, progress)

    return mixed_shards


def _shuffle_certificate(layout: Layout) -> dg.AssetsDefinition:
    @dg.asset(
        deps=[every("activations"), every("mixed_shards"), whole("shuffle_plan")],
        group_name=GROUP,
        owners=OWNERS,
        retry_policy=RETRIES,
        kinds=layout.kinds("python", "json"),
        code_version=code_version(SHUFFLE_VERSION),
        description=(
            "Proof that no row was lost or doubled (equal multiset hashes before and after) and that the order looks uniform (chi-square of "
            "destinations, autocorrelation of documents). Training refuses data without it. Look at the verdicts and at the lag plot."
        ),
    )
    def shuffle_certificate(context: dg.AssetExecutionContext, world: World, progress: dg.ResourceParam[Progress]) -> Events:
        pipeline, store = world.open()

        def work(_key: str) -> Made:
            proofs = {hook_point: certify_mixed(pipeline, store, hook_point, progress.advance) for hook_point in pipeline.config.harvest.hook_points}
            plots = {f"mixing.{hook_point}": dg.MetadataValue.md(plot_certificate(store, item)) for hook_point, item in proofs.items()}
            return made(list(proofs.values()), store.url, **plots)

        yield from record(context, work, progress)

    return shuffle_certificate
