"""A process of a training is killed at some step: the launcher says so, and what is resumed ends in the same bytes."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planned import executing

from interp_assets.errors import InterpError
from interp_assets.planning.pipeline import Pipeline, open_pipeline_store, save_plan
from interp_assets.storage.store import Store
from interp_assets.train.launch import explain_death, run_training, start_group

TINY: dict[str, Any] = {"d_sae": 48, "k": 2, "n_rows": 2400, "batch_rows": 100, "learning_rate": 5e-3, "dead_after_rows": 300}
SAES = [{"name": name, "architecture": name, **TINY} for name in ("topk", "batch_topk", "gated", "jump_relu_tanh")]
NAMES = [sae["name"] for sae in SAES]
CHECKPOINT_STEPS = 5

SUMMARY = """
Failures:
[1]:
  time      : 2026-11-22_13:00:00
  host      : somewhere
  rank      : 0 (local_rank: 0)
  exitcode  : 1 (pid: 700)
  error_file: <N/A>
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-22_13:00:00
  host      : somewhere
  rank      : 1 (local_rank: 1)
  exitcode  : {code} (pid: 701)
  error_file: <N/A>
"""


def make_grid(make_planted, root: Path, n: int, n_slices: int) -> tuple[Pipeline, Store]:
    """Plan the sweep under a root of its own, for `n` processes that divide the latents `n_slices` times."""
    planted = make_planted(SAES, root=str(root))
    changes = {"processes": n, "latent_processes": n_slices, "checkpoint_steps": CHECKPOINT_STEPS, "profile_steps": 0}
    pipeline = executing(planted.pipeline, **changes)
    store = open_pipeline_store(pipeline.config)
    save_plan(store, pipeline.plan)
    return pipeline, store


def find_rank(rank: int) -> int | None:
    """Return the pid of a rank among the descendants of this process; None when it is through."""
    parents: dict[int, int] = {}
    ranks: dict[int, str] = {}
    for folder in Path("/proc").iterdir():
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            variables = (folder / "environ").read_text().split("\0")
            ranks[int(folder.name)] = next((item.removeprefix("RANK=") for item in variables if item.startswith("RANK=")), "")
        except (ValueError, OSError):
            continue
    return next((pid for pid, value in ranks.items() if value == str(rank) and is_below(pid, parents)), None)


def is_below(pid: int, parents: dict[int, int]) -> bool:
    """Tell whether a process descends from this one."""
    while pid in parents:
        pid = parents[pid]
        if pid == os.getpid():
            return True
    return False


LAUNCHER = """
import sys
from interp_assets.planning.config import load_config
from interp_assets.planning.pipeline import load_pipeline, open_pipeline_store
from interp_assets.train.launch import run_training
config = load_config(sys.argv[1])
store = open_pipeline_store(config)
seen = []
run_training(load_pipeline(config, store), store, ["topk"], lambda n: seen or print("trains", flush=True) or seen.append(n))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the ranks in Linux' /proc")
def test_no_rank_outlives_a_launcher_that_is_killed(make_planted, tmp_path: Path) -> None:
    """Memory that runs out, or a lost container, kills the asset's process without a word: ranks would hold the device, and publish later."""
    pipeline, _ = make_grid(make_planted, tmp_path / "data", 2, 2)
    endless = pipeline.config.sae("topk").model_copy(update={"n_rows": 100_000_000})
    path = tmp_path / "pipeline.json"
    path.write_text(pipeline.config.model_copy(update={"saes": [endless]}).model_dump_json())
    with subprocess.Popen([sys.executable, "-c", LAUNCHER, str(path)], stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.readline() == "trains\n"
        ranks = [pid for pid in (find_rank(0), find_rank(1)) if pid]
        launcher.kill()
    assert len(ranks) == 2
    deadline = time.monotonic() + 60
    while (left := [pid for pid in ranks if is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []


def is_running(pid: int) -> bool:
    """Tell whether a process is there and no zombie, which nobody may have waited for yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.faults
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the ranks in Linux' /proc")
@pytest.mark.parametrize(("n", "n_slices", "drawn"), [(2, 2, 1), (4, 2, 2)])
def test_a_killed_grid_resumes_to_the_bytes_of_an_uninterrupted_one(make_planted, tmp_path: Path, n: int, n_slices: int, drawn: int) -> None:
    """SIGKILL of a drawn rank at a drawn step, not one of the last, of latent-parallel and 2 x 2 training: weights, logs, facts of every SAE.

    The ranks go on while this process looks for the victim; where the machine is so busy that they were through, it begins again.
    """
    pipeline, store = make_grid(make_planted, tmp_path / "whole", n, n_slices)
    expected = {name: item.manifest.digest for name, item in run_training(pipeline, store, NAMES).made.items()}
    draw = np.random.default_rng(drawn)
    victim, step = int(draw.integers(n)), int(draw.integers(CHECKPOINT_STEPS + 2, TINY["n_rows"] // TINY["batch_rows"] - 3))
    where = f"rank {victim} of {n}, step {step}, drawn by seed {drawn}"
    (pipeline, store), message = train_and_kill(lambda root: make_grid(make_planted, tmp_path / root, n, n_slices), victim, step)
    expected_text = rf"of rank {victim} \(pid \d+\) was killed by SIGKILL.*goes on from its last checkpoint"
    assert re.search(expected_text, message), f"{where}: {message}"
    seen: list[int] = []
    found = {name: item.manifest.digest for name, item in run_training(pipeline, store, NAMES, seen.append).made.items()}
    assert found == expected, where
    assert seen[0] >= CHECKPOINT_STEPS * TINY["batch_rows"], f"{where}: nothing was resumed"


def train_and_kill(make: Callable[[str], tuple[Pipeline, Store]], victim: int, step: int) -> tuple[tuple[Pipeline, Store], str]:
    """Train and kill a rank at a step, in new folders until a training was killed before its end; return its grid and what it said."""
    for attempt in range(10):
        pipeline, store = make(f"killed-{attempt}")
        n_left = step * len(SAES)

        def kill(_n: int) -> None:
            nonlocal n_left
            n_left -= 1
            if n_left == 0 and (pid := find_rank(victim)):
                os.kill(pid, signal.SIGKILL)

        try:
            run_training(pipeline, store, NAMES, kill)
        except InterpError as error:
            return (pipeline, store), str(error)
    pytest.fail("each of ten trainings was over before it could be killed")


def test_the_first_process_that_died_is_named_with_its_signal() -> None:
    """The others fail too, because their peer is gone: their tracebacks are not the cause."""
    text = explain_death(SUMMARY.format(code=-9), 1)
    assert text.startswith("The training process of rank 1 (pid 701) was killed by SIGKILL, and the others were ended.")
    assert "memory runs out: lower batch_rows or d_sae" in text
    assert "of rank 1 (pid 701) was killed by SIGSEGV, and the others were ended. Materialize" in explain_death(SUMMARY.format(code=-11), 1)
    assert "of rank 1 (pid 701) ended with status 1; its message is above" in explain_death(SUMMARY.format(code=1), 1)
    assert "was killed by signal 40, and the others were ended. Materialize" in explain_death(SUMMARY.format(code=-40), 1)
    assert "ended with status 7; their messages are above" in explain_death("nothing of use", 7)


def test_a_group_ends_though_a_process_that_left_it_holds_its_standard_error() -> None:
    """A worker in a session of its own outlives torchrun: closing what a thread still reads would wait for that worker."""
    script = "import subprocess, sys; p = subprocess.Popen(['sleep', '60'], start_new_session=True, stdout=-3); print(p.pid, file=sys.stderr)"
    with start_group([sys.executable, "-c", script], os.environ) as (process, last_words):
        assert process.stdout is not None
        assert process.stdout.read() == ""
        assert process.wait() == 0
        while not last_words.text():
            last_words.thread.join(0.01)
    try:
        assert last_words.thread.is_alive()
    finally:
        os.kill(int(last_words.text()), signal.SIGKILL)
    last_words.thread.join(60)
    assert not last_words.thread.is_alive()
