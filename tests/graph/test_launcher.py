"""A run whose process is gone is found out, so that it fails, frees its place and is tried again; one that lives, or may live, is left alone."""

import json
import subprocess
import sys
from pathlib import Path

import dagster as dg
from dagster._core.launcher import WorkerStatus
from dagster._core.storage.tags import GRPC_INFO_TAG
from dagster._core.types.loadable_target_origin import LoadableTargetOrigin
from dagster._grpc.server import GrpcServerProcess
from road_world import Finished, copied_history, make_road_config

from interp_assets.graph.backfill import run_backfill
from interp_assets.graph.definitions import build_defs
from interp_assets.graph.jobs import open_instance, run_road
from interp_assets.storage.process_names import name_process
from resources.launcher import EARLIER_TAG, PROCESS_TAG, LocalRunLauncher


def health(tags: dict[str, str]) -> WorkerStatus:
    """Ask for the health of a run with these tags."""
    return LocalRunLauncher().check_run_worker_health(dg.DagsterRun("job", "0" * 8, tags=tags)).status


def test_a_run_of_a_process_that_is_gone_has_failed() -> None:
    """After a power cut, `interp run` is in the list of runs as started, and would hold one of two places in the queue for ever."""
    source = "from interp_assets.storage.process_names import name_process; print(name_process())"
    child = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert health({PROCESS_TAG: child.stdout.strip()}) == WorkerStatus.FAILED
    assert health({PROCESS_TAG: name_process()}) == WorkerStatus.RUNNING


def test_a_run_of_an_earlier_version_that_is_gone_has_failed_too() -> None:
    """Its process stands under the tag of that time: as a run that nothing is known of it would hold its place in the queue for ever."""
    source = "from interp_assets.storage.process_names import name_process; print(name_process())"
    child = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert health({EARLIER_TAG: child.stdout.strip()}) == WorkerStatus.FAILED
    assert health({EARLIER_TAG: name_process()}) == WorkerStatus.RUNNING


def test_runs_of_earlier_versions_in_a_history_do_no_harm(finished: Finished) -> None:
    """One that is started for ever, with the tags of its time or none: nothing is made again, nothing fails, and no later run waits."""
    made = {"interp/asset": "sae", "interp/stage": "train"}
    with copied_history(finished) as instance:
        job = build_defs(finished.config).resolve_implicit_global_asset_job_def()
        for tags in ({}, made, {**made, EARLIER_TAG: "another-machine:1"}, {**made, EARLIER_TAG: ":"}):
            run = instance.create_run_for_job(job, tags=tags, status=dg.DagsterRunStatus.STARTED)
            assert health(dict(run.tags)) == WorkerStatus.RUNNING
        reports = list(run_road(finished.config, instance, select=["+sae"]))
        assert {report.name: report.n_made for report in reports if report.n_made} == {"corpus_plan": 1}
        assert list(run_backfill(finished.config, instance)) == []


def test_a_run_that_nothing_is_known_of_is_left_alone() -> None:
    """A process of another machine that shares the history cannot be looked at; failing its run would start it twice."""
    assert health({PROCESS_TAG: "another-machine:1"}) == WorkerStatus.RUNNING
    assert health({}) == WorkerStatus.RUNNING


def test_a_run_of_a_code_server_that_is_gone_has_failed(tmp_path: Path) -> None:
    """Daemon and code server killed together leave runs that nobody watches; a server that is there is asked which runs it has."""
    assert health({GRPC_INFO_TAG: json.dumps({"host": "localhost", "socket": str(tmp_path / "none.sock")})}) == WorkerStatus.FAILED
    (tmp_path / "code.py").write_text("import dagster\ndefs = dagster.Definitions()\n")
    origin = LoadableTargetOrigin(executable_path=sys.executable, python_file=str(tmp_path / "code.py"), working_directory=str(tmp_path))
    with (
        dg.DagsterInstance.from_config(str(home(tmp_path))) as instance,
        GrpcServerProcess(instance_ref=instance.get_ref(), location_name="code", loadable_target_origin=origin, wait_on_exit=True) as server,
    ):
        address = {"host": "localhost", "socket": server.socket, "port": server.port}
        assert health({GRPC_INFO_TAG: json.dumps(address)}) == WorkerStatus.FAILED  # it is there, and has no such run


def home(folder: Path) -> Path:
    """Make an empty instance folder."""
    (folder / "home").mkdir()
    (folder / "home" / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    return folder / "home"


def test_the_shipped_settings_use_it_and_runs_say_whose_they_are(finished: Finished, tiny_world: Path, tmp_path: Path) -> None:
    """Run monitoring can only ask a launcher that answers, about runs that carry the tag."""
    with open_instance(make_road_config(tiny_world, tmp_path / "data")) as instance:
        assert isinstance(instance.run_launcher, LocalRunLauncher)
        assert instance.run_launcher.supports_check_run_worker_health
    assert {run.tags[PROCESS_TAG] for run in finished.instance.get_runs()} == {name_process()}
