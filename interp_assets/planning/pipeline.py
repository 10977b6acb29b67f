"""A pipeline is a configuration plus what the world answered when it was planned; from it every artifact id follows.

The **plan** is the mutable file of the tree, `<root>/<pipeline>/plan.json`: which documents make which shard (with their fingerprints),
the tokenizer's and the subject model's fingerprints, and the width of every hook point. It is written by `corpus_plan` and only ever
replaced as a whole; beside it lies the configuration it was made from, `pipeline.json`, for who opens the folder. Given the plan, the id
and path of each artifact is a pure function (`refs.py` of each stage), so a job on any machine finds its inputs without a registry, and
finished work is recognised by its path.

Changing a text file changes one shard's fingerprint: that shard and what depends on it get new ids; the rest is reused.
"""

import json
from collections.abc import Callable, Hashable
from dataclasses import asdict, dataclass, field
from typing import Any, Final, NamedTuple, TypeVar

from interp_assets.errors import ArtifactCorruptError, ArtifactForeignError, ArtifactMissingError, ConfigError, StoreMissingError
from interp_assets.planning.config import PipelineConfig, make_config
from interp_assets.planning.hook_names import alias_of
from interp_assets.storage.foreign import parse_json
from interp_assets.storage.manifest import CONFIGURATION, PLAN
from interp_assets.storage.store import Store, open_store

_FORMAT: Final = "interp-assets/plan"
_OPTIONAL: Final = {"shuffle": 2, "hook_aliases": 3}
"""Keys that are written only where they say something, and from which version on. Raise it with every key that is added: readers refuse keys that
they do not know."""
_VERSIONS: Final = (1, *_OPTIONAL.values())
"""Versions that are read; the lowest that has all of a plan's keys is written."""
_DROPPED: Final = ("n_empty_files", "empty_files")
"""Keys that some plans of version 1 have and nobody needs."""
SHARD_SHIFT: Final = 40
"""`row_id = shard_index << SHARD_SHIFT | row_in_shard`: the address of a row, wherever it is stored."""
T = TypeVar("T")


class ChosenShuffle(NamedTuple):
    """What `shuffle.passes: auto` became."""

    passes: int
    fan_out: int
    token_shards: str
    """Combined ids of the token shards whose rows were counted: for others it is chosen anew."""


@dataclass(frozen=True, kw_only=True)
class ShardSource:
    """The documents of one shard, before they are read."""

    index: int
    fingerprint: str
    """Hash of the documents' content (local sources) or of their address (dataset, revision, range)."""
    n_documents: int
    n_bytes: int
    """UTF-8 bytes of text; of a dataset on the hub estimated, 0 when nothing can be told without reading it."""
    spec: dict[str, Any]
    """Where the documents are, in the source's own terms."""

    @property
    def key(self) -> str:
        """Partition key and file-name label."""
        return shard_key(self.index)


@dataclass(frozen=True, kw_only=True)
class PipelinePlan:
    """What the world answered: documents, tokenizer and model."""

    shards: list[ShardSource]
    tokenizer_fingerprint: str
    model_fingerprint: str
    hook_widths: dict[str, int]
    """`d_in` of every configured hook point."""
    vocabulary_size: int
    max_context: int
    generations: list[int] = field(default_factory=list)
    """For each generation of training shards, the first shard index after it (`shuffle/generations.py`); empty: all shards are one."""
    shuffle: ChosenShuffle | None = None
    """The shuffle's numbers where the configuration leaves them to the plan, once the rows are counted."""
    hook_aliases: dict[str, str] = field(default_factory=dict)
    """TransformerLens' names of the hook points that have another one in this model than in most: queries and keys without RoPE."""


@dataclass(frozen=True)
class Pipeline:
    """A configuration and its plan: all that a stage needs to know besides its store."""

    config: PipelineConfig
    plan: PipelinePlan
    empty_files: list[str] = field(default_factory=list, compare=False)
    """Files that were skipped because they hold no text: known to the process that planned, and no part of the plan."""
    listing: str = field(default="", compare=False)
    """Fingerprint of names, sizes and times of the text's files before they were read: known and no part of the plan, as above."""
    _answers: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def remember(self, question: Hashable, answer: Callable[[], T]) -> T:
        """Return `answer()`, computed once for each `question`: ids over all shards are asked for by every job."""
        if question not in self._answers:
            self._answers[question] = answer()
        return self._answers[question]

    @property
    def facts(self) -> dict[str, Any]:
        """The plan without its shards: these have fingerprints of their own."""
        facts = asdict(self.plan)
        del facts["shards"], facts["generations"], facts["shuffle"]
        if not self.plan.hook_aliases:
            del facts["hook_aliases"]
        return facts

    @property
    def shard_indices(self) -> list[int]:
        """Indices of all shards."""
        return self.remember("shards", lambda: [shard.index for shard in self.plan.shards])

    @property
    def train_indices(self) -> list[int]:
        """Indices of the shards that are shuffled and trained on."""

        def find() -> list[int]:
            pending = set(self.pending_indices)
            return [index for index in self.shard_indices if index >= self.config.corpus.held_out_shards and index not in pending]

        return self.remember("trained", find)

    def trains_on(self, index: int) -> bool:
        """Say whether a shard is shuffled and trained on: asked for every shard, so it looks in no list."""
        return index in self.remember("set of trained", lambda: frozenset(self.train_indices))

    @property
    def first_indices(self) -> list[int]:
        """Indices of the training shards that are shuffled first; later generations are merged into them."""
        stop = self.plan.generations[:1]
        return [index for index in self.train_indices if not stop or index < stop[0]]

    @property
    def pending_indices(self) -> list[int]:
        """Indices of the shards that wait for the next retraining."""
        generations = self.plan.generations
        return [index for index in self.shard_indices if index >= generations[-1]] if generations else []

    @property
    def held_out_indices(self) -> list[int]:
        """Indices of the shards that only measure."""
        return [index for index in self.shard_indices if index < self.config.corpus.held_out_shards]

    def source(self, index: int) -> ShardSource:
        """Return the documents of shard `index`. Raises `ConfigError` when the plan has no such shard."""
        shard = self.remember("sources", lambda: {shard.index: shard for shard in self.plan.shards}).get(index)
        if shard is not None:
            return shard
        raise ConfigError(
            f"There is no shard {index} in the plan of pipeline {self.config.name!r}: it has {len(self.plan.shards)}. Plan again with `interp run`."
        )

    def d_in(self, hook_point: str) -> int:
        """Return the width of a hook point. Raises `ConfigError` when it was not planned."""
        try:
            return self.plan.hook_widths[hook_point]
        except KeyError:
            raise ConfigError(
                f"Hook point {hook_point!r} is not in the plan ({sorted(self.plan.hook_widths)}). Plan again with `interp run`."
            ) from None

    def alias(self, hook_point: str) -> str:
        """Return the name that TransformerLens, and so SAELens, has for a hook point of this model; our own where it has none."""
        return self.plan.hook_aliases.get(hook_point) or alias_of(hook_point) or hook_point


