"""A pipeline's configuration: one small YAML file becomes frozen, checked models.

Fields are of two kinds. *Identity* fields decide bytes: they are hashed into artifact ids, so changing one makes new artifacts beside
the old ones. *Execution* fields decide only how the work is done (`ExecutionConfig`, and the few marked so): they never change an id.

A configuration never changes after it is made. Where a value may be `auto`, what was chosen is kept beside it, in the plan.
"""

import difflib
import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Final, Literal, TypeGuard, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, Field, ValidationError, WithJsonSchema, model_validator

from interp_assets.errors import ConfigError, OwnCodeError
from interp_assets.planning.grammar import expand, set_values
from interp_assets.planning.hook_names import canonical_name
from interp_assets.planning.identity import Name, Section
from interp_assets.planning.options import ARCHITECTURES, find_faults
from interp_assets.planning.own import MAX_BYTES, NAMED, check_metric, hash_code, read_declaration, split_name
from interp_assets.planning.probes import ProbesConfig, find_labels
from interp_assets.planning.sections import OVERKEEP, Code, CorpusConfig, HeadsConfig, MatchesConfig, Metric, Placed, StopConfig
from interp_assets.planning.steering import PatchingConfig, SteeringConfig
from interp_assets.storage.foreign import explain_yaml, parse_yaml
from interp_assets.storage.store import check_address

DEMO_MODEL = "builtin:pystdlib_gpt2"
"""The language model that ships with this package."""

ROOT_VARIABLE = "INTERP_ROOT"
"""Environment variable that moves any pipeline to another folder or bucket."""

_ALTERNATIVES: Final = ("literal['auto']", "constrained-int")
"""What pydantic puts behind the name of a field that is either of two: both of its errors are one wrong field."""

FORMER_SHAPE: Final = {"passes": 2, "fan_out": 8}
"""What was not stated of the shuffle's numbers before the plan could choose them."""

MAX_MIXED_SHARDS = 100_000
"""More partitions than this make Dagster's pages slow; a mixed shard may be as large as memory."""


def _check_architecture(name: str) -> str:
    if name not in ARCHITECTURES and not split_name(name):
        near = difflib.get_close_matches(name, ARCHITECTURES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        message = f"there is no architecture {name!r}{hint} (there are {', '.join(ARCHITECTURES)}, and your own: my_sae.py:function)"
        raise ValueError(message)
    return name


_NAMES: Final = {"anyOf": [{"enum": list(ARCHITECTURES)}, {"type": "string", "pattern": NAMED.pattern}]}
ArchitectureName = Annotated[str, AfterValidator(_check_architecture), WithJsonSchema(_NAMES)]
"""A built-in architecture, or a function in a file of one's own."""

HookPointName = Annotated[str, AfterValidator(canonical_name)]
"""A hook point in our words, whichever it was named in: an artifact's id does not depend on them."""


AnySection = TypeVar("AnySection", bound=Placed)


class ModelConfig(Placed):
    """The subject model. All identity."""

    name: str = DEMO_MODEL
    """Hugging Face id, local folder, or `builtin:pystdlib_gpt2`."""
    revision: str = "main"
    """Hugging Face revision; unused for local folders."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type that the model computes in."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Leave it off unless you have read that code."""

    @property
    def shown_name(self) -> str:
        """The name in what is published: of a folder its last part, because the rest describes somebody's machine."""
        return PurePosixPath(self.name).name if self.name.startswith(("/", "./", "../", "~")) else self.name


class HarvestConfig(Section):
    """Which activations are kept. All identity."""

    hook_points: Annotated[list[HookPointName], Field(min_length=1)] = ["resid_post.2"]
    """Names `<kind>.<layer>`: `resid_post.2`, `mlp_out.1`, `z.0`, `mlp_act.1` (docs/garcon.md has all); TransformerLens' names; `module:<path>`."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type of the stored rows."""
    excluded_positions: Annotated[int, Field(ge=0)] = 0
    """First positions of every context, a BOS included, whose rows are neither trained on, measured nor shown: attention sinks sit there."""
    excluded_token_ids: list[Annotated[int, Field(ge=0)]] = []
    """Tokens whose rows are left out likewise, such as separators that act as attention sinks."""


class ShuffleConfig(Section):
    """How the rows are mixed: all identity but the memory. What is `auto` is chosen once, when the rows are counted, and kept in the plan."""

    passes: Literal["auto"] | Annotated[int, Field(ge=1, le=6)] = "auto"
    """Reads and writes of the whole data; `passes` - 1 of them distribute over buckets, the last shuffles buckets in memory. `auto`: the fewest."""
    fan_out: Literal["auto"] | Annotated[int, Field(ge=1, le=65536)] = "auto"
    """Buckets per distribution pass; there are fan_out ** (passes - 1) mixed shards. `auto` with `passes`; 8 where `passes` is a number."""
    memory_bytes: Annotated[int, Field(ge=1 << 20)] = 1 << 30
    """Execution: rows that one job may hold in memory, in bytes."""

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, content: Any) -> Any:
        """Give the one of two numbers that is not stated the value that it always had beside a stated one."""
        if not isinstance(content, dict):
            return content
        given = {name for name in FORMER_SHAPE if content.get(name, "auto") != "auto"}
        return {**{name: value for name, value in FORMER_SHAPE.items() if given}, **content}

    @model_validator(mode="after")
    def _check_shape(self) -> "ShuffleConfig":
        if (self.passes == "auto") != (self.fan_out == "auto"):
            message = f"passes is {self.passes} and fan_out {self.fan_out}: state both numbers, or leave both `auto`"
            raise ValueError(message)
        return self

    @property
    def stated(self) -> tuple[int, int] | None:
        """Passes and fan-out where they are stated; None where the plan chooses them."""
        return None if self.passes == "auto" or self.fan_out == "auto" else (self.passes, self.fan_out)


