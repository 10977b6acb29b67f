"""What training took: times that add up over interruptions, and a profile that changes nothing."""

import gzip
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
import torch
from planned import executing

from interp_assets.compute.compiled import n_compilations
from interp_assets.errors import ArtifactCorruptError
from interp_assets.storage.manifest import Manifest, create_artifact, load_manifest, read_file
from interp_assets.train.loop import train_saes
from interp_assets.train.parallel import ONE_RANK
from interp_assets.train.profile import LOSS, NORMALIZE, PHASES, UPDATE, StepProfiler, group_of
from interp_assets.train.recipes import RECIPES
from interp_assets.train.refs import sae_ref
from interp_assets.train.reports import describe_speed
from interp_assets.train.resume import checkpoint_ref
from interp_assets.train.times import TrainingTimes, WaitClock, describe_times, find_times, forget_peaks, parse_times, peak_memory_bytes

TINY = {"d_sae": 48, "k": 2, "n_rows": 2000, "batch_rows": 100, "learning_rate": 5e-3, "dead_after_rows": 500}
QUICK = {"relu", "topk", "gated"}
"""Architectures that are watched in every test run: dense, sparse, and the one with two losses. The others by `make faults`."""


class KilledError(Exception):
    """Stands for a killed process."""


def read_json(planted, manifest: Manifest, name: str, sae: str = "a") -> dict[str, Any]:
    """Read a JSON file of a trained SAE."""
    return json.loads(read_file(planted.store, sae_ref(planted.pipeline, sae).path, manifest, name))


@pytest.mark.parametrize("architecture", [pytest.param(name, marks=() if name in QUICK else pytest.mark.faults) for name in RECIPES])
def test_a_profiled_training_has_the_same_weights(make_planted, architecture: str) -> None:
    """Watching must not touch what is watched: digest for digest."""
    saes = [{"name": "a", "architecture": architecture, **TINY}]
    watched, alone = make_planted(saes), make_planted(saes)
    found = train_saes(executing(watched.pipeline, profile_steps=3), watched.store, ["a"])["a"].manifest
    expected = train_saes(alone.pipeline, alone.store, ["a"])["a"].manifest
    assert found.timed == ["profile.json", "times.json", "trace.json.gz"]
    assert expected.timed == ["times.json"]
    assert found.digest == expected.digest


def test_a_profile_says_where_the_time_went(make_planted) -> None:
    """Shares of phases and groups are of the window's wall time, and every SAE of the run takes part."""
    planted = make_planted([{"name": "a", **TINY, "architecture": "relu"}, {"name": "b", **TINY, "architecture": "topk"}])
    produced = train_saes(executing(planted.pipeline, profile_steps=4), planted.store, ["a", "b"])
    profile = read_json(planted, produced["b"].manifest, "profile.json", "b")
    assert profile["steps"] == [10, 14]
    assert profile["trace"] == f"{produced['a'].ref.path}/trace.json.gz"
    assert produced["b"].manifest.timed == ["profile.json", "times.json"]
    phases = {item["name"]: item for item in profile["phases"]}
    assert set(phases) <= {*PHASES, "other"}
    assert (phases[NORMALIZE]["calls"], phases[LOSS]["calls"], phases[UPDATE]["calls"]) == (4, 8, 8)
    assert sum(item["share"] for item in profile["phases"]) == pytest.approx(1, abs=0.02)
    assert sum(item["s"] for item in profile["groups"]) < profile["wall_s"] * 1.05
    groups = {item["name"] for item in profile["groups"]}
    assert {"matrix products", "optimizer", "outside torch (NumPy, Numba, Python)", "wait for rows"} <= groups
    assert any(item["name"].startswith("aten::") and item["calls"] > 0 for item in profile["operations"])
    assert profile["memory"]["process_peak_bytes"] > 50 << 20
    assert 0 < profile["memory"]["window_peak_bytes"] < 1 << 30


def test_a_trace_opens_in_a_timeline_viewer(make_planted) -> None:
    """Chrome's trace format, with our phases as ranges, and without the name of the machine."""
    planted = make_planted([{"name": "a", **TINY}])
    manifest = train_saes(executing(planted.pipeline, profile_steps=2), planted.store, ["a"])["a"].manifest
    path = sae_ref(planted.pipeline, "a").path
    trace = json.loads(gzip.decompress(read_file(planted.store, path, manifest, "trace.json.gz")))
    assert "host_name" not in trace
    ranges = [event for event in trace["traceEvents"] if event.get("ph") == "X" and event["name"] == LOSS]
    assert len(ranges) == 2
    assert all(event["dur"] > 0 for event in ranges)


