"""An asset as plain data: everything that is known of it, said once, for whoever makes, forecasts, spreads, checks or shows it.

A stage's `assets.py` lists one `Asset` after the other; nothing else in the project knows their names. From these records follow Dagster's
definitions and Ray's tasks (`graph/`), what is missing or out of date (`road.py`), the forecast (`schedule.py`) and the costs (`costs.py`).

    asset       divides along an axis into partitions:  none, shard, bucket, experiment, slice, slice x shard
    partition   consists of artifacts, reads partitions of earlier assets, and is made by one function
    reads       whole, same, every, training, only, same_shard, same_slice, parent_bucket: which partitions of the asset before

Modules that compute are imported where a partition is made, not where the record is: a table of contents opens at once. What Dagster is,
and how a partition is computed, does not belong here.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, NamedTuple, Protocol, runtime_checkable

from interp_assets.planning.config import PipelineConfig
from interp_assets.planning.pipeline import Pipeline, shard_key
from interp_assets.planning.progress import Progress
from interp_assets.storage.lineage import Lineage
from interp_assets.storage.manifest import ArtifactRef, Produced
from interp_assets.storage.store import Store

Key = tuple[str, ...]
How = Literal["whole", "same", "every", "training", "only", "same_shard", "same_slice", "parent_bucket"]


@dataclass(frozen=True)
class Axis:
    """How an asset divides. `NONE`, `SHARDS` and `EXPERIMENTS` are everybody's; stages make others with `fixed` and `grid`."""

    name: str
    """What one partition is: `shard`, `bucket`, ..."""
    fixed: tuple[str, ...] = ()
    """The partition keys that the configuration tells; empty where the plan does."""
    planned: Callable[[Pipeline], list[str]] | None = None
    """The partition keys that the plan tells."""
    registered: str = ""
    """With `planned`: the name of the set that Dagster keeps of them."""
    dimensions: tuple["Axis", ...] = ()
    """Two axes whose keys are combined, as `first|second`."""

    def keys(self, pipeline: Pipeline) -> list[str]:
        """List all partitions in order; `[""]` without partitions."""
        if self.dimensions:
            first, second = (axis.keys(pipeline) for axis in self.dimensions)
            return [f"{a}|{b}" for a in first for b in second]
        return self.planned(pipeline) if self.planned else list(self.fixed)


NONE: Final = Axis("none", fixed=("",))
SHARDS: Final = Axis("shard", planned=lambda pipeline: [shard_key(index) for index in pipeline.shard_indices], registered="shards")
EXPERIMENTS: Final = Axis("experiment", planned=lambda pipeline: [sae.name for sae in pipeline.config.saes], registered="experiments")


def grid(first: Axis, second: Axis) -> Axis:
    """Combine two axes."""
    return Axis(f"{first.name}|{second.name}", dimensions=(first, second))


class Reads(NamedTuple):
    """An earlier asset that is read, and which of its partitions by which of the own. Made by the functions below."""

    key: Key
    how: How
    partitions: tuple[str, ...] = ()
    """`only`: the partitions that are read, whatever the own one is."""
    is_remembered: bool = False
    """Whether the own artifacts keep the digests of what was read, as the fact `made_from`."""
    may_be_gone: bool = False
    """Whether what was read may be deleted afterwards: then it says nothing of what was made."""
    is_needed: bool = True
    """Whether nothing can be made without it."""

    def if_there(self) -> "Reads":
        """Say that what is not there is left out, so that a failure there stops nothing here."""
        return self._replace(is_needed=False)

    def remember(self, *, may_be_gone: bool = False) -> "Reads":
        """Say that artifacts keep the digests of these inputs, of their own hook point where they have one."""
        return self._replace(is_remembered=True, may_be_gone=may_be_gone)


def whole(*key: str) -> Reads:
    """Read an asset without partitions."""
    return Reads(key, "whole")


def same(*key: str) -> Reads:
    """Read the partition with the own key."""
    return Reads(key, "same")


def every(*key: str) -> Reads:
    """Read all partitions."""
    return Reads(key, "every")


def training(*key: str) -> Reads:
    """Read all training shards; held-out ones only measure."""
    return Reads(key, "training")


