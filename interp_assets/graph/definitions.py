"""Assembles the asset graph: a configuration becomes fresh Dagster definitions, without touching storage, models or the network.

`build_defs(config)` is for tests, deployments and the command line. `defs` is what `workspace.yaml` loads: the pipeline that the
environment variable `INTERP_CONFIG` names (a YAML file), or the demo pipeline. Nothing else is decided here.
"""

import os
import warnings
from datetime import timedelta
from typing import Any, Final

# Every process of Dagster's that runs a step loads this module first, and inherits from one that did. Idle threads of OpenMP would spin on the
# cores that compiled loops use: steps of training take 5 to 15% longer.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import dagster as dg

import interp_assets.corpus.assets
import interp_assets.corpus.checks
import interp_assets.graph.retraining
import interp_assets.graph.sensors
import interp_assets.harvest.assets
import interp_assets.harvest.checks
import interp_assets.shuffle.assets
import interp_assets.shuffle.checks
import interp_assets.train.assets
import interp_assets.train.checks
import interp_assets.visualize.assets
import interp_assets.visualize.checks
import interp_assets.web.assets
from interp_assets.errors import ConfigError
from interp_assets.graph.partitions import make_layout
from interp_assets.planning.config import PipelineConfig, demo_config, load_config
from interp_assets.planning.costs import make_estimator
from interp_assets.planning.progress import Progress
from resources.world import World

CONFIG_VARIABLE = "INTERP_CONFIG"
EXECUTOR_VARIABLE = "INTERP_EXECUTOR"


def build_defs(config: PipelineConfig | None = None, *, progress: Progress | None = None) -> dg.Definitions:
    """Make the definitions of a pipeline (default: the demo); `progress` hears how in-process runs go."""
    config, progress = config or demo_config(), progress or Progress()
    progress.estimator = make_estimator(config)
    layout = make_layout(config)
    stages = (
        interp_assets.corpus.assets,
        interp_assets.harvest.assets,
        interp_assets.shuffle.assets,
        interp_assets.train.assets,
        interp_assets.visualize.assets,
        interp_assets.web.assets,
        interp_assets.graph.retraining,
    )
    checked = (
        interp_assets.corpus.checks,
        interp_assets.harvest.checks,
        interp_assets.shuffle.checks,
        interp_assets.train.checks,
        interp_assets.visualize.checks,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.BetaWarning)  # backfill policies; Dagster's version is pinned
        warnings.simplefilter("ignore", dg.PreviewWarning)  # partitioned checks
        return dg.Definitions(
            assets=_with_freshness(config, [asset for stage in stages for asset in stage.make_assets(layout)]),
            asset_checks=[check for stage in checked for check in stage.make_checks(layout)],
            sensors=[interp_assets.graph.sensors.make_sensor(layout), *interp_assets.graph.retraining.make_sensors(layout)],
            resources={"world": World.make(config), "progress": progress},
            executor=make_executor(os.environ.get(EXECUTOR_VARIABLE, "in_process")),
        )


_HANDED_ON: Final = (CONFIG_VARIABLE, "INTERP_ROOT", "INTERP_POSTGRES_URL", "INTERP_LOGS_BUCKET", "DAGSTER_HOME", "RAY_ADDRESS")
"""Variables that a step in a job of its own needs: without the first it would work on the demo pipeline. Credentials are the nodes' own."""


def make_executor(name: str) -> dg.ExecutorDefinition:
    """Return the executor of a deployment: `in_process`, or `kubernetes` or `ray`, which give every step a pod or job with what its asset asks for.

    In one process is the default, because importing torch again for every step and check costs seconds. Raises `ConfigError`.
    """
    if name == "in_process":
        return dg.in_process_executor
    if name == "kubernetes":
        from dagster_k8s import k8s_job_executor  # noqa: PLC0415 - takes seconds, and only clusters have it

        return k8s_job_executor
    if name == "ray":
        from dagster_ray import ray_executor  # noqa: PLC0415 - as above

        handed_on = [name for name in _HANDED_ON if name in os.environ]
        return ray_executor.configured({"ray": {"env_vars": handed_on}})
    raise ConfigError(f"{EXECUTOR_VARIABLE} is {name!r}; it is 'in_process', 'kubernetes' or 'ray'.")


def _with_freshness(config: PipelineConfig, assets: list[Any]) -> list[Any]:
    """Give the assets that people rely on a freshness policy, in a pipeline that takes in new text; a finished study does not age."""
    if not config.retrain.after_tokens:
        return assets
    days = timedelta(days=config.retrain.stale_after_days)
    policy = dg.FreshnessPolicy.time_window(fail_window=days, warn_window=days / 2)
    watched = {"corpus_plan", "sae", *(f"features/{name}/feature_browser" for name in config.features.saes)}

    def apply(spec: dg.AssetSpec) -> dg.AssetSpec:
        return spec.replace_attributes(freshness_policy=policy) if spec.key.to_user_string() in watched else spec

    return list(dg.map_asset_specs(apply, assets))


def config_from_environment() -> PipelineConfig:
    """Read the configuration that `INTERP_CONFIG` names, or return the demo's."""
    path = os.environ.get(CONFIG_VARIABLE)
    return load_config(path) if path else demo_config()


defs = build_defs(config_from_environment())
