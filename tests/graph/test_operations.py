"""What an operator relies on: retries, pools, tags, requests for machines, costs, freshness."""

import io
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from rich.console import Console
from road_world import Finished, make_road_config
from sixteen_shards import open_finished

from interp_assets.errors import ConfigError, InputError, InterpError, StoreError
from interp_assets.graph.assembly import make_executor
from interp_assets.graph.definitions import build_defs
from interp_assets.graph.events import Made, record
from interp_assets.graph.factory import GPU_POOL, RETRIES
from interp_assets.graph.jobs import RunError, open_instance, recorded_costs, run_road
from interp_assets.graph.partitions import claim_history
from interp_assets.graph.stages import make_road
from interp_assets.planning.config import make_config
from interp_assets.planning.costs import UNITS, add_up
from interp_assets.planning.progress import Progress
from interp_assets.storage.manifest import load_manifest
from interp_assets.terminal.forecast import print_costs
from resources.world import World


def run_failing(error: InterpError, n_failures: int) -> tuple[bool, int]:
    """Run an asset whose store fails some times; return success and the number of calls."""
    calls: list[str] = []

    def work(key: str) -> Made:
        calls.append(key)
        if len(calls) <= n_failures:
            raise error
        return Made("version", {"seconds": 36.0, "reused": False})

    @dg.asset(retry_policy=RETRIES)
    def some(context: dg.AssetExecutionContext, world: dg.ResourceParam[World]) -> Any:
        yield from record(context, work, Progress())

    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.materialize([some], instance=instance, resources={"world": World(make_config({}))}, raise_on_error=False)
    return result.success, len(calls)


def test_a_store_that_refuses_is_asked_again() -> None:
    """S3 answers 503 now and then, and a night's run should not end there; what a person must mend is not tried again."""
    assert run_failing(StoreError("slow down"), 1) == (True, 2)
    assert run_failing(InputError("not text"), 1) == (False, 1)


def test_every_partition_shows_what_was_expected_and_what_it_took(finished: Finished) -> None:
    """Bytes, requests and seconds side by side, for every asset of the road: an estimate that nobody can check is no estimate."""
    pipeline, store = open_finished(finished.config)
    for stop in make_road(finished.config).rest:
        tables = recorded_costs(finished.instance, stop)
        assert len(tables) == len(stop.partition_keys(pipeline)) or stop.name == "shuffle_pass_1", stop.name  # held out: nothing was made
        for table in tables:
            assert [row["what"] for row in table] == list(UNITS)
            assert all(row["estimated"] >= 0 for row in table)
        _, actual = add_up(tables)
        n_bytes = sum(load_manifest(store, ref).n_bytes for key in stop.partition_keys(pipeline) for ref in stop.artifacts(pipeline, store, key))
        assert n_bytes <= actual.written_bytes, stop.name
        assert actual.requests >= 2 * len(tables)
        assert actual.seconds > 0


def test_an_estimate_of_bytes_is_right_where_rows_are_all_there_is(tiny_world: Path, tmp_path: Path) -> None:
    """Two shards of 100,000 characters: activations and split files take what the plan says, within a tenth; an hour has its price."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(2):
        (texts / f"{i}.txt").write_text(" ".join(f"word{(i + j * j) % 997}" for j in range(14_000)))
    execution = {"device": "cpu", "usd_per_hour": 2.0}
    config = make_road_config(tiny_world, tmp_path / "data", corpus={"path": str(texts), "shard_bytes": 1}, execution=execution)
    with dg.DagsterInstance.ephemeral() as instance:
        list(run_road(config, instance, select=["token_shards", "activations", "shuffle_plan", "shuffle_pass_1", "mixed_shards"]))
        found = {stop.name: recorded_costs(instance, stop) for stop in make_road(config)}
    for name in ("activations", "shuffle_pass_1", "mixed_shards"):
        estimated, actual = add_up(found[name])
        assert actual.written_bytes == pytest.approx(estimated.written_bytes, rel=0.1), name
    for name in ("shuffle_pass_1", "mixed_shards"):
        estimated, actual = add_up(found[name])
        assert estimated.read_bytes / 2 <= actual.read_bytes <= estimated.read_bytes * 2, name  # whole blocks are read, to be verified
    assert add_up(found["activations"])[1].usd == pytest.approx(add_up(found["activations"])[1].seconds / 1800, rel=0.01)
    console = Console(record=True, width=200, file=io.StringIO())
    print_costs(console, config, found)
    print_costs(console, config, {})
    text = console.export_text()
    assert ["together", "8"] in [line.split()[:2] for line in text.splitlines()]
    assert "Nothing was made under this history" in text


def test_work_that_holds_a_model_is_in_the_pool_and_asks_for_a_gpu() -> None:
    """Two models at once do not fit one accelerator; on Kubernetes the pod of such a step asks for one, and a shuffle's for its memory."""
    graph = build_defs(make_config({"shuffle": {"memory_bytes": 4 << 30}})).resolve_asset_graph()
    pooled = {key.path[-1] for key in graph.executable_asset_keys if GPU_POOL in graph.get(key).pools}
    assert pooled == {"activations", "sae", "sae_evaluation", "feature_candidates", "example_activations", "feature_records"}
    tags = {key.path[-1]: graph.get(key).assets_def.op.tags for key in graph.executable_asset_keys}
    config = "dagster-k8s/config"
    assert all('"nvidia.com/gpu": "1"' in tags[name][config] for name in pooled)
    assert '"memory": "5632Mi"' in tags["mixed_shards"][config]
    assert config not in tags["token_shards"]


