"""The asset graph is what the golden file says, and every asset tells a person what it is."""

import json
from pathlib import Path

import dagster as dg
import pytest

from interp_assets.graph.definitions import build_defs
from interp_assets.graph.stages import make_road
from interp_assets.planning.config import make_config

GOLDEN = Path(__file__).parent.parent / "golden" / "asset_graph.json"
EDITS = [{"sae": "demo", "latent": 1, "clamp": "1 max"}]
STEERED = {
    "steering": {"prompts": ["a"], "recipes": {"golden": EDITS}, "search": {}},
    "patching": [{"name": "names", "pairs": [{"clean": "a", "corrupted": "b", "answer": "c"}]}],
}
THREE_PASSES = {"shuffle": {"passes": 4, "fan_out": 2}, "saes": [{"name": "a.b-c"}], "features": {"saes": ["a.b-c"]}}


def describe_graph(defs: dg.Definitions) -> dict[str, object]:
    """Return keys, groups, partitions, dependencies and checks as plain data."""
    graph = defs.resolve_asset_graph()
    assets = {
        key.to_user_string(): {
            "group": graph.get(key).group_name,
            "partitions": type(graph.get(key).partitions_def).__name__ if graph.get(key).partitions_def else None,
            "parents": sorted(parent.to_user_string() for parent in graph.get(key).parent_keys),
            "kinds": sorted(graph.get(key).kinds),
            "checks": sorted(check.name for check in graph.get(key).check_keys),
        }
        for key in sorted(graph.get_all_asset_keys())
    }
    return {"assets": assets, "jobs": [], "sensors": sorted(sensor.name for sensor in defs.sensors or [])}


@pytest.mark.parametrize(("name", "content"), [("demo", {"shuffle": {"passes": 2}}), ("chosen_passes", {}), ("four_passes", THREE_PASSES)])
def test_the_graph_is_the_golden_one(name: str, content: dict[str, object]) -> None:
    """Keys and dependencies are an interface: people's links, schedules and backfills name them. To change it, edit the golden file."""
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert describe_graph(build_defs(make_config(content))) == golden[name]


def test_steering_adds_its_assets_and_changes_no_other_but_the_browser() -> None:
    """The golden file has what differs from the graph without: curves and patched prompts, and that the browser shows the curves."""
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    found: dict[str, object] = describe_graph(build_defs(make_config(STEERED)))["assets"]  # type: ignore[assignment] - plain data
    assert {name: asset for name, asset in found.items() if golden["chosen_passes"]["assets"].get(name) != asset} == golden["steered"]


@pytest.mark.parametrize("content", [{}, THREE_PASSES, STEERED])
def test_every_asset_says_what_it_is(content: dict[str, object]) -> None:
    """A person who opens an asset in the UI finds owner, kinds, a description of two sentences, and a code version."""
    graph = build_defs(make_config(content)).resolve_asset_graph()
    for key in graph.get_all_asset_keys():
        node = graph.get(key)
        assert node.owners, key
        assert 1 <= len(node.kinds) <= 3, key
        assert node.group_name != "default", key
        assert (node.description or "").count(". ") >= 1, key
        assert node.is_external or node.code_version, key


@pytest.mark.parametrize("content", [{}, THREE_PASSES, {"shuffle": {"passes": 1, "fan_out": 8}}, STEERED])
def test_the_road_lists_the_assets_in_the_order_of_the_data(content: dict[str, object]) -> None:
    """The run loop walks the road: an asset that it does not list would never be made, and one listed too early would fail."""
    config = make_config(content)
    graph = build_defs(config).resolve_asset_graph()
    names = [stop.name for stop in make_road(config)]
    assert sorted(names) == sorted(key.to_user_string() for key in graph.executable_asset_keys)
    for i, name in enumerate(names):
        parents = {parent.to_user_string() for parent in graph.get(dg.AssetKey(name.split("/"))).parent_keys}
        assert parents - {"documents"} <= set(names[:i])


def test_a_bucket_is_told_that_it_is_one() -> None:
    """On S3 the assets' kinds say so, because people filter the graph by them."""
    graph = build_defs(make_config({"root": "s3://bucket/prefix"})).resolve_asset_graph()
    assert all("s3" in graph.get(key).kinds for key in graph.executable_asset_keys)


def test_the_certificate_check_blocks() -> None:
    """A failed certificate must stop the training that stands behind it."""
    graph = build_defs().resolve_asset_graph()
    check = graph.get(dg.AssetCheckKey(dg.AssetKey("shuffle_certificate"), "certificate_passed"))
    assert check.blocking
