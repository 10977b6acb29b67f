"""Dagster's real daemon for tests: started in a session of its own, killed at the end, its log kept."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import dagster as dg
import yaml
from dagster._core.definitions.partitions.context import partition_loading_context
from dagster._core.execution.backfill import PartitionBackfill

from interp_assets.graph.definitions import build_defs
from interp_assets.graph.jobs import dagster_home
from interp_assets.planning.config import PipelineConfig

_SETTINGS = Path(__file__).parent.parent.parent / "resources" / "dagster.yaml"


def set_up_home(config: PipelineConfig, **changes: dict[str, object]) -> None:
    """Make the folder of a pipeline's instance with the settings that ship, and sections of them changed: `run_monitoring={...}`."""
    settings = yaml.safe_load(_SETTINGS.read_text(encoding="utf-8"))
    for name, values in changes.items():
        settings[name] = {**settings.get(name, {}), **values}
    dagster_home(config).mkdir(parents=True)
    (dagster_home(config) / "dagster.yaml").write_text(yaml.safe_dump(settings))


@contextmanager
def daemon(config: PipelineConfig, folder: Path, variables: dict[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """Run the daemon of a pipeline, as `dagster-daemon run` does, with more environment variables."""
    (folder / "p.yaml").write_text(yaml.safe_dump(config.model_dump()))
    environment = {**os.environ, "INTERP_CONFIG": str(folder / "p.yaml"), "DAGSTER_HOME": str(dagster_home(config)), "PYTHONWARNINGS": "ignore"}
    environment |= variables or {}
    command = [sys.executable, "-m", "dagster._daemon", "run", "-m", "interp_assets.graph.definitions"]
    with (folder / "daemon.log").open("ab") as log:
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log, start_new_session=True)
        try:
            yield process
        finally:
            os.killpg(process.pid, 9)
            process.wait(20)


def submit_backfill(config: PipelineConfig, instance: dg.DagsterInstance, name: str, assets: list[str], keys: list[str]) -> None:
    """Ask for a backfill as Dagster's UI does."""
    with partition_loading_context(dynamic_partitions_store=instance):
        backfill = PartitionBackfill.from_asset_partitions(
            backfill_id=name,
            asset_graph=build_defs(config).resolve_asset_graph(),
            partition_names=keys,
            asset_selection=[dg.AssetKey(asset) for asset in assets],
            backfill_timestamp=time.time(),
            tags={},
            dynamic_partitions_store=instance,
            all_partitions=False,
            title=None,
            description=None,
            run_config=None,
        )
    instance.add_backfill(backfill)


def wait_for(what: Callable[[], object], timeout_s: float, log: Path) -> None:
    """Wait until `what()` is true; fail with the daemon's log."""
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, log.read_text(errors="replace")[-4000:]
        time.sleep(0.5)


def start_sensor(config: PipelineConfig, folder: Path, name: str) -> None:
    """Switch a sensor on, as `dagster sensor start` does."""
    environment = {**os.environ, "INTERP_CONFIG": str(folder / "p.yaml"), "DAGSTER_HOME": str(dagster_home(config)), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "dagster", "sensor", "start", name, "-m", "interp_assets.graph.definitions"]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def children_of(home: Path) -> list[int]:
    """List the processes that work on a Dagster home."""
    found = []
    for folder in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            is_there = f"DAGSTER_HOME={home}".encode() in (folder / "environ").read_bytes().split(b"\0")
            if is_there and (folder / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.append(int(folder.name))
    return found
