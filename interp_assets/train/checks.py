"""Checks of SAEs: finite losses, and held-out quality inside bounds that a sound training run meets."""

import math
from typing import Final

import dagster as dg

from interp_assets.graph.faces import partition_keys
from interp_assets.graph.partitions import Layout
from interp_assets.storage.manifest import load_manifest
from interp_assets.train.refs import evaluation_ref, sae_ref
from resources.world import World

MAX_FVU: Final = 0.5
"""An SAE that explains less than half of the variance has not learned."""
MAX_DEAD_SHARE: Final = 0.5
"""More dead latents than this: lower `d_sae`, or train on more rows."""


def make_checks(layout: Layout) -> list[dg.AssetChecksDefinition]:
    """Make the checks of this stage."""

    @dg.asset_check(asset="sae", partitions_def=layout.experiments, description="Every number that training reports is finite.")
    def finite_training(context: dg.AssetCheckExecutionContext, world: World) -> dg.AssetCheckResult:
        pipeline, store = world.open()
        wrong = {}
        for name in partition_keys(context):
            facts = load_manifest(store, sae_ref(pipeline, name)).facts
            bad = [key for key, value in facts.items() if isinstance(value, float) and not math.isfinite(value)]
            if bad:
                wrong[name] = bad
        return dg.AssetCheckResult(passed=not wrong, metadata={"wrong": dg.MetadataValue.json(wrong)})

    @dg.asset_check(asset="sae_evaluation", partitions_def=layout.experiments, description="FVU and dead share are inside their bounds.")
    def quality_bounds(context: dg.AssetCheckExecutionContext, world: World) -> dg.AssetCheckResult:
        pipeline, store = world.open()
        measured = {name: load_manifest(store, evaluation_ref(pipeline, name)).facts for name in partition_keys(context)}
        is_sound = all(facts["fvu"] <= MAX_FVU and facts["dead_share"] <= MAX_DEAD_SHARE for facts in measured.values())
        metadata = {"measured": dg.MetadataValue.json(measured), "fvu_limit": MAX_FVU, "dead_share_limit": MAX_DEAD_SHARE}
        return dg.AssetCheckResult(passed=is_sound, severity=dg.AssetCheckSeverity.WARN, metadata=metadata)

    return [finite_training, quality_bounds]
