"""Dose curves as assets: what steering by a recipe's latent does beside controls. Nothing without a section `steering`."""

from collections.abc import Callable

from interp_assets.errors import InputError
from interp_assets.harvest.sizes import forward_s, model_bytes
from interp_assets.planning.asset import Asset, Axis, Job, Load, Markdown, Needs, Shown, every, whole
from interp_assets.planning.config import PipelineConfig, SteeringConfig, code_version
from interp_assets.planning.pipeline import Pipeline
from interp_assets.storage.manifest import Produced
from interp_assets.storage.store import Store
from interp_assets.visualize.refs import features_key
from interp_assets.visualize.steering.refs import STEER_VERSION, curve_lineage, curve_ref, saes_of, steering_of

_ARMS = 5
_PROMPT_TOKENS = 32


def make_steering_assets(config: PipelineConfig) -> list[Asset]:
    """List the dose curves: one asset, or none without a section `steering`."""
    return [_sweep(config, config.steering)] if config.steering else []


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
        code_version=code_version(STEER_VERSION, steering=steering),
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


def _dose(job: Job) -> Callable[[str], list[Produced]]:
    from interp_assets.visualize.steering.curves import write_curve

    model, tokenizer = job.world.model(), job.world.tokenizer()
    return lambda key: [write_curve(job.pipeline, job.store, model, tokenizer, key, job.progress.advance)]


def _show(job: Job, _key: str, made: list[Produced]) -> dict[str, Shown]:
    from interp_assets.visualize.steering.curves import draw_curve

    facts = made[0].manifest.facts
    return {
        "curve": Markdown(draw_curve(job.pipeline, job.store, made[0])),
        **{name: facts[name] for name in facts if name.endswith("_over_controls")},
    }


def _takes(pipeline: Pipeline, _store: Store, _key: str) -> Load:
    steering = steering_of(pipeline)
    n_texts = len(steering.strengths) * _ARMS * len(steering.prompts) * steering.n
    n_tokens = 2.0 * n_texts * (steering.new_tokens + _PROMPT_TOKENS)  # each is scored without edits, too
    return Load(0, model_bytes(pipeline), 1e3 * n_texts, 4, 2, forward_s(pipeline, n_tokens), 2 * model_bytes(pipeline))
