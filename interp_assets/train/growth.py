"""New text that has been harvested becomes a candidate: a plan with one more generation, to be trained and compared before it counts.

    pending shards    planned, but in no generation yet
    growth            those of them, from the first on, whose activations are there, and their valid tokens
    candidate         the plan with a generation that ends after them, in a file of its own beside `plan.json`
    promotion         the generation enters `plan.json`; from then on every id follows it

Until then nothing that the pipeline shows has changed, because ids follow from `plan.json`. Each step may be repeated: it finds its result.
"""

import json
from dataclasses import replace
from typing import Any, Final, NamedTuple

import interp_assets.harvest.assets
import interp_assets.shuffle.assets
import interp_assets.train.assets
from interp_assets.corpus.refs import token_shard_ref
from interp_assets.errors import InputError
from interp_assets.harvest.refs import activation_shard_ref
from interp_assets.planning.asset import NONE
from interp_assets.planning.config import PipelineConfig
from interp_assets.planning.pipeline import Pipeline, load_pipeline, save_plan
from interp_assets.storage.manifest import ArtifactRef, Produced, create_artifact, find_made_from, find_manifest, load_manifest, make_ref
from interp_assets.storage.store import Store
from interp_assets.train.refs import FOLDER, evaluation_ref

COMPARISON: Final = "comparison.json"


class Growth(NamedTuple):
    """What has come since the last training."""

    stop: int
    """The first shard index that is not part of it."""
    n_tokens: int
    """Valid tokens of its shards."""


class Comparison(NamedTuple):
    """One SAE of the candidate beside the one before it, both measured on the held-out shards."""

    name: str
    fvu_before: float
    fvu_after: float
    ce_recovered_before: float | None
    ce_recovered_after: float | None
    worse: str
    """Why it is kept back; empty when it is not."""


def measure_growth(pipeline: Pipeline, store: Store) -> Growth:
    """Count the valid tokens of the pending shards that are harvested, up to the first one that is not."""
    n_tokens = 0
    stop = pipeline.plan.generations[-1] if pipeline.plan.generations else len(pipeline.plan.shards)
    for index in pipeline.pending_indices:
        tokens = find_manifest(store, token_shard_ref(pipeline, index))
        points = [find_manifest(store, activation_shard_ref(pipeline, name, index)) for name in pipeline.config.harvest.hook_points]
        if tokens is None or None in points:
            break
        n_tokens, stop = n_tokens + int(tokens.facts["n_valid"]), index + 1
    return Growth(stop, n_tokens)


def make_candidate(config: PipelineConfig, store: Store, stop: int) -> PipelineConfig:
    """Save the plan with one more generation, which ends before shard `stop`, and return the configuration that works under it."""
    pipeline = load_pipeline(config, store)
    candidate = config.model_copy(update={"execution": config.execution.model_copy(update={"plan": f"plan.candidate-{stop:06d}.json"})})
    if stop not in pipeline.plan.generations:
        if stop - 1 not in pipeline.pending_indices:
            raise InputError(f"Shards up to {stop - 1} are no new generation of pipeline {config.name!r}: pending are {pipeline.pending_indices}.")
        save_plan(store, replace(pipeline.plan, generations=[*pipeline.plan.generations, stop]), candidate.execution.plan)
    return candidate


def made_by_candidate(config: PipelineConfig) -> list[str]:
    """Name the assets that are made under a candidate's plan before it counts: all between harvested activations and what is compared."""
    from_rows = [asset for asset in interp_assets.harvest.assets.make_assets(config) if asset.axis is NONE]
    stages = (interp_assets.shuffle.assets, interp_assets.train.assets)
    return [asset.name for asset in [*from_rows, *(asset for stage in stages for asset in stage.make_assets(config))]]


def compare(config: PipelineConfig, current: Pipeline, candidate: Pipeline, store: Store) -> Produced:
    """Publish how the candidate's SAEs compare with those before them; the fact `promoted` is the verdict.

    An SAE is worse when its FVU is higher, or its share of recovered loss lower, by more than `retrain` allows. One shown SAE that is
    worse keeps the whole candidate back: its SAEs share their data. Raises `ArtifactMissingError` before both are evaluated.
    """
    ref = comparison_ref(current, candidate)
    names = [sae.name for sae in config.saes]
    pairs = [(load_manifest(store, evaluation_ref(current, name)), load_manifest(store, evaluation_ref(candidate, name))) for name in names]
    inputs = [manifest for pair in pairs for manifest in pair]
    if (manifest := find_made_from(store, ref, inputs)) is not None:
        return Produced(ref, manifest, is_cached=True)
    found = [_compare(config, name, before.facts, after.facts) for name, (before, after) in zip(names, pairs, strict=True)]
    kept_back = [item for item in found if item.worse and item.name in config.features.saes]
    with create_artifact(store, ref, made_from=inputs) as art:
        art.put(COMPARISON, (json.dumps([item._asdict() for item in found], indent=1) + "\n").encode())
        art.facts |= {
            "promoted": not kept_back,
            "why": "; ".join(f"{item.name}: {item.worse}" for item in kept_back),
            "shards": candidate.plan.generations[-1],
            "generation": len(candidate.plan.generations) - 1,
        }
    return art.produced


def promote(config: PipelineConfig, candidate: Pipeline, store: Store) -> bool:
    """Enter the candidate's generation into the pipeline's plan; answer False when it is there already.

    Raises `InputError` when the plan has grown otherwise meanwhile.
    """
    plan = load_pipeline(config, store).plan
    if plan.generations == candidate.plan.generations:
        return False
    if plan.generations != candidate.plan.generations[:-1]:
        raise InputError(
            f"The plan of {config.name!r} has the generations {plan.generations}, the candidate was made from {candidate.plan.generations[:-1]}: "
            "the text has changed meanwhile. The next retraining takes it into account."
        )
    return save_plan(store, replace(plan, generations=candidate.plan.generations))


def comparison_ref(current: Pipeline, candidate: Pipeline) -> ArtifactRef:
    """Address the comparison of a candidate with what it would replace."""
    names = [sae.name for sae in current.config.saes]
    inputs = {
        f"{role}.{name}": evaluation_ref(pipeline, name).artifact_id
        for role, pipeline in (("before", current), ("after", candidate))
        for name in names
    }
    identity: dict[str, Any] = {"code": 1, "retrain": current.config.retrain.model_dump()}
    return make_ref("sae_comparison", FOLDER, identity=identity, inputs=inputs, label=f"comparison-{candidate.plan.generations[-1]:06d}")


def _compare(config: PipelineConfig, name: str, before: dict[str, Any], after: dict[str, Any]) -> Comparison:
    rule = config.retrain
    worse = []
    if after["fvu"] - before["fvu"] > rule.max_fvu_increase:
        worse.append(f"FVU {after['fvu']:.4f} after {before['fvu']:.4f}, at most {rule.max_fvu_increase} more is allowed")
    old, new = before["ce_recovered"], after["ce_recovered"]
    if old is not None and new is not None and old - new > rule.max_ce_recovered_decrease:
        worse.append(f"loss recovered {new:.4f} after {old:.4f}, at most {rule.max_ce_recovered_decrease} less is allowed")
    return Comparison(name, before["fvu"], after["fvu"], old, new, "; ".join(worse))
