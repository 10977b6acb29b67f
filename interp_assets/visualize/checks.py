"""Checks of feature evidence: every latent of a slice has its record."""

import dagster as dg

from interp_assets.graph.faces import partition_keys
from interp_assets.graph.partitions import Layout
from interp_assets.storage.manifest import load_manifest
from interp_assets.visualize.refs import features_key, records_ref, slice_bounds, slice_index
from resources.world import World


def make_checks(layout: Layout) -> list[dg.AssetChecksDefinition]:
    """Make the checks of this stage: one for each SAE that is shown."""
    return [_records_complete(layout, name) for name in layout.config.features.saes]


def _records_complete(layout: Layout, sae: str) -> dg.AssetChecksDefinition:
    @dg.asset_check(
        asset=dg.AssetKey(features_key(sae, "feature_records")),
        partitions_def=layout.slices,
        description="One record for every latent, dead ones too.",
    )
    def records_complete(context: dg.AssetCheckExecutionContext, world: World) -> dg.AssetCheckResult:
        pipeline, store = world.open()
        counts = {}
        for key in partition_keys(context):
            start, stop = slice_bounds(pipeline, sae, slice_index(key))
            entry = load_manifest(store, records_ref(pipeline, sae, slice_index(key))).file("records.bin")
            counts[key] = {"latents": stop - start, "records": entry.n_rows}
        is_complete = all(count["latents"] == count["records"] for count in counts.values())
        return dg.AssetCheckResult(passed=is_complete, metadata={"slices": dg.MetadataValue.json(counts)})

    return records_complete
