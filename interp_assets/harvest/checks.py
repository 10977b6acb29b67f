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


def _activation_rows(pipeline: Pipeline, store: Store, keys: Sequence[str]) -> dict[str, Verdict]:
    indices = [shard_index(key) for key in keys]
    hook_points = pipeline.config.harvest.hook_points
    drifts = [norm_drifts(pipeline, store, hook_point, indices) for hook_point in hook_points]
    verdicts = {}
    for key, index, *of_shard in zip(keys, indices, *drifts, strict=True):
        wrong = [fault for hook_point in hook_points for fault in row_faults(pipeline, store, hook_point, index)]
        shown = {"norm_drift": round(max(of_shard), 4), "norm_drift_limit": MAX_NORM_DRIFT, "wrong": "; ".join(wrong) or "nothing"}
        sentences = [f"{fault}. Materialize this shard again." for fault in wrong]
        if max(of_shard) > MAX_NORM_DRIFT:
            sentences.append(
                f"mean norms of {key} differ from the others' by {max(of_shard):.0%}, at most {MAX_NORM_DRIFT:.0%} is usual. Look whether it holds "
                "other text, or was harvested by another release or device."
            )
        verdicts[key] = Verdict(sentences, shown, is_warning=not wrong)
    return verdicts


def _outlier_dimensions(pipeline: Pipeline, store: Store, _keys: Sequence[str]) -> dict[str, Verdict]:
    hook_points = pipeline.config.harvest.hook_points
    ratios = {hook_point: float(load_manifest(store, statistics_ref(pipeline, hook_point)).facts["max_mean_ratio"]) for hook_point in hook_points}
    sentences = [
        f"one dimension of {hook_point} has a mean {ratio:,.0f} times the typical one, more than {MAX_MEAN_RATIO:,.0f}: it dominates every norm. "
        "Look at the SAE's FVU with care; rows are centred before training."
        for hook_point, ratio in ratios.items()
        if ratio > MAX_MEAN_RATIO
    ]
    return {"": Verdict(sentences, {"limit": MAX_MEAN_RATIO, **{f"ratio.{name}": ratio for name, ratio in ratios.items()}}, is_warning=True)}


def row_faults(pipeline: Pipeline, store: Store, hook_point: str, index: int) -> list[str]:
    """Say where a shard's rows do not match its tokens, and whether its norms are not finite."""
    faults = []
    n_tokens = load_manifest(store, token_shard_ref(pipeline, index)).facts["n_rows"]
    facts = load_manifest(store, activation_shard_ref(pipeline, hook_point, index)).facts
    if facts["n_rows"] != n_tokens:
        faults.append(f"shard {index} at {hook_point}: {facts['n_rows']:,} rows for {n_tokens:,} token positions")
    if not math.isfinite(facts["mean_norm"]):
        faults.append(f"shard {index} at {hook_point}: mean norm {facts['mean_norm']}")
    return faults


def norm_drifts(pipeline: Pipeline, store: Store, hook_point: str, indices: list[int]) -> list[float]:
    """Return each shard's relative distance of its mean norm from the pipeline's: its merged statistics, else the median of these shards.

    One shard that is made again, by another release or on another device, is compared with all others and not with itself.
    """
    norms = [float(load_manifest(store, activation_shard_ref(pipeline, hook_point, index)).facts["mean_norm"]) for index in indices]
    merged = find_manifest(store, statistics_ref(pipeline, hook_point))
    typical = float(merged.facts["mean_norm"]) if merged else sorted(norms)[len(norms) // 2]
    return [abs(norm - typical) / typical if typical else 0.0 for norm in norms]


ACTIVATION_ROWS: Final = Check("activation_rows", "One finite row per token position, and mean norms alike in all shards.", _activation_rows)
OUTLIER_DIMENSIONS: Final = Check("outlier_dimensions", "No dimension's mean is far above the others.", _outlier_dimensions)
