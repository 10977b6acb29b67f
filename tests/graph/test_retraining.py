"""New text is taken in: harvested, appended, trained on warm, compared, and promoted or kept back, exactly once per threshold."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.definitions.partitions.context import partition_loading_context
from road_world import Finished, copied_history, make_road_config

from interp_assets.graph.definitions import build_defs
from interp_assets.graph.jobs import find_missing, recorded_versions, run_road
from interp_assets.graph.retraining import make_retraining_sensor, retrain
from interp_assets.graph.stages import make_road
from interp_assets.planning.config import PipelineConfig
from interp_assets.planning.pipeline import Pipeline, load_pipeline, open_pipeline_store
from interp_assets.shuffle.append import Appending, appended_ref
from interp_assets.shuffle.generations import before, newest
from interp_assets.shuffle.mixed import open_mixed, read_mixed_ids
from interp_assets.shuffle.refs import certificate_ref, mixed_shard_ref
from interp_assets.storage.store import Store
from interp_assets.train.growth import measure_growth
from interp_assets.train.refs import sae_ref
from resources.world import World

THRESHOLD = 300
RULE = {"after_tokens": THRESHOLD, "max_fvu_increase": 10.0, "max_ce_recovered_decrease": 10.0}


@pytest.fixture(scope="module")
def grown(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    """Return a finished pipeline that retrains, to be copied."""
    folder = tmp_path_factory.mktemp("grown")
    shutil.copytree(tiny_world / "texts", folder / "texts")
    config = configure(tiny_world, folder)
    with dg.DagsterInstance.ephemeral() as instance:
        yield Finished(config, instance, list(run_road(config, instance)))


@pytest.fixture
def copied(grown: Finished, tiny_world: Path, tmp_path: Path) -> PipelineConfig:
    """Return a configuration on a copy of texts and artifacts."""
    shutil.copytree(Path(grown.config.root).parent, tmp_path / "copy")
    return configure(tiny_world, tmp_path / "copy")


def configure(world: Path, folder: Path, **rule: float) -> PipelineConfig:
    """Return a small configuration that retrains after `THRESHOLD` tokens."""
    corpus = {"path": str(folder / "texts"), "shard_bytes": 900}
    return make_road_config(world, folder / "data", corpus=corpus, retrain={**RULE, **rule})


def land(config: PipelineConfig, name: str, n_words: int = 130) -> None:
    """Write a new text behind the others."""
    Path(config.corpus.path, name).write_text(" ".join(f"new{(i * i) % 97}" for i in range(n_words)))


def harvest(config: PipelineConfig, instance: dg.DagsterInstance) -> None:
    """Plan anew and harvest what has landed."""
    list(run_road(config, instance, select=["token_shards", "activations"]))


def opened(config: PipelineConfig) -> tuple[Pipeline, Store]:
    """Open plan and store."""
    store = open_pipeline_store(config)
    return load_pipeline(config, store), store


def tick(config: PipelineConfig, instance: dg.DagsterInstance) -> tuple[list[dg.RunRequest], str]:
    """Evaluate the sensor once."""
    context = dg.build_sensor_context(instance=instance, resources={"world": World(config)}, definitions=build_defs(config))
    with partition_loading_context(dynamic_partitions_store=instance):
        data = make_retraining_sensor().evaluate_tick(context)
    return list(data.run_requests or []), data.skip_message or ""


def test_landed_text_waits_and_changes_nothing(grown: Finished, copied: PipelineConfig) -> None:
    """A new shard is harvested and pending: every id of the shuffle, the SAEs and their evidence stays what it was."""
    with copied_history(grown) as instance:
        pipeline, _ = opened(copied)
        land(copied, "yy.txt", n_words=40)
        harvest(copied, instance)
        after, store = opened(copied)
        assert after.pending_indices == [len(pipeline.plan.shards)]
        assert [shard.fingerprint for shard in after.plan.shards[:-1]] == [shard.fingerprint for shard in pipeline.plan.shards]
        assert sae_ref(after, "demo") == sae_ref(pipeline, "demo")
        requests, why = tick(copied, instance)
        assert requests == []
        n_new = measure_growth(after, store).n_tokens
        assert why == f"{n_new:,} new tokens since the last training; a retraining starts at {THRESHOLD}."


def test_a_retraining_takes_new_text_in(grown: Finished, copied: PipelineConfig) -> None:
    """Old rows are not shuffled again; all rows are there once; the new SAE takes over, with evidence of its own, and nothing is stale."""
    with copied_history(grown) as instance:
        old, _ = opened(copied)
        land(copied, "yy.txt")
        harvest(copied, instance)
        done = retrain(copied, instance)
        pipeline, store = opened(copied)
        assert done.comparison.manifest.facts["promoted"]
        assert pipeline.plan.generations == [len(old.plan.shards), len(pipeline.plan.shards)]
        assert pipeline.pending_indices == []
        ids = [int(i) for shard in open_mixed(pipeline, store, "resid_post.0") for i in read_mixed_ids(store, shard, 0, shard.n_rows)]
        parts = Appending(open_mixed(before(pipeline), store, "resid_post.0"), open_mixed(newest(pipeline), store, "resid_post.0"), 2)
        for bucket in range(2):  # two modules address a merged shard: by the ids of all its inputs, and by the opened inputs
            assert appended_ref(pipeline, "resid_post.0", parts, bucket) == mixed_shard_ref(pipeline, "resid_post.0", bucket)
        apart = [int(i) for part in (parts.old, parts.new) for shard in part for i in read_mixed_ids(store, shard, 0, shard.n_rows)]
        assert sorted(ids) == sorted(apart)
        assert len(set(ids)) == len(ids)
        assert {i >> 40 for i in ids} == set(pipeline.train_indices)
        assert store.size(certificate_ref(pipeline, "resid_post.0").path + "/manifest.json")
        events = instance.fetch_materializations(dg.AssetKey("shuffle_pass_1"), limit=100).records
        assert len(events) == len(pipeline.plan.shards)  # each shard was split once, in its generation
        assert sae_ref(pipeline, "demo").inputs["warm_start"] == sae_ref(old, "demo").artifact_id
        for stop in make_road(copied).rest:
            assert find_missing(make_road(pipeline.config), stop, pipeline, store, instance) == [], stop.name
        assert retrain(copied, instance, pipeline.plan.generations[-1]).n_made == 0  # a run that is retried finds everything


def test_a_worse_sae_is_kept_back(grown: Finished, tiny_world: Path, tmp_path: Path) -> None:
    """With a margin that cannot be met, the plan, the SAEs and their evidence stay; the verdict says by how much it failed."""
    shutil.copytree(Path(grown.config.root).parent, tmp_path / "copy")
    config = configure(tiny_world, tmp_path / "copy", max_fvu_increase=-10.0)
    with copied_history(grown) as instance:
        versions = {stop.name: recorded_versions(instance, stop) for stop in make_road(config) if stop.stage in ("shuffle", "train")}
        land(config, "yy.txt")
        harvest(config, instance)
        done = retrain(config, instance)
        facts = done.comparison.manifest.facts
        pipeline, _ = opened(config)
        assert not done.comparison.manifest.facts["promoted"]
        assert len(pipeline.plan.generations) == 1
        assert "after" in facts["why"]
        assert "is allowed" in facts["why"]
        found = {stop.name: recorded_versions(instance, stop) for stop in make_road(config) if stop.stage in ("shuffle", "train")}
        new = f"shard-{len(pipeline.plan.shards) - 1:06d}"
        found["shuffle_pass_1"].pop(new)
        assert found == versions


def test_one_request_for_one_threshold(copied: PipelineConfig) -> None:
    """Ticks and restarts repeat the key, for which Dagster starts one run; only another threshold's worth of tokens makes a new one."""
    with dg.DagsterInstance.ephemeral() as instance:
        list(run_road(copied, instance, select=["token_shards", "activations"]))
        land(copied, "yy.txt")
        harvest(copied, instance)
        first, again = tick(copied, instance)[0], tick(copied, instance)[0]
        n_times = measure_growth(*opened(copied)).n_tokens // THRESHOLD
        assert [request.run_key for request in first] == [request.run_key for request in again] == [f"generation-1-passed-{n_times}"]
        assert first[0].run_config["ops"]["retraining"]["config"]["stop"] == len(opened(copied)[0].plan.shards)
        land(copied, "zz.txt")
        harvest(copied, instance)
        (more,) = tick(copied, instance)[0]
        assert more.run_key == f"generation-1-passed-{measure_growth(*opened(copied)).n_tokens // THRESHOLD}" != first[0].run_key


def test_changed_old_text_is_shuffled_anew(copied: PipelineConfig) -> None:
    """Appending is for new text: when an old shard has changed, all shards become one generation again."""
    with dg.DagsterInstance.ephemeral() as instance:
        list(run_road(copied, instance, select=["token_shards"]))
        first = min(Path(copied.corpus.path).iterdir())
        first.write_text(first.read_text() + " changed")
        land(copied, "yy.txt")
        list(run_road(copied, instance, select=["token_shards"]))
        pipeline, _ = opened(copied)
        assert pipeline.plan.generations == [len(pipeline.plan.shards)]
