"""The partitions of one run spread over a Ray cluster: each is a task, and a task whose node dies runs again on another.

An asset's partitions are made one after the other. Where a cluster is named, `start_fanout` sends each as a task instead, and the run waits
for them in its order and records them: Dagster sees the same events. A task finds the asset's record and opens the world for itself from the
configuration (a string), so only names travel, no models and no rows. All nodes need the same package and reach the same root.

Assets without partitions are Dagster runs of their own. Where the run loop says that several are siblings (`side_by_side`: the bundles of
several SAEs), the step of the first sends the tasks of all, and each takes its own.

A task asks for the memory and the accelerator that its record says. A request that no node can satisfy would wait for ever without a word:
the run says what it waits for, and gives up after a while, in which a lost node can be replaced or an autoscaler can start one.

Ray is used where it is: with `RAY_ADDRESS` set and the extra `ray` installed. Nothing else here or in the stages knows of it.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

from interp_assets.errors import ConfigError, InterpError
from interp_assets.graph.stages import make_road
from interp_assets.planning.asset import Asset, Job, Key
from interp_assets.planning.config import PipelineConfig
from interp_assets.planning.machine import PROCESS_BYTES
from interp_assets.storage.manifest import Produced
from resources.world import World

ADDRESS_VARIABLE: Final = "RAY_ADDRESS"
TASK_RETRIES: Final = 5
"""How often a task is run again after its node or worker died; errors of the work itself are not retried by Ray."""
PATIENCE_S: Final = 300.0
"""How long a run waits for a node that is large enough."""
_LOOK_S: Final = 5.0
"""How long a task is waited for before the nodes are looked at."""
_TRUSTED: Final = Path(__file__).parents[2]
"""The folder that holds this package."""


class Task(NamedTuple):
    """A partition on the cluster."""

    name: str
    reference: Any
    request: Mapping[str, int]
    """What it asks its node for, by Ray's names."""


class Fanout:
    """Tasks on a cluster, one for each partition of a run."""

    def __init__(self, tasks: dict[str, Task], tell: Callable[[str], Any] = str, patience_s: float = PATIENCE_S) -> None:
        """Hold submitted tasks by partition key. `tell` hears what a run waits for."""
        self._tasks = tasks
        self._tell = tell
        self._patience_s = patience_s
        self._nodes: dict[str, str] = {}

    def where(self, key: str) -> str:
        """Return the node that made a partition which was taken."""
        return self._nodes.get(key, "")

    def take(self, key: str) -> list[Produced]:
        """Wait for a partition and return its artifacts.

        Raises what its work raised, `InterpError` when its node was lost too often, and `ConfigError` when no node is large enough.
        """
        import ray  # noqa: PLC0415 - only where there is a cluster
        from ray.exceptions import RayError  # noqa: PLC0415 - as above

        task = self._tasks.pop(key)
        try:
            self._wait(task)
            answer, self._nodes[key] = ray.get(task.reference)
        except RayError as error:
            text = str(error).splitlines()[0]
            raise InterpError(f"The Ray task of {task.name} was lost {TASK_RETRIES + 1} times: {text}. Look at `ray status`.") from error
        if isinstance(answer, InterpError):
            raise answer
        return answer

    def _wait(self, task: Task) -> None:
        """Wait for a task while some node can run it, and for such a node as long as patience lasts."""
        import ray  # noqa: PLC0415 - as above

        unfit_since = None
        while not ray.wait([task.reference], timeout=_LOOK_S)[0]:
            complaint = find_unmet(task, ray.nodes())
            if not complaint:
                unfit_since = None
                continue
            if unfit_since is None:
                unfit_since = time.monotonic()
                self._tell(f"{complaint} Waiting for one.")
            if time.monotonic() - unfit_since >= self._patience_s:
                ray.cancel(task.reference)
                raise ConfigError(complaint)


class _Siblings:
    """Assets whose tasks are sent together, and those that have been."""

    def __init__(self, assets: Sequence[Asset]) -> None:
        self.assets = assets
        self.tasks: dict[Key, Task] | None = None


_SIBLINGS: Final[dict[tuple[str, Key], _Siblings]] = {}
"""By configuration and asset; filled by the run loop, read in the steps of its runs, which are in the same process."""


@contextmanager
def side_by_side(assets: Sequence[Asset], config: PipelineConfig) -> Iterator[None]:
    """Let the first step of these assets send the tasks of all, where a cluster is named. One asset alone stays in its own process."""
    group = _Siblings(assets)
    keys = [(config.model_dump_json(), asset.key) for asset in assets] if len(assets) > 1 else []
    _SIBLINGS.update(dict.fromkeys(keys, group))
    try:
        yield
    finally:
        for key in keys:
            _SIBLINGS.pop(key, None)


