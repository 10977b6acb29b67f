"""Activations as assets: one forward pass per shard for all hook points, and statistics over the training shards."""

from functools import partial

import dagster as dg

from interp_assets.garcon.device import choose_device
from interp_assets.graph.faces import GPU_POOL, OWNERS, RETRIES, Events, Made, code_version, made, partition_keys, record
from interp_assets.graph.fanout import start_fanout
from interp_assets.graph.partitions import Layout, every, same
from interp_assets.harvest.activations import harvest_shard
from interp_assets.harvest.refs import ACTIVATION_SHARD_VERSION
from interp_assets.harvest.statistics import merge_statistics
from interp_assets.planning.pipeline import shard_index
from interp_assets.planning.plots import plot_norms
from interp_assets.planning.progress import Progress
from interp_assets.storage.manifest import Produced
from resources.world import World

GROUP = "harvest"


def make_assets(layout: Layout) -> list[dg.AssetsDefinition]:
    """Make the assets of this stage."""
    return [_activations(layout), _activation_statistics(layout)]


def make_partition(config_json: str, key: str) -> list[Produced]:
    """Make the activations of one shard, wherever this runs."""
    world = World(config_json=config_json)
    pipeline, store = world.open()
    return list(harvest_shard(pipeline, store, world.model(), shard_index(key)).values())


def _activations(layout: Layout) -> dg.AssetsDefinition:
    @dg.asset(
        partitions_def=layout.shards,
        deps=[same("token_shards")],
        group_name=GROUP,
        owners=OWNERS,
        retry_policy=RETRIES,
        pool=GPU_POOL,
        op_tags=layout.on_gpu(),
        kinds=layout.kinds("pytorch", "huggingface"),
        code_version=code_version(ACTIVATION_SHARD_VERSION, layout.config.model, layout.config.harvest),
        backfill_policy=layout.spread(),
        description=(
            "What the subject model computes at every token position of one corpus shard: one row per position, in safetensors, for all hook points "
            "from a single forward pass. The unit of work is a corpus shard. Look at rows per second, and at the mean norm: "
            "it should hardly differ between shards."
        ),
    )
    def activations(context: dg.AssetExecutionContext, world: World, progress: dg.ResourceParam[Progress]) -> Events:
        pipeline, store = world.open()
        n_gpus = float(choose_device(pipeline.config.execution.device).type == "cuda")
        fanout = start_fanout(make_partition, world.config_json, partition_keys(context), n_gpus=n_gpus)

        harvest = None if fanout else partial(harvest_shard, pipeline, store, world.model(), progress=progress.advance)

        def work(key: str) -> Made:
            shards = fanout.take(key) if fanout else list(harvest(shard_index(key)).values()) if harvest else []
            facts = zip(pipeline.config.harvest.hook_points, (item.manifest.facts for item in shards), strict=True)
            norms = {f"mean_norm.{hook_point}": float(item["mean_norm"]) for hook_point, item in facts}
            return made(shards, store.url, **norms, **({"node": fanout.where(key)} if fanout else {}))

        yield from record(context, work, progress)

    return activations


def _activation_statistics(layout: Layout) -> dg.AssetsDefinition:
    @dg.asset(
        deps=[every("activations")],
        group_name=GROUP,
        owners=OWNERS,
        retry_policy=RETRIES,
        kinds=layout.kinds("python", "numpy"),
        code_version=code_version(1),
        description=(
            "Count, mean, variance and norm histogram of every hook point over all training shards, merged from what each shard measured. "
            "Training divides by the mean squared norm, and a dimension far above the others is an outlier worth knowing. Look at the histogram."
        ),
    )
    def activation_statistics(context: dg.AssetExecutionContext, world: World, progress: dg.ResourceParam[Progress]) -> Events:
        pipeline, store = world.open()

        def work(_key: str) -> Made:
            merged = {hook_point: merge_statistics(pipeline, store, hook_point) for hook_point in pipeline.config.harvest.hook_points}
            plots = {f"norms.{hook_point}": dg.MetadataValue.md(plot_norms(store, item)) for hook_point, item in merged.items()}
            return made(list(merged.values()), store.url, **plots)

        yield from record(context, work, progress)

    return activation_statistics