@pytest.mark.parametrize(
    ("n_steps", "steps", "watched"), [(3, range(100), [10, 11, 12]), (3, range(4), [1, 2, 3]), (9, range(2), [0, 1]), (0, range(9), [])]
)
def test_the_window_lies_inside_the_training(n_steps: int, steps: range, watched: list[int]) -> None:
    """After a warm-up where there is time for one; a short training is watched as far as it goes."""
    profiler, seen = StepProfiler(n_steps, steps, torch.device("cpu")), []
    for step in steps:
        profiler.before(step)
        before = profiler.result
        profiler.after(step)
        seen += [step] * (profiler.result is not before)
    assert seen == watched[-1:]
    if profiler.result is not None:
        assert profiler.result.summary["steps"] == [watched[0], watched[-1] + 1]


def test_operations_are_added_to_the_group_that_people_look_for() -> None:
    """A `topk` among the elementwise operations would hide what is slow."""
    names = {"aten::addmm": "matrix products", "aten::topk": "sort, select, gather", "aten::mul_": "elementwise and other"}
    names |= {"aten::_fused_adam_": "optimizer", "gloo:all_reduce": "communication", "aten::copy_": "copies and memory", "aten::sum": "reductions"}
    assert {name: group_of(name) for name in names} == names


def test_a_step_that_compiles_is_in_no_rate(make_planted) -> None:
    """Loops are compiled when they are first needed, which may be in the middle of a training: a second that says nothing of its speed."""
    planted = make_planted([{"name": "a", **TINY}])
    steps: list[int] = []

    def compile_something(n: int) -> None:
        steps.append(n)
        if len(steps) == 15:
            numba.njit(lambda x: x + 1)(1)

    produced = train_saes(planted.pipeline, planted.store, ["a"], compile_something)["a"]
    assert read_json(planted, produced.manifest, "times.json")["rated_rows"] <= 1800
    before = n_compilations()
    numba.njit(lambda x: x + 2)(1)
    assert n_compilations() == before + 1


def test_times_count_all_rows_and_the_wait_for_them(make_planted) -> None:
    """The share of waiting tells whether disk or device is to be made faster."""
    planted = make_planted([{"name": "a", **TINY}, {"name": "b", **TINY}])
    produced = train_saes(planted.pipeline, planted.store, ["a", "b"])
    for name, item in produced.items():
        times = read_json(planted, item.manifest, "times.json", name)
        assert times["n_rows"] == 2000
        assert 0 < times["rated_rows"] <= 1900
        assert 0 < times["wait_s"] < times["rated_s"] < times["wall_s"]
        assert 0 < times["step_s"] < times["rated_s"] - times["wait_s"]
        assert times["input_wait_share"] == pytest.approx(times["wait_s"] / times["rated_s"])
        assert times["rows_per_s"] == pytest.approx(times["rated_rows"] / times["rated_s"])
        assert times["step_rows_per_s"] == pytest.approx(times["rated_rows"] / times["step_s"])
        assert (times["n_together"], times["processes"], times["device"]) == (2, 1, "cpu")


def test_times_add_up_over_interruptions(make_planted) -> None:
    """A resumed training that counted only its last part would look fast."""
    planted, seen = make_planted([{"name": "a", **TINY}]), [0]

    def progress(n: int) -> None:
        seen[0] += n
        if seen[0] == 1500:
            raise KilledError

    with pytest.raises(KilledError):
        train_saes(executing(planted.pipeline, checkpoint_steps=4), planted.store, ["a"], progress)
    ref = checkpoint_ref(sae_ref(planted.pipeline, "a"), 12)
    before = parse_times(read_file(planted.store, ref.path, load_manifest(planted.store, ref), "times.json"))
    after = read_json(planted, train_saes(planted.pipeline, planted.store, ["a"])["a"].manifest, "times.json")
    assert (before.n_rows, before.rated_rows) == (1200, 1100)
    assert (after["n_rows"], after["rated_rows"]) == (2000, 1100 + 700)
    for name, value in vars(before).items():
        assert after[name] > value > 0, name


