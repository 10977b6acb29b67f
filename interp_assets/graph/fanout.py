"""The partitions of one run spread over the workers of a Ray cluster: what a node held when it died is made again on another.

An asset's partitions are made one after the other. Where there is a cluster, `start_fanout` hands them to its workers instead (`workers.py`), and
the run takes them in its order and records them: Dagster sees the same events. A worker finds the asset's record and opens the world for itself
from the configuration (a string), so only names travel, no models and no rows. All nodes need the same package and reach the same root.

Assets without partitions are Dagster runs of their own. Where the run loop says that several are siblings (`side_by_side`: the bundles of
several SAEs), the step of the first hands out those of all, and each takes its own.

A worker asks for the memory and the accelerator that the records say. A request that no node can satisfy would wait for ever without a word:
the run says what it waits for, and gives up after a while, in which a lost node can be replaced or an autoscaler can start one.

A cluster is what `RAY_ADDRESS` names, or what the run has started on this machine (`local_ray.py`). Nothing else here or in the stages knows of it.
"""

import logging
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, Final, NamedTuple

from interp_assets.errors import ConfigError, InterpError
from interp_assets.graph.workers import Answer, Member, Order, Starts, Worker, count_room, find_crew
from interp_assets.planning.asset import Asset, Job, Key
from interp_assets.planning.config import PipelineConfig
from interp_assets.planning.machine import PROCESS_BYTES
from interp_assets.planning.progress import Progress

ADDRESS_VARIABLE: Final = "RAY_ADDRESS"
RETRIES: Final = 5
"""How often a partition is made again after its node or worker died; errors of the work itself are not tried again."""
PATIENCE_S: Final = 300.0
"""How long a run waits for a node that is large enough."""
_LOOK_S: Final = 5.0
"""How long an answer is waited for before the nodes are looked at."""
_WATCH_S: Final = 1.0
"""How often workers are asked how far they are; a hundred of them, at most, a second."""
TRUSTED: Final = Path(__file__).parents[2]
"""The folder that holds this package."""
_RUNS: Final = count()


class Load(NamedTuple):
    """The work of a run."""

    orders: Sequence[Order]
    request: Mapping[str, int]
    """What a worker asks its node for, by Ray's names: as much as the largest partition."""
    largest: str
    """The name of that one."""
    n_wanted: int = 1
    """Workers that there shall be even where the nodes of now have no room for them."""


