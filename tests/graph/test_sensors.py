"""Landed text becomes requests: first for a plan, then for the shards that it registers, and never twice."""

import shutil
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.definitions.partitions.context import partition_loading_context
from dagster._core.storage.tags import RUN_KEY_TAG
from road_world import make_road_config

from interp_assets.graph.definitions import build_defs
from interp_assets.graph.jobs import run_road
from interp_assets.graph.sensors import make_sensor
from interp_assets.planning.config import PipelineConfig
from resources.world import World


@pytest.fixture
def config(tiny_world: Path, tmp_path: Path) -> PipelineConfig:
    """Return a configuration whose texts may be changed."""
    shutil.copytree(tiny_world / "texts", tmp_path / "texts")
    return make_road_config(tiny_world, tmp_path / "data", corpus={"path": str(tmp_path / "texts"), "shard_bytes": 900})


def tick(config: PipelineConfig, instance: dg.DagsterInstance, cursor: str | None) -> tuple[list[dg.RunRequest], str, str | None]:
    """Evaluate the sensor once: its requests, why it skipped, and its new cursor."""
    world = {"world": World(config)}
    context = dg.build_sensor_context(instance=instance, cursor=cursor, resources=world, definitions=build_defs(config))
    with partition_loading_context(dynamic_partitions_store=instance):
        data = make_sensor(config).evaluate_tick(context)
    return list(data.run_requests or []), data.skip_message or "", data.cursor


def asked(requests: list[dg.RunRequest]) -> list[tuple[str | None, list[str]]]:
    """Return partition and assets of each request."""
    return [(request.partition_key, [key.to_user_string() for key in request.asset_selection or []]) for request in requests]


def test_landed_text_is_planned_then_harvested(config: PipelineConfig, tmp_path: Path) -> None:
    """A new folder, a new file, and nothing new: each tick asks for what is due, and only for that."""
    with dg.DagsterInstance.ephemeral() as instance:
        requests, _, cursor = tick(config, instance, None)
        assert asked(requests) == [(None, ["corpus_plan"])]
        list(run_road(config, instance, select=["token_shards", "activations"]))
        requests, _, cursor = tick(config, instance, cursor)
        assert requests == []
        (tmp_path / "texts" / "zz.txt").write_text("more text " * 120)
        requests, _, cursor = tick(config, instance, cursor)
        assert asked(requests) == [(None, ["corpus_plan"])]
        list(run_road(config, instance, select=["corpus_plan"]))
        first, _, cursor = tick(config, instance, cursor)
        again, _, _ = tick(config, instance, cursor)
        assert asked(first) == [("shard-000005", ["token_shards", "activations"])]
        assert first[0].run_key == again[0].run_key  # Dagster starts one run for one key


def plan(config: PipelineConfig, instance: dg.DagsterInstance, request: dg.RunRequest) -> None:
    """Materialize the plan as the daemon would: in a run that bears the request's key."""
    job = build_defs(config).resolve_implicit_global_asset_job_def()
    tags = {RUN_KEY_TAG: request.run_key or ""}
    assert job.execute_in_process(instance=instance, asset_selection=request.asset_selection, tags=tags).success


def test_a_file_that_comes_back_and_goes_between_tick_and_planning_does_not_stay_in_the_plan(config: PipelineConfig, tmp_path: Path) -> None:
    """A tick saw the folder without it, the plan was made with it, and the folder looks as the tick has seen it: nobody planned again."""
    text, away = tmp_path / "texts" / "zz.txt", tmp_path / "away.txt"
    text.write_text("more text " * 120)
    with dg.DagsterInstance.ephemeral() as instance:
        (request,), _, cursor = tick(config, instance, None)
        plan(config, instance, request)
        text.rename(away)
        (request,), _, cursor = tick(config, instance, cursor)
        away.rename(text)
        plan(config, instance, request)
        text.rename(away)
        (again,), _, cursor = tick(config, instance, cursor)
        assert asked([again]) == [(None, ["corpus_plan"])]
        plan(config, instance, again)
        assert not [file for shard in World(config).open()[0].plan.shards for file in str(shard.spec).split("'") if file == "zz.txt"]
        assert all(key for key, _ in asked(tick(config, instance, cursor)[0]))  # shards, and no plan


def test_a_listing_that_comes_back_is_planned_again(config: PipelineConfig, tmp_path: Path) -> None:
    """Dagster starts one run for one key, for ever: the third of the listings A, B, A needs another key than the first."""
    text, away, keys, cursor = tmp_path / "texts" / "zz.txt", tmp_path / "away.txt", [], None
    text.write_text("more text " * 120)
    with dg.DagsterInstance.ephemeral() as instance:
        for source, target in ((text, away), (away, text), (text, away)):
            source.rename(target)
            (request,), _, cursor = tick(config, instance, cursor)
            plan(config, instance, request)
            keys.append(request.run_key)
            assert (tick(config, instance, cursor)[2]) == cursor
    assert len(set(keys)) == 3


def test_a_shard_whose_text_has_changed_is_asked_for_again(config: PipelineConfig, tmp_path: Path) -> None:
    """Dagster knows the partition as made; its documents are others now."""
    with dg.DagsterInstance.ephemeral() as instance:
        (request,), _, cursor = tick(config, instance, None)
        list(run_road(config, instance, select=["token_shards", "activations"]))
        (last,) = [path for path in (tmp_path / "texts").iterdir() if path.name == "4.txt"]
        last.write_text(last.read_text().replace("word1", "word2"))
        (request,), _, cursor = tick(config, instance, cursor)
        plan(config, instance, request)
        requests, _, _ = tick(config, instance, cursor)
        assert [key for key, _ in asked(requests)] == ["shard-000004"]
        assert requests[0].run_key == tick(config, instance, cursor)[0][0].run_key


def test_before_the_first_plan_it_waits(config: PipelineConfig) -> None:
    """The plan was asked for; until it is there, no shard is known."""
    with dg.DagsterInstance.ephemeral() as instance:
        _, _, cursor = tick(config, instance, None)
        requests, why, _ = tick(config, instance, cursor)
    assert requests == []
    assert "has no plan at" in why


def test_other_sources_do_not_change(tiny_world: Path, tmp_path: Path) -> None:
    """The standard library does not land; the sensor says why it rests."""
    config = make_road_config(tiny_world, tmp_path, corpus={"source": "stdlib", "path": ""})
    with dg.DagsterInstance.ephemeral() as instance:
        requests, why, _ = tick(config, instance, None)
    assert requests == []
    assert why == "The corpus source is 'stdlib'; only 'files' can change under a running pipeline."
