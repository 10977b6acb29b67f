"""The daemon is killed in the middle of a backfill, with its code server and its runs: a new one goes on, and nothing is lost or doubled."""

from pathlib import Path

import dagster as dg
import pytest
from daemon_world import daemon, set_up_home, submit_backfill, wait_for
from dagster._core.execution.backfill import BulkActionStatus
from fault_tally import Tally
from road_world import Finished, assert_as_if_nothing_happened, make_road_config

from interp_assets.graph.jobs import open_instance, recorded_versions, run_road
from interp_assets.graph.stages import make_road
from interp_assets.planning.asset import Asset

BACKFILL = "restarted"


@pytest.mark.filterwarnings("ignore:.*AssetSelection.sources:DeprecationWarning")  # Dagster's own use of it
def test_a_backfill_survives_its_daemon(finished: Finished, tiny_world: Path, tmp_path: Path, tally: Tally) -> None:
    """Two assets, shards in runs of one: all dies when some are made and some are under way; the rest comes by itself."""
    execution = {"device": "cpu", "tokens_per_batch": 512, "rows_per_block": 256, "partitions_per_run": 1}
    config = make_road_config(tiny_world, tmp_path / "data", execution=execution)
    set_up_home(config, run_monitoring={"poll_interval_seconds": 2, "start_timeout_seconds": 100})
    names = ["activations", "shuffle_pass_1"]
    stops = [stop for stop in make_road(config) if stop.name in names]
    expected = {stop.name: recorded_versions(finished.instance, stop) for stop in stops}
    log = tmp_path / "daemon.log"
    with open_instance(config) as instance:
        list(run_road(config, instance, select=["token_shards", "shuffle_plan"]))
        submit_backfill(config, instance, BACKFILL, names, sorted(expected["activations"]))
        with daemon(config, tmp_path):
            wait_for(lambda: runs_with(instance, dg.DagsterRunStatus.SUCCESS) and runs_with(instance, dg.DagsterRunStatus.STARTED), 240, log)
        tally.fault("daemons killed in the middle of a backfill")
        n_killed = len(runs_with(instance, dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.STARTING))  # these fail when they should have started
        assert n_killed >= 1
        assert n_made(instance, stops) < sum(len(keys) for keys in expected.values())
        with daemon(config, tmp_path):
            wait_for(lambda: (found := instance.get_backfill(BACKFILL)) is not None and found.status in DONE, 300, log)
        assert {stop.name: recorded_versions(instance, stop) for stop in stops} == expected
        found = instance.get_backfill(BACKFILL)
        assert found is not None
        assert found.status == BulkActionStatus.COMPLETED_SUCCESS
        assert len(runs_with(instance, dg.DagsterRunStatus.FAILURE)) == n_killed
        tally.fault("runs killed with their daemon, found dead and run again", n_killed)
        list(run_road(config, instance))
    tally.right(assert_as_if_nothing_happened(config, finished))


DONE = (BulkActionStatus.COMPLETED_SUCCESS, BulkActionStatus.COMPLETED_FAILED, BulkActionStatus.FAILED)


def runs_with(instance: dg.DagsterInstance, *statuses: dg.DagsterRunStatus) -> list[dg.DagsterRun]:
    """List the backfill's runs with one of these statuses."""
    return list(instance.get_runs(dg.RunsFilter(tags={"dagster/backfill": BACKFILL}, statuses=list(statuses))))


def n_made(instance: dg.DagsterInstance, stops: list[Asset]) -> int:
    """Count the partitions that are recorded."""
    return sum(len(recorded_versions(instance, stop)) for stop in stops)
