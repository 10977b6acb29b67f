"""Dose curves as assets: what steering by a recipe's latent does beside controls. Nothing without a section `steering`."""

from collections.abc import Callable

from interp_assets.errors import InputError
from interp_assets.harvest.sizes import forward_s, model_bytes
from interp_assets.planning.asset import Asset, Axis, Job, Load, Markdown, Needs, Shown, every, whole
from interp_assets.planning.config import PipelineConfig, code_version
from interp_assets.planning.pipeline import Pipeline
from interp_assets.planning.sections import SteeringConfig
from interp_assets.storage.manifest import Produced
from interp_assets.storage.store import Store
from interp_assets.visualize.refs import features_key
from interp_assets.visualize.steering.refs import (
    SEARCH_VERSION,
    STEER_VERSION,
    curve_lineage,
    curve_ref,
    saes_of,
    search_lineage,
    search_of,
    search_ref,
    steering_of,
)

_ARMS = 5
_TRIED_ARMS = 3
_FEWEST_PROMPTS = 4
_PROMPT_TOKENS = 32


def make_steering_assets(config: PipelineConfig) -> list[Asset]:
    """List the dose curves, of recipes and of latents that a search finds; none without a section `steering`."""
    steering = config.steering
    if steering is None:
        return []
    return [*([_sweep(config, steering)] if steering.recipes else []), *([_search(config, steering)] if steering.search else [])]


def _sweep(config: PipelineConfig, steering: SteeringConfig) -> Asset:
    records = [every(*features_key(sae, "feature_records")) for sae in config.features.saes]
    return Asset(
        key=("steering_sweep",),
        group="steer",
        kinds=("pytorch", "parquet"),
        description=(
            "Texts under one latent at several strengths, beside another latent, a random direction, the opposite one and zero, scored by the model "
            "without edits. Look at what is left of the feature's effect when the controls' is taken away."
        ),
        axis=Axis("recipe", fixed=tuple(steering.recipes)),
        reads=(every("sae"), *records, whole("activation_statistics")),
        artifacts=lambda pipeline, _store, key: [curve_ref(pipeline, key)],
        lineage=lambda pipeline, _store, key: curve_lineage(pipeline, key),
        make=_dose,
        shows=_show,
        takes=_takes,
        needs=Needs(accelerator=True),
        obstacles=find_obstacles,
        unit="texts",
        code_version=code_version(STEER_VERSION, steering=steering.model_dump(exclude={"search"})),
    )


def _search(config: PipelineConfig, steering: SteeringConfig) -> Asset:
    records = [every(*features_key(sae, "feature_records")) for sae in config.features.saes]
    return Asset(
        key=("steering_search",),
        group="steer",
        kinds=("pytorch", "parquet"),
        description=(
            "Latents that change what the model writes beyond their controls, and some that do not: found on every other prompt, dosed on the rest. "
            "Look at how much of an effect is left on prompts that it was not chosen by."
        ),
        axis=Axis("searched", fixed=tuple(config.features.saes)),
        reads=(every("sae"), *records, whole("activation_statistics")),
        artifacts=lambda pipeline, _store, key: [search_ref(pipeline, key)],
        lineage=lambda pipeline, _store, key: search_lineage(pipeline, key),
        make=_find,
        shows=_show_found,
        takes=_searching,
        needs=Needs(accelerator=True),
        obstacles=find_search_obstacles,
        unit="texts",
        code_version=code_version(SEARCH_VERSION, steering=steering),
    )


def find_obstacles(pipeline: Pipeline, _store: Store) -> list[str]:
    """Say which recipes are wrong, before anything is made."""
    from interp_assets.garcon.steering.recipe import load_recipe

    found = []
    for name, edits in steering_of(pipeline).recipes.items():
        try:
            load_recipe(edits)
        except InputError as error:
            found.append(f"`steering.recipes.{name}`: {error}")
            continue
        if unknown := [sae for sae in saes_of(pipeline, name) if sae not in pipeline.config.features.saes]:
            found.append(f"`steering.recipes.{name}` names {unknown}; how latents fire is known of features.saes, {pipeline.config.features.saes}.")
    return found


def find_search_obstacles(pipeline: Pipeline, _store: Store) -> list[str]:
    """Say that there are too few prompts for a search: of one text there is no interval."""
    n_prompts = len(steering_of(pipeline).prompts)
    what = f"`steering.search` finds latents on every other prompt and doses them on the rest: it takes {_FEWEST_PROMPTS}, and there are {n_prompts}."
    return [what] if n_prompts < _FEWEST_PROMPTS else []


def _dose(job: Job) -> Callable[[str], list[Produced]]:
    from interp_assets.visualize.steering.curves import write_curve

    model, tokenizer = job.world.model(), job.world.tokenizer()
    return lambda key: [write_curve(job.pipeline, job.store, model, tokenizer, key, job.progress.advance)]


def _find(job: Job) -> Callable[[str], list[Produced]]:
    from interp_assets.visualize.steering.search import write_search

    model, tokenizer = job.world.model(), job.world.tokenizer()
    return lambda key: [write_search(job.pipeline, job.store, model, tokenizer, key, job.progress.advance)]


def _show_found(job: Job, _key: str, made: list[Produced]) -> dict[str, Shown]:
    from interp_assets.visualize.steering.search import draw_search

    facts = made[0].manifest.facts
    return {"curves": Markdown(draw_search(job.pipeline, job.store, made[0])), **{name: facts[name] for name in ("movers", "idle")}}


def _show(job: Job, _key: str, made: list[Produced]) -> dict[str, Shown]:
    from interp_assets.visualize.steering.curves import draw_curve

    facts = made[0].manifest.facts
    return {
        "curve": Markdown(draw_curve(job.pipeline, job.store, made[0])),
        **{name: facts[name] for name in facts if name.endswith("_over_controls")},
    }


def _takes(pipeline: Pipeline, _store: Store, _key: str) -> Load:
    steering = steering_of(pipeline)
    return _writing(pipeline, len(steering.strengths) * _ARMS * len(steering.prompts) * steering.n)


def _searching(pipeline: Pipeline, _store: Store, _key: str) -> Load:
    steering, search = steering_of(pipeline), search_of(pipeline)
    n_tried, n_dosed = search.candidates * _TRIED_ARMS, 2 * search.shown * _ARMS * len(steering.strengths)
    return _writing(pipeline, (n_tried + n_dosed) * len(steering.prompts) // 2 * steering.n)


def _writing(pipeline: Pipeline, n_texts: int) -> Load:
    steering = steering_of(pipeline)
    n_tokens = 2.0 * n_texts * (steering.new_tokens + _PROMPT_TOKENS)  # each is scored without edits, too
    return Load(0, model_bytes(pipeline), 1e3 * n_texts, 4, 2, forward_s(pipeline, n_tokens), 2 * model_bytes(pipeline))
