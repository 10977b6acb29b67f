"""What training took: times that add up over interruptions, and a profile that changes nothing."""

import gzip
import json
from typing import Any

import pytest
import torch

from interp_assets.manifest import Manifest, read_file
from interp_assets.train.loop import Execution, train_saes
from interp_assets.train.profile import LOSS, NORMALIZE, PHASES, UPDATE, StepProfiler, group_of
from interp_assets.train.recipes import RECIPES
from interp_assets.train.refs import sae_ref
from interp_assets.train.times import TrainingTimes, WaitClock, parse_times

TINY = {"d_sae": 48, "k": 2, "n_rows": 2000, "batch_rows": 100, "learning_rate": 5e-3, "dead_after_rows": 500}


class KilledError(Exception):
    """Stands for a killed process."""


def read_json(planted, manifest: Manifest, name: str, sae: str = "a") -> dict[str, Any]:
    """Read a JSON file of a trained SAE."""
    return json.loads(read_file(planted.store, sae_ref(planted.pipeline, sae).path, manifest, name))


@pytest.mark.parametrize("architecture", list(RECIPES))
def test_a_profiled_training_has_the_same_weights(make_planted, architecture: str) -> None:
    """Watching must not touch what is watched: digest for digest."""
    saes = [{"name": "a", "architecture": architecture, **TINY}]
    watched, alone = make_planted(saes), make_planted(saes)
    found = train_saes(watched.pipeline, watched.store, ["a"], execution=Execution(profile_steps=3))["a"].manifest
    expected = train_saes(alone.pipeline, alone.store, ["a"])["a"].manifest
    assert found.timed == ["profile.json", "times.json", "trace.json.gz"]
    assert expected.timed == ["times.json"]
    assert found.digest == expected.digest


def test_a_profile_says_where_the_time_went(make_planted) -> None:
    """Shares of phases and groups are of the window's wall time, and every SAE of the run takes part."""
    planted = make_planted([{"name": "a", **TINY}, {"name": "b", **TINY, "architecture": "topk"}])
    produced = train_saes(planted.pipeline, planted.store, ["a", "b"], execution=Execution(profile_steps=4))
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
    manifest = train_saes(planted.pipeline, planted.store, ["a"], execution=Execution(profile_steps=2))["a"].manifest
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


def test_times_count_all_rows_and_the_wait_for_them(make_planted) -> None:
    """The share of waiting tells whether disk or device is to be made faster."""
    planted = make_planted([{"name": "a", **TINY}, {"name": "b", **TINY}])
    produced = train_saes(planted.pipeline, planted.store, ["a", "b"])
    for name, item in produced.items():
        times = read_json(planted, item.manifest, "times.json", name)
        assert times["n_rows"] == 2000
        assert 0 < times["wait_s"] < times["wall_s"]
        assert 0 < times["step_s"] < times["wall_s"] - times["wait_s"]
        assert times["input_wait_share"] == pytest.approx(times["wait_s"] / times["wall_s"])
        assert times["rows_per_s"] == pytest.approx(2000 / times["wall_s"])
        assert (times["n_together"], times["processes"], times["device"]) == (2, 1, "cpu")


def test_times_add_up_over_interruptions(make_planted) -> None:
    """A resumed training that counted only its last part would look fast."""
    planted, seen = make_planted([{"name": "a", **TINY}]), [0]

    def progress(n: int) -> None:
        seen[0] += n
        if seen[0] == 1500:
            raise KilledError

    with pytest.raises(KilledError):
        train_saes(planted.pipeline, planted.store, ["a"], progress, execution=Execution(checkpoint_steps=4))
    manifest = train_saes(planted.pipeline, planted.store, ["a"])["a"].manifest
    assert read_json(planted, manifest, "times.json")["n_rows"] == 2000
    times = TrainingTimes()
    times.add(wall_s=2.0, wait_s=0.5, step_s=1.0, n_rows=7)
    assert parse_times(times.encode()) == times
    assert times.input_wait_share == 0.25
    assert TrainingTimes().input_wait_share == 0.0


def test_a_clock_counts_only_what_was_waited_for() -> None:
    """The loop's own work between two rows is no waiting."""
    clock = WaitClock()
    for item in clock.each(iter([1, 2, 3])):
        total = sum(range(20_000 * item))
        assert total
    assert 0 < clock.wait_s < clock.elapsed_s
    assert clock.lap() > 0
