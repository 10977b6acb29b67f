"""Other bytes under an artifact's id: all that was made from the old ones is due, and is made as a rebuild would make it."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from road_world import make_road_config

from interp_assets.corpus.plan import plan_corpus
from interp_assets.graph.stages import make_road
from interp_assets.planning.asset import Asset, Job
from interp_assets.planning.config import PipelineConfig
from interp_assets.planning.pipeline import load_pipeline, open_pipeline_store
from interp_assets.planning.promised import Promised, find_lost
from interp_assets.planning.road import Partition
from interp_assets.planning.schedule import make_schedule
from interp_assets.shuffle.refs import shuffle_plan_ref
from interp_assets.storage.lineage import Digests
from interp_assets.storage.manifest import ArtifactRef, create_artifact, load_manifest, read_file, remove_artifact
from interp_assets.storage.store import Store
from interp_assets.storage.verify import verify_tree
from interp_assets.visualize.refs import thresholds_ref
from resources.world import World

POINTS = ["resid_post.0", "resid_post.1"]


@pytest.fixture(scope="module")
def built(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> PipelineConfig:
    """Return a pipeline of three passes and two hook points whose artifacts are all made. Tests copy it."""
    folder = tmp_path_factory.mktemp("built")
    sae = {"d_sae": 16, "k": 4, "n_rows": 256, "batch_rows": 64, "dead_after_rows": 128}
    saes = [{"name": "demo", "hook_point": POINTS[0], "architecture": "topk", **sae}, {"name": "other", "hook_point": POINTS[1], **sae}]
    config = make_road_config(
        tiny_world, folder / "data", harvest={"hook_points": POINTS}, shuffle={"passes": 3, "fan_out": 2}, saes=saes, corpus={"shard_bytes": 2000}
    )
    plan_corpus(config, open_pipeline_store(config))
    assert make_all(config)
    return config


@pytest.fixture
def copied(built: PipelineConfig, tmp_path: Path) -> PipelineConfig:
    """Return a configuration on a copy of the finished artifacts."""
    return copy_of(built, tmp_path / "copied")


def copy_of(config: PipelineConfig, root: Path) -> PipelineConfig:
    """Copy a pipeline's artifacts."""
    shutil.copytree(config.root, root)
    return config.model_copy(update={"root": str(root)})


def walk(config: PipelineConfig) -> Iterator[tuple[Asset, str]]:
    """Go through all partitions, in order."""
    pipeline = load_pipeline(config, open_pipeline_store(config))
    for asset in make_road(config).rest:
        for key in asset.partition_keys(pipeline):
            yield asset, key


def make_all(config: PipelineConfig) -> set[Partition]:
    """Make what is due, asset by asset, and return it. Of each asset a partition that is not due is asked for as well: it is found."""
    road, world = make_road(config), World(config)
    pipeline, store = world.open()
    made: set[Partition] = set()
    for asset in road.rest:
        known, keys = Digests(store), asset.partition_keys(pipeline)
        due = [key for key in keys if road.find_version(asset, pipeline, store, key, known) is None]
        asked = tuple([*due, *(key for key in keys if key not in due)][: len(due) + 1])
        assert asset.make is not None
        maker = asset.make(Job(world, pipeline, store, asked)) if due else lambda _key: []
        for key in asked:
            assert any(not item.is_cached for item in maker(key)) == (key in due), (asset.name, key)
        made |= {(asset.name, key) for key in due}
    return made


def find_due(config: PipelineConfig) -> set[Partition]:
    """Return what `interp plan` counts, before anything is made."""
    pipeline, store = World(config).open()
    road, known = make_road(config), Digests(store)
    found = {(asset.name, key) for asset, key in walk(config) if road.find_version(asset, pipeline, store, key, known) is None}
    counted = {line.name: line.n_missing for line in make_schedule(road, pipeline, store, {}, 1) if line.name != road.plan.name}
    assert {name: n for name, n in counted.items() if n} == {name: sum(asset == name for asset, _ in found) for name, _ in found}
    return found


