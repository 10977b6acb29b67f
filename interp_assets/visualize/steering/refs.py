"""Where dose curves and patched prompts lie, and what each is made from."""

from collections.abc import Sequence
from typing import Any

from interp_assets.errors import ConfigError
from interp_assets.harvest.refs import statistics_ref
from interp_assets.planning.pipeline import Pipeline
from interp_assets.planning.steering import PatchingConfig, SearchConfig, SteeringConfig
from interp_assets.storage.lineage import Lineage
from interp_assets.storage.manifest import ArtifactRef, make_ref
from interp_assets.train.refs import sae_ref
from interp_assets.visualize.refs import FOLDER, records_ref

STEERING_FOLDER = f"{FOLDER}/steering"
STEER_VERSION = 2
"""Raise it when the same model, SAE and recipe would give other texts or scores."""
SEARCH_FOLDER = f"{FOLDER}/search"
SEARCH_VERSION = 2
"""Raise it when the same model and SAE would give other latents, texts or scores."""
PATCHING_FOLDER = f"{FOLDER}/patching"
PATCHING_VERSION = 1
"""Raise it when the same model and prompts would give other effects."""


def steering_of(pipeline: Pipeline) -> SteeringConfig:
    """Return the configuration of steering. Raises `ConfigError` for a pipeline without."""
    if pipeline.config.steering is None:
        raise ConfigError(f"Pipeline {pipeline.config.name!r} steers nothing: its configuration has no section `steering`.")
    return pipeline.config.steering


def edits_of(pipeline: Pipeline, name: str) -> list[dict[str, Any]]:
    """Return the edits of a recipe. Raises `ConfigError` with the names there are."""
    recipes = steering_of(pipeline).recipes
    if name not in recipes:
        raise ConfigError(f"No recipe is called {name!r}; `steering.recipes` has {sorted(recipes)}.")
    return recipes[name]


def saes_of(pipeline: Pipeline, name: str) -> list[str]:
    """List the SAEs that a recipe names, each once; what else is in it is not looked at here."""
    edits = edits_of(pipeline, name)
    named = [part.get("sae") for edit in edits for part in (edit, edit.get("if")) if isinstance(part, dict)]
    return list(dict.fromkeys(sae for sae in named if isinstance(sae, str)))


def recipes_of(steering: SteeringConfig | None, sae: str) -> list[str]:
    """List the recipes whose dose curves are of latents of an SAE: those that clamp one."""
    recipes = steering.recipes if steering else {}
    clamped = {name: [edit.get("sae") for edit in edits if "clamp" in edit] for name, edits in recipes.items()}
    return [name for name, saes in clamped.items() if sae in saes]


def swept_refs(pipeline: Pipeline, sae: str) -> list[ArtifactRef]:
    """List what holds dose curves of an SAE's latents: those of recipes, then what a search found."""
    steering = pipeline.config.steering
    curves = [curve_ref(pipeline, recipe) for recipe in recipes_of(steering, sae)]
    return [*curves, *([search_ref(pipeline, sae)] if steering and steering.search else [])]


def curve_ref(pipeline: Pipeline, name: str) -> ArtifactRef:
    """Address the dose curve of one recipe: its edits, prompts and strengths, the model, the SAEs and how their latents fire."""
    steering = steering_of(pipeline)
    asked = {"edits": edits_of(pipeline, name), **steering.model_dump(exclude={"recipes", "search"})}
    identity = {"code": STEER_VERSION, "model": pipeline.plan.model_fingerprint, "seed": pipeline.config.seed, "steering": asked}
    inputs = {f"{ref.kind}.{ref.path}": ref.artifact_id for ref in sources_of(pipeline, saes_of(pipeline, name))}
    return make_ref("steering_sweep", STEERING_FOLDER, identity=identity, inputs=inputs, label=name)


def search_of(pipeline: Pipeline) -> SearchConfig:
    """Return how latents are found. Raises `ConfigError` for a pipeline that looks for none."""
    if (found := steering_of(pipeline).search) is None:
        raise ConfigError(f"Pipeline {pipeline.config.name!r} looks for no latents: its section `steering` has no `search`.")
    return found


def search_edits(pipeline: Pipeline, sae: str, latent: int) -> list[dict[str, Any]]:
    """Return the recipe by which a search sets a latent."""
    return [{"sae": sae, "latent": latent, "clamp": f"{search_of(pipeline).strength:g} {steering_of(pipeline).unit}"}]


def search_ref(pipeline: Pipeline, sae: str) -> ArtifactRef:
    """Address what a search among the latents of an SAE finds: as a dose curve, but for the recipes."""
    asked = steering_of(pipeline).model_dump(exclude={"recipes"})
    identity = {"code": SEARCH_VERSION, "model": pipeline.plan.model_fingerprint, "seed": pipeline.config.seed, "steering": asked}
    inputs = {f"{ref.kind}.{ref.path}": ref.artifact_id for ref in sources_of(pipeline, [sae])}
    return make_ref("steering_search", SEARCH_FOLDER, identity=identity, inputs=inputs, label=sae)


def search_lineage(pipeline: Pipeline, sae: str) -> list[Lineage]:
    """Return what a search keeps."""
    return [Lineage(search_ref(pipeline, sae), list(sources_of(pipeline, [sae])))]


def sources_of(pipeline: Pipeline, saes: Sequence[str]) -> Sequence[ArtifactRef]:
    """List what a dose curve is made from: SAEs, the records of their latents, and the norms of their activations."""
    refs: list[ArtifactRef] = []
    for sae in saes:
        config = pipeline.config.sae(sae)
        refs += [sae_ref(pipeline, sae), statistics_ref(pipeline, config.targets[0])]
        refs += [records_ref(pipeline, sae, latent_slice) for latent_slice in range(pipeline.config.features.latent_slices)]
    return refs


def curve_lineage(pipeline: Pipeline, name: str) -> list[Lineage]:
    """Return what the dose curve of one recipe keeps."""
    return [Lineage(curve_ref(pipeline, name), list(sources_of(pipeline, saes_of(pipeline, name))))]


def patching_of(pipeline: Pipeline, name: str) -> PatchingConfig:
    """Return a set of prompts. Raises `ConfigError` with the names there are."""
    for asked in pipeline.config.patching:
        if asked.name == name:
            return asked
    raise ConfigError(f"No set of prompts is called {name!r}; `patching` has {[asked.name for asked in pipeline.config.patching]}.")


def patching_ref(pipeline: Pipeline, name: str) -> ArtifactRef:
    """Address what patching does over one set of prompts: these, where and how they are patched, the model and its tokenizer."""
    plan = pipeline.plan
    identity = {
        "code": PATCHING_VERSION,
        "model": plan.model_fingerprint,
        "model_dtype": pipeline.config.model.dtype,
        "tokenizer": plan.tokenizer_fingerprint,
        "patching": patching_of(pipeline, name).model_dump(exclude={"name"}),
    }
    return make_ref("patching_sweep", PATCHING_FOLDER, identity=identity, inputs={}, label=name)
