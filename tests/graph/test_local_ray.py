"""`interp run --workers` starts Ray on this machine, gives each worker its share, and leaves no process behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from road_world import Finished, assert_as_if_nothing_happened, make_road_config

from interp_assets.graph.local_ray import count_workers
from interp_assets.planning.config import ExecutionConfig

MARK = "INTERP_TEST_OF_WORKERS"
COMMAND = "import sys; from interp_assets.terminal.cli import main; sys.argv = ['interp', *sys.argv[1:]]; main()"
BEGIN = """
from interp_assets.errors import ConfigError
from interp_assets.graph.local_ray import local_cluster
from interp_assets.planning.config import ExecutionConfig
try:
    with local_cluster(ExecutionConfig(workers=2)):
        pass
except ConfigError as error:
    print(error)
"""


def test_auto_is_a_worker_a_core_where_there_is_no_gpu() -> None:
    """What is stated stays as it is; what is left to the machine is never more than it has."""
    assert count_workers(ExecutionConfig()) == 1
    assert count_workers(ExecutionConfig(workers=16)) == 16
    assert count_workers(ExecutionConfig(workers="auto", device="cpu")) == len(os.sched_getaffinity(0))


def begin(ray: str) -> "subprocess.CompletedProcess[str]":
    """Ask for two workers in a process where something stands for Ray."""
    program = f"import sys, types; sys.modules['ray'] = {ray}\n{BEGIN}"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)


def test_without_ray_several_workers_are_refused_with_what_installs_it() -> None:
    """A person who asks for two workers shall not get one without a word."""
    done = begin("None")
    assert "execution.workers is 2, and Ray, which starts them, is not installed: pip install 'interp-assets[ray]'" in done.stdout


def test_a_ray_that_would_answer_everybody_is_not_started() -> None:
    """Ray reads whether it asks for a token when it is imported, and listens on all addresses of the machine."""
    done = begin("types")
    assert "Ray was imported in this process before its token could be set" in done.stdout


def processes_marked(mark: str) -> list[int]:
    """List the processes that have a variable of this value."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


@pytest.mark.faults
@pytest.mark.timeout(400)
def test_two_workers_make_what_one_makes_and_ctrl_c_ends_them_all(finished: Finished, tiny_world: Path, tmp_path: Path) -> None:
    """Whoever interrupts a run wants the machine back at once, and whoever starts it again wants the digests of one process."""
    config = make_road_config(tiny_world, tmp_path / "data")
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(config.model_dump()))
    command = [sys.executable, "-c", COMMAND, "run", "--config", "p.yaml", "--workers", "2"]
    environment = {**os.environ, MARK: str(tmp_path)}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as run:
        assert run.stdout is not None
        said = []
        for line in run.stdout:
            said.append(line)
            if "activations: 5 partitions to make" in line:
                break
        assert len(processes_marked(str(tmp_path))) > 3, "".join(said)  # this run, Ray's own two, and workers
        os.killpg(run.pid, signal.SIGINT)
        rest = run.stdout.read()
        assert run.wait(60) == 130, rest
    deadline = time.monotonic() + 20
    while (left := processes_marked(str(tmp_path))) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert_as_if_nothing_happened(config, finished)
    assert processes_marked(str(tmp_path)) == []
