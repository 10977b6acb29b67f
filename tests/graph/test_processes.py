"""Dagster's own commands load the definitions and materialize a partition, on the persistent default that `interp` uses."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest
import yaml
from daemon_world import children_of, wait_for

from interp_assets.graph.jobs import dagster_home, open_instance, recorded_versions, run_road
from interp_assets.graph.stages import make_road
from interp_assets.planning.config import PipelineConfig
from interp_assets.planning.pipeline import load_pipeline, open_pipeline_store

ROOT = Path(__file__).parent.parent.parent
SHARD = "shard-000001"


def dagster(*arguments: str, config: PipelineConfig, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run Dagster's command line on a pipeline."""
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump(config.model_dump()))
    environment = {**os.environ, "INTERP_CONFIG": str(path), "DAGSTER_HOME": str(dagster_home(config)), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "dagster", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_workspace_is_valid(road_config: PipelineConfig, tmp_path: Path) -> None:
    """`workspace.yaml` and `dagster.yaml` are what a person's first `dagster dev` reads."""
    with open_instance(road_config):
        result = dagster("definitions", "validate", "-w", "workspace.yaml", config=road_config, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "All code locations passed validation" in result.stderr + result.stdout


@pytest.mark.slow
def test_one_partition_from_dagsters_command_line(road_config: PipelineConfig, tmp_path: Path) -> None:
    """What `interp run` made and what Dagster's own command makes again is one history, with one digest."""
    stop = next(stop for stop in make_road(road_config) if stop.name == "token_shards")
    with open_instance(road_config) as instance:
        list(run_road(road_config, instance, select=["token_shards"]))
        before = recorded_versions(instance, stop)
        result = dagster(
            "asset",
            "materialize",
            "--select",
            "token_shards",
            "--partition",
            SHARD,
            "-m",
            "interp_assets.graph.definitions",
            config=road_config,
            folder=tmp_path,
        )
        assert result.returncode == 0, result.stderr
        filters = dg.AssetRecordsFilter(asset_key=dg.AssetKey("token_shards"), asset_partitions=[SHARD])
        assert len(instance.fetch_materializations(filters, limit=10).records) == 2
        assert recorded_versions(instance, stop) == before
    store = open_pipeline_store(road_config)
    assert before[SHARD] == make_road(road_config).find_version(stop, load_pipeline(road_config, store), store, SHARD)


def test_each_pipeline_has_its_own_history(road_config: PipelineConfig, tmp_path: Path) -> None:
    """Asset keys are the same in all pipelines, so two in one database would overwrite each other's lineage."""
    other = road_config.model_copy(update={"name": "other"})
    assert dagster_home(road_config) == (tmp_path / "data" / ".dagster" / "tiny")
    assert dagster_home(other) == (tmp_path / "data" / ".dagster" / "other")
    bucket = road_config.model_copy(update={"root": "s3://bucket/prefix"})
    assert dagster_home(bucket) == Path(".dagster/tiny").resolve()


def test_a_new_history_gets_our_settings(road_config: PipelineConfig) -> None:
    """No telemetry, no newsletter dialog, and the limits of a small machine; a person's own settings are left alone."""
    with open_instance(road_config) as instance:
        assert not instance.telemetry_enabled
        assert not instance.nux_enabled
    settings = dagster_home(road_config) / "dagster.yaml"
    settings.write_text("telemetry:\n  enabled: true\n")
    with open_instance(road_config):
        assert settings.read_text() == "telemetry:\n  enabled: true\n"


def test_the_settings_at_the_root_are_the_shipped_ones() -> None:
    """One file: `dagster.yaml` in the checkout is a link to the one that a wheel carries."""
    assert (ROOT / "dagster.yaml").resolve() == (ROOT / "resources" / "dagster.yaml").resolve()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent was killed, and shows processes in /proc")
def test_dagster_ends_with_a_command_that_was_killed(road_config: PipelineConfig, tmp_path: Path) -> None:
    """By `kill -9`: webserver, daemon and code servers would go on, hold the port, and start runs. `timeout` has its test in `test_safe_path.py`."""
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(road_config.model_dump()))
    home = tmp_path / "home"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", "from interp_assets.terminal.cli import main; main()", "dev", "--config", "p.yaml", "--dagster-port", str(port)]
    with (tmp_path / "said.txt").open("wb") as said:
        process = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, "DAGSTER_HOME": str(home)}, stdout=said, stderr=said)
        try:
            wait_for(lambda: len(children_of(home)) >= 5, 120, tmp_path / "said.txt")  # dev, webserver, daemon, a code server
            process.kill()
            assert process.wait(60) == -signal.SIGKILL
            wait_for(lambda: not children_of(home), 60, home / "dagster-dev.log")
        finally:
            process.kill()
            for pid in children_of(home):
                os.kill(pid, signal.SIGKILL)
