"""Which upstream partitions each partition reads, for every dependency of the graph: Dagster guesses wrong in silence."""

from itertools import product
from typing import Any

import dagster as dg
import pytest

from interp_assets.graph.definitions import build_defs
from interp_assets.graph.jobs import make_ranges
from interp_assets.graph.partitions import set_partitions
from interp_assets.graph.stages import make_road
from interp_assets.planning.config import PipelineConfig, make_config
from interp_assets.planning.pipeline import Pipeline, PipelinePlan, ShardSource

SHARD_KEYS = ["shard-000000", "shard-000001", "shard-000002"]
SLICES = ["slice-000", "slice-001"]
FEATURES = "features/demo/"


def parents_of(config: PipelineConfig, name: str, partition: str | None) -> dict[str, list[str]]:
    """Return the upstream partitions of one partition, by asset; assets without partitions have none."""
    graph = build_defs(config).resolve_asset_graph()
    key = dg.AssetKey(name.split("/"))
    with dg.DagsterInstance.ephemeral() as instance:
        set_partitions(instance, "shards", SHARD_KEYS)
        set_partitions(instance, "experiments", ["demo", "other"])
        found: dict[str, list[str]] = {}
        for parent in graph.get(key).parent_keys:
            if not graph.get(parent).is_partitioned:
                found[parent.to_user_string()] = []
                continue
            with dg._core.definitions.partitions.context.partition_loading_context(dynamic_partitions_store=instance):
                result = graph.get_parent_partition_keys_for_child(partition, parent, key)
            assert not result.required_but_nonexistent_subset.get_partition_keys()
            found[parent.to_user_string()] = sorted(result.partitions_subset.get_partition_keys())
    return found


def two_experiments(passes: int = 2) -> PipelineConfig:
    """Return a configuration with three shards, four buckets after two passes, two experiments and two slices."""
    return make_config({"shuffle": {"passes": passes, "fan_out": 2}, "saes": [{"name": "demo"}, {"name": "other"}]})


EXPECTED: list[tuple[str, str | None, dict[str, list[str]]]] = [
    ("token_shards", SHARD_KEYS[1], {"corpus_plan": [], "documents": [SHARD_KEYS[1]]}),
    ("activations", SHARD_KEYS[1], {"token_shards": [SHARD_KEYS[1]]}),
    ("activation_statistics", None, {"activations": SHARD_KEYS}),
    ("shuffle_plan", None, {"token_shards": SHARD_KEYS}),
    ("shuffle_pass_1", SHARD_KEYS[2], {"activations": [SHARD_KEYS[2]], "shuffle_plan": []}),
    ("mixed_shards", "bucket-00001", {"shuffle_pass_1": SHARD_KEYS, "shuffle_plan": []}),
    ("shuffle_certificate", None, {"activations": SHARD_KEYS, "mixed_shards": ["bucket-00000", "bucket-00001"], "shuffle_plan": []}),
    ("sae", "other", {"mixed_shards": ["bucket-00000", "bucket-00001"], "activation_statistics": [], "shuffle_certificate": []}),
    ("sae_evaluation", "other", {"sae": ["other"], "activations": [SHARD_KEYS[0]], "activation_statistics": []}),
    ("sweep", None, {"sae": ["demo", "other"], "sae_evaluation": ["demo", "other"]}),
    (
        FEATURES + "feature_candidates",
        "slice-001|shard-000002",
        {"sae": ["demo"], "activations": [SHARD_KEYS[2]], "token_shards": [SHARD_KEYS[2]], "activation_statistics": []},
    ),
    (
        FEATURES + "feature_examples",
        "slice-001",
        {FEATURES + "feature_candidates": [f"slice-001|{shard}" for shard in SHARD_KEYS], "token_shards": SHARD_KEYS, "sae": ["demo"]},
    ),
    (
        FEATURES + "example_activations",
        SHARD_KEYS[1],
        {
            FEATURES + "feature_examples": SLICES,
            FEATURES + "feature_candidates": [f"{part}|{SHARD_KEYS[1]}" for part in SLICES],
            "activations": [SHARD_KEYS[1]],
            "token_shards": [SHARD_KEYS[1]],
            "sae": ["demo"],
        },
    ),
    (
        FEATURES + "feature_records",
        "slice-000",
        {
            FEATURES + "feature_examples": ["slice-000"],
            FEATURES + "example_activations": SHARD_KEYS,
            "token_shards": SHARD_KEYS,
            "sae": ["demo"],
            "sae_evaluation": ["demo"],
        },
    ),
    (FEATURES + "feature_browser", None, {FEATURES + "feature_records": SLICES, "sae_evaluation": ["demo"]}),
]


