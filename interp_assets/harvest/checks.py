"""Checks of the activations: as many rows as tokens, finite norms that do not drift between shards, outlier dimensions named."""

import math
from collections.abc import Sequence
from typing import Final

from interp_assets.corpus.refs import token_shard_ref
from interp_assets.harvest.refs import activation_shard_ref, statistics_ref
from interp_assets.planning.asset import Check, Verdict
from interp_assets.planning.pipeline import Pipeline, shard_index
from interp_assets.storage.manifest import find_manifest, load_manifest
from interp_assets.storage.store import Store

MAX_NORM_DRIFT: Final = 0.25
"""Mean norms of the shards of one run may differ from their median by this share; text differs, models do not."""
MAX_MEAN_RATIO: Final = 100.0
"""A dimension whose |mean| is this many times the typical one dominates the norm: worth knowing, no fault."""


def _activation_rows(pipeline: Pipeline, store: Store, keys: Sequence[str]) -> Verdict:
    indices = [shard_index(key) for key in keys]
    hook_points = pipeline.config.harvest.hook_points
    wrong = [fault for hook_point in hook_points for fault in row_faults(pipeline, store, hook_point, indices)]
    drifts = {hook_point: norm_drift(pipeline, store, hook_point, indices) for hook_point in hook_points}
    drift = max(drifts.values())
    shown = {"shards": len(indices), "wrong": wrong, "norm_drift": round(drift, 4), "norm_drift_limit": MAX_NORM_DRIFT}
    sentences = [f"{fault}. Materialize this shard again." for fault in wrong]
    sentences += [
        f"mean norms of {len(indices):,} shard(s) at {hook_point} differ from the others' by {found:.0%}, at most {MAX_NORM_DRIFT:.0%} is usual. "
        "Look whether they hold other text, or were harvested by another release or device."
        for hook_point, found in drifts.items()
        if found > MAX_NORM_DRIFT
    ]
    return Verdict(sentences, shown, is_warning=not wrong)


def _outlier_dimensions(pipeline: Pipeline, store: Store, _keys: Sequence[str]) -> Verdict:
    hook_points = pipeline.config.harvest.hook_points
    ratios = {hook_point: float(load_manifest(store, statistics_ref(pipeline, hook_point)).facts["max_mean_ratio"]) for hook_point in hook_points}
    sentences = [
        f"one dimension of {hook_point} has a mean {ratio:,.0f} times the typical one, more than {MAX_MEAN_RATIO:,.0f}: it dominates every norm. "
        "Look at the SAE's FVU with care; rows are centred before training."
        for hook_point, ratio in ratios.items()
        if ratio > MAX_MEAN_RATIO
    ]
    return Verdict(sentences, {"limit": MAX_MEAN_RATIO, **{f"ratio.{name}": ratio for name, ratio in ratios.items()}}, is_warning=True)


def row_faults(pipeline: Pipeline, store: Store, hook_point: str, indices: list[int]) -> list[str]:
    """Name the shards whose rows do not match their tokens, or whose norms are not finite."""
    faults = []
    for index in indices:
        n_tokens = load_manifest(store, token_shard_ref(pipeline, index)).facts["n_rows"]
        facts = load_manifest(store, activation_shard_ref(pipeline, hook_point, index)).facts
        if facts["n_rows"] != n_tokens:
            faults.append(f"shard {index} at {hook_point}: {facts['n_rows']:,} rows for {n_tokens:,} token positions")
        if not math.isfinite(facts["mean_norm"]):
            faults.append(f"shard {index} at {hook_point}: mean norm {facts['mean_norm']}")
    return faults


def norm_drift(pipeline: Pipeline, store: Store, hook_point: str, indices: list[int]) -> float:
    """Return the largest relative distance of these shards' mean norms from the pipeline's: its merged statistics, else the shards' median.

    One shard that is made again, by another release or on another device, is compared with all others and not with itself.
    """
    norms = sorted(float(load_manifest(store, activation_shard_ref(pipeline, hook_point, index)).facts["mean_norm"]) for index in indices)
    merged = find_manifest(store, statistics_ref(pipeline, hook_point))
    typical = float(merged.facts["mean_norm"]) if merged else norms[len(norms) // 2]
    return max(abs(norm - typical) for norm in (norms[0], norms[-1])) / typical if typical else 0.0


ACTIVATION_ROWS: Final = Check("activation_rows", "One finite row per token position, and mean norms alike in all shards.", _activation_rows)
OUTLIER_DIMENSIONS: Final = Check("outlier_dimensions", "No dimension's mean is far above the others.", _outlier_dimensions)
