"""Checks of the corpus: the token shards hold what they count."""

import dagster as dg

from interp_assets.corpus.refs import token_shard_ref
from interp_assets.graph.faces import partition_keys
from interp_assets.graph.partitions import Layout
from interp_assets.planning.pipeline import shard_index
from interp_assets.storage.manifest import Manifest, load_manifest
from resources.world import World


def make_checks(layout: Layout) -> list[dg.AssetChecksDefinition]:
    """Make the checks of this stage."""

    @dg.asset_check(asset="token_shards", partitions_def=layout.shards, description="Every token shard has valid rows, and its counts agree.")
    def token_counts(context: dg.AssetCheckExecutionContext, world: World) -> dg.AssetCheckResult:
        pipeline, store = world.open()
        keys = partition_keys(context)
        wrong = {key: fault for key in keys if (fault := count_fault(load_manifest(store, token_shard_ref(pipeline, shard_index(key)))))}
        return dg.AssetCheckResult(passed=not wrong, metadata={"shards": len(keys), "wrong": dg.MetadataValue.json(wrong)})

    return [token_counts]


def count_fault(manifest: Manifest) -> str:
    """Say what is wrong with a token shard's counts; empty when nothing is."""
    facts, n_table_rows = manifest.facts, manifest.file("tokens.parquet").n_rows
    if n_table_rows is not None and n_table_rows != facts["n_rows"]:
        return f"tokens.parquet has {n_table_rows:,} rows, the facts say {facts['n_rows']:,}"
    if not 0 < facts["n_valid"] <= facts["n_rows"]:
        return f"{facts['n_valid']:,} valid rows of {facts['n_rows']:,}"
    return ""
