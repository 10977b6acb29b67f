"""Feature evidence as assets: four passes over the activations for each SAE that the configuration wants shown."""

import dagster as dg

from interp_assets.graph.faces import GPU_POOL, OWNERS, RETRIES, Events, Made, code_version, made, record
from interp_assets.graph.partitions import SHARD_DIMENSION, SLICE_DIMENSION, Layout, every, only, same, same_shard, same_slice
from interp_assets.planning.pipeline import shard_index
from interp_assets.planning.progress import Progress
from interp_assets.train.checkpoint import load_sae
from interp_assets.visualize.candidates import find_candidates
from interp_assets.visualize.examples import select_examples
from interp_assets.visualize.records import write_records
from interp_assets.visualize.refs import FEATURES_VERSION, features_key, slice_index, split_grid_key
from interp_assets.visualize.windows import fire_windows
from resources.world import World


def make_assets(layout: Layout) -> list[dg.AssetsDefinition]:
    """Make the assets of this stage: one group for each SAE of `features.saes`."""
    passes = (_feature_candidates, _feature_examples, _example_activations, _feature_records)
    return [make(layout, sae) for sae in layout.config.features.saes for make in passes]


def group_of(sae: str) -> str:
    """Name the asset group of one SAE's features."""
    return "features_" + "".join(char if char.isalnum() else "_" for char in sae)


def _feature_candidates(layout: Layout, name: str) -> dg.AssetsDefinition:
    @dg.asset(
        key=list(features_key(name, "feature_candidates")),
        partitions_def=layout.grid,
        deps=[only("sae", [name]), same_shard("activations"), same_shard("token_shards")],
        group_name=group_of(name),
        owners=OWNERS,
        retry_policy=RETRIES,
        pool=GPU_POOL,
        op_tags=layout.on_gpu(),
        kinds=layout.kinds("pytorch", "parquet"),
        code_version=code_version(FEATURES_VERSION, layout.config.features),
        backfill_policy=dg.BackfillPolicy.single_run(),
        description=(
            f"Where the latents of {name} fire in one shard: their strongest tokens, a uniform random sample of the others, and exact counts. "
            "The unit of work is a latent slice of one shard. Look at the number of firings and at rows per second."
        ),
    )
    def feature_candidates(context: dg.AssetExecutionContext, world: World, progress: dg.ResourceParam[Progress]) -> Events:
        pipeline, store = world.open()
        sae = load_sae(pipeline, store, name)

        def work(key: str) -> Made:
            latent_slice, index = split_grid_key(key)
            return made([find_candidates(pipeline, store, sae, name, index, latent_slice, progress.advance)], store.url)

        yield from record(context, work, progress)

    assert {SLICE_DIMENSION, SHARD_DIMENSION} == set(layout.grid.partition_dimension_names)
    return feature_candidates


def _feature_examples(layout: Layout, name: str) -> dg.AssetsDefinition:
    @dg.asset(
        key=list(features_key(name, "feature_examples")),
        partitions_def=layout.slices,
        deps=[same_slice(features_key(name, "feature_candidates")), every("token_shards")],
        group_name=group_of(name),
        owners=OWNERS,
        retry_policy=RETRIES,
        kinds=layout.kinds("python", "parquet"),
        code_version=code_version(FEATURES_VERSION, layout.config.features),
        backfill_policy=layout.spread(),
        description=(
            f"The dataset examples of {name}, chosen from the candidates of all shards: the strongest, those from each quantile interval, and random "
            "ones. The unit of work is a latent slice. Look at how many latents are dead."
        ),
    )
    def feature_examples(context: dg.AssetExecutionContext, world: World, progress: dg.ResourceParam[Progress]) -> Events:
        pipeline, store = world.open()
        yield from record(context, lambda key: made([select_examples(pipeline, store, name, slice_index(key))], store.url), progress)

    return feature_examples


def _example_activations(layout: Layout, name: str) -> dg.AssetsDefinition:
    @dg.asset(
        key=list(features_key(name, "example_activations")),
        partitions_def=layout.shards,
        deps=[
            every(features_key(name, "feature_examples")),
            same_shard(features_key(name, "feature_candidates")),
            same("activations"),
            same("token_shards"),
            only("sae", [name]),
        ],
        group_name=group_of(name),
        owners=OWNERS,
        retry_policy=RETRIES,
        pool=GPU_POOL,
        op_tags=layout.on_gpu(),
        kinds=layout.kinds("pytorch", "parquet"),
        code_version=code_version(FEATURES_VERSION, layout.config.features),
        backfill_policy=layout.spread(),
        description=(
            f"How the latents of {name} fire on the tokens around their examples, for the examples that lie in one shard. "
            "The unit of work is a corpus shard. Look at the number of windows."
        ),
    )
    def example_activations(context: dg.AssetExecutionContext, world: World, progress: dg.ResourceParam[Progress]) -> Events:
        pipeline, store = world.open()
        sae = load_sae(pipeline, store, name)
        yield from record(context, lambda key: made([fire_windows(pipeline, store, sae, name, shard_index(key))], store.url), progress)

    return example_activations


def _feature_records(layout: Layout, name: str) -> dg.AssetsDefinition:
    @dg.asset(
        key=list(features_key(name, "feature_records")),
        partitions_def=layout.slices,
        deps=[
            same(features_key(name, "feature_examples")),
            every(features_key(name, "example_activations")),
            every("token_shards"),
            only("sae", [name]),
            only("sae_evaluation", [name]),
        ],
        group_name=group_of(name),
        owners=OWNERS,
        retry_policy=RETRIES,
        pool=GPU_POOL,
        op_tags=layout.on_gpu(),
        kinds=layout.kinds("pytorch", "json"),
        code_version=code_version(FEATURES_VERSION, layout.config.features),
        backfill_policy=layout.spread(),
        description=(
            f"What a person sees of each latent of {name}: examples with their tokens coloured, statistics, the words it raises and lowers, its "
            "neighbours. The unit of work is a latent slice. One range request opens one feature."
        ),
    )
    def feature_records(context: dg.AssetExecutionContext, world: World, progress: dg.ResourceParam[Progress]) -> Events:
        pipeline, store = world.open()
        sae, tokenizer, unembedding = load_sae(pipeline, store, name), world.tokenizer(), world.model().unembedding()

        def work(key: str) -> Made:
            return made([write_records(pipeline, store, name, sae, slice_index(key), tokenizer, unembedding, progress.advance)], store.url)

        yield from record(context, work, progress)

    return feature_records