def test_backfills_spread_what_is_large_and_share_what_is_read_together() -> None:
    """Shards, buckets and slices go side by side, some in each run; a sweep shares its read, a grid is one run a slice, whatever the number."""
    graph = build_defs(make_config({"execution": {"partitions_per_run": 7}, "shuffle": {"passes": 3}})).resolve_asset_graph()
    policies = {key.path[-1]: graph.get(key).backfill_policy for key in graph.executable_asset_keys if graph.get(key).is_partitioned}
    single = {name for name, policy in policies.items() if policy == dg.BackfillPolicy.single_run()}
    assert single == {"sae", "sae_evaluation", "feature_candidates"}
    assert {name for name, policy in policies.items() if policy == dg.BackfillPolicy.multi_run(7)} == set(policies) - single


def test_only_a_pipeline_that_takes_in_text_ages() -> None:
    """A finished study is not out of date after a month; a pipeline that retrains is, when nothing has come of it."""
    graph = build_defs(make_config({"retrain": {"after_tokens": 1000}})).resolve_asset_graph()
    watched = {key.path[-1] for key in graph.executable_asset_keys if graph.get(key).freshness_policy is not None}
    assert watched == {"corpus_plan", "sae", "feature_browser"}
    demo = build_defs().resolve_asset_graph()
    assert all(demo.get(key).freshness_policy is None for key in demo.executable_asset_keys)


@pytest.mark.filterwarnings("ignore")  # of Ray's import
def test_an_executor_is_one_of_three() -> None:
    """A typing error in a deployment's environment is named when the definitions load."""
    assert make_executor("in_process") is dg.in_process_executor
    assert make_executor("kubernetes").name == "k8s"
    assert make_executor("ray").name == "ray"
    with pytest.raises(ConfigError, match="INTERP_EXECUTOR is 'k8s'; it is 'in_process', 'kubernetes' or 'ray'"):
        make_executor("k8s")


def test_runs_carry_tags_to_filter_by(finished: Any) -> None:
    """In the list of runs: which asset, which stage."""
    runs = finished.instance.get_runs(dg.RunsFilter(tags={"interp/stage": "shuffle"}))
    assert {run.tags["interp/asset"] for run in runs} >= {"shuffle_plan", "mixed_shards"}


def test_two_pipelines_do_not_share_a_history(tiny_world: Path, tmp_path: Path) -> None:
    """Their asset keys and partition sets are the same: in one database, one would take the shards of the other for its own."""
    config = make_road_config(tiny_world, tmp_path / "data")
    other = config.model_copy(update={"name": "other"})
    with dg.DagsterInstance.ephemeral() as instance:
        list(run_road(config, instance, select=["corpus_plan"]))
        with pytest.raises(RunError, match=r"history is that of the pipeline 'tiny', and 'other' would mix .*DAGSTER_HOME .*INTERP_POSTGRES_URL"):
            list(run_road(other, instance, select=["corpus_plan"]))
        list(run_road(config, instance, select=["corpus_plan"]))
        assert instance.get_dynamic_partitions("pipeline") == ["tiny"]


def test_a_pipeline_that_moves_keeps_its_history(tiny_world: Path, tmp_path: Path) -> None:
    """The name decides, not the root: a copy in a bucket is the same pipeline; and without DAGSTER_HOME each has a folder of its own."""
    config = make_road_config(tiny_world, tmp_path / "data")
    with open_instance(config) as first, open_instance(config.model_copy(update={"name": "other"})) as second:
        assert first.root_directory != second.root_directory
    with dg.DagsterInstance.ephemeral() as instance:
        claim_history(instance, config.name)
        claim_history(instance, make_road_config(tiny_world, tmp_path / "moved").name)
