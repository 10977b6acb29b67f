"""The runbook is followed by the letter: its commands are read from the page and typed, in a folder with a pipeline that something happens to."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml
from road_world import make_road_config
from s3_server import start_s3_server

from interp_assets.store import open_store

PAGE = Path(__file__).parent.parent.parent / "docs" / "runbook.md"
NAME = "my-pipeline"
ASSETS = ("token_shards", "activations", "shuffle_plan", "shuffle_pass_1", "mixed_shards", "shuffle_certificate")


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
        done = subprocess.run(shlex.split(command), cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == returncode, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def folders(self, asset: str) -> list[Path]:
        """List the artifacts of a shard asset's first hook point or of the tokens."""
        return sorted((self.folder / "data" / NAME / asset).glob("shard-*"))


@pytest.fixture(scope="module")
def shell(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """Make the pipeline, up to its certificate."""
    folder = tmp_path_factory.mktemp("runbook")
    shutil.copytree(tiny_world, folder / "world")
    config = make_road_config(folder / "world", Path("data")).model_copy(update={"name": NAME})
    (folder / "my.yaml").write_text(yaml.safe_dump({**config.model_dump(), "root": "data"}))
    shell = Shell(folder)
    shell.type("interp run --config my.yaml " + " ".join(f"--select {name}" for name in ASSETS))
    return shell


def made(said: str) -> dict[str, int]:
    """Return how many partitions of each asset a command made."""
    return {match[1]: int(match[2]) for match in re.finditer(r"^  (\S+) +(\d+) made", said, re.MULTILINE)}


def test_a_lost_shard(shell: Shell, counts: Counter[str]) -> None:
    """One shard's folder is gone: one command makes one partition, and nothing behind it. Then one shard by its name, as the page says."""
    select = " ".join(f"--select {name}" for name in ASSETS)
    shutil.rmtree(shell.folders("2-activations/resid_post.0")[2])
    (command,) = read_commands("A lost shard")
    assert made(shell.type(f"{command} {select}")) == {"activations": 1}
    by_name = re.search(r"One shard by name: `([^`]+)`", PAGE.read_text(encoding="utf-8"))
    assert by_name is not None
    assert made(shell.type(by_name[1].replace("shard-000007", "shard-000001"))) == {"activations": 1}
    counts["runbook entries followed by the letter"] += 1


def test_a_corrupt_shard(shell: Shell, counts: Counter[str]) -> None:
    """`interp verify` names the folder, which is removed and made again; then every block agrees."""
    select = " ".join(f"--select {name}" for name in ASSETS)
    path = shell.folders("2-activations/resid_post.0")[1] / "rows.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    verify, remove, backfill = read_commands("A corrupt shard")
    said = shell.type(verify.replace("data/my-pipeline", f"data/{NAME}"), returncode=1)
    named = re.search(rf"data/{NAME}/(\S*shard-000001-\w+)", said)
    assert named is not None, said
    assert "block 0" in said
    shell.type(remove.replace("my-pipeline", NAME).replace("<the folder that it names>", named[1]))
    assert made(shell.type(f"{backfill} {select}")) == {"activations": 1}
    assert "every block agrees with its manifest" in shell.type(verify)
    counts["runbook entries followed by the letter"] += 1


def test_from_laptop_to_cluster(shell: Shell, tmp_path: Path, counts: Counter[str]) -> None:
    """The folder is copied to a bucket, one variable is set, and the run finds everything: the bucket gets no object more."""
    server = start_s3_server(tmp_path / "s3")
    try:
        options = {key.lower(): value for key, value in server.environment.items() if key != "AWS_ENDPOINT_URL"}
        sync, export, run = read_commands("From laptop to cluster")
        assert sync.startswith(f"aws s3 sync data/{NAME} s3://bucket/interp/{NAME}")  # typed below in Python: the tool is not ours
        bucket = open_store(f"s3://test/interp/{NAME}", s3=options)
        for path in (shell.folder / "data" / NAME).rglob("*"):
            if path.is_file():
                bucket.put(path.relative_to(shell.folder / "data" / NAME).as_posix(), path.read_bytes())
        before = {item.path for item in bucket.list()}
        name, _, value = export.removeprefix("export ").partition("=")
        moved = Shell(shell.folder)
        moved.environment |= server.environment | {name: value.replace("bucket", "test"), "DAGSTER_HOME": str(tmp_path / "home")}
        said = moved.type(run + "".join(f" --select {asset}" for asset in ASSETS))
        assert " in s3://test/interp" in said
        assert {item.path for item in bucket.list()} == before
        counts["runbook entries followed by the letter"] += 1
    finally:
        server.stop()


def test_a_changed_model(shell: Shell, counts: Counter[str]) -> None:
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
    counts["runbook entries followed by the letter"] += 1
