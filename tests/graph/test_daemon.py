"""Dagster's real daemon: text that has been harvested starts one retraining, through to new feature records, whatever restarts come."""

import shutil
from pathlib import Path

import dagster as dg
import pytest
from daemon_world import daemon, start_sensor, wait_for
from road_world import make_road_config

from interp_assets.graph.jobs import open_instance, recorded_versions, run_road
from interp_assets.graph.stages import make_road
from interp_assets.planning.pipeline import load_pipeline, open_pipeline_store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
PATIENCE_S = 400
"""The daemon's runs are processes that import torch: a dozen seconds each alone on two cores, and minutes beside other work."""


@pytest.mark.parametrize("restarts", [0, pytest.param(1, marks=pytest.mark.faults)])
def test_enough_new_tokens_start_one_retraining(tiny_world: Path, tmp_path: Path, restarts: int) -> None:
    """The sensor asks, the queue starts one run, the run ends in promoted SAEs with records of their own; a new daemon starts nothing more."""
    shutil.copytree(tiny_world / "texts", tmp_path / "texts")
    rule = {"after_tokens": 200, "max_fvu_increase": 10.0, "max_ce_recovered_decrease": 10.0}
    corpus = {"path": str(tmp_path / "texts"), "shard_bytes": 900}
    config = make_road_config(tiny_world, tmp_path / "data", corpus=corpus, retrain=rule)
    records = next(stop for stop in make_road(config) if stop.name == "features/demo/feature_records")
    with open_instance(config) as instance:
        list(run_road(config, instance))
        before = recorded_versions(instance, records)
        (tmp_path / "texts" / "yy.txt").write_text(" ".join(f"new{(i * i) % 97}" for i in range(130)))
        list(run_road(config, instance, select=["token_shards", "activations"]))

        def runs() -> list[dg.DagsterRun]:
            return [run for run in instance.get_runs() if "dagster/sensor_name" in run.tags]

        with daemon(config, tmp_path):
            wait_for(lambda: any(run.is_finished for run in runs()), PATIENCE_S, tmp_path / "daemon.log")
        store = open_pipeline_store(config)
        (run,) = runs()
        assert run.status == dg.DagsterRunStatus.SUCCESS
        assert load_pipeline(config, store).plan.generations == [5, 6]
        assert set(recorded_versions(instance, records).values()).isdisjoint(before.values())
        event = instance.get_latest_materialization_event(dg.AssetKey("retraining"))
        assert event is not None
        assert event.asset_materialization is not None
        assert event.asset_materialization.metadata["verdict"].value == "promoted"
        for _ in range(restarts):
            n_ticks = len(_ticks(instance))
            with daemon(config, tmp_path):
                wait_for(lambda n_ticks=n_ticks: len(_ticks(instance)) > n_ticks, PATIENCE_S, tmp_path / "daemon.log")
        assert len(runs()) == 1


@pytest.mark.faults  # two ticks of half a minute, and two runs: minutes, so it is in `make faults`
def test_a_landed_file_is_planned_and_harvested(tiny_world: Path, tmp_path: Path) -> None:
    """The sensor sees the file, has the plan made, which registers a shard, and has this shard tokenized and harvested; no other is touched."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for i, path in enumerate(sorted((tiny_world / "texts").iterdir())[:2]):
        shutil.copy(path, texts / f"{i}.txt")
    config = make_road_config(tiny_world, tmp_path / "data", corpus={"path": str(texts), "shard_bytes": 1})
    with open_instance(config) as instance:
        list(run_road(config, instance, select=["token_shards", "activations"]))
        before = instance.get_materialized_partitions(dg.AssetKey("activations"))
        n_before = instance.get_runs_count()
        with daemon(config, tmp_path):
            start_sensor(config, tmp_path, "landed_text")
            (texts / "zz.txt").write_text("text that has come later " * 30)
            wait_for(lambda: len(instance.get_materialized_partitions(dg.AssetKey("activations"))) > len(before), PATIENCE_S, tmp_path / "daemon.log")
            wait_for(lambda: all(run.is_finished for run in instance.get_runs()), PATIENCE_S, tmp_path / "daemon.log")
        new = instance.get_materialized_partitions(dg.AssetKey("activations")) - before
        assert new == set(instance.get_dynamic_partitions("shards")) - before
        assert len(new) == 1
        asked = [run.tags.get("dagster/partition", "the plan") for run in instance.get_runs() if "dagster/sensor_name" in run.tags]
        assert set(asked) == {"the plan", *new}
        assert asked.count(*new) == 1
        assert instance.get_runs_count() - n_before == len(asked)


def _ticks(instance: dg.DagsterInstance) -> list[object]:
    (state,) = instance.all_instigator_state()
    return list(instance.get_ticks(state.instigator_origin_id, state.selector_id))
