"""Checks of SAEs: finite losses, and held-out quality inside bounds that a sound training run meets."""

import math
from collections.abc import Sequence
from typing import Final

from interp_assets.planning.asset import Check, Verdict
from interp_assets.planning.pipeline import Pipeline
from interp_assets.storage.manifest import load_manifest
from interp_assets.storage.store import Store
from interp_assets.train.exchange.fit import Claims, Fit, explain_misfit
from interp_assets.train.refs import evaluation_ref, sae_ref

MAX_FVU: Final = 0.5
"""An SAE that explains less than half of the variance has not learned."""
MAX_DEAD_SHARE: Final = 0.5
"""More dead latents than this: lower `d_sae`, or train on more rows."""


def _finite_training(pipeline: Pipeline, store: Store, keys: Sequence[str]) -> Verdict:
    wrong = {}
    for name in keys:
        facts = load_manifest(store, sae_ref(pipeline, name)).facts
        bad = [key for key, value in facts.items() if isinstance(value, float) and not math.isfinite(value)]
        if bad:
            wrong[name] = bad
    return Verdict(not wrong, {"wrong": wrong})


def _quality_bounds(pipeline: Pipeline, store: Store, keys: Sequence[str]) -> Verdict:
    measured = {name: load_manifest(store, evaluation_ref(pipeline, name)).facts for name in keys}
    is_sound = all(facts["fvu"] <= MAX_FVU and facts["dead_share"] <= MAX_DEAD_SHARE for facts in measured.values())
    return Verdict(is_sound, {"measured": measured, "fvu_limit": MAX_FVU, "dead_share_limit": MAX_DEAD_SHARE}, is_warning=True)


def _imported_fit(pipeline: Pipeline, store: Store, keys: Sequence[str]) -> Verdict:
    misfits = {}
    for name in (name for name in keys if pipeline.config.sae(name).imported):
        facts, told = load_manifest(store, evaluation_ref(pipeline, name)).facts, load_manifest(store, sae_ref(pipeline, name)).facts["imported"]
        fit = Fit(**{field: facts[field] for field in Fit._fields})
        if misfit := explain_misfit(fit, Claims(told["l0"], "its folder")):
            misfits[name] = misfit
    return Verdict(not misfits, {"misfits": misfits})


FINITE_TRAINING: Final = Check("finite_training", "Every number that training reports is finite.", _finite_training)
QUALITY_BOUNDS: Final = Check("quality_bounds", "FVU and dead share are inside their bounds.", _quality_bounds)
IMPORTED_FIT: Final = Check(
    "imported_fit", "Imported SAEs reconstruct the held-out rows, and fire about as often as their folders say.", _imported_fit
)
