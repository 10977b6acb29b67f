"""The runbook is followed by the letter: its commands are read from the page and typed, in a folder with a pipeline that something happens to."""

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from daemon_world import wait_for
from dagster import DagsterInstance, DagsterRunStatus, RunsFilter
from fault_tally import Tally
from road_world import Finished, assert_as_if_nothing_happened, make_road_config
from s3_server import start_s3_server

from interp_assets.errors import StoreError
from interp_assets.graph.jobs import TURN_LEASE, dagster_home
from interp_assets.planning.config import PipelineConfig, load_config
from interp_assets.planning.history import FOLDER
from interp_assets.storage.store import Store, open_store

PAGE = Path(__file__).parent.parent.parent / "docs" / "runbook.md"
NAME = "my-pipeline"
ENTRY = "entries of the runbook followed by the letter"
ASSETS = ("token_shards", "activations", "shuffle_plan", "shuffle_pass_1", "mixed_shards", "shuffle_certificate")

SELECT = " ".join(f"--select {name}" for name in ASSETS)

MOUNTING = ["unshare", "--map-root-user", "--mount"]
"""A user namespace of its own, in which a small file system can be mounted that nobody else sees."""


def can_mount() -> bool:
    """Say whether this system lets an ordinary process have such a namespace."""
    if shutil.which("unshare") is None:
        return False
    probe = [*MOUNTING, "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/mnt"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


def read_commands(section: str) -> list[str]:
    """Return the command lines of a section's first block, without their comments."""
    text = PAGE.read_text(encoding="utf-8").partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    block = text.partition("```\n")[2].partition("```")[0]
    return [line.partition("  #")[0].strip() for line in block.splitlines() if line.strip()]


class Shell:
    """A folder with `my.yaml` and its data, and a prompt in it."""

    def __init__(self, folder: Path) -> None:
        """Stand in `folder`, where `interp` is this checkout's."""
        self.folder = folder
        self.environment = {**os.environ, "COLUMNS": "200", "PYTHONWARNINGS": "ignore", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def type(self, command: str, *, returncode: int = 0) -> str:
        """Run a command line; return what it says."""
        done = subprocess.run(shlex.split(command), cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False, timeout=200)
        assert done.returncode == returncode, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def start(self, command: str) -> subprocess.Popen[bytes]:
        """Start a command line in a terminal of its own."""
        return subprocess.Popen(
            shlex.split(command), cwd=self.folder, env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, start_new_session=True
        )

    @property
    def config(self) -> PipelineConfig:
        """Return the configuration, seen from anywhere."""
        return load_config(self.folder / "my.yaml").model_copy(update={"root": str(self.folder / "data")})

    def folders(self, asset: str) -> list[Path]:
        """List the artifacts of a shard asset's first hook point or of the tokens."""
        return sorted((self.folder / "data" / NAME / asset).glob("shard-*"))


def make_shell(world: Path, folder: Path) -> Shell:
    """Make a folder with a configuration, and a prompt in it."""
    shutil.copytree(world, folder / "world")
    config = make_road_config(folder / "world", Path("data")).model_copy(update={"name": NAME})
    (folder / "my.yaml").write_text(yaml.safe_dump({**config.model_dump(), "root": "data"}))
    return Shell(folder)


@pytest.fixture(scope="module")
def shell(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """Make the pipeline, up to its certificate."""
    shell = make_shell(tiny_world, tmp_path_factory.mktemp("runbook"))
    shell.type(f"interp run --config my.yaml {SELECT}")
    return shell


def made(said: str) -> dict[str, int]:
    """Return how many partitions of each asset a command made."""
    return {match[1]: int(match[2]) for match in re.finditer(r"^  (\S+) +(\d+) made", said, re.MULTILINE)}


def test_a_lost_shard(shell: Shell, tally: Tally) -> None:
    """One shard's folder is gone: one command makes one partition, and nothing behind it. Then one shard by its name, as the page says."""
    shutil.rmtree(shell.folders("2-activations/resid_post.0")[2])
    (command,) = read_commands("A lost shard")
    assert made(shell.type(f"{command} {SELECT}")) == {"activations": 1}
    by_name = re.search(r"One shard by name: `([^`]+)`", PAGE.read_text(encoding="utf-8"))
    assert by_name is not None
    shutil.rmtree(shell.folders("2-activations/resid_post.0")[1])
    assert made(shell.type(by_name[1].replace("shard-000007", "shard-000001"))) == {"activations": 1}
    tally.fault(ENTRY)


def test_a_corrupt_shard(shell: Shell, tally: Tally) -> None:
    """`interp verify` names the folder, which is removed and made again; then every block agrees."""
    path = shell.folders("2-activations/resid_post.0")[1] / "rows.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    verify, remove, backfill = read_commands("A corrupt shard")
    said = shell.type(verify, returncode=1)
    named = re.search(rf"data/{NAME}/(\S*shard-000001-\w+)", said)
    assert named is not None, said
    assert "block 0" in said
    shell.type(remove.replace("my-pipeline", NAME).replace("<the folder that it names>", named[1]))
    assert made(shell.type(f"{backfill} {SELECT}")) == {"activations": 1}
    assert "every block agrees with its manifest" in shell.type(verify)
    tally.fault(ENTRY)


def test_from_laptop_to_cluster(shell: Shell, tmp_path: Path, tally: Tally) -> None:
    """The folder is copied to a bucket, one variable is set, and the run finds everything: the bucket gets an entry of history and no artifact."""
    server = start_s3_server(tmp_path / "s3")
    try:
        options = {key.lower(): value for key, value in server.environment.items() if key != "AWS_ENDPOINT_URL"}
        sync, export, run = read_commands("From laptop to cluster")
        assert sync.startswith(f"aws s3 sync data/{NAME} s3://bucket/interp/{NAME}")  # typed below in Python: the tool is not ours
        bucket = open_store(f"s3://test/interp/{NAME}", s3=options)
        for path in (shell.folder / "data" / NAME).rglob("*"):
            if path.is_file():
                bucket.put(path.relative_to(shell.folder / "data" / NAME).as_posix(), path.read_bytes())
        before = {item.path for item in bucket.list() if not item.path.startswith(FOLDER)}
        name, _, value = export.removeprefix("export ").partition("=")
        moved = Shell(shell.folder)
        moved.environment |= server.environment | {name: value.replace("bucket", "test"), "DAGSTER_HOME": str(tmp_path / "home")}
        said = moved.type(f"{run} {SELECT}")
        assert " in s3://test/interp" in said
        assert {item.path for item in bucket.list() if not item.path.startswith((TURN_LEASE, FOLDER))} == before
        tally.fault(ENTRY)
    finally:
        server.stop()


def test_a_stuck_run(shell: Shell, finished: Finished, tally: Tally) -> None:
    """A run is killed in the middle: Dagster's daemon finds it dead, and the next command makes what it had left."""
    assert any(kill_in_the_middle(shell) for _ in range(4)), "each of four runs was over before it could be killed"
    tally.fault("runs killed from the runbook's prompt")
    dev, backfill = read_commands("A stuck run")
    with DagsterInstance.from_config(str(dagster_home(shell.config))) as instance:
        started = RunsFilter(statuses=[DagsterRunStatus.STARTED])
        (stuck,) = instance.get_runs(started)
        ui = shell.start(f"{dev} --dagster-port {free_port()}")
        try:
            wait_for(lambda: not instance.get_runs(started), 250, dagster_home(shell.config) / "dagster-dev.log")
            found = instance.get_run_by_id(stuck.run_id)
            assert found is not None
            assert found.status == DagsterRunStatus.FAILURE
            said = shell.type(f"{backfill} {SELECT}")
        finally:
            ui.terminate()  # as a closed terminal does; a shell's background job may have been told to ignore Ctrl-C
            ui.wait(60)
    assert made(said)["activations"] >= 3
    tally.right(assert_as_if_nothing_happened(shell.config, finished, names=ASSETS))
    tally.fault(ENTRY)


def kill_in_the_middle(shell: Shell) -> bool:
    """Kill a run when it has made its first activation shard; False when it was over first."""
    for path in shell.folders("2-activations/resid_post.0"):
        shutil.rmtree(path)
    run = shell.start(f"interp run --config my.yaml {SELECT}")
    while not list((shell.folder / "data" / NAME).glob("2-activations/resid_post.0/*/manifest.json")) and run.poll() is None:
        time.sleep(0.001)
    with suppress(ProcessLookupError):
        os.killpg(run.pid, signal.SIGKILL)
    return run.wait() == -signal.SIGKILL


@pytest.mark.skipif(not can_mount(), reason="needs a user namespace in which a file system may be mounted")
def test_a_full_disk(finished: Finished, tiny_world: Path, tmp_path: Path, tally: Tally) -> None:
    """A disk of a few megabytes with somebody's old shards on it, and Dagster's history: a clear error, room is made, and it goes on."""
    shell = make_shell(tiny_world, tmp_path / "full")
    inspect, listing, remove, run = read_commands("A full disk")
    assert remove == f"{listing} --delete"
    old = f"data/{NAME}/2-activations/resid_post.0/shard-000000-0123456789ab"
    script = f"""
        mkdir data && mount -t tmpfs -o size=6m tmpfs data && mkdir -p {old}
        head -c 5500000 /dev/urandom > {old}/rows.safetensors
        {run} {SELECT} > first.txt 2>&1; echo $? > first.code
        {inspect} > inspect.txt 2>&1; echo $? > inspect.code
        {remove} --hours 0 > gc.txt 2>&1
        {run} {SELECT} > second.txt 2>&1; echo $? > second.code
        cp -r data kept
    """
    typed = [*MOUNTING, "bash", "-c", script]
    done = subprocess.run(typed, cwd=shell.folder, env=shell.environment, capture_output=True, text=True, check=False, timeout=250)
    first, second = ((shell.folder / f"{name}.txt").read_text() for name in ("first", "second"))
    codes = [(shell.folder / f"{name}.code").read_text().strip() for name in ("first", "inspect", "second")]
    assert codes == ["1", "0", "0"], first + second + done.stderr
    assert "is full" in first or "Could not write" in first
    assert "ree some space and run the same command again: finished shards are kept." in first
    assert "A bug in" not in first
    tally.fault("disks that were full")
    config = shell.config.model_copy(update={"root": str(shell.folder / "kept")})
    tally.right(assert_as_if_nothing_happened(config, finished, names=ASSETS), n_refused=1)
    tally.fault(ENTRY)


def test_a_full_bucket(finished: Finished, tiny_world: Path, tmp_path: Path, tally: Tally) -> None:
    """Somebody's old shards use up a bucket's quota: the run names the bucket, the object, what is kept and what to do; with room it goes on."""
    server = start_s3_server(tmp_path / "s3")
    try:
        shell = make_shell(tiny_world, tmp_path / "full")
        remove, run = read_commands("A full bucket")
        assert remove == "interp gc --config my.yaml --delete"  # done below by hand: it keeps what is younger than a day
        shell.environment |= server.environment | {"INTERP_ROOT": "s3://test/interp", "DAGSTER_HOME": str(tmp_path / "home")}
        shell.type(f"{run} --select token_shards")
        options = {key.lower(): value for key, value in server.environment.items() if key != "AWS_ENDPOINT_URL"}
        bucket = open_store(f"s3://test/interp/{NAME}", s3=options)
        old = "2-activations/resid_post.0/shard-000000-0123456789ab/rows.safetensors"
        bucket.put(old, os.urandom(3 << 20))
        wait_for(
            lambda: "read only" in server.shell("s3.bucket.quota -name=test -op=set -sizeMB=1", "s3.bucket.quota.enforce -apply"), 60, server.log
        )
        said = shell.type(f"{run} {SELECT}", returncode=1)
        assert f"Could not write s3://test/interp/{NAME}/" in said
        assert "or full, or broken: look at its own log. Then run the same command again: finished shards are kept." in said
        tally.fault("buckets that were full")
        bucket.delete([old])
        server.shell("s3.bucket.quota -name=test -op=disable", "s3.bucket.quota.enforce -apply")
        wait_for(lambda: can_write(bucket), 60, server.log)
        assert made(shell.type(f"{run} {SELECT}"))["activations"] == 5
        config = shell.config.model_copy(update={"root": "s3://test/interp"})
        tally.right(assert_as_if_nothing_happened(config, finished, bucket, ASSETS), n_refused=1)
        tally.fault(ENTRY)
    finally:
        server.stop()


def can_write(store: Store) -> bool:
    """Say whether a store takes an object."""
    try:
        store.put(".probe", b"1")
    except StoreError:
        return False
    store.delete([".probe"])
    return True


def free_port() -> int:
    """Find a port that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_changed_model(shell: Shell, tally: Tally) -> None:
    """Other weights in the same folder: a backfill refuses to mix two models and says what to do; that plans again and keeps the old."""
    weights = shell.folder / "world" / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    old = shell.folders("2-activations/resid_post.0")
    shutil.rmtree(old[0])
    said = shell.type("interp backfill --config my.yaml --select activations", returncode=1)
    assert "has changed since it was planned" in said
    (command,) = read_commands("A changed model")
    assert made(shell.type(f"{command} --select token_shards --select activations"))["activations"] == len(old)
    assert set(shell.folders("2-activations/resid_post.0")) > set(old[1:])
    tally.fault(ENTRY)
