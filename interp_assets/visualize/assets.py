"""Feature evidence as assets: four passes over the activations for each SAE that the configuration wants shown."""

from collections.abc import Callable
from typing import Any

from interp_assets.corpus.sizes import TEXT_BYTES_PER_TOKEN, count_rows, rows_of
from interp_assets.harvest.heads.refs import head_counts, heads_of
from interp_assets.harvest.sizes import forward_s, model_bytes
from interp_assets.planning.asset import SHARDS, Asset, Axis, Job, Load, Needs, every, grid, only, same, same_shard, same_slice, whole
from interp_assets.planning.config import PipelineConfig, code_version
from interp_assets.planning.hook_names import canonical_name
from interp_assets.planning.machine import ONE_WORKER
from interp_assets.planning.pipeline import Pipeline, shard_index
from interp_assets.planning.sections import HeadsConfig
from interp_assets.shuffle.rows import RowFormat
from interp_assets.storage.manifest import Produced, find_manifest
from interp_assets.storage.store import Store
from interp_assets.train.refs import sae_ref
from interp_assets.visualize.checks import records_complete
from interp_assets.visualize.estimate import EvidencePlan, Workload, estimate
from interp_assets.visualize.lineage import candidates_lineage, examples_lineage, records_lineage, windows_lineage
from interp_assets.visualize.refs import (
    FEATURES_VERSION,
    TARGETS_VERSION,
    candidates_ref,
    examples_ref,
    features_key,
    prompt_targets_lineage,
    prompt_targets_ref,
    read_features,
    read_roles,
    records_ref,
    slice_index,
    slice_key,
    split_grid_key,
    windows_ref,
)
from interp_assets.visualize.steering.assets import make_steering_assets

ON_ACCELERATOR = Needs(accelerator=True)
_LIGHTENS = "raise features.latent_slices, or lower features.top_k or n_random"
_PASSES = ("feature_candidates", "feature_examples", "example_activations", "feature_records")


def make_assets(config: PipelineConfig) -> list[Asset]:
    """List the assets of this stage: four for each SAE of `features.saes`, the targets of heads' prompts, and the dose curves."""
    evidence = [asset for sae in config.features.saes for asset in [*_finding(config, sae), *_showing(config, sae)]]
    explained = [_explaining(config.heads)] if config.heads and config.heads.explained else []
    return [*evidence, *explained, *make_steering_assets(config)]


def _explaining(heads: HeadsConfig) -> Asset:
    saes = dict.fromkeys(sae for prompt in heads.explained.values() for sae, _ in prompt.wanted)
    return Asset(
        key=("prompt_targets",),
        group="heads",
        kinds=("pytorch", "json"),
        description=(
            "What every edge adds to the tokens' logits and the latents that a configured prompt names, and what all else adds: together they sum to "
            "the target. The unit of work is a prompt. Look at the targets."
        ),
        axis=Axis("explained", fixed=tuple(heads.explained)),
        reads=(whole("corpus_plan"), *([only("sae", partitions=list(saes))] if saes else [])),
        artifacts=lambda pipeline, _store, key: [prompt_targets_ref(pipeline, key)],
        lineage=lambda pipeline, _store, key: prompt_targets_lineage(pipeline, key),
        make=_explain,
        unit="prompts",
        shows=lambda _job, _key, made: {name: made[0].manifest.facts[name] for name in ("n_tokens", "targets")},
        takes=_explaining_takes,
        needs=ON_ACCELERATOR,
        obstacles=find_target_obstacles,
        code_version=code_version(TARGETS_VERSION, prompts={name: prompt.model_dump() for name, prompt in heads.explained.items()}),
    )


def find_target_obstacles(pipeline: Pipeline, _store: Store) -> list[str]:
    """Say which latents edges do not add up to, before anything is made."""
    found = []
    for prompt, (name, latent) in ((prompt, each) for prompt, asked in heads_of(pipeline).explained.items() for each in asked.wanted):
        sae = pipeline.config.sae(name)
        if not canonical_name(sae.hook_point).startswith("resid_post.") or sae.more_hook_points:
            read = ", ".join(sae.sources)
            found.append(
                f"`heads.prompts.{prompt}` names a latent of {name}, which reads {read}: edges add up to what is read at resid_post.L alone."
            )
        elif latent >= sae.d_sae:
            found.append(f"`heads.prompts.{prompt}` names latent {latent:,} of {name}, which has latents 0 to {sae.d_sae - 1:,}.")
    return found


