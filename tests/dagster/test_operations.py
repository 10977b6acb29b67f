"""What an operator relies on: retries, pools, tags, requests for machines, costs, freshness."""

from typing import Any

import dagster as dg
import pytest

from interp_assets.config import make_config
from interp_assets.definitions import build_defs, make_executor
from interp_assets.errors import ConfigError, InputError, InterpError, StoreError
from interp_assets.faces import GPU_POOL, RETRIES, Made, record
from interp_assets.progress import Progress
from resources.world import World


def run_failing(error: InterpError, n_failures: int, usd_per_hour: float = 0.0) -> tuple[bool, int, dict[str, Any]]:
    """Run an asset whose store fails some times; return success, calls, and the metadata of its event."""
    calls: list[str] = []

    def work(key: str) -> Made:
        calls.append(key)
        if len(calls) <= n_failures:
            raise error
        return Made("version", {"seconds": 36.0, "reused": False})

    @dg.asset(retry_policy=RETRIES)
    def some(context: dg.AssetExecutionContext, world: World) -> Any:
        yield from record(context, work, Progress())

    config = make_config({"execution": {"usd_per_hour": usd_per_hour}})
    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.materialize([some], instance=instance, resources={"world": World.make(config)}, raise_on_error=False)
    events = result.asset_materializations_for_node("some")
    return result.success, len(calls), {key: value.value for key, value in events[0].metadata.items()} if events else {}


def test_a_store_that_refuses_is_asked_again() -> None:
    """S3 answers 503 now and then, and a night's run should not end there; what a person must mend is not tried again."""
    assert run_failing(StoreError("slow down"), 1)[:2] == (True, 2)
    assert run_failing(InputError("not text"), 1)[:2] == (False, 1)


def test_a_partition_shows_what_it_cost() -> None:
    """Estimated by `interp plan`, found here: seconds times the price of the machine, when the configuration names one."""
    assert run_failing(StoreError(""), 0, usd_per_hour=2.0)[2]["usd"] == 0.02
    assert "usd" not in run_failing(StoreError(""), 0)[2]


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


def test_an_executor_is_one_of_two() -> None:
    """A typing error in a deployment's environment is named when the definitions load."""
    assert make_executor("in_process") is dg.in_process_executor
    assert make_executor("kubernetes").name == "k8s"
    with pytest.raises(ConfigError, match="INTERP_EXECUTOR is 'k8s'; it is 'in_process' or 'kubernetes'"):
        make_executor("k8s")


def test_runs_carry_tags_to_filter_by(finished: Any) -> None:
    """In the list of runs: which asset, which stage."""
    runs = finished.instance.get_runs(dg.RunsFilter(tags={"interp/stage": "shuffle"}))
    assert {run.tags["interp/asset"] for run in runs} >= {"shuffle_plan", "mixed_shards"}
