"""What lies in the working directory is data: no process that we start takes a file there for a module."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from daemon_world import children_of, wait_for
from traps import NAMES, Traps

from interp_assets.graph.jobs import open_instance, run_road
from interp_assets.planning.config import PipelineConfig
from interp_assets.train.launch import _command, start_group

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
LAUNCH = """
mutation Launch($selector: JobOrPipelineSelector!) {
  launchRun(executionParams: {selector: $selector, runConfigData: {}}) {
    __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message }
  }
}
"""
AFTER_MAIN = """
import sys
from interp_assets.terminal.cli import main
sys.argv = ["interp", "--version"]
try:
    main()
finally:
    import numba
    assert numba.config.CACHE_DIR == "", numba.config.CACHE_DIR
"""
LOCATIONS = "{ workspaceOrError { ... on Workspace { locationEntries { name locationOrLoadError { __typename ... on PythonError { message } } } } } }"


@pytest.fixture
def traps(tmp_path: Path) -> Traps:
    """Fill a working directory with traps."""
    return Traps(tmp_path / "trapped")


def ask(url: str, query: str, **variables: Any) -> dict[str, Any]:
    """Send a query or mutation as the UI does; empty while it does not answer."""
    content = json.dumps({"query": query, "variables": variables}).encode()
    request = urllib.request.Request(f"{url}/graphql", content, {"Content-Type": "application/json", "Origin": url, "Sec-Fetch-Site": "same-origin"})
    with suppress(OSError), urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)["data"]
    return {}


def test_the_traps_work(traps: Traps) -> None:
    """A Python that is started without care runs them, so what follows means something."""
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--help"], cwd=traps.folder, capture_output=True, check=False)
    assert traps.ran()
    assert {"gql", "torch", "dagster", "json"} <= set(NAMES)


def test_dagster_runs_nothing_of_the_working_directory_and_ends_with_its_command(road_config: PipelineConfig, traps: Traps, tmp_path: Path) -> None:
    """Webserver, daemon, code servers and a run that the UI starts, of `interp dev` in a folder from elsewhere.

    Without the command (a closed terminal, `timeout`) they would go on, hold the port, and start runs.
    """
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(road_config.model_dump()))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    home, said = tmp_path / "home", tmp_path / "said.txt"
    interp = [str(Path(sys.executable).with_name("interp")), "dev", "--config", str(tmp_path / "p.yaml"), "--dagster-port", str(port)]
    environment = {**os.environ, "DAGSTER_HOME": str(home), "PYTHONWARNINGS": "ignore"}
    with said.open("wb") as output:
        process = subprocess.Popen(interp, cwd=traps.folder, env=environment, stdout=output, stderr=output)
        try:
            wait_for(lambda: ask(url, LOCATIONS), 120, said)
            log = home / "dagster-dev.log"
            (entry,) = ask(url, LOCATIONS)["workspaceOrError"]["locationEntries"]
            assert entry["locationOrLoadError"]["__typename"] == "RepositoryLocation", entry
            selector = {"repositoryLocationName": entry["name"], "repositoryName": "__repository__", "pipelineName": "__ASSET_JOB"}
            launched = ask(url, LAUNCH, selector={**selector, "assetSelection": [{"path": ["corpus_plan"]}]})["launchRun"]
            assert launched["__typename"] == "LaunchRunSuccess", launched
            run_id = launched["run"]["runId"]
            status = "query Run($id: ID!) { runOrError(runId: $id) { ... on Run { status } } }"
            wait_for(lambda: ask(url, status, id=run_id)["runOrError"]["status"] in ("SUCCESS", "FAILURE"), 120, log)
            assert ask(url, status, id=run_id)["runOrError"]["status"] == "SUCCESS", log.read_text()[-4000:]
            assert ask(url, "{ instance { daemonHealth { allDaemonStatuses { daemonType lastHeartbeatTime } } } }")
            assert sys.platform != "linux" or len(children_of(home)) >= 5
            process.terminate()
            assert process.wait(60) == 128 + signal.SIGTERM
            assert sys.platform != "linux" or children_of(home) == []  # the command waits for them
        finally:
            process.kill()
    assert traps.ran() == []


def test_training_processes_run_nothing_of_the_working_directory(road_config: PipelineConfig, traps: Traps, tmp_path: Path) -> None:
    """Torchrun and the process that it starts. It ends for want of a plan, which is after its imports."""
    path = tmp_path / "p.json"
    path.write_text(road_config.model_dump_json())
    command, variables = _command(path, [road_config.saes[0].name], 1)
    here = Path.cwd()
    os.chdir(traps.folder)
    try:
        with start_group(command, variables) as (process, last_words):
            assert process.stdout is not None
            said = process.stdout.read()
            process.wait(100)
            last_words.thread.join(10)
    finally:
        os.chdir(here)
    assert '"event": "error"' in said.replace('":"', '": "'), last_words.text()
    assert traps.ran() == []


def test_the_command_itself_runs_nothing_of_the_working_directory(road_config: PipelineConfig, traps: Traps, tmp_path: Path) -> None:
    """Numba reads `.numba_config.yaml` of the working directory: the folder of machine code that it names is not ours."""
    (traps.folder / ".numba_config.yaml").write_text(f"cache_dir: {tmp_path / 'theirs'}\n")
    subprocess.run([sys.executable, "-P", "-c", AFTER_MAIN], cwd=traps.folder, check=True)
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(road_config.model_dump()))
    interp = [str(Path(sys.executable).with_name("interp")), "run", "--config", str(tmp_path / "p.yaml"), "--select", "token_shards"]
    done = subprocess.run(interp, cwd=traps.folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert traps.ran() == []
    with open_instance(road_config) as instance:
        assert [report.n_made for report in run_road(road_config, instance, select=["token_shards"])][1:] == [0]
