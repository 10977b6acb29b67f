"""Checks of SAEs: finite losses, and held-out quality inside bounds that a sound training run meets."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from interp_assets.harvest.refs import OUTLIER_MULTIPLE
from interp_assets.planning.asset import Check, Verdict
from interp_assets.planning.pipeline import Pipeline
from interp_assets.storage.manifest import load_manifest
from interp_assets.storage.store import Store
from interp_assets.train.exchange.fit import Claims, Fit, explain_misfit
from interp_assets.train.refs import evaluation_ref, sae_ref

MAX_FVU: Final = 0.5
"""An SAE that explains less than half of the variance has not learned."""
MAX_OUTLIER_GAP: Final = 0.05
"""By how much FVU over ordinary rows may exceed that over all rows."""
MAX_DEAD_SHARE: Final = 0.5
"""More dead latents than this: lower `d_sae`, or train on more rows."""


def _finite_training(pipeline: Pipeline, store: Store, keys: Sequence[str]) -> dict[str, Verdict]:
    return {name: _judge_numbers(load_manifest(store, sae_ref(pipeline, name)).facts) for name in keys}


def _judge_numbers(facts: Mapping[str, Any]) -> Verdict:
    wrong = [key for key, value in facts.items() if isinstance(value, float) and not math.isfinite(value)]
    return Verdict(not wrong, {"wrong": ", ".join(wrong) or "nothing"})


def _quality_bounds(pipeline: Pipeline, store: Store, keys: Sequence[str]) -> dict[str, Verdict]:
    return {name: _judge_quality(load_manifest(store, evaluation_ref(pipeline, name)).facts) for name in keys}


def _judge_quality(facts: Mapping[str, Any]) -> Verdict:
    ordinary = facts.get("fvu_ordinary") or 0.0
    is_sound = max(facts["fvu"], ordinary) <= MAX_FVU and facts["dead_share"] <= MAX_DEAD_SHARE
    shown = {"fvu": facts["fvu"], "fvu_ordinary": ordinary, "fvu_limit": MAX_FVU}
    shown |= {"dead_share": facts["dead_share"], "dead_share_limit": MAX_DEAD_SHARE}
    return Verdict(is_sound, shown, is_warning=True)


def _imported_fit(pipeline: Pipeline, store: Store, keys: Sequence[str]) -> dict[str, Verdict]:
    return {name: _judge_fit(pipeline, store, name) for name in keys}


def _judge_fit(pipeline: Pipeline, store: Store, name: str) -> Verdict:
    if not pipeline.config.sae(name).imported:
        return Verdict(passed=True, shown={"misfit": "not imported"})
    facts, told = load_manifest(store, evaluation_ref(pipeline, name)).facts, load_manifest(store, sae_ref(pipeline, name)).facts["imported"]
    fit = Fit(**{field: facts[field] for field in Fit._fields})
    misfit = explain_misfit(fit, Claims(told["l0"], "its folder"))
    return Verdict(not misfit, {**fit._asdict(), "misfit": misfit or "none"})


def _outlier_rows(pipeline: Pipeline, store: Store, keys: Sequence[str]) -> dict[str, Verdict]:
    return {name: _judge_outliers(load_manifest(store, evaluation_ref(pipeline, name)).facts) for name in keys}


def _judge_outliers(facts: Mapping[str, Any]) -> Verdict:
    shown = {key: facts[key] for key in ("fvu", "fvu_ordinary", "fvu_outliers", "outlier_share") if facts.get(key) is not None}
    is_hidden = facts.get("outlier_share") and facts["fvu_ordinary"] is not None and facts["fvu_ordinary"] - facts["fvu"] > MAX_OUTLIER_GAP
    return Verdict(not is_hidden, {**shown, "norm_multiple": OUTLIER_MULTIPLE, "gap_limit": MAX_OUTLIER_GAP}, is_warning=True)


FINITE_TRAINING: Final = Check("finite_training", "Every number that training reports is finite.", _finite_training)
QUALITY_BOUNDS: Final = Check("quality_bounds", "FVU, of ordinary rows too, and dead share are inside their bounds.", _quality_bounds)
IMPORTED_FIT: Final = Check(
    "imported_fit", "Imported SAEs reconstruct the held-out rows, and fire about as often as their folders say.", _imported_fit
)
OUTLIER_ROWS: Final = Check("outlier_rows", "A few rows of huge norm do not make FVU look better than it is on all others.", _outlier_rows)