class Fanout:
    """Partitions of a run at the workers of a cluster."""

    def __init__(
        self, load: Load, kind: type[Worker], progress: Progress, tell: Callable[[str], Any] = str, *, patience_s: float = PATIENCE_S
    ) -> None:
        """Hand out orders to workers of a kind. `tell` hears what a run waits for."""
        self._load, self._progress, self._tell, self._patience_s = load, progress, tell, patience_s
        self._crew = find_crew(load.request, kind)
        self._waiting = deque(load.orders)
        self._due = {(order.asset_key, order.key) for order in load.orders}
        self._given: dict[Any, tuple[Member, Order]] = {}
        self._answers: dict[tuple[Key, str], Answer | Exception] = {}
        self._lost: Counter[Order] = Counter()
        self._starts = Starts()
        self._looks: dict[Any, Member] = {}
        self._looked_s = self._counted_s = -_LOOK_S
        self._heard_s = time.monotonic()
        self._n_room, self._unfit_since = 0, None

    def take(self, asset: Asset, key: str) -> Answer:
        """Wait for a partition and return what became of it.

        Raises what its work raised, `InterpError` when its node was lost too often or no worker starts, and `ConfigError` when no node is large
        enough.
        """
        place = (asset.key, key)
        while place not in self._answers:
            self._step()
        answer = self._answers.pop(place)
        self._due.remove(place)
        if not self._due:
            self._crew.rest()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _step(self) -> None:
        """Give workers what they can do, and wait for one of them, for a short time."""
        import ray  # noqa: PLC0415 - only where there is a cluster

        self._fill()
        greeting = {member.hello: member for member in self._crew.members if not member.is_up}
        answered = ray.wait([*self._given, *greeting], timeout=_WATCH_S)[0]
        for reference in answered:
            self._hear(reference, greeting.get(reference))
        self._watch()
        if answered:
            self._heard_s, self._unfit_since = time.monotonic(), None
        elif time.monotonic() - self._heard_s >= _LOOK_S:
            self._heard_s = time.monotonic()
            self._check_room()

    def _fill(self) -> None:
        import ray  # noqa: PLC0415 - as above

        if time.monotonic() - self._counted_s >= _LOOK_S or not self._crew.members:
            self._n_room, self._counted_s = count_room(self._crew.request, ray.nodes()), time.monotonic()
        n_workers = min(len(self._waiting) + len(self._given), max(self._n_room, self._load.n_wanted, 1))
        self._crew.shrink(n_workers)
        self._crew.grow(n_workers)
        up = [member for member in self._crew.members if member.is_up]
        for depth in (1, 2):  # a second one waits at the worker while there are enough for all, so that none idles while an answer is recorded
            for member in up:
                if self._waiting and member.n_orders < depth and (depth == 1 or len(self._waiting) > len(up)):
                    order = self._waiting.popleft()
                    self._given[member.give(order)] = member, order

    def _hear(self, reference: Any, greeting: Member | None) -> None:
        """Take what a worker says, or that it is lost: then what it was given waits again."""
        import ray  # noqa: PLC0415 - as above
        from ray.exceptions import RayError, RayTaskError  # noqa: PLC0415 - as above

        member, order = self._given.pop(reference, (greeting, None))
        assert member is not None
        try:
            answer: Any = ray.get(reference)
        except RayTaskError as error:
            answer = error
        except RayError as error:
            lines = str(error).strip().splitlines()
            self._lose(member, order, lines[0] if order else lines[-1])  # of a worker that never was, the cause stands last
            return
        member.is_up = True
        self._starts.succeed()
        if order:
            member.n_orders -= 1
            self._answers[order.asset_key, order.key] = answer

    def _lose(self, member: Member, order: Order | None, why: str) -> None:
        self._counted_s = -_LOOK_S
        if member in self._crew.members:
            self._crew.end(member)
        if order is None:
            self._starts.fail(member, self._crew.members)
            if self._starts.n_failed > RETRIES and not any(other.is_up for other in self._crew.members):
                self._give_up(why)
            return
        self._lost[order] += 1
        if self._lost[order] <= RETRIES:
            self._waiting.appendleft(order)
        else:
            text = f"The Ray worker of {order.name} was lost {RETRIES + 1} times: {why}. Look at `ray status`."
            self._answers[order.asset_key, order.key] = InterpError(text)

    def _give_up(self, why: str) -> None:
        """Answer all that waits, because no worker comes up."""
        text = (
            f"No Ray worker of {self._load.largest} starts, after {RETRIES + 1} attempts: {why}. Every node needs this package and its memory free."
        )
        self._answers |= {(order.asset_key, order.key): InterpError(text) for order in self._waiting}
        self._waiting.clear()

    def _check_room(self) -> None:
        """Say when no node is large enough, and wait for one as long as patience lasts."""
        import ray  # noqa: PLC0415 - as above

        complaint = find_unmet(self._load, ray.nodes())
        if not complaint:
            self._unfit_since = None
            return
        if self._unfit_since is None:
            self._unfit_since = time.monotonic()
            self._tell(f"{complaint} Waiting for one.")
        if time.monotonic() - self._unfit_since >= self._patience_s:
            self._crew.dismiss()
            raise ConfigError(complaint)

    def _watch(self) -> None:
        """Show what all workers are doing, every now and then."""
        import ray  # noqa: PLC0415 - as above
        from ray.exceptions import RayError  # noqa: PLC0415 - as above

        at_work = [member for member in self._crew.members if member.n_orders]
        if self._looks:
            ready = ray.wait([*self._looks], num_returns=len(self._looks), timeout=0)[0]
            if len(ready) < len(self._looks) and time.monotonic() - self._looked_s < 2 * _LOOK_S:
                return
            with suppress(RayError):  # a worker that died is heard of by what it was given
                self._progress.watch([doing for doing in ray.get(ready) if doing.key])
            self._looks = {}
        elif time.monotonic() - self._looked_s >= max(_WATCH_S, len(at_work) / 100):
            self._looked_s = time.monotonic()
            self._looks = {member.look(): member for member in at_work}


class _Siblings:
    """Assets whose partitions are handed out together, and those that have been."""

    def __init__(self, assets: Sequence[Asset]) -> None:
        self.assets = assets
        self.fanout: Fanout | None = None
        self.left: set[Key] = set()


_SIBLINGS: Final[dict[tuple[str, Key], _Siblings]] = {}
"""By configuration and asset; filled by the run loop, read in the steps of its runs, which are in the same process."""


