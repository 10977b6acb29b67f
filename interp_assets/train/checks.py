"""Checks of SAEs: finite losses, and held-out quality inside bounds that a sound training run meets."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from interp_assets.harvest.refs import OUTLIER_MULTIPLE
from interp_assets.planning.asset import Check, Verdict
from interp_assets.planning.pipeline import Pipeline
from interp_assets.storage.manifest import find_manifest, load_manifest
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
    found = {name: find_manifest(store, sae_ref(pipeline, name)) for name in keys}  # one that was stopped has none
    return {name: _judge_numbers(name, manifest.facts) for name, manifest in found.items() if manifest}


def _judge_numbers(name: str, facts: Mapping[str, Any]) -> Verdict:
    wrong = [key for key, value in facts.items() if isinstance(value, float) and not math.isfinite(value)]
    sentences = [f"SAE {name} reports what is not finite ({', '.join(wrong)}). Train it again with a lower learning_rate."] if wrong else []
    return Verdict(sentences, {"wrong": ", ".join(wrong) or "nothing"})


def _quality_bounds(pipeline: Pipeline, store: Store, keys: Sequence[str]) -> dict[str, Verdict]:
    return {name: _judge_quality(name, load_manifest(store, evaluation_ref(pipeline, name)).facts) for name in keys}


def _judge_quality(name: str, facts: Mapping[str, Any]) -> Verdict:
    bounds = (
        ("fvu", "FVU", MAX_FVU, "train on more rows, or raise k or d_sae"),
        ("fvu_ordinary", "FVU over ordinary rows", MAX_FVU, "train on more rows, or leave rows of huge norm out (harvest.excluded_positions)"),
        ("dead_share", "a dead share", MAX_DEAD_SHARE, "lower d_sae, or train on more rows"),
    )
    found = {fact: facts[fact] for fact, *_ in bounds if facts.get(fact) is not None}
    sentences = [
        f"SAE {name} has {what} of {found[fact]:.3f} on the held-out shards, at most {limit} is sound: {advice}."
        for fact, what, limit, advice in bounds
        if fact in found and not found[fact] <= limit
    ]
    return Verdict(sentences, {**found, "fvu_limit": MAX_FVU, "dead_share_limit": MAX_DEAD_SHARE}, is_warning=True)


def _imported_fit(pipeline: Pipeline, store: Store, keys: Sequence[str]) -> dict[str, Verdict]:
    return {name: _judge_fit(pipeline, store, name) for name in keys}


def _judge_fit(pipeline: Pipeline, store: Store, name: str) -> Verdict:
    if not pipeline.config.sae(name).imported:
        return Verdict([], {"misfit": "none"})
    facts, told = load_manifest(store, evaluation_ref(pipeline, name)).facts, load_manifest(store, sae_ref(pipeline, name)).facts["imported"]
    misfit = explain_misfit(Fit(**{field: facts[field] for field in Fit._fields}), Claims(told["l0"], "its folder"))
    if misfit and pipeline.config.sae(name).accepts_misfit:
        return Verdict([], {"misfit": f"accepted: {misfit}"})
    remedy = " If it is meant so, say accepts_misfit: true in its entry."
    return Verdict([f"SAE {name}: {misfit}{remedy}"] if misfit else [], {"misfit": misfit or "none"})


def _outlier_rows(pipeline: Pipeline, store: Store, keys: Sequence[str]) -> dict[str, Verdict]:
    return {name: _judge_outliers(name, load_manifest(store, evaluation_ref(pipeline, name)).facts) for name in keys}


def _judge_outliers(name: str, facts: Mapping[str, Any]) -> Verdict:
    shown = {key: facts[key] for key in ("fvu", "fvu_ordinary", "fvu_outliers", "outlier_share") if facts.get(key) is not None}
    is_hidden = facts.get("outlier_share") and facts["fvu_ordinary"] is not None and facts["fvu_ordinary"] - facts["fvu"] > MAX_OUTLIER_GAP
    sentence = (
        f"SAE {name} has FVU {facts['fvu']:.3f}, and {facts['fvu_ordinary']:.3f} over ordinary rows: {facts['outlier_share']:.2%} of the rows have "
        f"more than {OUTLIER_MULTIPLE:g} times the median norm. A gap of at most {MAX_OUTLIER_GAP:g} is sound: leave such rows out "
        "(harvest.excluded_positions, harvest.excluded_token_ids)."
        if is_hidden
        else ""
    )
    return Verdict([sentence] if sentence else [], {**shown, "norm_multiple": OUTLIER_MULTIPLE, "gap_limit": MAX_OUTLIER_GAP}, is_warning=True)


FINITE_TRAINING: Final = Check("finite_training", "Every number that training reports is finite.", _finite_training)
QUALITY_BOUNDS: Final = Check("quality_bounds", "FVU, of ordinary rows too, and dead share are inside their bounds.", _quality_bounds)
IMPORTED_FIT: Final = Check(
    "imported_fit", "Imported SAEs reconstruct the held-out rows, and fire about as often as their folders say.", _imported_fit
)
OUTLIER_ROWS: Final = Check("outlier_rows", "A few rows of huge norm do not make FVU look better than it is on all others.", _outlier_rows)
