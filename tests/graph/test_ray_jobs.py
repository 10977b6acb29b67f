"""Whole runs and their steps as Ray jobs, by dagster-ray, on a local cluster of two nodes with its real job server and Dagster's real daemon."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dagster as dg
import pytest
from daemon_world import daemon, set_up_home, submit_backfill, wait_for
from road_world import Finished, make_road_config

from interp_assets.graph.jobs import open_instance, recorded_versions, run_road
from interp_assets.graph.stages import make_road

pytest.importorskip("aiohttp_cors", reason="the job server needs `ray[default]`")
pytestmark = [pytest.mark.faults, pytest.mark.timeout(400), pytest.mark.filterwarnings("ignore:.*AssetSelection.sources:DeprecationWarning")]
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "t" * 32, "RAY_USAGE_STATS_ENABLED": "0"}
CLUSTER = """
import sys
from ray.cluster_utils import Cluster
head = {"num_cpus": 1, "include_dashboard": True, "dashboard_port": int(sys.argv[1]), "object_store_memory": 80_000_000}
cluster = Cluster(initialize_head=True, head_node_args=head)
cluster.add_node(num_cpus=1, object_store_memory=80_000_000)
open("session.txt", "w").write(cluster.head_node.get_session_dir_path())
print("up", flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@contextmanager
def run_cluster(folder: Path) -> Iterator[str]:
    """Run a head and a worker; yield the address of the job server."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, **TOKEN, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONWARNINGS": "ignore"}
    with (folder / "ray.log").open("wb") as log:
        command = [sys.executable, "-c", CLUSTER, str(port)]
        process = subprocess.Popen(command, env=environment, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            assert process.stdout.readline().strip().endswith(b"up"), (folder / "ray.log").read_text()[-3000:]
            yield f"http://127.0.0.1:{port}"
        finally:
            process.stdin.close()
            process.wait(60)
            process.stdout.close()


def test_a_run_and_its_steps_are_ray_jobs(finished: Finished, tiny_world: Path, tmp_path: Path) -> None:
    """A backfill of the daemon's becomes a job on the cluster, its asset and that asset's check two more, with the digests of one process."""
    config = make_road_config(tiny_world, tmp_path / "data")
    stops = [stop for stop in make_road(config) if stop.name == "activations"]
    with run_cluster(tmp_path) as address:
        names = ["INTERP_CONFIG", "INTERP_EXECUTOR", "DAGSTER_HOME", *TOKEN, "PYTHONWARNINGS"]
        ray = {"address": address, "num_cpus": 0.5, "env_vars": names}
        set_up_home(config, run_launcher={"module": "dagster_ray", "class": "RayRunLauncher", "config": {"ray": ray}})
        with open_instance(config) as instance:
            list(run_road(config, instance, select=["token_shards"]))
            submit_backfill(config, instance, "rays", ["activations"], sorted(recorded_versions(finished.instance, stops[0])))
            with daemon(config, tmp_path, {**TOKEN, "INTERP_EXECUTOR": "ray"}):
                runs = dg.RunsFilter(tags={"dagster/backfill": "rays"})
                wait_for(lambda: (found := instance.get_runs(runs)) and all(run.is_finished for run in found), 240, tmp_path / "daemon.log")
            (run,) = instance.get_runs(runs)
            said = "\n".join(record.message or record.user_message for record in instance.all_logs(run.run_id))
            assert run.status == dg.DagsterRunStatus.SUCCESS, said
            assert 'Executing step "activations" in Ray job dagster-step-' in said
            assert recorded_versions(instance, stops[0]) == recorded_versions(finished.instance, stops[0])
        jobs = {path.name for path in Path((tmp_path / "session.txt").read_text()).glob("logs/job-driver-*.log")}
    assert f"job-driver-dagster-run-{run.run_id}.log" in jobs
    assert sum(name.startswith("job-driver-dagster-step-") for name in jobs) == 2
