"""Dagster's real daemon: text that has been harvested starts one retraining, through to new feature records, whatever restarts come."""

import shutil
from pathlib import Path

import dagster as dg
import pytest
from daemon_world import daemon, wait_for
from road_world import make_road_config

from interp_assets.jobs import open_instance, recorded_versions, run_road
from interp_assets.pipeline import load_pipeline, open_pipeline_store
from interp_assets.road import make_road

pytestmark = [pytest.mark.slow]


def test_enough_new_tokens_start_one_retraining(tiny_world: Path, tmp_path: Path) -> None:
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
            wait_for(lambda: any(run.is_finished for run in runs()), 120, tmp_path / "daemon.log")
        store = open_pipeline_store(config)
        (run,) = runs()
        assert run.status == dg.DagsterRunStatus.SUCCESS
        assert load_pipeline(config, store).plan.generations == [5, 6]
        assert set(recorded_versions(instance, records).values()).isdisjoint(before.values())
        event = instance.get_latest_materialization_event(dg.AssetKey("retraining"))
        assert event is not None
        assert event.asset_materialization is not None
        assert event.asset_materialization.metadata["verdict"].value == "promoted"
        n_ticks = len(_ticks(instance))
        with daemon(config, tmp_path):
            wait_for(lambda: len(_ticks(instance)) > n_ticks, 60, tmp_path / "daemon.log")
        assert len(runs()) == 1


def _ticks(instance: dg.DagsterInstance) -> list[object]:
    (state,) = instance.all_instigator_state()
    return list(instance.get_ticks(state.instigator_origin_id, state.selector_id))