def _explain(job: Job) -> Callable[[str], list[Produced]]:
    from interp_assets.visualize.prompt_targets import keep_targets

    model, tokenizer = job.world.model(), job.world.tokenizer()
    return lambda key: [keep_targets(job.pipeline, job.store, model, tokenizer, key)]


def _explaining_takes(pipeline: Pipeline, _store: Store, key: str) -> Load:
    prompt = heads_of(pipeline).prompt(key)
    n_tokens, n_targets = len(prompt.text) / TEXT_BYTES_PER_TOKEN, len(prompt.logits) + len(prompt.latents)
    written = 6 * n_targets * n_tokens * sum(head_counts(pipeline).values())
    return Load(0, 0.0, written, 1 + len(prompt.latents), 5, forward_s(pipeline, n_tokens), model_bytes(pipeline) + 4 * written)


def group_of(sae: str) -> str:
    """Name the asset group of one SAE's features."""
    return "features_" + "".join(char if char.isalnum() else "_" for char in sae)


def _finding(config: PipelineConfig, sae: str) -> list[Asset]:
    slices = Axis("slice", fixed=tuple(slice_key(index) for index in range(config.features.latent_slices)))
    candidates, examples = (features_key(sae, name) for name in _PASSES[:2])
    reads_sae = only("sae", partitions=[sae])
    common: dict[str, Any] = {"group": group_of(sae), "needs": ON_ACCELERATOR}
    return [
        Asset(
            key=candidates,
            kinds=("pytorch", "parquet"),
            description=(
                f"Where the latents of {sae} fire in one shard: their strongest tokens, a uniform random sample of the others, and exact counts. "
                "The unit of work is a latent slice of one shard. Look at the number of firings and at rows per second."
            ),
            axis=grid(slices, SHARDS),
            reads=(reads_sae, same_shard("activations"), same_shard("token_shards"), whole("activation_statistics")),
            artifacts=lambda pipeline, _store, key: [candidates_ref(pipeline, sae, *reversed(split_grid_key(key)))],
            lineage=lambda pipeline, _store, key: candidates_lineage(pipeline, sae, *reversed(split_grid_key(key))),
            make=lambda job: _find(job, sae),
            takes=lambda pipeline, store, key: _evidence(pipeline, store, sae, 0, rows_of(pipeline, store, split_grid_key(key)[1])),
            lightens=_LIGHTENS,
            is_one_run=True,
            code_version=code_version(FEATURES_VERSION, features=read_features(config.features, "candidates")),
            **common,
        ),
        Asset(
            key=examples,
            kinds=("python", "parquet"),
            description=(
                f"The dataset examples of {sae}, chosen from the candidates of all shards: the strongest, those from each quantile interval, and "
                "random ones. The unit of work is a latent slice. Look at how many latents are dead."
            ),
            axis=slices,
            reads=(same_slice(*candidates), every("token_shards"), reads_sae),
            artifacts=lambda pipeline, _store, key: [examples_ref(pipeline, sae, slice_index(key))],
            lineage=lambda pipeline, _store, key: examples_lineage(pipeline, sae, slice_index(key)),
            make=lambda job: _select(job, sae),
            takes=lambda pipeline, store, _key: _evidence(pipeline, store, sae, 1),
            lightens=_LIGHTENS,
            code_version=code_version(FEATURES_VERSION, features=read_features(config.features, "examples")),
            group=group_of(sae),
        ),
    ]


def _showing(config: PipelineConfig, sae: str) -> list[Asset]:
    slices = Axis("slice", fixed=tuple(slice_key(index) for index in range(config.features.latent_slices)))
    candidates, examples, windows, records = (features_key(sae, name) for name in _PASSES)
    reads_sae = only("sae", partitions=[sae])
    common: dict[str, Any] = {"group": group_of(sae), "needs": ON_ACCELERATOR}
    return [
        Asset(
            key=windows,
            kinds=("pytorch", "parquet"),
            description=(
                f"How the latents of {sae} fire on the tokens around their examples, for the examples that lie in one shard. "
                "The unit of work is a corpus shard. Look at the number of windows."
            ),
            axis=SHARDS,
            reads=(every(*examples), same_shard(*candidates), same("activations"), same("token_shards"), reads_sae),
            artifacts=lambda pipeline, _store, key: [windows_ref(pipeline, sae, shard_index(key))],
            lineage=lambda pipeline, _store, key: windows_lineage(pipeline, sae, shard_index(key)),
            make=lambda job: _fire(job, sae),
            takes=lambda pipeline, store, key: _evidence(pipeline, store, sae, 2, rows_of(pipeline, store, shard_index(key))),
            lightens=_LIGHTENS,
            code_version=code_version(FEATURES_VERSION, features=read_features(config.features, "windows")),
            **common,
        ),
        Asset(
            key=records,
            kinds=("pytorch", "json"),
            description=(
                f"What a person sees of each latent of {sae}: examples with their tokens coloured, statistics, the words it raises and lowers, its "
                "neighbours. The unit of work is a latent slice. One range request opens one feature."
            ),
            axis=slices,
            reads=(same(*examples), every(*windows), every("token_shards"), reads_sae, only("sae_evaluation", partitions=[sae])),
            artifacts=lambda pipeline, _store, key: [records_ref(pipeline, sae, slice_index(key))],
            lineage=lambda pipeline, _store, key: records_lineage(pipeline, sae, slice_index(key)),
            make=lambda job: _write(job, sae),
            unit="features",
            takes=lambda pipeline, store, _key: _evidence(pipeline, store, sae, 3),
            lightens=_LIGHTENS,
            checks=(records_complete(sae),),
            code_version=code_version(FEATURES_VERSION, features=read_features(config.features, "records"), **read_roles(config.corpus)),
            **common,
        ),
    ]