class SaeConfig(Placed):
    """One sparse autoencoder of the sweep. Identity, but for `imported`."""

    name: Name = "demo"
    """Name of the experiment; it becomes a partition and a folder."""
    hook_point: HookPointName = "resid_post.2"
    """Where its rows come from; one of `harvest.hook_points`."""
    architecture: ArchitectureName = "batch_topk"
    """Sparsifying function and its recipe; one of your own is a function in a file beside the configuration, `my_sae.py:p_anneal`."""
    code: Code | None = None
    """Of an architecture of your own: its file's hash, which is filled in when the configuration is read. Stating it pins the bytes."""
    task: Literal["sae", "transcoder", "skip_transcoder", "crosscoder"] = "sae"
    """What is reconstructed: the rows themselves, those of `target_hook_point`, or those of several hook points by shared latents."""
    target_hook_point: HookPointName = ""
    """`transcoder` and `skip_transcoder`: where the rows come from that are reconstructed. Unused for others."""
    more_hook_points: tuple[HookPointName, ...] = ()
    """`crosscoder`: the hook points besides `hook_point`. Unused for others."""
    d_sae: Annotated[int, Field(ge=1)] = 2048
    """Number of latents."""
    k: Annotated[int, Field(ge=1)] = 32
    """Active latents per row, for the TopK family; the target L0 for `jump_relu`."""
    sparsity_coefficient: Annotated[float, Field(ge=0)] = 5.0
    """Weight of the sparsity loss, for `relu`, `gated` and the `jump_relu` family."""
    learning_rate: Annotated[float, Field(gt=0)] = 3e-4
    """Peak learning rate of Adam."""
    batch_rows: Annotated[int, Field(ge=1)] = 4096
    """Rows per global batch."""
    n_rows: Annotated[int, Field(ge=1)] = 1_000_000
    """Rows to train on; more than there are means several epochs."""
    dead_after_rows: Annotated[int, Field(ge=1)] = 200_000
    """A latent that has not fired for this many rows, over all ranks, is dead."""
    seed: int = 0
    """Seed of the initial weights; the order of the data depends on the pipeline's seed only."""
    product_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type that the operands of matrix products are rounded to; weights, thresholds and optimizer stay float32."""
    options: dict[str, float | tuple[float, ...]] = {}
    """Constants of the architecture's recipe that are to be others, such as `decay_share`, `betas`, `groups` (docs/howto.md lists them)."""
    imported: str = ""
    """Execution: folder or `s3://` address of an SAE that another tool trained; it is taken from there. `interp import` writes the whole entry."""
    imported_digest: str = ""
    """`imported`: the digest of its files; it, task and hook points are then the identity. Fields from `sparsity_coefficient` on are unused."""
    accepts_misfit: bool = False
    """`imported`, execution: it may reconstruct badly, or fire otherwise than its folder says; `--accept-misfit` of the import writes it."""

    @model_validator(mode="after")
    def _check_options(self) -> "SaeConfig":
        if self.architecture not in ARCHITECTURES:
            return self  # its options are in its file
        if faults := find_faults(self.architecture, self.options):
            raise ValueError("; ".join(faults))
        if self.code:
            message = f"code belongs to an architecture of one's own, and {self.architecture!r} is built in"
            raise ValueError(message)
        return self

    def identity(self) -> dict[str, Any]:
        """Return what decides the bytes of this SAE: its recipe, or of an imported one its digest, task and hook points."""
        return self._dump({"task", "hook_point", "target_hook_point", "imported_digest"})

    def described(self) -> dict[str, Any]:
        """Return what readers want to know of this SAE: its recipe, or of an imported one what has a meaning."""
        return self._dump({"name", "architecture", "task", "hook_point", "target_hook_point", "d_sae", "imported_digest"})

    def _dump(self, of_imported: set[str]) -> dict[str, Any]:
        if self.imported:
            return self.model_dump(include=of_imported)
        dumped = self.model_dump(exclude={"imported", "imported_digest", "accepts_misfit", "code"})
        return {**dumped, "code": {"digest": self.code.digest}} if self.code else dumped

    @property
    def is_own(self) -> bool:
        """Tell whether the architecture is a function of somebody's own."""
        return self.architecture not in ARCHITECTURES

    @property
    def is_transcoder(self) -> bool:
        """Tell whether other rows are reconstructed than those that are encoded."""
        return self.task in ("transcoder", "skip_transcoder")

    @property
    def sources(self) -> tuple[str, ...]:
        """The hook points whose rows, side by side, are encoded."""
        return (self.hook_point, *self.more_hook_points)

    @property
    def targets(self) -> tuple[str, ...]:
        """The hook points whose rows, side by side, are reconstructed."""
        return (self.target_hook_point,) if self.is_transcoder else self.sources