def versions(config: PipelineConfig) -> dict[Partition, str | None]:
    """Return the data version of every partition."""
    pipeline, store = World(config).open()
    road = make_road(config)
    return {(asset.name, key): road.find_version(asset, pipeline, store, key) for asset, key in walk(config)}


def replace_bytes(store: Store, ref: ArtifactRef) -> None:
    """Seal an artifact's files again in other blocks: another manifest, another digest, and nothing that a reader would refuse."""
    old = load_manifest(store, ref)
    files = {entry.name: (read_file(store, ref.path, old, entry.name), entry) for entry in old.files}
    with create_artifact(store, ref, replace=True) as art:
        for name, (data, entry) in files.items():
            with art.open(name, n_rows=entry.n_rows, dtype=entry.dtype, shape=entry.shape, block_bytes=entry.block_bytes // 2) as sink:
                sink.write(data)
        art.facts |= old.facts
    assert load_manifest(store, ref).digest != old.digest


REPLACED = {
    "token_shards": ("shard-000001", {"activations", "shuffle_plan", "sae", "sae_evaluation", "features/demo/feature_browser"}),
    "activations": (
        "shard-000001",
        {"activation_statistics", "shuffle_pass_1", "shuffle_certificate", "sae", "sweep", "features/demo/feature_records"},
    ),
    "activation_statistics": ("", {"sae", "sae_evaluation", "features/demo/feature_candidates", "features/demo/feature_browser"}),
    "shuffle_plan": ("", {"shuffle_pass_1", "shuffle_pass_2", "mixed_shards", "shuffle_certificate", "sae", "features/demo/feature_examples"}),
    "shuffle_pass_1": ("shard-000001", {"shuffle_pass_2", "mixed_shards", "shuffle_certificate", "sae", "features/demo/feature_browser"}),
    "shuffle_pass_2": ("bucket-00001", {"mixed_shards", "shuffle_certificate", "sae", "sweep", "features/demo/feature_browser"}),
    "mixed_shards": ("bucket-00002", {"shuffle_certificate", "sae", "sae_evaluation", "sweep", "features/demo/feature_candidates"}),
    "shuffle_certificate": ("", {"sae", "sae_evaluation", "sweep", "features/demo/feature_browser"}),
    "sae": ("demo", {"sae_evaluation", "sweep", "features/demo/feature_candidates", "features/demo/feature_browser"}),
    "sae_evaluation": ("demo", {"sweep", "features/demo/feature_records", "features/demo/feature_browser"}),
    "features/demo/feature_candidates": ("slice-001|shard-000001", {"features/demo/feature_examples", "features/demo/feature_browser"}),
    "features/demo/feature_examples": ("slice-001", {"features/demo/example_activations", "features/demo/feature_records"}),
    "features/demo/example_activations": ("shard-000000", {"features/demo/feature_records", "features/demo/feature_browser"}),
    "features/demo/feature_records": ("slice-000", {"features/demo/feature_browser"}),
}


REBUILT = {"activations", "features/demo/feature_candidates"}
"""Kinds whose followers are also made from nothing: what follows the rows, and what follows an SAE."""


QUICK = {"activations", "shuffle_certificate", "features/demo/feature_candidates"}
"""Kinds that are replaced in every test run; the others by `make faults`."""


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.faults) for name in REPLACED])
def test_all_that_was_made_from_replaced_bytes_is_made_again_as_a_rebuild_makes_it(copied: PipelineConfig, tmp_path: Path, name: str) -> None:
    """A result of bytes that are no longer there was called finished: an SAE of other rows, features of another SAE."""
    key, expected = REPLACED[name]
    pipeline, store = World(copied).open()
    before = versions(copied)
    (ref, *_) = [item for item in make_road(copied).find(name).artifacts(pipeline, store, key) if item.hook_point in ("", POINTS[0])]
    replace_bytes(store, ref)
    due = find_due(copied)
    assert expected <= {asset for asset, _ in due}
    assert name not in {asset for asset, _ in due}
    assert make_all(copied) == due
    after = versions(copied)
    changed = {partition for partition, version in after.items() if version != before[partition]}
    assert changed == due | {(name, key)}
    if name not in REBUILT:
        return
    rebuilt = copy_of(copied, tmp_path / "rebuilt")
    for asset, partition in walk(copied):  # what is due, and no more, from nothing
        for item in asset.artifacts(pipeline, store, partition) if (asset.name, partition) in due else []:
            remove_artifact(World(rebuilt).store(), item.path)
    make_all(rebuilt)
    assert versions(rebuilt) == after


