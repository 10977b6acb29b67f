"""Commands that meet on one pipeline take turns, and first ones make one history."""

import subprocess
import sys
from pathlib import Path

import yaml
from road_world import make_road_config

from interp_assets.graph.jobs import TURN_LOCK, take_turn
from interp_assets.storage.locks import locked

OPEN = """
import sys, warnings
warnings.simplefilter("ignore")
from interp_assets.graph.jobs import open_instance
from interp_assets.planning.config import load_config
config = load_config(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
with open_instance(config) as instance:
    print(instance.get_runs_count(), flush=True)
"""


HOLD = """
import sys, pathlib
from interp_assets.storage.locks import locked
with locked(pathlib.Path(sys.argv[1])):
    print(flush=True)
    sys.stdin.readline()
"""


def test_first_commands_of_one_pipeline_at_once_make_one_history(tiny_world: Path, tmp_path: Path) -> None:
    """Two that find no tables both make them, and one ended in "table run_tags already exists"."""
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(make_road_config(tiny_world, tmp_path / "data").model_dump()))
    command = [sys.executable, "-c", OPEN, str(tmp_path / "p.yaml")]
    first = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(3)]
    for process in first:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in first:  # all at once
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.communicate()[0] for process in first] == ["0\n"] * 3


def test_who_waits_says_for_whom(tiny_world: Path, tmp_path: Path) -> None:
    """A command that stands still without a word looks broken."""
    config, said = make_road_config(tiny_world, tmp_path / "data"), []
    lock = tmp_path / "data" / config.name / TURN_LOCK
    with subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as other:
        assert other.stdout is not None
        other.stdout.readline()

        def tell(sentence: str) -> None:
            said.append(sentence)
            other.communicate("\n")

        with take_turn(config, tell):
            assert said
    assert said[0].startswith("`-c ")
    assert f"process {other.pid} on " in said[0]
    assert "works on pipeline tiny. Waiting until it has ended" in said[0]
    with locked(lock):
        pass