class FeaturesConfig(Section):
    """Which SAEs are shown, and what evidence is gathered. All identity."""

    saes: list[Name] = ["demo"]
    """Names of the SAEs to visualize."""
    latent_slices: Annotated[int, Field(ge=1)] = 2
    """Jobs that the latents of one SAE are divided over."""
    top_k: Annotated[int, Field(ge=1)] = 20
    """Strongest examples per latent."""
    n_random: Annotated[int, Field(ge=1)] = 200
    """Uniformly random activating tokens per latent."""
    window: Annotated[int, Field(ge=0, le=4096)] = 32
    """Tokens on each side of the example's peak, inside its document and context."""
    n_intervals: Annotated[int, Field(ge=1)] = 10
    """Quantile intervals of the activation, from each of which examples are shown."""
    examples_per_interval: Annotated[int, Field(ge=1)] = 5
    """Examples shown from one interval."""
    keep: Literal["all", "candidates"] = "all"
    """`all` stores every firing (3-5 bytes each); `candidates` only what examples need."""
    gather: bool = False
    """Also save the activations around the examples of each latent slice; refused where they are over twice the shard."""
    one_per_document: bool = True
    """Show at most one top example of a document."""
    distinct_tokens: Annotated[int, Field(ge=0, le=64)] = 8
    """Show top examples whose tokens agree this far on both sides of the peak once, chosen from 4 `top_k`; 0 shows them all."""
    encode_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type that rows and encoder columns are rounded to before they are multiplied; sums and activations are float32."""

    @property
    def n_kept_top(self) -> int:
        """How many of a latent's strongest firings are kept to choose the top examples from: more when repeated texts are left out."""
        return self.top_k * (OVERKEEP if self.distinct_tokens else 1)


class RetrainConfig(Section):
    """When new text retrains the SAEs, and when the result takes the place of what was there. Never part of an id."""

    after_tokens: Annotated[int, Field(ge=0)] = 0
    """Valid tokens, harvested since the last training, that start a retraining by the sensor. 0: never; new text is then shuffled with the old."""
    max_fvu_increase: float = 0.01
    """A retrained SAE whose FVU on the held-out shards is higher by more than this is kept back; below 0, it has to be better by as much."""
    max_ce_recovered_decrease: float = 0.01
    """A retrained SAE whose recovered share of the model's loss is lower by more than this is kept back; below 0 as above."""
    stale_after_days: Annotated[int, Field(ge=1)] = 30
    """Days after which the plan, an SAE or a browser counts as out of date in Dagster's UI; it warns at half. Only with `after_tokens`."""


