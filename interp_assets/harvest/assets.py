"""Activations as assets: one forward pass per shard for all hook points, and statistics over the training shards."""

import dagster as dg

from interp_assets.faces import GPU_POOL, OWNERS, RETRIES, Events, Made, code_version, made, record
from interp_assets.harvest.activations import harvest_shard
from interp_assets.harvest.refs import ACTIVATION_SHARD_VERSION
from interp_assets.harvest.statistics import merge_statistics
from interp_assets.partitions import Layout, every, same
from interp_assets.pipeline import shard_index
from interp_assets.plots import plot_norms
from interp_assets.progress import Progress
from resources.world import World

GROUP = "harvest"


def make_assets(layout: Layout) -> list[dg.AssetsDefinition]:
    """Make the assets of this stage."""
    return [_activations(layout), _activation_statistics(layout)]


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
        model = world.model()

        def work(key: str) -> Made:
            shards = harvest_shard(pipeline, store, model, shard_index(key), progress.advance)
            norms = {f"mean_norm.{hook_point}": float(item.manifest.facts["mean_norm"]) for hook_point, item in shards.items()}
            return made(list(shards.values()), store.url, **norms)

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