def start_fanout(asset: Asset, job: Job) -> Fanout | None:
    """Send every partition of a run to the cluster that `RAY_ADDRESS` names.

    None without a cluster, for one partition alone that has no siblings, and for an asset whose partitions are made together.
    """
    address = os.environ.get(ADDRESS_VARIABLE)
    siblings = _SIBLINGS.get((job.config.model_dump_json(), asset.key))
    if not address or not asset.can_spread or (len(job.keys) < 2 and not siblings):
        return None
    import ray  # noqa: PLC0415 - as above

    if not ray.is_initialized():
        with chdir(_TRUSTED):  # Ray puts the current directory first on the module path of its workers
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    tasks = _send_siblings(siblings, asset, job) if siblings else _send(asset, job, job.keys)

    def tell(sentence: str) -> None:
        job.log(sentence)
        job.progress.tell(sentence)

    return Fanout(tasks, tell)


def make_partition(config_json: str, asset_key: tuple[str, ...], key: str) -> list[Produced]:
    """Make one partition of an asset, wherever this runs."""
    world = World(PipelineConfig.model_validate_json(config_json))
    asset = make_road(world.config).get(asset_key)
    assert asset.make is not None
    return asset.make(Job(world, *world.open(), keys=(key,)))(key)


def make_request(asset: Asset, job: Job, key: str, n_gpus: int) -> dict[str, int]:
    """Return what a task asks its node for: a core, the memory of its record, and a GPU where it holds a model and the device is CUDA.

    `n_gpus` is how many the cluster has: with the device `auto`, these decide, because whoever sends the tasks may have none.
    """
    device = job.config.execution.device
    takes_gpu = asset.needs.accelerator and (device == "cuda" or (device == "auto" and n_gpus > 0))
    return {"CPU": 1, "GPU": int(takes_gpu), "memory": PROCESS_BYTES + int(asset.takes(job.pipeline, job.store, key).memory_bytes)}


def find_unmet(task: Task, nodes: Sequence[Mapping[str, Any]]) -> str:
    """Say what a task asks for when no living node of `ray.nodes()` has as much, even when it is idle; empty where one has."""
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    if any(all(has.get(name, 0) >= amount for name, amount in task.request.items()) for has in alive):
        return ""
    nearest = max(alive, key=lambda has: [min(has.get(name, 0), task.request[name]) for name in ("CPU", "GPU", "memory")], default={})
    return (
        f"The Ray task of {task.name} asks for {_describe(task.request)}, and no node of the cluster has as much: the nearest has "
        f"{_describe(nearest)}. Add such a node (`ray status` lists what there is), or ask for less: smaller shards or buckets "
        "(`interp plan` says what each asset takes), or `execution.device: cpu` where there are no GPUs."
    )


def _describe(resources: Mapping[str, int | float]) -> str:
    return f"{resources.get('CPU', 0):g} CPU, {resources.get('GPU', 0):g} GPU and {resources.get('memory', 0) / 2**30:.1f} GiB of memory"


def _send_siblings(siblings: _Siblings, asset: Asset, job: Job) -> dict[str, Task]:
    """Return the task of an asset; the first to ask sends those of all. A step that is tried again sends its own again."""
    if siblings.tasks is None:
        siblings.tasks = {each.key: _send(each, job, [""])[""] for each in siblings.assets}
    task = siblings.tasks.pop(asset.key, None)
    return {"": task} if task else _send(asset, job, [""])


def _send(asset: Asset, job: Job, keys: Sequence[str]) -> dict[str, Task]:
    import ray  # noqa: PLC0415 - as above

    n_gpus, config_json = int(ray.cluster_resources().get("GPU", 0)), job.config.model_dump_json()
    remote = ray.remote(max_retries=TASK_RETRIES, num_cpus=1, scheduling_strategy="SPREAD")(_attempt)
    tasks: dict[str, Task] = {}
    for key in keys:
        request = make_request(asset, job, key, n_gpus)
        reference = remote.options(num_gpus=request["GPU"], memory=request["memory"]).remote(config_json, asset.key, key)
        tasks[key] = Task(f"{asset.name} {key}".rstrip(), reference, request)
    return tasks


def _attempt(config_json: str, asset_key: tuple[str, ...], key: str) -> tuple[list[Produced] | InterpError, str]:
    """Run in a task; return its node too. Errors that a person can mend are an answer, so that Ray does not try them again."""
    import ray  # noqa: PLC0415 - runs on the cluster

    node = ray.get_runtime_context().get_node_id()
    try:
        return make_partition(config_json, asset_key, key), node
    except InterpError as error:
        return error, node