class ExecutionConfig(Section):
    """How the work is done; never part of an id."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where models and SAEs compute; `auto` takes CUDA, then MPS, then the CPU."""
    device_map: Literal["auto"] | None = None
    """`auto` spreads a subject model that is larger than one device over all, then memory, then the disk (pip install 'interp-assets[big]')."""
    tokens_per_batch: Annotated[int, Field(ge=1)] = 8192
    """Token positions per forward of the subject model, at most; lower it where memory is short. Above 8,192 nothing is gained."""
    rows_per_block: Annotated[int, Field(ge=64)] = 4096
    """Rows that the feature passes encode at once."""
    processes: Annotated[int, Field(ge=1)] = 1
    """Training processes started by torchrun; 1 trains in the asset's own process."""
    latent_processes: Annotated[int, Field(ge=1)] = 1
    """How many of `processes` the latents of an SAE are divided over (latent parallel); the rest share the rows (data parallel)."""
    checkpoint_steps: Annotated[int, Field(ge=1)] = 500
    """Steps between two checkpoints of a training, at most two of which are kept."""
    profile_steps: Annotated[int, Field(ge=0, le=1000)] = 5
    """Training steps that are profiled, after ten steps of warm-up; costs about a second, which no rate counts. 0 profiles none."""
    read_again: bool = False
    """Plan from all text and weights, not from notes of files that have not changed since they were read (`interp run --read-again`)."""
    plan: Name = "plan.json"
    """File of the plan in the pipeline's folder; a retraining works under a plan of its own until it is promoted. Leave it."""
    usd_per_hour: Annotated[float, Field(ge=0)] = 0.0
    """What an hour of the machine costs, for the cost that each partition shows. 0 shows none."""
    workers: Annotated[int, Field(ge=1)] | Literal["auto"] = 1
    """Partitions that `interp run` makes side by side; more than 1 starts Ray on this machine. `auto`: one a GPU, without one a core."""
    partitions_per_run: Annotated[int, Field(ge=1)] = 64
    """Partitions that one run of a backfill makes: shards, buckets or slices. Fewer spread over more machines; each run costs seconds to start."""