def test_an_sae_of_one_hook_point_does_not_depend_on_the_rows_of_another(copied: PipelineConfig) -> None:
    """Training is the most expensive step: what is not read must not cost it."""
    pipeline, store = World(copied).open()
    (ref,) = [item for item in make_road(copied).find("mixed_shards").artifacts(pipeline, store, "bucket-00000") if item.hook_point == POINTS[1]]
    replace_bytes(store, ref)
    due = find_due(copied)
    assert ("sae", "other") in due
    assert not {("sae", "demo"), ("sae_evaluation", "demo")} & due
    assert not {asset for asset, _ in due if asset.startswith("features/demo")}


@pytest.mark.faults
def test_thresholds_of_other_bytes_are_not_trusted(copied: PipelineConfig) -> None:
    """Candidates of all slices and windows read the same thresholds: those from elsewhere may differ in the last bit."""
    pipeline, store = World(copied).open()
    replace_bytes(store, thresholds_ref(pipeline, "demo", 1))
    due = find_due(copied)
    assert {("features/demo/feature_candidates", f"slice-00{i}|shard-000001") for i in range(2)} <= due
    assert ("features/demo/example_activations", "shard-000001") in due
    assert make_all(copied) == due
    assert find_due(copied) == set()


def test_what_the_plan_promises_and_made_artifacts_need_is_missed(copied: PipelineConfig) -> None:
    """A folder without its manifest is no artifact, so nothing in it was wrong: the plan of the shuffle was gone, and `verify` had no word for it."""
    pipeline, store = World(copied).open()
    road = make_road(copied)
    assert find_lost(road, pipeline, store) == Promised([], 0)
    plan = shuffle_plan_ref(pipeline).path
    store.delete([f"{plan}/manifest.json"])
    (lost,) = find_lost(road, pipeline, store).lost
    assert (lost.path, "shuffle_plan" in lost.what, "which needs it" in lost.what) == (plan, True, True)
    assert [fault.path for fault in verify_tree(store)] == [f"{plan}/plan.json"]
    rows = road.find("mixed_shards").artifacts(pipeline, store, "bucket-00001")[0].path
    tokens = road.find("token_shards").artifacts(pipeline, store, "shard-000001")[0].path
    for path in (rows, tokens):
        remove_artifact(store, path)
    assert [fault.path for fault in find_lost(road, pipeline, store).lost] == [tokens, plan, rows]


def test_what_is_not_made_yet_and_what_may_go_are_no_faults(copied: PipelineConfig) -> None:
    """A pipeline at work, and one whose split files were deleted as the runbook says, are sound."""
    pipeline, store = World(copied).open()
    road = make_road(copied)
    for name in ("shuffle_pass_1", "shuffle_pass_2"):
        for key in road.find(name).partition_keys(pipeline):
            for ref in road.find(name).artifacts(pipeline, store, key):
                remove_artifact(store, ref.path)
    assert find_lost(road, pipeline, store) == Promised([], 0)
    last = road.find("features/demo/feature_browser").artifacts(pipeline, store, "")[0]
    remove_artifact(store, last.path)
    assert find_lost(road, pipeline, store) == Promised([], 1)
