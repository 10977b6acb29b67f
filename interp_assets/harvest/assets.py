"""Activations as assets: one forward pass per shard for all hook points, and statistics over the training shards."""

from collections.abc import Callable
from functools import partial
from typing import Final

from interp_assets.corpus.sizes import TOKEN_BYTES, rows_of
from interp_assets.harvest.checks import ACTIVATION_ROWS, OUTLIER_DIMENSIONS
from interp_assets.harvest.heads.assets import make_head_assets
from interp_assets.harvest.refs import ACTIVATION_SHARD_VERSION, TRUTH_VERSION, activation_shard_ref, read_dtypes, statistics_ref, truth_ref
from interp_assets.harvest.sizes import ROWS_PER_S, forward_s, model_bytes
from interp_assets.planning.asset import SHARDS, Asset, Job, Load, Markdown, Needs, Shown, name_facts, per_hook_point, same, training, whole
from interp_assets.planning.config import PipelineConfig, code_version
from interp_assets.planning.pipeline import Pipeline, shard_index
from interp_assets.storage.dtypes import ITEM_BYTES
from interp_assets.storage.manifest import ArtifactRef, Produced
from interp_assets.storage.store import Store

GROUP = "harvest"
_STATISTICS_BYTES_PER_DIMENSION: Final = 40
_WIDTH_OF_FORWARD: Final = 30
"""Values of the model's width that a forward pass holds for each token."""


def make_assets(config: PipelineConfig) -> list[Asset]:
    """List the assets of this stage."""
    return [
        Asset(
            key=("activations",),
            group=GROUP,
            kinds=("pytorch", "huggingface"),
            description=(
                "What the subject model computes at every token position of one corpus shard: one row per position, in safetensors, for all hook "
                "points from a single forward pass. The unit of work is a corpus shard. Look at rows per second, and at the mean norm: "
                "it should hardly differ between shards."
            ),
            axis=SHARDS,
            reads=(same("token_shards").remember(),),
            artifacts=_activations,
            make=_harvest,
            shows=_show_norms,
            takes=_harvesting,
            lightens="lower execution.tokens_per_batch, harvest fewer hook points, or load the model in bfloat16 (model.dtype)",
            work_kind=lambda config, _key: f"activations {config.model.name}",
            needs=Needs(accelerator=True),
            checks=(ACTIVATION_ROWS,),
            code_version=code_version(ACTIVATION_SHARD_VERSION, dtypes=read_dtypes(config)),
        ),
        Asset(
            key=("activation_statistics",),
            group=GROUP,
            kinds=("python", "numpy"),
            description=(
                "Count, mean, variance and norm histogram of every hook point over all training shards, merged from what each shard measured. "
                "Training divides by the mean squared norm, and a dimension far above the others is an outlier worth knowing. Look at the histogram."
            ),
            reads=(training("activations").remember(),),
            artifacts=per_hook_point(statistics_ref),
            make=_merge,
            shows=_show_histograms,
            takes=_merging,
            checks=(OUTLIER_DIMENSIONS,),
            code_version=code_version(1),
        ),
        *([_planting()] if config.corpus.is_planted else []),
        *make_head_assets(config),
    ]


def _planting() -> Asset:
    return Asset(
        key=("planted_truth",),
        group=GROUP,
        kinds=("pytorch",),
        description=(
            "The features that planted rows are made of: directions, how often they fire, and whose child each is. Evaluations compare with them."
        ),
        reads=(whole("corpus_plan"),),
        artifacts=lambda pipeline, _store, _key: [truth_ref(pipeline)],
        make=_publish_truth,
        shows=lambda _job, _key, made: {"features": made[0].manifest.facts["n_features"], "l0": made[0].manifest.facts["l0"]},
        code_version=code_version(TRUTH_VERSION),
    )


def _publish_truth(job: Job) -> Callable[[str], list[Produced]]:
    from interp_assets.harvest.planted import make_truth

    return lambda _key: [make_truth(job.pipeline, job.store)]


def _activations(pipeline: Pipeline, _store: Store, key: str) -> list[ArtifactRef]:
    return [activation_shard_ref(pipeline, hook_point, shard_index(key)) for hook_point in pipeline.config.harvest.hook_points]


def _harvest(job: Job) -> Callable[[str], list[Produced]]:
    if job.config.corpus.is_planted:
        from interp_assets.harvest.planted import make_planted_shard

        return lambda key: [make_planted_shard(job.pipeline, job.store, shard_index(key), job.progress.advance)]
    from interp_assets.harvest.activations import harvest_shard

    harvest = partial(harvest_shard, job.pipeline, job.store, job.world.model(), progress=job.progress.advance)
    return lambda key: list(harvest(shard_index(key)).values())


def _show_norms(job: Job, _key: str, made: list[Produced]) -> dict[str, Shown]:
    return name_facts(made, job.hook_points, "mean_norm", "mean_squared_norm")


def _harvesting(pipeline: Pipeline, store: Store, key: str) -> Load:
    config, n_rows, widths = pipeline.config, rows_of(pipeline, store, shard_index(key)), pipeline.plan.hook_widths
    row_bytes = sum(widths[name] for name in config.harvest.hook_points) * ITEM_BYTES[config.harvest.dtype]
    batch = min(config.execution.tokens_per_batch, n_rows) * max(widths.values()) * 4 * _WIDTH_OF_FORWARD
    return Load(
        rows=n_rows,
        read_bytes=n_rows * TOKEN_BYTES,
        written_bytes=n_rows * row_bytes,
        n_inputs=3,
        n_outputs=2 * len(config.harvest.hook_points),
        busy_s=max(n_rows / ROWS_PER_S, forward_s(pipeline, float(n_rows))),
        memory_bytes=model_bytes(pipeline) + batch,
    )


def _merge(job: Job) -> Callable[[str], list[Produced]]:
    from interp_assets.harvest.statistics import merge_statistics

    return lambda _key: [merge_statistics(job.pipeline, job.store, hook_point) for hook_point in job.hook_points]


def _show_histograms(job: Job, _key: str, made: list[Produced]) -> dict[str, Shown]:
    from interp_assets.harvest.plots import plot_norms

    drawn = {f"norms.{hook_point}": Markdown(plot_norms(job.store, item)) for hook_point, item in zip(job.hook_points, made, strict=True)}
    return {**name_facts(made, job.hook_points, "mean_norm", "mean_squared_norm", "variance", "max_mean_ratio"), **drawn}


def _merging(pipeline: Pipeline, _store: Store, _key: str) -> Load:
    n_train = len(pipeline.train_indices)
    width = sum(pipeline.d_in(hook_point) for hook_point in pipeline.config.harvest.hook_points) * _STATISTICS_BYTES_PER_DIMENSION
    return Load(0, n_train * width, width, 2 * n_train, 1)