class PipelineConfig(Section):
    """A whole pipeline, from text to features."""

    name: Name = "pystdlib"
    """Folder of the pipeline inside `root`."""
    root: str = "data"
    """Execution: a folder or `s3://bucket/prefix`. The environment variable `INTERP_ROOT` overrides it: one file serves laptop and cluster."""
    seed: int = 0
    """Root of every random stream."""
    corpus: CorpusConfig = CorpusConfig()
    model: ModelConfig = ModelConfig()
    harvest: HarvestConfig = HarvestConfig()
    shuffle: ShuffleConfig = ShuffleConfig()
    saes: Annotated[list[SaeConfig], Field(min_length=1)] = [SaeConfig()]
    features: FeaturesConfig = FeaturesConfig()
    heads: HeadsConfig | None = None
    """Statistics and examples of every attention head; nothing of them is made without this section."""
    metrics: list[Metric] = []
    """Functions in files of your own that measure every SAE, `my.py:half_norm`; they retrain nothing."""
    probes: ProbesConfig | None = None
    """What few latents of every SAE tell of labels of rows; nothing is probed without this section."""
    steering: SteeringConfig | None = None
    """Dose curves of latents beside controls; nothing is steered without this section."""
    patching: list[PatchingConfig] = []
    """Sets of prompts over which activations are patched, each a partition."""
    retrain: RetrainConfig = RetrainConfig()
    matches: MatchesConfig | None = None
    """The same features in other SAEs; nothing is matched without this section."""
    stop: StopConfig | None = None
    """Trainings that others dominate end early, as a record and a checkpoint; none does without this section."""
    track: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = []
    """Execution: tools that get the curves of trainings too; nothing goes to a network unless their own variables say so."""
    execution: ExecutionConfig = ExecutionConfig()

    @model_validator(mode="after")
    def _check_references(self) -> "PipelineConfig":
        names = [sae.name for sae in self.saes]
        for what, given in (("SAEs", names), ("sets of prompts in `patching`", [asked.name for asked in self.patching])):
            if len(set(given)) != len(given):
                message = f"two {what} have one name: {sorted(given)}"
                raise ValueError(message)
        explained = self.heads.explained.values() if self.heads else ()
        shown = [("features.saes", name) for name in self.features.saes]
        shown += [("matches.saes", name) for name in (self.matches.saes if self.matches else ())]
        for section, name in [*shown, *(("heads.prompts", name) for prompt in explained for name, _ in prompt.wanted)]:
            if name not in names:
                message = f"{section} names {name!r}, but the SAEs are {names}"
                raise ValueError(message)
        if len(set(self.harvest.hook_points)) != len(self.harvest.hook_points):
            message = f"harvest.hook_points names one twice: {self.harvest.hook_points}"
            raise ValueError(message)
        passes, fan_out = self.shuffle.stated or (1, 1)
        if fan_out ** (passes - 1) > MAX_MIXED_SHARDS:
            message = f"fan_out ** (passes - 1) is {fan_out ** (passes - 1):,} mixed shards, at most {MAX_MIXED_SHARDS:,}"
            raise ValueError(message)
        if self.corpus.is_planted:
            _check_planted(self)
        if self.probes:
            self.probes.check_source(self.corpus.source)
        for sae in self.saes:
            _check_task(sae, self.harvest.hook_points)
            if sae.task == "crosscoder" and sae.name in self.features.saes:
                message = f"features.saes names the crosscoder {sae.name!r}: feature passes read one hook point. Take it out of the list"
                raise ValueError(message)
            if sae.name in self.features.saes and self.features.latent_slices > sae.d_sae:
                message = f"features.latent_slices is {self.features.latent_slices:,}, but SAE {sae.name!r} has only {sae.d_sae:,} latents"
                raise ValueError(message)
            if sae.k > sae.d_sae:
                message = f"SAE {sae.name!r} wants k = {sae.k} active latents of d_sae = {sae.d_sae}"
                raise ValueError(message)
        return self

    @cached_property
    def _places(self) -> dict[str, int]:
        """Where in `saes` each was found when it was last asked for, by name."""
        return {}

    def sae(self, name: str) -> SaeConfig:
        """Return the SAE called `name`. Raises `ConfigError` with the names there are."""
        for attempt in range(2):
            place = self._places.get(name, len(self.saes))
            if place < len(self.saes) and self.saes[place].name == name:
                return self.saes[place]
            if not attempt:  # not asked before, or a copy with other SAEs
                self._places.update({sae.name: place for place, sae in enumerate(self.saes)})
        raise ConfigError(f"No SAE is called {name!r}; the configuration has {[sae.name for sae in self.saes]}.")


def _check_planted(config: PipelineConfig) -> None:
    """Raise `ValueError` for what needs text or a model, where rows are planted."""
    wanted = {"features.saes": config.features.saes, "heads": config.heads, "steering": config.steering, "patching": config.patching}
    if found := [name for name, value in wanted.items() if value]:
        message = f"planted rows have no text and no model, which {', '.join(found)} needs: leave it out, and write `features: {{saes: []}}`"
        raise ValueError(message)
    if len(config.harvest.hook_points) != 1:
        message = f"planted rows are those of one hook point, and harvest.hook_points are {config.harvest.hook_points}"
        raise ValueError(message)


def _check_task(sae: SaeConfig, hook_points: list[str]) -> None:
    """Raise `ValueError` when an SAE reads what is not harvested, or what its task does not read."""
    for name in dict.fromkeys((*sae.sources, *sae.targets)):
        if name not in hook_points:
            message = f"SAE {sae.name!r} reads {name!r}, but harvest.hook_points are {hook_points}"
            raise ValueError(message)
    if bool(sae.target_hook_point) != sae.is_transcoder or bool(sae.more_hook_points) != (sae.task == "crosscoder"):
        message = (
            f"SAE {sae.name!r} is of task {sae.task!r} with target_hook_point {sae.target_hook_point!r} and more_hook_points "
            f"{list(sae.more_hook_points)}: transcoders have a target, crosscoders have more hook points, others neither"
        )
        raise ValueError(message)
    if bool(sae.imported) != bool(sae.imported_digest) or (sae.imported and sae.task == "crosscoder"):
        message = (
            f"SAE {sae.name!r} has imported {sae.imported!r}, imported_digest {sae.imported_digest!r} and task {sae.task!r}: an imported SAE "
            "has both fields and is no crosscoder. `interp import` writes the entry"
        )
        raise ValueError(message)
    if len(set(sae.sources)) != len(sae.sources):
        message = f"crosscoder {sae.name!r} names a hook point twice: {list(sae.sources)}"
        raise ValueError(message)


