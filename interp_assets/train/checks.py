"""Checks of SAEs: finite losses, and held-out quality inside bounds that a sound training run meets."""

import math
from collections.abc import Sequence
from typing import Final

from interp_assets.planning.asset import Check, Verdict
from interp_assets.planning.pipeline import Pipeline
from interp_assets.storage.manifest import load_manifest
from interp_assets.storage.store import Store
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
    sentences = [
        f"SAE {name} reports what is not finite ({', '.join(bad)}). Train it again with a lower learning_rate." for name, bad in wrong.items()
    ]
    return Verdict(sentences, {"wrong": wrong})


def _quality_bounds(pipeline: Pipeline, store: Store, keys: Sequence[str]) -> Verdict:
    measured = {name: load_manifest(store, evaluation_ref(pipeline, name)).facts for name in keys}
    bounds = (
        ("fvu", "FVU", MAX_FVU, "train on more rows, or raise k or d_sae"),
        ("dead_share", "a dead share", MAX_DEAD_SHARE, "lower d_sae, or train on more rows"),
    )
    sentences = [
        f"SAE {name} has {what} of {facts[fact]:.3f} on the held-out shards, at most {limit} is sound: {advice}."
        for name, facts in measured.items()
        for fact, what, limit, advice in bounds
        if not facts[fact] <= limit
    ]
    return Verdict(sentences, {"measured": measured, "fvu_limit": MAX_FVU, "dead_share_limit": MAX_DEAD_SHARE}, is_warning=True)


FINITE_TRAINING: Final = Check("finite_training", "Every number that training reports is finite.", _finite_training)
QUALITY_BOUNDS: Final = Check("quality_bounds", "FVU and dead share are inside their bounds.", _quality_bounds)