@pytest.mark.parametrize(("name", "partition", "parents"), EXPECTED, ids=[name for name, _, _ in EXPECTED])
def test_a_partition_reads_exactly_these(name: str, partition: str | None, parents: dict[str, list[str]]) -> None:
    """A mapping that is wrong or missing gives stale marks in the wrong places, and backfills that leave work out."""
    assert parents_of(two_experiments(), name, partition) == parents


def test_every_asset_has_its_case() -> None:
    """A new asset must not slip past the table above."""
    graph = build_defs(two_experiments()).resolve_asset_graph()
    with_parents = {key.to_user_string() for key in graph.executable_asset_keys if graph.get(key).parent_keys}
    assert with_parents == {name for name, _, _ in EXPECTED}


def test_a_bucket_of_a_later_pass_reads_only_the_bucket_it_is_divided_from() -> None:
    """With four passes of fan-out 2: bucket b of a pass comes from bucket b // 2 of the pass before."""
    config = two_experiments(passes=4)
    assert parents_of(config, "shuffle_pass_2", "bucket-00001")["shuffle_pass_1"] == SHARD_KEYS
    for bucket in range(4):
        assert parents_of(config, "shuffle_pass_3", f"bucket-0000{bucket}")["shuffle_pass_2"] == [f"bucket-0000{bucket // 2}"]
    for bucket in range(8):
        assert parents_of(config, "mixed_shards", f"bucket-0000{bucket}")["shuffle_pass_3"] == [f"bucket-0000{bucket // 2}"]


def test_a_shuffle_of_one_pass_reads_the_activations() -> None:
    """One pass gathers all shards into one mixed shard."""
    assert parents_of(two_experiments(passes=1), "mixed_shards", "bucket-00000") == {"activations": SHARD_KEYS, "shuffle_plan": []}


@pytest.mark.parametrize("passes", [1, 2, 4])
def test_the_road_and_dagster_agree_on_what_each_partition_reads(passes: int) -> None:
    """A backfill waits for, and follows, what the road says; people see what Dagster's mappings say."""
    config = two_experiments(passes)
    shards = [ShardSource(index=index, fingerprint="", n_documents=1, n_bytes=1, spec={}) for index in range(len(SHARD_KEYS))]
    facts: dict[str, Any] = {"tokenizer_fingerprint": "", "model_fingerprint": "", "hook_widths": {}, "vocabulary_size": 1, "max_context": 1}
    pipeline, road = Pipeline(config, PipelinePlan(shards=shards, **facts)), make_road(config)
    every_shard = {("activations", key) for key in SHARD_KEYS}
    for asset in road.rest:
        for key in {asset.partition_keys(pipeline)[0], asset.partition_keys(pipeline)[-1]}:
            ours = road.parents(asset, pipeline, key)
            theirs = {(parent, item) for parent, items in parents_of(config, asset.name, key or None).items() for item in items or [""]}
            held_out = every_shard - ours if any(item.how == "training" for item in asset.reads) else set()
            assert theirs - held_out == ours, (asset.name, key)
            assert held_out <= {("activations", SHARD_KEYS[0])}  # Dagster is told of all shards: which are held out is no mapping of its


def test_registered_partitions_become_exactly_the_given_ones() -> None:
    """A shard whose text is gone must leave, or a backfill would ask for it for ever."""
    with dg.DagsterInstance.ephemeral() as instance:
        set_partitions(instance, "shards", ["a", "b"])
        set_partitions(instance, "shards", ["b", "c"])
        assert instance.get_dynamic_partitions("shards") == ["b", "c"]


def test_missing_partitions_are_joined_into_ranges() -> None:
    """One run for each contiguous range, because a run costs a second."""
    assert make_ranges(["a", "b", "d"], ["a", "b", "c", "d"]) == [("a", "b"), ("d", "d")]
    assert make_ranges([], ["a"]) == []


def test_ranges_of_two_dimensions_stay_in_their_row() -> None:
    """Dagster reads a range of two dimensions as a rectangle: one that wraps around would run the wrong cells."""
    keys = [f"{row}|{column}" for row, column in product(["s0", "s1"], ["a", "b", "c"])]
    missing = ["s0|b", "s0|c", "s1|a", "s1|b"]
    assert make_ranges(missing, keys) == [("s0|b", "s0|c"), ("s1|a", "s1|b")]
