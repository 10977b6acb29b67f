"""Dose curves and patched prompts as assets: what steering by a latent does beside controls, and what each place of a model carries."""

from collections.abc import Callable, Sequence
from typing import Final

from interp_assets.corpus.sizes import TEXT_BYTES_PER_TOKEN
from interp_assets.errors import InputError
from interp_assets.harvest.heads.refs import model_heads
from interp_assets.harvest.sizes import ROWS_PER_S, forward_s, model_bytes
from interp_assets.planning.asset import Asset, Axis, Job, Load, Markdown, Needs, Shown, every, whole
from interp_assets.planning.config import PipelineConfig, code_version
from interp_assets.planning.pipeline import Pipeline
from interp_assets.planning.steering import SteeringConfig
from interp_assets.storage.manifest import Produced
from interp_assets.storage.store import Store
from interp_assets.visualize.refs import features_key
from interp_assets.visualize.steering.refs import (
    PATCHING_VERSION,
    SEARCH_VERSION,
    STEER_VERSION,
    curve_lineage,
    curve_ref,
    patching_of,
    patching_ref,
    saes_of,
    search_lineage,
    search_of,
    search_ref,
    steering_of,
)

_ARMS = 5
_TRIED_ARMS = 3
_FEWEST_PROMPTS = 4
_TOKENS_PER_S: Final = 6_000
"""Of a small model on two cores: a text is written a token at a time, and what the cache holds is copied for each."""


def make_steering_assets(config: PipelineConfig) -> list[Asset]:
    """List the dose curves, of recipes and of latents that a search finds, and what is patched; none without `steering` and `patching`."""
    steering, found = config.steering, []
    if steering and steering.recipes:
        found.append(_sweep(config, steering))
    if steering and steering.search:
        found.append(_search(config, steering))
    return [*found, *([_patching(config)] if config.patching else [])]


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


def _patching(config: PipelineConfig) -> Asset:
    return Asset(
        key=("patching_sweep",),
        group="steer",
        kinds=("pytorch", "parquet"),
        description=(
            "What each position or head carries from clean prompts into corrupted ones: the metric with one cell patched, less that without, over a "
            "set of pairs. Look at where the clean answer comes back."
        ),
        axis=Axis("prompt_set", fixed=tuple(asked.name for asked in config.patching)),
        reads=(whole("corpus_plan"),),
        artifacts=lambda pipeline, _store, key: [patching_ref(pipeline, key)],
        make=_patch,
        shows=_show_patched,
        takes=_patching_takes,
        needs=Needs(accelerator=True),
        unit="pairs",
        code_version=code_version(PATCHING_VERSION, patching=config.patching),
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
    return _exactly(lambda key: write_curve(job.pipeline, job.store, model, tokenizer, key, job.progress.advance))


def _find(job: Job) -> Callable[[str], list[Produced]]:
    from interp_assets.visualize.steering.search import write_search

    model, tokenizer = job.world.model(), job.world.tokenizer()
    return _exactly(lambda key: write_search(job.pipeline, job.store, model, tokenizer, key, job.progress.advance))


def _patch(job: Job) -> Callable[[str], list[Produced]]:
    from interp_assets.visualize.steering.patching import write_patching

    model, tokenizer = job.world.model(), job.world.tokenizer()
    return _exactly(lambda key: write_patching(job.pipeline, job.store, model, tokenizer, key, job.progress.advance))


def _exactly(write: Callable[[str], Produced]) -> Callable[[str], list[Produced]]:
    """Return what makes a partition whose bytes do not follow the number of threads; what a notebook runs may."""
    from interp_assets.compute.any_threads import AnyThreads

    def make(key: str) -> list[Produced]:
        with AnyThreads():
            return [write(key)]

    return make


def _show_found(job: Job, key: str, made: list[Produced]) -> dict[str, Shown]:
    from interp_assets.visualize.steering.plots import plot_dose
    from interp_assets.visualize.steering.search import read_search

    facts, found = made[0].manifest.facts, read_search(job.pipeline, job.store, key)
    role = dict(found.candidates.select("latent", "role").iter_rows())
    curves = (f"**{role[latent]}: {dose.what}**\n\n{plot_dose(dose)}" for latent, dose in found.doses.items())
    return {"curves": Markdown("\n\n".join(curves)), **{name: facts[name] for name in ("movers", "idle")}}


def _show(job: Job, key: str, made: list[Produced]) -> dict[str, Shown]:
    from interp_assets.visualize.steering.curves import read_curve
    from interp_assets.visualize.steering.plots import plot_dose

    facts = made[0].manifest.facts
    curve = Markdown(plot_dose(read_curve(job.pipeline, job.store, key)))
    return {"curve": curve, **{name: facts[name] for name in facts if name.endswith("_over_controls")}}


def _show_patched(job: Job, key: str, made: list[Produced]) -> dict[str, Shown]:
    from interp_assets.visualize.steering.patching import read_patching
    from interp_assets.visualize.steering.plots import plot_patching

    facts = made[0].manifest.facts
    drawn = Markdown(plot_patching(read_patching(job.pipeline, job.store, key)))
    return {"cells": drawn, **{name: facts[name] for name in ("strongest", "effect", "lead", "n_pairs")}}


def _takes(pipeline: Pipeline, _store: Store, _key: str) -> Load:
    steering = steering_of(pipeline)
    return _writing(pipeline, _count_tokens(steering, _count_cells(steering), steering.prompts))


def _searching(pipeline: Pipeline, _store: Store, _key: str) -> Load:
    steering, search = steering_of(pipeline), search_of(pipeline)
    n_tried = _count_tokens(steering, search.candidates * _TRIED_ARMS, steering.prompts[::2])
    return _writing(pipeline, n_tried + _count_tokens(steering, 2 * search.shown * _count_cells(steering), steering.prompts[1::2]))


def _count_cells(steering: SteeringConfig) -> int:
    """Return the arms of a dose curve at all strengths, of which `zero` has none."""
    return (_ARMS - 1) * len(steering.strengths) + 1


def _count_tokens(steering: SteeringConfig, n_cells: int, prompts: Sequence[str]) -> float:
    """Return the tokens that pass the model for so many cells: each text has a twin without edits."""
    return 2.0 * n_cells * steering.n * sum(len(prompt) / TEXT_BYTES_PER_TOKEN + steering.new_tokens for prompt in prompts)


def _writing(pipeline: Pipeline, n_tokens: float) -> Load:
    busy_s = max(n_tokens / _TOKENS_PER_S, forward_s(pipeline, n_tokens))
    return Load(0, model_bytes(pipeline), n_tokens, 4, 2, busy_s, 2 * model_bytes(pipeline))


def _patching_takes(pipeline: Pipeline, _store: Store, key: str) -> Load:
    """Count tokens that pass the model: a cell's copy of the prompt takes half the blocks, a backward twice its forward."""
    asked, heads = patching_of(pipeline, key), model_heads(pipeline).heads
    n_points = sum(len(heads) if "*" in point else 1 for point in asked.points)
    n_cells = n_passed = 0.0
    for pair in asked.pairs:
        n_tokens = len(pair.clean) / TEXT_BYTES_PER_TOKEN
        cells = n_points * (n_tokens if asked.by == "position" else max(heads.values(), default=1))
        n_cells += cells
        n_passed += n_tokens * (2 + cells / 2 if asked.method == "exact" else 4)
    busy_s = max(n_passed / ROWS_PER_S, forward_s(pipeline, n_passed))
    return Load(0, model_bytes(pipeline), 4e3 + 4 * n_cells, 2, 2, busy_s, 2 * model_bytes(pipeline))
