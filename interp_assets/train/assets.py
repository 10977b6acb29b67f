"""SAEs as assets: one partition per experiment of the sweep, trained together, measured on the held-out shards, and compared in one table."""

import time

import dagster as dg

from interp_assets.errors import CertificateError
from interp_assets.graph.faces import GPU_POOL, OWNERS, RETRIES, Events, Made, Shared, code_version, interruptible, made, partition_keys, record
from interp_assets.graph.partitions import Layout, every, only, same, whole
from interp_assets.planning.pipeline import Pipeline, shard_key
from interp_assets.planning.plots import plot_curves, plot_frequencies, plot_pareto, plot_training
from interp_assets.planning.progress import Progress
from interp_assets.shuffle.refs import certificate_ref
from interp_assets.storage.manifest import load_manifest
from interp_assets.storage.store import Store
from interp_assets.storage.traffic import METER
from interp_assets.train.evaluate import evaluate_sae
from interp_assets.train.launch import run_training
from interp_assets.train.loop import training_rows
from interp_assets.train.refs import EVALUATION_VERSION, IMPORT_VERSION, SWEEP_VERSION, TRAIN_VERSION, sae_ref
from interp_assets.train.reports import describe_speed, describe_sweep, make_listener
from interp_assets.train.resume import has_checkpoint
from interp_assets.train.sweep import make_sweep
from resources.world import World

GROUP = "train"


def make_assets(layout: Layout) -> list[dg.AssetsDefinition]:
    """Make the assets of this stage."""
    return [_sae(layout), _sae_evaluation(layout), _sweep(layout)]


def _sae(layout: Layout) -> dg.AssetsDefinition:
    @dg.asset(
        partitions_def=layout.experiments,
        deps=[every("mixed_shards"), whole("activation_statistics"), whole("shuffle_certificate")],
        group_name=GROUP,
        owners=OWNERS,
        retry_policy=RETRIES,
        pool=GPU_POOL,
        op_tags=layout.on_gpu(),
        kinds=layout.kinds("pytorch"),
        code_version=f"{code_version(TRAIN_VERSION)}.{code_version(IMPORT_VERSION)}",
        backfill_policy=dg.BackfillPolicy.single_run(),
        description=(
            "A trained sparse autoencoder: weights and configuration in a folder that SAELens opens, and its training curve. The unit of work is an "
            "experiment; those of one run share one reader and see identical batches. Look at the loss curve, L0 and FVU, at the profile, and at "
            "the share of the time that training waited for rows. An experiment with `imported` is read from another tool's folder instead."
        ),
    )
    def sae(context: dg.AssetExecutionContext, world: World, progress: dg.ResourceParam[Progress]) -> Events:
        pipeline, store = world.open()
        names = partition_keys(context)
        _require_certificates(pipeline, store, names)
        progress.begin("sae", ", ".join(names), training_rows(pipeline, names))
        begun_before = {name for name in names if has_checkpoint(store, sae_ref(pipeline, name))}
        before, begun = METER.total(), time.monotonic()
        with interruptible(progress):
            trained = run_training(pipeline, store, names, progress.advance, make_listener(context.log.info))
        shared = Shared(METER.total().since(before), time.monotonic() - begun)

        def work(key: str) -> Made:
            item = trained[key]
            shown = {name: dg.MetadataValue.md(text) for name, text in describe_speed(store, item).items()}
            if not pipeline.config.sae(key).imported:
                shown["training"] = dg.MetadataValue.md(plot_training(store, item))
            return made([item], store.url, **shown)._replace(is_whole=key not in begun_before)

        yield from record(context, work, progress, shared)

    return sae


def _sae_evaluation(layout: Layout) -> dg.AssetsDefinition:
    held_out = [shard_key(index) for index in range(layout.config.corpus.held_out_shards)]

    @dg.asset(
        partitions_def=layout.experiments,
        deps=[same("sae"), only("activations", held_out), whole("activation_statistics")],
        group_name=GROUP,
        owners=OWNERS,
        retry_policy=RETRIES,
        pool=GPU_POOL,
        op_tags=layout.on_gpu(),
        kinds=layout.kinds("pytorch", "parquet"),
        code_version=code_version(EVALUATION_VERSION),
        backfill_policy=dg.BackfillPolicy.single_run(),
        description=(
            "An SAE measured on the held-out shards, which it has never seen: L0, FVU, share of the model's loss recovered when its reconstruction "
            "is put in place, KL divergence, dead latents. The unit of work is an experiment. Look at the histogram of firing frequencies."
        ),
    )
    def sae_evaluation(context: dg.AssetExecutionContext, world: World, progress: dg.ResourceParam[Progress]) -> Events:
        pipeline, store = world.open()
        model = world.model()

        def work(key: str) -> Made:
            item = evaluate_sae(pipeline, store, model, key, progress.advance)
            return made([item], store.url, firing_frequency=dg.MetadataValue.md(plot_frequencies(store, item)))

        yield from record(context, work, progress)

    return sae_evaluation


def _sweep(layout: Layout) -> dg.AssetsDefinition:
    @dg.asset(
        deps=[every("sae"), every("sae_evaluation")],
        group_name=GROUP,
        owners=OWNERS,
        retry_policy=RETRIES,
        kinds=layout.kinds("parquet", "polars"),
        code_version=code_version(SWEEP_VERSION),
        description=(
            "All SAEs of the pipeline in one table: configuration, quality on the held-out shards, speed, and artifact ids of each; polars, DuckDB "
            "and pandas read it. Look at the Pareto plot of L0 and FVU, and at the learning curves side by side."
        ),
    )
    def sweep(context: dg.AssetExecutionContext, world: World, progress: dg.ResourceParam[Progress]) -> Events:
        pipeline, store = world.open()

        def work(_key: str) -> Made:
            item = make_sweep(pipeline, store)
            text = {"pareto": plot_pareto(store, item), "learning_curves": plot_curves(store, item), "saes": describe_sweep(store, item)}
            return made([item], store.url, **{name: dg.MetadataValue.md(value) for name, value in text.items()})

        yield from record(context, work, progress)

    return sweep


def _require_certificates(pipeline: Pipeline, store: Store, names: list[str]) -> None:
    """Refuse to train on rows whose shuffle is not proven. Raises `CertificateError`."""
    configs = [config for config in (pipeline.config.sae(name) for name in names) if not config.imported]
    for hook_point in sorted({hook_point for config in configs for hook_point in (*config.sources, *config.targets)}):
        certificate = load_manifest(store, certificate_ref(pipeline, hook_point))
        if not certificate.facts["passed"]:
            raise CertificateError(
                f"The shuffle of {hook_point} has no valid certificate ({store.url}/{certificate_ref(pipeline, hook_point).path}): training would "
                "learn its order. Read its verdicts with `interp inspect`, and materialize the mixed shards again."
            )