def only(*key: str, partitions: Iterable[str]) -> Reads:
    """Read the named partitions, whatever the own one is."""
    return Reads(key, "only", partitions=tuple(partitions))


def same_shard(*key: str) -> Reads:
    """Read the same shard: from a grid that one shard, or from shards all slices of it."""
    return Reads(key, "same_shard")


def same_slice(*key: str) -> Reads:
    """Read the same latent slice of a grid, in all its shards."""
    return Reads(key, "same_slice")


def parent_bucket(*key: str) -> Reads:
    """Read the bucket that the own one is divided from: parent b has as many following children as there are times more of them."""
    return Reads(key, "parent_bucket")


class Load(NamedTuple):
    """What one partition is expected to take, before its price."""

    rows: float = 0.0
    """Rows that go through it; 0 where no row does."""
    read_bytes: float = 0.0
    written_bytes: float = 0.0
    n_inputs: float = 1.0
    """Objects that are opened."""
    n_outputs: float = 1.0
    busy_s: float = 0.0
    """Seconds of computing on `machine.ONE_WORKER`."""
    memory_bytes: float = 0.0
    """What the job holds, beside the process."""


class Needs(NamedTuple):
    """What a step's pod or job asks for, whatever the plan."""

    accelerator: bool = False
    """Whether a subject model or SAEs are held: on a GPU, unless the configuration says otherwise, one run at a time."""
    memory_bytes: int = 0
    """0: nothing in particular."""


class Markdown(str):
    """Text for people, pictures included."""

    __slots__ = ()


class Table(list[dict[str, Any]]):
    """Rows for people."""


Shown = int | float | str | Markdown | Table | Mapping[str, Any] | Sequence[Any]


@runtime_checkable
class World(Protocol):
    """Where the subject model and its tokenizer come from."""

    @property
    def config(self) -> PipelineConfig:
        """The pipeline's configuration."""
        ...

    def tokenizer(self) -> Any:
        """Load the subject model's tokenizer. Raises `InputError` when it is not the planned one."""
        ...

    def model(self) -> Any:
        """Load the subject model. Raises `InputError` when it is not the planned one."""
        ...


@dataclass(frozen=True)
class Job:
    """What a maker is handed: a run of partitions of one asset, and the world."""

    world: World
    pipeline: Pipeline
    store: Store
    keys: tuple[str, ...] = ("",)
    progress: Progress = field(default_factory=Progress)
    log: Callable[[str], Any] = str

    @property
    def config(self) -> PipelineConfig:
        """The pipeline's configuration."""
        return self.pipeline.config

    @property
    def hook_points(self) -> list[str]:
        """The hook points that are harvested."""
        return self.pipeline.config.harvest.hook_points


Make = Callable[[Job], Callable[[str], list[Produced]]]
"""Prepares a run (loads what all its partitions need) and returns what makes one partition."""


class Verdict(NamedTuple):
    """What a check found of one partition."""

    wrong: Sequence[str]
    """For each thing that is wrong a sentence: what, where, the number, its limit, the next step. Empty when the check has passed."""
    shown: Mapping[str, Shown]
    is_warning: bool = False
    """Whether a failure is worth knowing and no more."""

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.wrong


class Check(NamedTuple):
    """A question to partitions that were made. It divides as its asset does, and answers for each partition."""

    name: str
    description: str
    verdicts: Callable[[Pipeline, Store, Sequence[str]], Mapping[str, Verdict]]
    """Answers, by partition key, for the partitions of one run (`""` without partitions)."""
    blocks: bool = False
    """Whether a failure stops what stands behind."""


class Observed(NamedTuple):
    """The state of a partition of something that lies outside."""

    version: str
    facts: Mapping[str, int | float | str]