def test_rates_are_of_ordinary_steps() -> None:
    """The first step compiles and a watched one is slow: both take their time, and say nothing about the speed of training."""
    times = TrainingTimes()
    assert times.input_wait_share is None
    times.add(wall_s=5.0, wait_s=3.0, step_s=1.0, n_rows=7, is_rated=False)
    assert times.input_wait_share is None
    times.add(wall_s=2.0, wait_s=0.5, step_s=1.0, n_rows=7)
    assert times == TrainingTimes(wall_s=7.0, n_rows=14, rated_s=2.0, rated_rows=7, wait_s=0.5, step_s=1.0)
    assert parse_times(times.encode()) == times
    content = json.loads(describe_times(times, ONE_RANK, torch.device("cpu"), 1))
    assert (content["rows_per_s"], content["step_rows_per_s"], content["input_wait_share"]) == (3.5, 7.0, 0.25)


def test_watched_steps_and_first_steps_are_in_no_rate(make_planted) -> None:
    """An SAE of which every step is watched has no speed; `b` starts later, and its first step is not `a`'s speed either."""
    planted = make_planted([{"name": "a", **TINY}, {"name": "b", **TINY, "n_rows": 300}])
    produced = train_saes(executing(planted.pipeline, profile_steps=5), planted.store, ["a", "b"])
    a, b = (read_json(planted, produced[name].manifest, "times.json", name) for name in ("a", "b"))
    assert (a["n_rows"], a["rated_rows"], b["n_rows"], b["rated_rows"]) == (2000, 1400, 300, 200)
    alone = make_planted([{"name": "a", **TINY, "n_rows": 300}])
    item = train_saes(executing(alone.pipeline, profile_steps=5), alone.store, ["a"])["a"]
    times = read_json(alone, item.manifest, "times.json")
    assert times["wall_s"] > 0
    assert [times[name] for name in ("rated_rows", "rows_per_s", "step_rows_per_s", "input_wait_share")] == [0, None, None, None]
    assert "rows/s" not in describe_speed(alone.store, item)["speed"]
    assert "rows/s of its own steps" in describe_speed(planted.store, produced["a"])["speed"]


def test_the_first_steps_of_a_member_that_joins_are_in_no_rate(make_planted) -> None:
    """What one SAE compiles in its first step is not the speed of the SAEs beside it."""
    saes = [{"name": "a", **TINY}, {"name": "b", **TINY, "seed": 1}]
    planted, seen = make_planted(saes), []

    def progress(n: int) -> None:
        seen.append(n)
        if len(seen) == 8:
            raise KilledError

    with pytest.raises(KilledError):
        train_saes(executing(planted.pipeline, checkpoint_steps=7), planted.store, ["a"], progress)
    produced = train_saes(planted.pipeline, planted.store, ["a", "b"])
    a, b = (read_json(planted, produced[name].manifest, "times.json", name) for name in ("a", "b"))
    assert (a["n_rows"], a["rated_rows"]) == (2000, 600 + 1200)
    assert (b["n_rows"], b["rated_rows"]) == (2000, 1800)


def test_an_error_inside_the_window_stops_the_profiler(make_planted) -> None:
    """Torch has one profiler a process: one that is left running watches the next training, and refuses to watch it properly."""
    planted, seen = make_planted([{"name": "a", **TINY}]), []

    def progress(n: int) -> None:
        seen.append(torch.autograd.profiler._is_profiler_enabled)  # torch says it nowhere else
        if len(seen) == 12:
            raise KilledError

    with pytest.raises(KilledError):
        train_saes(executing(planted.pipeline, profile_steps=5), planted.store, ["a"], progress)
    assert seen == [False] * 10 + [True] * 2
    assert not torch.autograd.profiler._is_profiler_enabled  # torch says it nowhere else


