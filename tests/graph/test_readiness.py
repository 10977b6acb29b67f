"""What this machine lacks is said before any work: hours later it was an error after a harvest."""

from pathlib import Path

import dagster as dg
import pytest
import torch
from road_world import Finished, make_road_config

from interp_assets.errors import PlanError
from interp_assets.graph.backfill import run_backfill
from interp_assets.graph.jobs import run_road
from interp_assets.graph.readiness import check_machine, find_lacks, machine_bytes
from interp_assets.graph.stages import make_road
from interp_assets.planning.config import PipelineConfig
from interp_assets.planning.machine import PROCESS_BYTES
from interp_assets.planning.pipeline import load_pipeline, open_pipeline_store
from interp_assets.planning.progress import format_bytes
from interp_assets.planning.schedule import make_schedule

HUGE = 1 << 45
"""Latents whose weights no disk of today holds."""


def _make(world: Path, root: Path, **changes: object) -> PipelineConfig:
    sae = {"name": "demo", "hook_point": "resid_post.0", "d_sae": HUGE, "k": 4, "n_rows": 1024, "batch_rows": 128}
    return make_road_config(world, root, **{"saes": [sae], "features": {"saes": []}, **changes})


def _refusal(config: PipelineConfig) -> str:
    """Run a road, see that nothing but the plan is made, and return why."""
    with dg.DagsterInstance.ephemeral() as instance:
        reports = []
        with pytest.raises(PlanError) as caught:
            reports.extend(run_road(config, instance))
        with pytest.raises(PlanError) as again:
            list(run_backfill(config, instance))
    assert [report.name for report in reports] in ([], ["corpus_plan"])
    assert str(again.value) == str(caught.value)
    assert {path.path for path in open_pipeline_store(config).list()} == {"plan.json", "pipeline.json"}
    return str(caught.value)


def test_a_disk_that_is_too_small_is_refused_with_the_figures(tiny_world: Path, tmp_path: Path) -> None:
    """By the run and by a backfill; what was asked for is what counts: tokens alone have room."""
    config = _make(tiny_world, tmp_path / "data")
    said = _refusal(config)
    assert f"{tmp_path / 'data'} has " in said
    assert " free, and " in said
    assert " TB will be written (sae " in said
    assert "Name another `root`, free some space (`interp gc`" in said
    assert "Rows are estimated from the text: `interp run --select token_shards` counts them first." in said
    with dg.DagsterInstance.ephemeral() as instance:
        assert [report.name for report in run_road(config, instance, select=["token_shards"])] == ["corpus_plan", "token_shards"]
        with pytest.raises(PlanError) as caught:
            list(run_road(config, instance))
    assert "counts them first" not in str(caught.value)


def test_a_device_that_is_not_there_is_refused_where_something_needs_it(tiny_world: Path, tmp_path: Path) -> None:
    """Text is tokenized without one."""
    device = "cuda" if torch.backends.mps.is_available() else "mps"  # no machine has both
    config = make_road_config(tiny_world, tmp_path / "data", execution={"device": device})
    assert _refusal(config).startswith(f"execution.device is {device!r}, but this machine has only [")
    pipeline, store, road = load_pipeline(config, open_pipeline_store(config)), open_pipeline_store(config), make_road(config)
    check_machine(road, pipeline, store, road.select(["token_shards"]))


def test_what_is_made_already_needs_neither_room_nor_a_device(finished: Finished) -> None:
    """A finished pipeline is looked at, and run again, on any machine."""
    execution = finished.config.execution.model_copy(update={"device": "mps"})
    config = finished.config.model_copy(update={"execution": execution})
    store = open_pipeline_store(config)
    pipeline, road = load_pipeline(config, store), make_road(config)
    check_machine(road, pipeline, store, road.rest)
    assert find_lacks(road, pipeline, store, make_schedule(road, pipeline, store, {}, 1)) == []


def test_what_no_memory_holds_is_refused_with_the_need_and_what_to_change(tiny_world: Path, tmp_path: Path) -> None:
    """Weights and the state of their training, before anything is harvested: it ended in a killed process hours later."""
    config = _make(tiny_world, tmp_path / "data", execution={"device": "cpu"})
    said = _refusal(config)
    assert "\nsae needs about " in said
    assert f" of memory in its largest job, and this machine has {format_bytes(machine_bytes() or 0)}. Lower d_sae or batch_rows" in said


def test_each_stage_is_compared_with_the_memory_there_is(tiny_world: Path, tmp_path: Path) -> None:
    """Model, shuffle and features too; a need that is not known, is made already, or lies on another machine, refuses nothing."""
    config = make_road_config(tiny_world, tmp_path / "data", execution={"device": "cpu"})
    with dg.DagsterInstance.ephemeral() as instance:
        list(run_road(config, instance, select=["token_shards"]))
    store, road = open_pipeline_store(config), make_road(config)
    pipeline = load_pipeline(config, store)
    lines = make_schedule(road, pipeline, store, {}, 1)
    known = {line.name for line in lines if line.job_bytes and line.n_missing}
    assert known >= {"activations", "shuffle_pass_1", "mixed_shards", "sae", "sae_evaluation", "features/demo/feature_candidates"}
    found = find_lacks(road, pipeline, store, lines, PROCESS_BYTES)
    assert {sentence.partition(" needs about ")[0] for sentence in found} == known
    assert not any("token_shards needs" in sentence for sentence in found)
    assert find_lacks(road, pipeline, store, lines, PROCESS_BYTES + max(line.job_bytes for line in lines)) == []


def test_a_container_has_the_memory_of_its_limit(tmp_path: Path) -> None:
    """The machine's own figure would let it be killed; a group without a limit, or a system that tells nothing, is no limit."""
    (tmp_path / "meminfo").write_text("MemTotal:       2048 kB\nMemAvailable:   10 kB\n")
    (tmp_path / "limit").write_text("1048576\n")
    (tmp_path / "none").write_text("max\n")
    assert machine_bytes(tmp_path / "meminfo", tmp_path / "limit") == 1 << 20
    assert machine_bytes(tmp_path / "meminfo", tmp_path / "none") == 2 << 20
    assert machine_bytes(tmp_path / "gone", tmp_path / "none") is None
