"""The partitions of one run spread over a Ray cluster: each is a task, and a task whose node dies runs again on another.

An asset's partitions are made one after the other. Where a cluster is named, `start_fanout` sends each as a task instead, and the run waits
for them in its order and records them: Dagster sees the same events. A task finds the asset's record and opens the world for itself from the
configuration (a string), so only names travel, no models and no rows. All nodes need the same package and reach the same root. A task asks
for the memory and the accelerator that its record says.

Ray is used where it is: with `RAY_ADDRESS` set and the extra `ray` installed. Nothing else here or in the stages knows of it.
"""

import logging
import os
from contextlib import chdir
from pathlib import Path
from typing import Any, Final

from interp_assets.errors import InterpError
from interp_assets.graph.stages import make_road
from interp_assets.planning.asset import Asset, Job
from interp_assets.planning.config import PipelineConfig
from interp_assets.planning.machine import PROCESS_BYTES
from interp_assets.storage.manifest import Produced
from resources.world import World

ADDRESS_VARIABLE: Final = "RAY_ADDRESS"
TASK_RETRIES: Final = 5
"""How often a task is run again after its node or worker died; errors of the work itself are not retried by Ray."""
_TRUSTED: Final = Path(__file__).parents[2]
"""The folder that holds this package."""


class Fanout:
    """Tasks on a cluster, one for each partition of a run."""

    def __init__(self, tasks: dict[str, Any]) -> None:
        """Hold submitted tasks by partition key."""
        self._tasks = tasks
        self._nodes: dict[str, str] = {}

    def where(self, key: str) -> str:
        """Return the node that made a partition which was taken."""
        return self._nodes.get(key, "")

    def take(self, key: str) -> list[Produced]:
        """Wait for a partition and return its artifacts. Raises what its work raised, or `InterpError` when its node was lost too often."""
        import ray  # noqa: PLC0415 - only where there is a cluster
        from ray.exceptions import RayError  # noqa: PLC0415 - as above

        try:
            answer, self._nodes[key] = ray.get(self._tasks.pop(key))
        except RayError as error:
            text = str(error).splitlines()[0]
            raise InterpError(f"The Ray task of {key} was lost {TASK_RETRIES + 1} times: {text}. Look at `ray status`.") from error
        if isinstance(answer, InterpError):
            raise answer
        return answer


def start_fanout(asset: Asset, job: Job) -> Fanout | None:
    """Send every partition of a run to the cluster that `RAY_ADDRESS` names.

    None without a cluster, for one partition alone, and for an asset whose partitions are made together.
    """
    address = os.environ.get(ADDRESS_VARIABLE)
    if not address or len(job.keys) < 2 or not asset.can_spread:
        return None
    import ray  # noqa: PLC0415 - as above

    if not ray.is_initialized():
        with chdir(_TRUSTED):  # Ray puts the current directory first on the module path of its workers
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    task = ray.remote(max_retries=TASK_RETRIES, num_cpus=1, num_gpus=_n_accelerators(asset, job), scheduling_strategy="SPREAD")(_attempt)
    config_json = job.config.model_dump_json()
    return Fanout({key: task.options(memory=_memory(asset, job, key)).remote(config_json, asset.key, key) for key in job.keys})


def make_partition(config_json: str, asset_key: tuple[str, ...], key: str) -> list[Produced]:
    """Make one partition of an asset, wherever this runs."""
    world = World(PipelineConfig.model_validate_json(config_json))
    asset = make_road(world.config).get(asset_key)
    assert asset.make is not None
    return asset.make(Job(world, *world.open(), keys=(key,)))(key)


def _n_accelerators(asset: Asset, job: Job) -> float:
    from interp_assets.garcon.device import choose_device  # noqa: PLC0415 - takes torch

    return float(asset.needs.accelerator and choose_device(job.config.execution.device).type == "cuda")


def _memory(asset: Asset, job: Job, key: str) -> int:
    return PROCESS_BYTES + int(asset.takes(job.pipeline, job.store, key).memory_bytes)


def _attempt(config_json: str, asset_key: tuple[str, ...], key: str) -> tuple[list[Produced] | InterpError, str]:
    """Run in a task; return its node too. Errors that a person can mend are an answer, so that Ray does not try them again."""
    import ray  # noqa: PLC0415 - runs on the cluster

    node = ray.get_runtime_context().get_node_id()
    try:
        return make_partition(config_json, asset_key, key), node
    except InterpError as error:
        return error, node