@contextmanager
def side_by_side(assets: Sequence[Asset], config: PipelineConfig) -> Iterator[None]:
    """Let the first step of these assets hand out those of all, where there is a cluster. One asset alone stays in its own process."""
    group = _Siblings(assets)
    keys = [(config.model_dump_json(), asset.key) for asset in assets] if len(assets) > 1 else []
    _SIBLINGS.update(dict.fromkeys(keys, group))
    try:
        yield
    finally:
        for key in keys:
            _SIBLINGS.pop(key, None)


def start_fanout(asset: Asset, job: Job) -> Fanout | None:
    """Hand every partition of a run to the workers of a cluster.

    None without a cluster, for one partition alone that has no siblings, and for an asset whose partitions are made together.
    """
    siblings = _SIBLINGS.get((job.config.model_dump_json(), asset.key))
    if not asset.can_spread or (len(job.keys) < 2 and not siblings) or not _connect():
        return None

    def tell(sentence: str) -> None:
        job.log(sentence)
        job.progress.tell(sentence)

    if not siblings:
        return Fanout(make_load([asset], job, job.keys), Worker, job.progress, tell)
    if asset.key not in siblings.left:  # the first to ask hands out all; a step that is tried again only its own
        assets = [asset] if siblings.fanout else siblings.assets
        fanout = Fanout(make_load(assets, job, [""]), Worker, job.progress, tell)
        siblings.fanout, siblings.left = siblings.fanout or fanout, siblings.left | {each.key for each in assets if each is not asset}
        return fanout
    siblings.left.discard(asset.key)
    return siblings.fanout


def _connect() -> bool:
    """Say whether there is a cluster, and be connected with it."""
    ray = sys.modules.get("ray")
    if ray and ray.is_initialized():
        return True
    address = os.environ.get(ADDRESS_VARIABLE)
    if not address:
        return False
    import ray  # noqa: PLC0415 - as above

    with chdir(TRUSTED):  # Ray puts the current directory first on the module path of its workers
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    return True


def make_load(assets: Sequence[Asset], job: Job, keys: Sequence[str]) -> Load:
    """Return the work that these partitions of each asset are, and what a worker of it asks for."""
    import ray  # noqa: PLC0415 - as above

    n_gpus, config_json, run = int(ray.cluster_resources().get("GPU", 0)), job.config.model_dump_json(), f"{os.getpid()}-{next(_RUNS)}"
    folder = str(Path.cwd())
    requests = {Order(run, config_json, folder, asset.key, key): make_request(asset, job, key, n_gpus) for asset in assets for key in keys}
    request = {name: max(each[name] for each in requests.values()) for name in ("CPU", "GPU", "memory")}
    largest = next(order for order, each in requests.items() if each["memory"] == request["memory"])
    n_wanted = job.config.execution.workers
    return Load(list(requests), request, largest.name, n_wanted if isinstance(n_wanted, int) else 1)


def make_request(asset: Asset, job: Job, key: str, n_gpus: int) -> dict[str, int]:
    """Return what a partition asks its node for: a core, the memory of its record, and a GPU where it holds a model and the device is CUDA.

    `n_gpus` is how many the cluster has: with the device `auto`, these decide, because whoever hands out the work may have none.
    """
    device = job.config.execution.device
    takes_gpu = asset.needs.accelerator and (device == "cuda" or (device == "auto" and n_gpus > 0))
    return {"CPU": 1, "GPU": int(takes_gpu), "memory": PROCESS_BYTES + int(asset.takes(job.pipeline, job.store, key).memory_bytes)}


def find_unmet(load: Load, nodes: Sequence[Mapping[str, Any]]) -> str:
    """Say what a worker asks for when no living node of `ray.nodes()` has as much, even when it is idle; empty where one has."""
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    if any(all(has.get(name, 0) >= amount for name, amount in load.request.items()) for has in alive):
        return ""
    nearest = max(alive, key=lambda has: [min(has.get(name, 0), load.request[name]) for name in ("CPU", "GPU", "memory")], default={})
    return (
        f"The Ray worker of {load.largest} asks for {_describe(load.request)}, and no node of the cluster has as much: the nearest has "
        f"{_describe(nearest)}. Add such a node (`ray status` lists what there is), or ask for less: smaller shards or buckets "
        "(`interp plan` says what each asset takes), or `execution.device: cpu` where there are no GPUs."
    )


def _describe(resources: Mapping[str, int | float]) -> str:
    return f"{resources.get('CPU', 0):g} CPU, {resources.get('GPU', 0):g} GPU and {resources.get('memory', 0) / 2**30:.1f} GiB of memory"
