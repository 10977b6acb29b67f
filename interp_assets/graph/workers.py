"""Processes of a Ray cluster become workers that keep what they have loaded: one loads a subject model once, not once for each shard.

A worker is a Ray actor. It books a core, memory and, where a model is held, a GPU, for as long as it lives, so two never share a device. What an
asset's `make` has prepared for one partition (model, tokenizer, SAE, plan) serves for all that the worker is given of that run; the next run
begins without it, because its plan may be another.

A crew is the workers of one shape: as many as the living nodes have room for, or `execution.workers` if that is more, so that an autoscaler
sees what is wanted; never more than there is work. It stays between the assets of a process, because its imports take seconds, and ends when an
asset needs another shape, when this process itself is about to hold a model, and with the run.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any, Final, NamedTuple

from interp_assets.errors import InterpError
from interp_assets.graph.stages import make_road
from interp_assets.planning.asset import Job, Key
from interp_assets.planning.config import PipelineConfig
from interp_assets.planning.pipeline import Pipeline
from interp_assets.planning.progress import Doing, Progress
from interp_assets.storage.manifest import Produced
from interp_assets.storage.store import Store
from interp_assets.storage.traffic import METER, Traffic
from resources.world import World

_STEP_BYTES: Final = 1 << 28
"""Memory is booked in such steps, so that assets of nearly one size share their workers."""
_LOOKING: Final = "looking"
"""Concurrency group of an actor that answers while it works."""


class Order(NamedTuple):
    """One partition to be made."""

    run: str
    """Names the run that wants it: what was loaded for another one is not used."""
    config_json: str
    folder: str
    """Where the run was begun: relative paths of its configuration start there."""
    asset_key: Key
    key: str

    @property
    def name(self) -> str:
        """What people call it."""
        return f"{'/'.join(self.asset_key)} {self.key}".rstrip()


class Answer(NamedTuple):
    """A partition that was made."""

    made: list[Produced]
    node: str
    traffic: Traffic
    seconds: float


class KeptWorld(World):
    """A world that opens and loads each thing once."""

    def open(self) -> tuple[Pipeline, Store]:
        """Return the plan as it was when it was asked for first."""
        return self._opened

    def tokenizer(self) -> Any:
        """Return the tokenizer."""
        return self._tokenizer

    def model(self) -> Any:
        """Return the subject model."""
        return self._model

    @cached_property
    def _opened(self) -> tuple[Pipeline, Store]:
        return super().open()

    @cached_property
    def _tokenizer(self) -> Any:
        return super().tokenizer()

    @cached_property
    def _model(self) -> Any:
        return super().model()


class _Counted(Progress):
    """Counts the units of work of the partition at hand."""

    def __init__(self) -> None:
        self.n_units = 0

    def advance(self, n: int) -> None:
        self.n_units += n


class Worker:
    """Makes partitions in a process of its own."""

    def __init__(self) -> None:
        self._held: tuple[str, Key] | None = None
        self.make_here: Callable[[str], list[Produced]] = lambda _key: []
        self._key, self._began, self._progress = "", 0.0, _Counted()

    def make(self, order: Order) -> Answer | InterpError:
        """Make a partition. Errors that a person can mend are an answer: the work is not tried again."""
        import ray  # noqa: PLC0415 - runs on the cluster

        node, before = ray.get_runtime_context().get_node_id(), METER.total()
        self._key, self._began, self._progress.n_units = order.key, time.monotonic(), 0
        try:
            if self._held != (order.run, order.asset_key):
                self.forget()
                self.prepare(order)
            made = self.make_here(order.key)
            return Answer(made, node, METER.total().since(before), time.monotonic() - self._began)
        except InterpError as error:
            return error
        finally:
            self._key = ""

    def prepare(self, order: Order) -> None:
        """Load what all partitions of a run need."""
        with suppress(FileNotFoundError):  # a node without that folder reaches the root by another path, or not at all
            os.chdir(order.folder)
        world = KeptWorld(PipelineConfig.model_validate_json(order.config_json))
        asset, (pipeline, store) = make_road(world.config).get(order.asset_key), world.open()
        assert asset.make is not None
        prepare = asset.make

        def make_job(key: str) -> Job:
            return Job(world, pipeline, store, (key,), self._progress)

        self.make_here = (lambda key: prepare(make_job(key))(key)) if asset.is_made_together else prepare(make_job(order.key))
        self._held = (order.run, order.asset_key)

    def forget(self) -> None:
        """Drop what was loaded."""
        self._held, self.make_here = None, lambda _key: []

    def look(self) -> Doing:
        """Say what it is doing; answered while it works."""
        return Doing(self._key, self._progress.n_units, time.monotonic() - self._began)


class Member:
    """One worker of a crew, as this process knows it."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self.hello = actor.look.options(concurrency_group=_LOOKING).remote()
        self.is_up = False
        self.n_orders = 0
        """What it was given and has not answered."""

    def give(self, order: Order) -> Any:
        """Send it work; returns a reference to the answer."""
        self.n_orders += 1
        return self.actor.make.remote(order)

    def look(self) -> Any:
        """Ask what it is doing; returns a reference to the answer."""
        return self.actor.look.options(concurrency_group=_LOOKING).remote()


