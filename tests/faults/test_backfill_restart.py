"""The daemon is killed in the middle of a backfill, with its runs: a new one goes on, and each shard is made with its digest."""

import time
from collections import Counter
from pathlib import Path

import dagster as dg
from daemon_world import daemon, wait_for
from dagster._core.definitions.partitions.context import partition_loading_context
from dagster._core.execution.backfill import BulkActionStatus, PartitionBackfill
from road_world import Finished, make_road_config

from interp_assets.definitions import build_defs
from interp_assets.jobs import open_instance, recorded_versions, run_road
from interp_assets.road import make_road

BACKFILL = "restarted"


def test_a_backfill_survives_its_daemon(finished: Finished, tiny_world: Path, tmp_path: Path, counts: Counter[str]) -> None:
    """Five shards in runs of two: the daemon and its runs die when the first is under way, and the backfill still ends complete."""
    execution = {"device": "cpu", "tokens_per_batch": 512, "rows_per_block": 256, "partitions_per_run": 2}
    config = make_road_config(tiny_world, tmp_path / "data", execution=execution)
    activations = next(stop for stop in make_road(config) if stop.name == "activations")
    expected = recorded_versions(finished.instance, activations)
    log = tmp_path / "daemon.log"
    with open_instance(config) as instance:
        list(run_road(config, instance, select=["token_shards"]))
        with partition_loading_context(dynamic_partitions_store=instance):
            backfill = PartitionBackfill.from_asset_partitions(
                backfill_id=BACKFILL,
                asset_graph=build_defs(config).resolve_asset_graph(),
                partition_names=sorted(expected),
                asset_selection=[dg.AssetKey("activations")],
                backfill_timestamp=time.time(),
                tags={},
                dynamic_partitions_store=instance,
                all_partitions=False,
                title=None,
                description=None,
                run_config=None,
            )
        instance.add_backfill(backfill)
        with daemon(config, tmp_path):
            wait_for(lambda: any(run.status == dg.DagsterRunStatus.STARTED for run in _runs(instance)), 90, log)
        counts["daemons killed in the middle of a backfill"] += 1
        instance_runs = len(_runs(instance))
        assert instance_runs >= 1
        with daemon(config, tmp_path):
            wait_for(lambda: set(recorded_versions(instance, activations)) == set(expected), 200, log)
        assert recorded_versions(instance, activations) == expected
        found = instance.get_backfill(BACKFILL)
        assert found is not None
        assert found.status in (BulkActionStatus.REQUESTED, BulkActionStatus.COMPLETED_SUCCESS, BulkActionStatus.COMPLETED)


def _runs(instance: dg.DagsterInstance) -> list[dg.DagsterRun]:
    return list(instance.get_runs(dg.RunsFilter(tags={"dagster/backfill": BACKFILL})))