def _find(job: Job, name: str) -> Callable[[str], list[Produced]]:
    from interp_assets.train.checkpoint import load_sae
    from interp_assets.visualize.candidates import find_candidates

    sae = load_sae(job.pipeline, job.store, name)

    def make(key: str) -> list[Produced]:
        latent_slice, index = split_grid_key(key)
        return [find_candidates(job.pipeline, job.store, sae, name, index, latent_slice, job.progress.advance)]

    return make


def _select(job: Job, name: str) -> Callable[[str], list[Produced]]:
    from interp_assets.visualize.examples import select_examples

    return lambda key: [select_examples(job.pipeline, job.store, name, slice_index(key))]


def _fire(job: Job, name: str) -> Callable[[str], list[Produced]]:
    from interp_assets.train.checkpoint import load_sae
    from interp_assets.visualize.windows import fire_windows

    sae = load_sae(job.pipeline, job.store, name)
    return lambda key: [fire_windows(job.pipeline, job.store, sae, name, shard_index(key))]


def _write(job: Job, name: str) -> Callable[[str], list[Produced]]:
    from interp_assets.train.checkpoint import load_sae
    from interp_assets.visualize.records import write_records

    sae, tokenizer, unembedding = load_sae(job.pipeline, job.store, name), job.world.tokenizer(), job.world.model().unembedding()
    return lambda key: [write_records(job.pipeline, job.store, name, sae, slice_index(key), tokenizer, unembedding, job.progress.advance)]


def workload(pipeline: Pipeline, store: Store, name: str) -> Workload:
    """Return what the feature passes of one SAE are given."""
    sae, d_in = pipeline.config.sae(name), pipeline.d_in(pipeline.config.sae(name).hook_point)
    return Workload(
        n_rows=max(1, count_rows(pipeline, store, pipeline.shard_indices)),
        n_shards=len(pipeline.shard_indices),
        d_in=d_in,
        d_sae=sae.d_sae,
        l0=expected_l0(pipeline, store, name),
        row_bytes=RowFormat(d_in, pipeline.config.harvest.dtype).row_bytes,
        vocabulary_size=pipeline.plan.vocabulary_size,
    )


def expected_l0(pipeline: Pipeline, store: Store, name: str) -> float:
    """Return how many latents of an SAE fire on a row: as its training measured it, and before that `k`, whatever the architecture makes of it."""
    manifest = find_manifest(store, sae_ref(pipeline, name))
    return float((manifest.facts.get("l0") if manifest else None) or pipeline.config.sae(name).k)


def _evidence(pipeline: Pipeline, store: Store, sae: str, which: int, n_rows: int = 0) -> Load:
    """Return what a partition of one of the four passes takes: its share of the pass."""
    features = pipeline.config.features

    def plan() -> EvidencePlan:
        return estimate(workload(pipeline, store, sae), features, features.latent_slices, ONE_WORKER)

    found = pipeline.remember(("evidence", sae), plan)
    cost, n_shards, n_slices = found.passes[which], len(pipeline.shard_indices), features.latent_slices
    n_inputs = 2 * (3, n_shards, n_slices, n_shards)[which]
    busy_s = cost.wall_s / cost.jobs - ONE_WORKER.job_s
    return Load(n_rows, cost.read_bytes / cost.jobs, cost.written_bytes / cost.jobs, n_inputs, 2, busy_s, found.job_bytes)
