"""The partitions of one run spread over a Ray cluster: each shard is a task, and a task whose node dies runs again on another.

An asset's body makes its partitions one after the other. Where a cluster is named, `start_fanout` sends each shard as a task instead, and
the body waits for them in its order and records them: Dagster sees the same events. A task opens the world for itself from the
configuration (a string), so only names travel, no models and no rows. All nodes need the same package and reach the same root.

Ray is used where it is: with `RAY_ADDRESS` set and the extra `ray` installed. Nothing else here or in the stages knows of it.
"""

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any, Final

from interp_assets.errors import InterpError
from interp_assets.storage.manifest import Produced

ADDRESS_VARIABLE: Final = "RAY_ADDRESS"
TASK_RETRIES: Final = 5
"""How often a task is run again after its node or worker died; errors of the work itself are not retried by Ray."""
_TRUSTED: Final = Path(__file__).parents[2]
"""The folder that holds this package."""

Make = Callable[[str, str], list[Produced]]


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


def start_fanout(make: Make, config_json: str, keys: Sequence[str], *, n_gpus: float = 0.0) -> Fanout | None:
    """Send `make(config_json, key)` for every partition of a run to the cluster that `RAY_ADDRESS` names; None without one.

    `make` is a function of a module, so only its name travels. Each task asks for one CPU and `n_gpus` accelerators.
    """
    address = os.environ.get(ADDRESS_VARIABLE)
    if not address or len(keys) < 2:
        return None
    import ray  # noqa: PLC0415 - as above

    if not ray.is_initialized():
        with chdir(_TRUSTED):  # Ray puts the current directory first on the module path of its workers
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    task = ray.remote(max_retries=TASK_RETRIES, num_cpus=1, num_gpus=n_gpus, scheduling_strategy="SPREAD")(_attempt)
    return Fanout({key: task.remote(make, config_json, key) for key in keys})


def _attempt(make: Make, config_json: str, key: str) -> tuple[list[Produced] | InterpError, str]:
    """Run in a task; return its node too. Errors that a person can mend are an answer, so that Ray does not try them again."""
    import ray  # noqa: PLC0415 - runs on the cluster

    node = ray.get_runtime_context().get_node_id()
    try:
        return make(config_json, key), node
    except InterpError as error:
        return error, node