class Starts:
    """Counts how often in a row all new workers were lost before they were up: a node that has no such package would end them for ever."""

    def __init__(self) -> None:
        self.n_failed = 0
        self._older: set[Member] = set()

    def fail(self, lost: Member, others: Sequence[Member]) -> None:
        """Count a worker that was lost before it was up; those that were started beside it count as one with it."""
        if lost not in self._older:
            self.n_failed, self._older = self.n_failed + 1, set(others)

    def succeed(self) -> None:
        """Begin anew: one is up."""
        self.n_failed, self._older = 0, set()


class Crew:
    """Workers of one shape."""

    def __init__(self, request: Mapping[str, int], kind: type[Worker]) -> None:
        self.kind, self.request = kind, request
        self.members: list[Member] = []

    def serves(self, request: Mapping[str, int], nodes: Sequence[Mapping[str, Any]]) -> bool:
        """Say whether its workers are large enough for a request, and whether no more of them would fit if they were made for it."""
        is_enough = all(self.request[name] >= request[name] for name in request)
        return is_enough and self.request["GPU"] == request["GPU"] and count_room(self.request, nodes) == count_room(request, nodes)

    def grow(self, n_workers: int) -> None:
        """Start workers until there are so many."""
        import ray  # noqa: PLC0415 - only where there is a cluster

        make_actor: Any = ray.remote
        remote = make_actor(concurrency_groups={_LOOKING: 1})(self.kind)
        place = {"num_cpus": self.request["CPU"], "num_gpus": self.request["GPU"], "memory": self.request["memory"]}
        while len(self.members) < n_workers:
            actor = remote.options(**place, scheduling_strategy="SPREAD").remote()
            self.members.append(Member(actor))

    def shrink(self, n_workers: int) -> None:
        """End those that are not up yet, as far as there are more than so many: they wait for room that there is not."""
        for member in [member for member in self.members if not member.is_up][: max(0, len(self.members) - n_workers)]:
            self.end(member)

    def end(self, member: Member) -> None:
        """End a worker, whatever it does."""
        import ray  # noqa: PLC0415 - as above

        self.members.remove(member)
        ray.kill(member.actor)

    def rest(self) -> None:
        """Drop what the workers hold, and end those that are at work still: nobody waits for it."""
        for member in list(self.members):
            if member.n_orders or not member.is_up:
                self.end(member)
            else:
                member.actor.forget.remote()

    def dismiss(self) -> None:
        """End all workers."""
        for member in list(self.members):
            self.end(member)


_CREW: Final[list[Crew]] = []
"""The crew of this process, if it has one."""


def find_crew(request: Mapping[str, int], kind: type[Worker] = Worker) -> Crew:
    """Return a crew whose workers hold a request: the one there is, if it serves."""
    import ray  # noqa: PLC0415 - as above

    nodes = ray.nodes()
    if _CREW and (_CREW[0].kind is not kind or not _CREW[0].serves(request, nodes)):
        dismiss_crew()
    if not _CREW:
        rounded = {**request, "memory": -(-request["memory"] // _STEP_BYTES) * _STEP_BYTES}
        _CREW.append(Crew(rounded if count_room(rounded, nodes) == count_room(request, nodes) > 0 else request, kind))
    _CREW[0].rest()
    return _CREW[0]


def dismiss_crew() -> None:
    """End the workers of this process."""
    while _CREW:
        _CREW.pop().dismiss()


def count_room(request: Mapping[str, int], nodes: Sequence[Mapping[str, Any]]) -> int:
    """Count the workers of a shape that the living nodes of `ray.nodes()` hold when they are idle."""
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    return sum(int(min(has.get(name, 0) // amount for name, amount in request.items() if amount)) for has in alive)
