"""Landed text becomes requests: first for a plan, then for the shards that it registers, and never twice."""

import shutil
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.definitions.partitions.context import partition_loading_context
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


def test_before_the_first_plan_it_waits(config: PipelineConfig) -> None:
    """The plan was asked for; until it is there, no shard is known."""
    with dg.DagsterInstance.ephemeral() as instance:
        _, _, cursor = tick(config, instance, None)
        requests, why, _ = tick(config, instance, cursor)
    assert requests == []
    assert "has no plan at" in why


def test_other_sources_do_not_change(tiny_world: Path, tmp_path: Path) -> None:
    """The standard library does not land; the sensor says why it rests."""
    config = make_road_config(tiny_world, tmp_path, corpus={"source": "stdlib"})
    with dg.DagsterInstance.ephemeral() as instance:
        requests, why, _ = tick(config, instance, None)
    assert requests == []
    assert why == "The corpus source is 'stdlib'; only 'files' can change under a running pipeline."