def load_config(path: str | Path, *, overrides: dict[str, Any] | None = None, settings: Sequence[str] = ()) -> PipelineConfig:
    """Read a YAML configuration; `overrides` replace top-level keys, `INTERP_ROOT` replaces `root` if it is set, `settings` are `path=value`.

    Text, model and imported SAEs of relative paths are looked for in the working directory, then beside the file. `root` is relative to the former.
    Files of code are looked for beside the file alone.

    Raises `ConfigError` that names the file, the field, the value and what is allowed.
    """
    where = Path(path)
    try:
        text = where.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"Cannot read the configuration {where}: {reason}. `interp init` writes one to start from.") from error
    try:
        content = parse_yaml(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not YAML: {explain_yaml(error)}. Mend it; `interp init` writes a file to compare with.") from error
    except ValueError as error:
        raise ConfigError(f"{where} is no configuration: {error}. Write out what is meant; `interp init` writes a file to compare with.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{where} must hold keys and values (name, corpus, model, ...), not a {type(content).__name__}.")
    moved = {"root": os.environ[ROOT_VARIABLE]} if os.environ.get(ROOT_VARIABLE) else {}
    changed = set_values({**content, **moved, **(overrides or {})}, settings)
    folder = where.resolve().parent
    return find_code(_find_beside(make_config(changed, where=str(where)), folder), folder)


def find_code(config: PipelineConfig, folder: Path) -> PipelineConfig:
    """Fill in what the files of one's own are that a configuration names; relative paths lie in `folder`. Nothing is executed.

    Raises `ConfigError` for a file that is not there, a function that it does not have, and options that this has not. What else is wrong with a
    file, its SAE's training says: others go on.
    """
    sources: dict[Path, bytes] = {}
    saes = [_find_architecture(sae, folder, sources) if sae.is_own and not sae.imported else sae for sae in config.saes]
    metrics = [_find_metric(metric, folder, sources) for metric in config.metrics]
    probes = config.probes and find_labels(config.probes, folder)
    is_same = (saes, metrics, probes) == (config.saes, config.metrics, config.probes)
    return config if is_same else config.model_copy(update={"saes": saes, "metrics": metrics, "probes": probes})


def _find_architecture(sae: SaeConfig, folder: Path, sources: dict[Path, bytes]) -> SaeConfig:
    place, function = _locate(sae.architecture, folder)
    short = {"architecture": f"{place.name}:{function}"}  # where the file lies decides nothing
    if sae.code:
        return sae.model_copy(update=short)
    source = _read_source(place, folder, sources, f"SAE {sae.name!r} has the architecture {sae.architecture}")
    try:
        declared = read_declaration(source, place.name, function)
        if faults := find_faults(declared.kind, sae.options, declared.options, short["architecture"]):
            raise ConfigError(f"SAE {sae.name!r}: {'; '.join(faults)}.")
    except OwnCodeError:
        pass  # told where it is trained
    return sae.model_copy(update={**short, "code": Code(path=str(place), digest=hash_code(source))})


def _find_metric(metric: Metric, folder: Path, sources: dict[Path, bytes]) -> Metric:
    place, function = _locate(metric.function, folder)
    short = {"function": f"{place.name}:{function}"}
    if metric.code:
        return metric.model_copy(update=short)
    source = _read_source(place, folder, sources, f"metrics names {metric.function}")
    with suppress(OwnCodeError):  # told where it measures
        check_metric(source, place.name, function)
    return metric.model_copy(update={**short, "code": Code(path=str(place), digest=hash_code(source))})


def _locate(name: str, folder: Path) -> tuple[Path, str]:
    named = split_name(name)
    assert named is not None
    return folder / Path(named[0]).expanduser(), named[1]


def _read_source(place: Path, folder: Path, sources: dict[Path, bytes], who: str) -> bytes:
    """Read a file of code, each once."""
    try:
        if place not in sources:
            with place.open("rb") as file:
                sources[place] = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{who}, and {place} cannot be read ({error.strerror}). Its path is relative to {folder}.") from error
    if len(sources[place]) > MAX_BYTES:
        raise ConfigError(f"{who}, and {place} has more than {MAX_BYTES:,} bytes: it is another file.")
    return sources[place]


def _find_beside(config: PipelineConfig, folder: Path) -> PipelineConfig:
    """Point relative paths to what lies in `folder`, where it does not lie in the working directory."""
    saes = [_point(sae, "imported", folder) if sae.imported and "://" not in sae.imported else sae for sae in config.saes]
    corpus = _point(config.corpus, "path", folder) if config.corpus.source != "stdlib" and config.corpus.path else config.corpus
    model = config.model if config.model.name.startswith("builtin:") else _point(config.model, "name", folder)
    return config.model_copy(update={"corpus": corpus, "model": model, "saes": saes})


def _point(section: AnySection, field: str, folder: Path) -> AnySection:
    given = Path(getattr(section, field))
    if given.is_absolute() or str(given).startswith("~") or given.exists():
        return section
    if (folder / given).exists():
        return section.model_copy(update={field: str((folder / given).resolve())})
    lost = section.model_copy()
    lost._folder = str(folder)  # noqa: SLF001 - no field: it is no part of what was configured
    return lost


def make_config(content: dict[str, Any], where: str = "the configuration") -> PipelineConfig:
    """Check a configuration given as plain data. Raises `ConfigError`, one line per wrong field."""
    _check_addresses(content, where)
    if isinstance(content.get("saes"), list):
        defaults = {name: field.default for name, field in SaeConfig.model_fields.items()}
        content = {**content, "saes": expand(content["saes"], defaults)}
    try:
        return PipelineConfig.model_validate(content)
    except ValidationError as error:
        found: dict[tuple[int | str, ...], dict[str, Any]] = {}
        for item in error.errors():
            where_it_is = tuple(part for part in item["loc"] if str(part) not in _ALTERNATIVES)
            before = found.get(where_it_is)
            found[where_it_is] = {
                **item,
                "loc": where_it_is,
                "msg": f"{before['msg']} or {item['msg'].removeprefix('Input should be ')}" if before else item["msg"],
            }
        alike: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for item in found.values():
            alike.setdefault((*(part for part in item["loc"] if isinstance(part, str)), item["msg"], repr(item["input"])), []).append(item)
        lines = [_explain(items[0]) + (f", and {len(items) - 1:,} more of the list" if len(items) > 1 else "") for items in alike.values()]
        raise ConfigError(f"{where} has {len(lines)} wrong {'field' if len(lines) == 1 else 'fields'}:\n" + "\n".join(lines)) from error


def _check_addresses(content: Any, where: str) -> None:
    """Refuse keys in addresses, wherever they stand, before anything repeats them: Dagster records the configuration with each run."""
    if isinstance(content, str):
        check_address(content, where)
    for value in content.values() if isinstance(content, dict) else content if isinstance(content, list) else ():
        _check_addresses(value, where)


def _explain(item: dict[str, Any]) -> str:
    """Say of one error of pydantic which field is wrong, what it holds and what is allowed."""
    path = [part for part in item["loc"] if isinstance(part, str)]
    where = ".".join(str(part) for part in item["loc"]) or "pipeline"
    if item["type"] == "extra_forbidden":
        model = _model_at(path[:-1])
        near = difflib.get_close_matches(str(item["loc"][-1]), model.model_fields, n=1) if model else []
        return f"  {where}: there is no such field{f'; did you mean {near[0]!r}?' if near else ''} (got {item['input']!r:.80})"
    message = str(item["msg"]).removeprefix("Value error, ")
    if path[:1] == ["saes"] and isinstance(item["input"], list) and item["type"].endswith(("_type", "_parsing")):
        message += f"; to try all of them: each: {{{'.'.join(path[1:])}: {item['input']!r:.60}}}"
    return f"  {where}: {message}" + ("" if isinstance(item["input"], dict) else f" (got {item['input']!r:.80})")


def _model_at(path: list[str]) -> type[BaseModel] | None:
    """Return the section of a configuration that a path of names leads to; None where it leads to none."""
    sections = {
        name: next(filter(_is_section, (field.annotation, *get_args(field.annotation))), None) for name, field in PipelineConfig.model_fields.items()
    }
    return (PipelineConfig if not path else sections.get(path[0])) if len(path) < 2 else None


def _is_section(kind: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def code_version(version: int, **identity: object) -> str:
    """Return an asset's code version: its own number, and a hash of what decides its bytes of the configuration, by any names."""
    text = json.dumps(identity, sort_keys=True, default=BaseModel.model_dump)
    return f"{version}-{hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}" if identity else str(version)
