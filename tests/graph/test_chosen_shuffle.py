"""`shuffle: {passes: auto}`: the plan chooses the numbers when the rows are counted, and keeps them."""

from pathlib import Path

import dagster as dg
import pytest
from road_world import Finished, assert_as_if_nothing_happened, make_road_config
from tiny_models import save_model, write_texts

from interp_assets.errors import PlanError
from interp_assets.graph.jobs import RunError, run_road
from interp_assets.graph.stages import make_road
from interp_assets.planning.config import PipelineConfig
from interp_assets.planning.pipeline import load_pipeline, open_pipeline_store
from interp_assets.shuffle.plan import load_shuffle_plan

MIB = 1 << 20
STAGES = ["token_shards", "activations", "shuffle_plan", "shuffle_pass_1", "shuffle_pass_2", "mixed_shards", "shuffle_certificate"]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> PipelineConfig:
    """Return a pipeline whose rows are five times what a job may hold."""
    world = tmp_path_factory.mktemp("large")
    save_model(world / "model", "gpt2")
    write_texts(world / "texts", n_files=6, n_chars=12_000)
    return make_road_config(world, world / "data", corpus={"shard_bytes": 12_000}, shuffle={"memory_bytes": MIB})


def test_three_passes_are_chosen_made_and_kept(large: PipelineConfig) -> None:
    """Ranges of a few kB are too small for two passes. More memory later changes nothing that exists; other text chooses anew."""
    store = open_pipeline_store(large)
    with dg.DagsterInstance.ephemeral() as instance:
        first = list(run_road(large, instance, select=STAGES))
        pipeline = load_pipeline(large, store)
        sizes = load_shuffle_plan(pipeline, store).sizes
        assert pipeline.plan.shuffle is not None
        assert (sizes.passes, sizes.fan_out) == pipeline.plan.shuffle[:2] == (3, 3)
        assert {item.name: item.n_made for item in first}["mixed_shards"] == 9
        assert {item.name: item.n_made for item in first}["shuffle_pass_2"] == 3
        assert set(instance.get_dynamic_partitions("mixed_shards buckets")) == {f"bucket-{n:05d}" for n in range(9)}
        road = make_road(large)
        read = road.parents(road.find("mixed_shards"), pipeline, "bucket-00004")
        assert {key for name, key in read if name == "shuffle_pass_2"} == {"bucket-00001"}  # a lost bucket holds up its own children alone
        count = assert_as_if_nothing_happened(large, Finished(large, instance, first), names=STAGES)
        assert count == (sizes.n_rows, 0, 0)

        roomy = large.model_copy(update={"shuffle": large.shuffle.model_copy(update={"memory_bytes": 1 << 30})})
        again = list(run_road(roomy, instance, select=STAGES))
        assert sum(item.n_made for item in again) == 1  # the plan, which looks at the text

        (Path(large.corpus.path) / "zz.txt").write_text("more text of the same kind, " * 40, encoding="utf-8")
        list(run_road(roomy, instance, select=STAGES))
        assert load_shuffle_plan(load_pipeline(large, store), store).sizes.passes == 1
        assert set(instance.get_dynamic_partitions("mixed_shards buckets")) == {"bucket-00000"}
        assert instance.get_dynamic_partitions("shuffle_pass_2 buckets") == []


def test_rows_that_fit_one_job_take_one_pass(tiny_world: Path, tmp_path: Path) -> None:
    """The default configuration: nothing is split, nothing is made twice, and the table counts no partition that holds nothing."""
    config = make_road_config(tiny_world, tmp_path / "data", shuffle={})
    with dg.DagsterInstance.ephemeral() as instance:
        reports = {item.name: item for item in run_road(config, instance, select=STAGES)}
        assert load_pipeline(config, open_pipeline_store(config)).plan.shuffle is not None
        assert (reports["shuffle_pass_1"].n_partitions, reports["mixed_shards"].n_made) == (0, 1)
        assert "shuffle_pass_2" not in reports
        assert {item.name: item.n_made for item in run_road(config, instance, select=STAGES)} == {
            name: int(name == "corpus_plan") for name in reports
        }


def test_a_pipeline_of_an_earlier_release_keeps_its_shuffle(tiny_world: Path, tmp_path: Path) -> None:
    """It stated nothing and was shuffled in two passes over 8 buckets: an update must not shuffle and train again."""
    stated = make_road_config(tiny_world, tmp_path / "data", shuffle={"passes": 2, "fan_out": 8})
    config = make_road_config(tiny_world, tmp_path / "data", shuffle={})
    with dg.DagsterInstance.ephemeral() as instance:
        list(run_road(stated, instance, select=STAGES[:3]))
        before = instance.get_latest_materialization_event(dg.AssetKey("shuffle_plan"))
        assert load_pipeline(config, open_pipeline_store(config)).plan.shuffle is None
        list(run_road(config, instance, select=STAGES[:3]))
        pipeline = load_pipeline(config, open_pipeline_store(config))
        assert pipeline.plan.shuffle is not None
        assert pipeline.plan.shuffle[:2] == (2, 8)
        after = instance.get_latest_materialization_event(dg.AssetKey("shuffle_plan"))
        assert before is not None
        assert after is not None
        assert before.asset_materialization.tags["dagster/data_version"] == after.asset_materialization.tags["dagster/data_version"]


def test_what_cannot_work_is_refused_before_any_work(tiny_world: Path, tmp_path: Path) -> None:
    """An estimate refuses what is far out, before a token is made; counted rows refuse the rest before the harvest, which takes hours."""
    batch = {"name": "demo", "hook_point": "resid_post.0", "d_sae": 32, "k": 4}
    far = make_road_config(tiny_world, tmp_path / "data", saes=[{**batch, "batch_rows": 100_000}])
    with dg.DagsterInstance.ephemeral() as instance:
        with pytest.raises(RunError, match=r"SAE 'demo' takes 100,000 rows a batch \(batch_rows\), and the training shards have at most"):
            list(run_road(far, instance))
        assert instance.get_materialized_partitions(dg.AssetKey("token_shards")) == set()
        close = make_road_config(tiny_world, tmp_path / "data", saes=[{**batch, "batch_rows": 6000}])
        with pytest.raises(PlanError, match=r"SAE 'demo' takes 6,000 rows a batch"):
            list(run_road(close, instance))
        assert len(instance.get_materialized_partitions(dg.AssetKey("token_shards"))) == 5
        assert instance.get_materialized_partitions(dg.AssetKey("activations")) == set()
