"""A recipe of the configuration becomes a dose curve: all texts, their scores, and the table of means beside controls.

Format: `docs/formats/steering_sweep.md`.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import polars as pl

from interp_assets.garcon.backend import Chats
from interp_assets.garcon.features import AttachedSae
from interp_assets.garcon.local import LocalBackend
from interp_assets.garcon.session import Model
from interp_assets.garcon.steering.dose import DIFFERENCE, Dose, run_dose
from interp_assets.garcon.steering.recipe import SaeEntry, load_recipe, make_edits
from interp_assets.garcon.subject import SubjectModel
from interp_assets.harvest.statistics import load_statistics
from interp_assets.planning.pipeline import Pipeline
from interp_assets.storage.lineage import Digests, create_current, find_current, trace
from interp_assets.storage.manifest import Produced, load_manifest, read_file, timed
from interp_assets.storage.store import Store
from interp_assets.train.checkpoint import load_sae
from interp_assets.visualize.steering.firings import load_firings
from interp_assets.visualize.steering.refs import curve_lineage, curve_ref, edits_of, saes_of, steering_of

TEXTS: Final = "texts.parquet"
TABLE: Final = "table.parquet"


@timed
def write_curve(pipeline: Pipeline, store: Store, subject: SubjectModel, tokenizer: Any, name: str, progress: Callable[[int], None]) -> Produced:
    """Write and score the texts of one recipe; `progress` is advanced by texts. Raises `InputError` for a recipe that does not fit."""
    ref, kept = curve_ref(pipeline, name), trace(Digests(store), curve_lineage(pipeline, name))
    if (manifest := find_current(store, ref, kept)) is not None:
        return Produced(ref, manifest, is_cached=True)
    steering = steering_of(pipeline)
    backend = open_backend(pipeline, store, subject, tokenizer, saes_of(pipeline, name))
    prompts = Chats(tuple(map(tuple, backend.tokenize(steering.prompts, special=True))), ())
    strengths = [f"{strength:g} {steering.unit}" for strength in steering.strengths]
    options = {"new_tokens": steering.new_tokens, "n": steering.n, "temperature": steering.temperature, "seed": pipeline.config.seed, "watch": ()}
    edits = make_edits(load_recipe(edits_of(pipeline, name)), backend)
    names = sorted(Model.over(backend).names(edits.freeze))
    dose = run_dose(backend, prompts, edits._replace(freeze=tuple(names)), strengths, options)
    progress(dose.texts.height)
    with create_current(store, ref, kept) as art:
        for file, table in ((TEXTS, dose.texts), (TABLE, dose.table())):
            content = io.BytesIO()
            table.write_parquet(content)
            art.put(file, content.getvalue(), n_rows=table.height)
        art.facts |= {"what": dose.what, "n_texts": dose.texts.height, "strengths": strengths, "prompts": len(steering.prompts), **_effects(dose)}
    return art.produced


def open_backend(pipeline: Pipeline, store: Store, subject: SubjectModel, tokenizer: Any, saes: Sequence[str]) -> Any:
    """Return the model with SAEs, how their latents fire, and how long activations are where they write."""
    backend: Any = LocalBackend(subject, tokenizer)
    backend.saes = {sae: _attach(pipeline, store, subject, sae) for sae in saes}
    backend.norms = {attached.written_at: _mean_norm(pipeline, store, attached.written_at) for attached in backend.saes.values()}
    return backend


def clamped_latent(edits: Sequence[Mapping[str, Any]]) -> int:
    """Return the latent that a recipe clamps, of which its dose curve is."""
    return next(entry.latent for entry in load_recipe(edits).edits if isinstance(entry, SaeEntry) and entry.clamp is not None)


def read_curve(pipeline: Pipeline, store: Store, name: str) -> Dose:
    """Read a dose curve. Raises `ConfigError` for a recipe that the configuration does not have, `ArtifactMissingError` before it is made."""
    ref = curve_ref(pipeline, name)
    manifest = load_manifest(store, ref)
    texts = pl.read_parquet(io.BytesIO(read_file(store, ref.path, manifest, TEXTS)))
    return Dose(texts, str(manifest.facts["what"]), list(manifest.facts["strengths"]), pipeline.config.seed)


def _effects(dose: Dose) -> dict[str, float]:
    """Return, of each outcome at the largest strength, the feature's mean less the controls'."""
    table = dose.table().filter((pl.col("arm") == DIFFERENCE) & (pl.col("strength") == dose.strengths[-1]))
    return {f"{line['outcome']}_over_controls": line["mean"] for line in table.to_dicts() if line["mean"] == line["mean"]}  # no NaN in a manifest


def _attach(pipeline: Pipeline, store: Store, subject: SubjectModel, name: str) -> AttachedSae:
    config, sae = pipeline.config.sae(name), load_sae(pipeline, store, name).to(subject.device)
    return AttachedSae(sae, config.hook_point, target=config.target_hook_point, firings=load_firings(pipeline, store, name))


def _mean_norm(pipeline: Pipeline, store: Store, hook_point: str) -> float:
    return load_statistics(pipeline, store, hook_point).mean_norm
