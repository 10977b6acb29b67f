"""The road becomes Dagster definitions: what the run loop runs, and what `definitions.py` adds sensors to."""

import os
import warnings
from typing import Final

import dagster as dg

from interp_assets.errors import ConfigError
from interp_assets.graph.factory import make_check, make_definition
from interp_assets.graph.stages import make_road
from interp_assets.planning.config import PipelineConfig
from interp_assets.planning.costs import make_estimator
from interp_assets.planning.progress import Progress
from resources.world import World

CONFIG_VARIABLE: Final = "INTERP_CONFIG"
EXECUTOR_VARIABLE: Final = "INTERP_EXECUTOR"
_HANDED_ON: Final = (CONFIG_VARIABLE, "INTERP_ROOT", "INTERP_POSTGRES_URL", "INTERP_LOGS_BUCKET", "DAGSTER_HOME", "RAY_ADDRESS")
"""Variables that a step in a job of its own needs: without the first it would work on the demo pipeline. Credentials are the nodes' own."""


def assemble(config: PipelineConfig, progress: Progress) -> dg.Definitions:
    """Make the definitions of a pipeline's road; `progress` hears how in-process runs go."""
    road = make_road(config)
    progress.estimator = make_estimator(config, road)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.BetaWarning)  # backfill policies; Dagster's version is pinned
        warnings.simplefilter("ignore", dg.PreviewWarning)  # partitioned checks
        return dg.Definitions(
            assets=[make_definition(asset, road, config) for asset in (*road.outside, *road)],
            asset_checks=[make_check(asset, check) for asset in road for check in asset.checks],
            resources={"world": World(config), "progress": progress},
            executor=make_executor(os.environ.get(EXECUTOR_VARIABLE, "in_process")),
        )


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