def shard_key(index: int) -> str:
    """Return the partition key of a corpus shard, for example `shard-000017`."""
    return f"shard-{index:06d}"


def shard_index(key: str) -> int:
    """Return the shard's index of a partition key. Raises `ConfigError` for anything else."""
    prefix, _, digits = key.partition("-")
    if prefix != "shard" or not digits.isdigit():
        raise ConfigError(f"{key!r} is no shard key; they look like {shard_key(17)!r}.")
    return int(digits)


def open_pipeline_store(config: PipelineConfig) -> Store:
    """Open the folder of a pipeline: `<root>/<name>`."""
    return open_store(config.root).child(config.name)


def save_plan(store: Store, plan: PipelinePlan, name: str = PLAN) -> bool:
    """Replace the pipeline's plan; answer False when it was the same already."""
    content = {**asdict(plan), "shuffle": plan.shuffle._asdict() if plan.shuffle else None}
    content = {name: value for name, value in content.items() if value or name not in _OPTIONAL}
    version = max([1, *(since for name, since in _OPTIONAL.items() if name in content)])
    data = (json.dumps({"format": _FORMAT, "version": version, **content}, sort_keys=True, indent=1) + "\n").encode()
    try:
        if store.get(name) == data:
            return False
    except StoreMissingError:
        pass
    return store.put(name, data)


def save_configuration(store: Store, config: PipelineConfig) -> None:
    """Keep beside the plan what it was made from, so that the folder can be opened without the file that somebody wrote.

    Plans of other names are candidates, which the folder's reader does not want.
    """
    if config.execution.plan != PLAN:
        return
    data = (json.dumps(config.model_dump(mode="json"), sort_keys=True, indent=1) + "\n").encode()
    try:
        if store.get(CONFIGURATION) == data:
            return
    except StoreMissingError:
        pass
    store.put(CONFIGURATION, data)


def load_configuration(store: Store) -> PipelineConfig:
    """Read the configuration of the latest planning. Raises `ArtifactMissingError` in a folder that is no pipeline's, or an earlier release's."""
    try:
        return make_config(parse_json(store.get(CONFIGURATION)))
    except StoreMissingError as error:
        raise ArtifactMissingError(
            f"There is no {CONFIGURATION} at {store.url}: it is no pipeline's folder, or was planned by an earlier release. Name the pipeline's "
            "YAML, or plan again with `interp run`."
        ) from error
    except (ValueError, TypeError) as error:
        raise ArtifactCorruptError(f"{store.url}/{CONFIGURATION} is damaged ({error}). Name the pipeline's YAML instead.") from error


def load_pipeline(config: PipelineConfig, store: Store) -> Pipeline:
    """Read the plan of a pipeline.

    Raises `ArtifactMissingError` before the first planning, `ArtifactForeignError` for another release's plan, `ArtifactCorruptError` for a
    damaged one.
    """
    name = config.execution.plan
    try:
        content = parse_json(store.get(name))
        found = (content.pop("format"), content.pop("version"))
        if found[0] != _FORMAT or found[1] not in _VERSIONS:
            raise ArtifactForeignError(
                f"The plan {store.url}/{name} is {found}, this release reads {_FORMAT!r} of versions {_VERSIONS}. Use the release that wrote "
                "it on every machine, or materialize `corpus_plan` again with this one."
            )
        for key in _DROPPED:
            content.pop(key, None)
        shards = [ShardSource(**shard) for shard in content.pop("shards")]
        chosen = content.pop("shuffle", None)
        plan = PipelinePlan(shards=shards, shuffle=ChosenShuffle(**chosen) if chosen else None, **content)
    except StoreMissingError as error:
        raise ArtifactMissingError(
            f"Pipeline {config.name!r} has no plan at {store.url}/{name}. Materialize `corpus_plan` (or `interp run`) first."
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ArtifactCorruptError(f"The plan {store.url}/{name} is damaged ({error}). Materialize `corpus_plan` again.") from error
    return Pipeline(config, plan)
