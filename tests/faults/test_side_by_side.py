"""Commands that meet on one pipeline, and a notes folder whose servers are killed: nobody loses anything, and nobody counts what another made."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml
from fault_tally import Tally
from road_world import Finished, assert_as_if_nothing_happened, make_road_config

from interp_assets.web.notes import Notebook

INTERP = [sys.executable, "-c", "from interp_assets.terminal.cli import main; main()"]
WRITE = """
import sys, pathlib, itertools
from interp_assets.web.notes import Notebook
notebook = Notebook(pathlib.Path(sys.argv[1]), "demo")
for i in itertools.count():
    latent = 2 * i % 200 + int(sys.argv[2])
    notebook.change(latent, f"note {i}", ["both"])
    print(latent, flush=True)
"""


def start(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    """Start a command."""
    return subprocess.Popen([*INTERP, *arguments], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_two_runs_of_a_new_pipeline_at_once_make_everything_once(finished: Finished, tiny_world: Path, tmp_path: Path, tally: Tally) -> None:
    """The second ended in "table run_tags already exists", or said "56 made" like the first."""
    config = make_road_config(tiny_world, tmp_path / "data")
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(config.model_dump()))
    both = [start("run", "--config", "p.yaml", cwd=tmp_path) for _ in range(2)]
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    made = [int(re.findall(r": (\d+) made in", text)[0]) for text in said]
    first, second = sorted(made)
    assert (first, second) == (1, sum(report.n_made for report in finished.reports)), said  # the plan is made by both
    (waited,) = [text for text in said if "Waiting until it has ended" in text]
    assert re.search(r"`.*run --config p\.yaml` \(process \d+ on .*\) works on pipeline tiny\.", waited)
    tally.fault("second runs of one pipeline at once")
    tally.right(assert_as_if_nothing_happened(config, finished))


def test_a_run_whose_neighbour_is_killed_takes_its_turn(finished: Finished, tiny_world: Path, tmp_path: Path, tally: Tally) -> None:
    """A lock that a dead process leaves would stop a pipeline until somebody deletes a file."""
    config = make_road_config(tiny_world, tmp_path / "data")
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(config.model_dump()))
    working, started_s = start("run", "--config", "p.yaml", cwd=tmp_path), time.monotonic()
    lock = tmp_path / "data" / "tiny" / ".working"
    while not (lock.exists() and lock.read_text()):
        assert time.monotonic() - started_s < 120
        time.sleep(0.05)
    assert json.loads(lock.read_text())["process_id"] == working.pid
    waiting = start("run", "--config", "p.yaml", cwd=tmp_path)
    time.sleep(5)
    working.send_signal(signal.SIGKILL)
    working.communicate()
    text, _ = waiting.communicate()
    assert waiting.returncode == 0, text
    tally.fault("processes killed while another waits for their turn")
    tally.right(assert_as_if_nothing_happened(config, finished))


def test_notes_survive_servers_that_are_killed(tmp_path: Path, tally: Tally) -> None:
    """At every moment the file is whole, and what a page was told is kept is kept."""
    for _ in range(5):
        writers = [
            subprocess.Popen([sys.executable, "-c", WRITE, str(tmp_path), str(first)], stdout=subprocess.PIPE, text=True) for first in range(2)
        ]
        for writer in writers:
            assert writer.stdout is not None
            writer.stdout.readline()
        time.sleep(0.2)
        for writer in writers:
            writer.kill()
        tally.fault("processes killed while they write notes", len(writers))
        told = {int(line) for writer in writers for line in writer.communicate()[0].splitlines()}
        content = Notebook(tmp_path, "demo").read()
        assert told <= {int(latent) for latent in content["notes"]}