@dataclass(frozen=True, kw_only=True)
class Asset:
    """One asset: what it is, how it divides, what it reads, how it is made, what that takes, and how it is looked at."""

    key: Key
    """For example `("features", "demo", "feature_records")`."""
    group: str
    kinds: tuple[str, ...]
    """What it is made with and stored as, for filters in the UI."""
    description: str
    """What it is, its unit of work, and what to look at; two sentences at least."""
    axis: Axis = NONE
    unit: str = "rows"
    """What its progress counts, for people."""
    reads: tuple[Reads, ...] = ()
    artifacts: Callable[[Pipeline, Store, str], list[ArtifactRef]] = lambda _pipeline, _store, _key: []
    """The artifacts of one partition, one for each hook point where there are several."""
    lineage: Callable[[Pipeline, Store, str], list[Lineage]] | None = None
    """Whose digests the artifacts of one partition keep, where `reads` that are remembered cannot say it: those of an SAE's own hook points, or
    of artifacts that no asset lists. None: what is remembered."""
    make: Make | None = None
    """None for the plan, and for what lies outside."""
    plan: Callable[[PipelineConfig, Store, Callable[[str], None]], Pipeline] | None = None
    """Asks the world which documents, tokenizer and model there are; the last argument hears sentences for people. Only of the first asset."""
    observe: Callable[[Pipeline], Mapping[str, Observed]] | None = None
    """For what lies outside: the state of its partitions, as the plan has found it."""
    shows: Callable[[Job, str, list[Produced]], Mapping[str, Shown]] = lambda _job, _key, _made: {}
    """Numbers, tables and plots of a partition that was made, beside rows, bytes and seconds."""
    checks: tuple[Check, ...] = ()
    takes: Callable[[Pipeline, Store, str], Load] = lambda _pipeline, _store, _key: Load()
    work_kind: Callable[[PipelineConfig, str], str] | None = None
    """Names a partition's kind of work, for what is known of this machine; None: the asset's name."""
    needs: Needs = field(default_factory=Needs)
    obstacles: Callable[[Pipeline, Store], list[str]] = lambda _pipeline, _store: []
    """What is known to stop it before any work, a sentence each with the next step: rows count as soon as tokens are there, else at their bounds."""
    lightens: str = ""
    """How a person makes it take less memory, as a clause: what is lowered or raised in the configuration."""
    completes_plan: bool = False
    """Whether partitions of later assets are known only when it is made: it adds to the plan."""
    is_made_together: bool = False
    """Whether a run's partitions are one piece of work, done when it is prepared; others are made alone, on any machine."""
    may_part: bool = False
    """With `is_made_together`: whether its partitions may be made apart all the same, each on a machine of its own."""
    is_one_run: bool = False
    """Whether a backfill makes all partitions in one run; else so many as `execution.partitions_per_run`, side by side."""
    may_go: bool = False
    """Whether its artifacts may be deleted once what is made of them is there."""
    is_relied_on: bool = False
    """Whether it counts as out of date when new text has waited for long."""
    code_version: str = ""
    stage: str = ""
    """The stage's folder; the road fills it in."""

    @property
    def name(self) -> str:
        """The key as people write it: parts joined by `/`."""
        return "/".join(self.key)

    @property
    def is_external(self) -> bool:
        """Whether nothing of ours makes it."""
        return self.make is None and self.plan is None

    @property
    def can_spread(self) -> bool:
        """Whether a partition can be made on any machine; one without partitions is sent there beside siblings only."""
        return self.make is not None and (self.may_part or not self.is_made_together)

    def partition_keys(self, pipeline: Pipeline) -> list[str]:
        """List all partitions in order; `[""]` without partitions."""
        return self.axis.keys(pipeline)

    def kind_of_work(self, config: PipelineConfig, key: str) -> str:
        """Name a partition's kind of work."""
        return self.work_kind(config, key) if self.work_kind else self.key[-1]


def per_hook_point(address: Callable[[Pipeline, str], ArtifactRef]) -> Callable[[Pipeline, Store, str], list[ArtifactRef]]:
    """Return the artifacts of an asset that has one for each hook point."""
    return lambda pipeline, _store, _key: [address(pipeline, hook_point) for hook_point in pipeline.config.harvest.hook_points]


def name_facts(made: Sequence[Produced], names: Sequence[str], *facts: str) -> dict[str, Shown]:
    """Return facts of several artifacts under the name of what each is of: `mean_norm.resid_post.2`. Those that an artifact lacks are left out."""
    found = ((fact, name, item.manifest.facts.get(fact)) for name, item in zip(names, made, strict=True) for fact in facts)
    return {f"{fact}.{name}": value for fact, name, value in found if value is not None}
