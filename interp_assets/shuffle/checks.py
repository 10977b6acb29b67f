"""Checks of the shuffle: the certificate, which blocks training, and row counts that add up."""

import dagster as dg

from interp_assets.corpus.refs import token_shard_ref
from interp_assets.graph.partitions import Layout
from interp_assets.shuffle.refs import certificate_ref, mixed_shard_ref, n_mixed_shards
from interp_assets.storage.manifest import load_manifest
from resources.world import World


def make_checks(_layout: Layout) -> list[dg.AssetChecksDefinition]:
    """Make the checks of this stage."""

    @dg.asset_check(asset="shuffle_certificate", blocking=True, description="No row lost or doubled, and an order that looks uniform.")
    def certificate_passed(world: World) -> dg.AssetCheckResult:
        pipeline, store = world.open()
        verdicts = {
            hook_point: load_manifest(store, certificate_ref(pipeline, hook_point)).facts for hook_point in pipeline.config.harvest.hook_points
        }
        is_passed = all(facts["passed"] for facts in verdicts.values())
        return dg.AssetCheckResult(passed=is_passed, metadata={"verdicts": dg.MetadataValue.json(verdicts)})

    @dg.asset_check(asset="shuffle_certificate", description="The mixed shards hold as many rows as the training shards have valid tokens.")
    def mixed_row_counts(world: World) -> dg.AssetCheckResult:
        pipeline, store = world.open()
        n_expected = sum(load_manifest(store, token_shard_ref(pipeline, index)).facts["n_valid"] for index in pipeline.train_indices)
        found = {
            hook_point: sum(
                load_manifest(store, mixed_shard_ref(pipeline, hook_point, bucket)).facts["n_rows"] for bucket in range(n_mixed_shards(pipeline))
            )
            for hook_point in pipeline.config.harvest.hook_points
        }
        return dg.AssetCheckResult(
            passed=set(found.values()) == {n_expected}, metadata={"expected": n_expected, "found": dg.MetadataValue.json(found)}
        )

    return [certificate_passed, mixed_row_counts]