def test_watching_writes_nothing_to_standard_error() -> None:
    """A log of training with C++ remarks about blocks of unknown size makes people look for a fault; what others say meanwhile is kept."""
    script = """
import os, sys, torch
from interp_assets.train.profile import StepProfiler
held = [torch.ones(100) for _ in range(9)]
profiler = StepProfiler(2, range(2), torch.device("cpu"))
for step in range(2):
    profiler.before(step)
    held.pop()
    torch.ones(9).sum()
    os.write(2, f"step {step}\\n".encode())
    profiler.after(step)
print(profiler.result.summary["steps"])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("[0, 2]\n", "step 0\nstep 1\n")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux forgets the peak of a process")
def test_the_peak_of_memory_is_of_this_training() -> None:
    """An SAE is not as large as whatever the process did before."""
    large = np.ones(50_000_000)
    high = peak_memory_bytes()
    del large
    forget_peaks(torch.device("cpu"))
    assert peak_memory_bytes() < high - 300_000_000


def test_damaged_times_are_no_missing_times(make_planted) -> None:
    """A table that is silently without speeds is a result that nobody doubts; an SAE of an earlier release has none to show."""
    planted = make_planted([{"name": "a", **TINY}])
    item = train_saes(planted.pipeline, planted.store, ["a"])["a"]
    path, older = item.ref.path, replace(item.manifest, files=[entry for entry in item.manifest.files if entry.name != "times.json"])
    assert find_times(planted.store, path, item.manifest)["processes"] == 1
    assert find_times(planted.store, path, older) == {}
    planted.store.put(f"{path}/times.json", b"x" * item.manifest.file("times.json").n_bytes)
    with pytest.raises(ArtifactCorruptError, match=r"times.json is damaged in block 0"):
        find_times(planted.store, path, item.manifest)


@pytest.mark.parametrize("damage", ["gone", "another byte", "another release"])
def test_a_checkpoint_that_lost_its_times_keeps_its_weights(make_planted, caplog, damage: str) -> None:
    """Hours of training are worth more than the knowledge of how long they took."""
    planted, seen = make_planted([{"name": "a", **TINY}]), []

    def progress(n: int) -> None:
        seen.append(n)
        if sum(seen) == 1500:
            raise KilledError

    with pytest.raises(KilledError):
        train_saes(executing(planted.pipeline, checkpoint_steps=4), planted.store, ["a"], progress)
    ref = checkpoint_ref(sae_ref(planted.pipeline, "a"), 12)
    state = read_file(planted.store, ref.path, load_manifest(planted.store, ref), "state.safetensors")
    if damage == "gone":
        planted.store.delete([f"{ref.path}/times.json"])
    elif damage == "another byte":
        planted.store.put(f"{ref.path}/times.json", b"x" * len(planted.store.get(f"{ref.path}/times.json")))
    else:
        log = read_file(planted.store, ref.path, load_manifest(planted.store, ref), "log.json")
        with create_artifact(planted.store, ref, replace=True) as art:
            art.put("state.safetensors", state)
            art.put("log.json", log)
            art.put("times.json", b'{"seconds": 3}', is_timed=True)
    seen.clear()
    resumed = train_saes(planted.pipeline, planted.store, ["a"], seen.append)["a"].manifest
    assert seen[0] == 1200
    assert f"The times of checkpoint {planted.store.url}/{ref.path} are lost, its weights are used" in caplog.text
    assert read_json(planted, resumed, "times.json")["n_rows"] == 800
    alone = make_planted([{"name": "a", **TINY}])
    assert resumed.digest == train_saes(alone.pipeline, alone.store, ["a"])["a"].manifest.digest


def test_a_clock_counts_only_what_was_waited_for() -> None:
    """The loop's own work between two rows is no waiting, and a stopped clock counts nothing."""
    now = [100.0]

    def spend(seconds: float) -> None:
        now[0] += seconds

    def read() -> Iterator[str]:
        for name, seconds in (("a", 1.0), ("b", 2.0)):
            spend(seconds)
            yield name
        spend(0.5)

    clock = WaitClock(lambda: now[0])
    found = []
    for name in clock.each(read()):
        spend(8.0)
        with clock.stopped():
            spend(64.0)
        found.append((name, clock.last_wait_s, clock.lap()))
        with clock.stopped():
            spend(32.0)
        spend(16.0)
    assert found == [("a", 1.0, 9.0), ("b", 2.0, 26.0)]
    assert (clock.wait_s, clock.last_wait_s, clock.elapsed_s) == (3.5, 0.5, 51.5)
    assert clock.lap() == 16.5
