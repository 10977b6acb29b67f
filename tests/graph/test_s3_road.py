"""The whole graph on a real S3 server: environment variables are all that changes, and every digest is the one of a local folder."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from road_world import Finished
from s3_server import S3Server, start_s3_server

from interp_assets.graph.jobs import recorded_versions
from interp_assets.graph.stages import make_road
from interp_assets.planning.pipeline import load_pipeline
from interp_assets.storage.store import Store, open_store
from interp_assets.storage.verify import verify_tree

pytestmark = [pytest.mark.s3, pytest.mark.slow]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """Run one server for this file."""
    server = start_s3_server(tmp_path_factory.mktemp("s3"))
    yield server
    server.stop()


def open_bucket(server: S3Server) -> Store:
    """Open the pipeline's folder in the bucket from this process, whose environment knows nothing of the server."""
    options = {key.lower(): value for key, value in server.environment.items() if key != "AWS_ENDPOINT_URL"}
    return open_store("s3://test/data", s3=options).child("tiny")


def test_the_whole_graph_on_s3_has_the_digests_of_a_local_folder(server: S3Server, finished: Finished, tmp_path: Path) -> None:
    """A pipeline moves from a laptop to a bucket by `INTERP_ROOT` and `AWS_*`; nothing is made anew because of where it lies."""
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(finished.config.model_dump()))
    environment = {**os.environ, **server.environment, "INTERP_ROOT": "s3://test/data", "COLUMNS": "200"}
    command = [sys.executable, "-c", "from interp_assets.terminal.cli import main; main()", "run", "--config", str(tmp_path / "pipeline.yaml")]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "Pipeline tiny in s3://test/data" in run.stdout
    assert [path.name for path in tmp_path.iterdir() if path.name != "pipeline.yaml"] == [".dagster"]
    store = open_bucket(server)
    pipeline = load_pipeline(finished.config, store)
    for stop in make_road(finished.config).rest:
        found = {key: make_road(pipeline.config).find_version(stop, pipeline, store, key) for key in stop.partition_keys(pipeline)}
        assert found == recorded_versions(finished.instance, stop), stop.name
    assert verify_tree(store) == []
    assert _secrets_in(tmp_path / ".dagster", server) == []


def _secrets_in(folder: Path, server: S3Server) -> list[str]:
    """List the files that hold the server's secret key: Dagster's databases and logs must not."""
    secret = server.environment["AWS_SECRET_ACCESS_KEY"].encode()
    return [str(path) for path in folder.rglob("*") if path.is_file() and secret in path.read_bytes()]
