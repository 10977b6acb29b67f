"""What every section of a configuration is, and those sections that say which evidence is gathered: heads, steering; and files of one's own."""

from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr, model_serializer, model_validator

from interp_assets.planning.identity import leave_out_later
from interp_assets.planning.own import split_name

OVERKEEP: Final = 4
"""Strongest firings that are kept for each top example, with `features.distinct_tokens`."""


def _check_name(name: str) -> str:
    if not name or not all(char.isascii() and (char.isalnum() or char in "_-.") for char in name) or name.startswith((".", "-")):
        message = f"{name!r} is no name: letters, digits, '_', '-' and '.' only, and not '.' or '-' first"
        raise ValueError(message)
    return name


Name = Annotated[str, AfterValidator(_check_name)]


class Section(BaseModel):
    """Frozen and checked; new fields at their defaults are no part of an id."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    _folder: str = PrivateAttr("")

    @property
    def looked_in(self) -> str:
        """Where a relative path was looked for in vain, for messages; nothing for others."""
        return f" (looked in {' and '.join(dict.fromkeys([str(Path.cwd()), self._folder]))})" if self._folder else ""

    @model_serializer(mode="wrap")
    def _dump_identity(self, dump: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        return leave_out_later(self, dump(self))


class Code(Section):
    """A file of one's own: what it was when the configuration was read. Identity, but for `path`."""

    path: str = ""
    """Execution: where it lay."""
    digest: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    """SHA-256 of its bytes. Where it is stated, the file is not looked at: what is executed are the bytes with this hash that the pipeline keeps."""


class Metric(Section):
    """A function in a file of your own that measures SAEs. Identity of its measurements alone; its name may stand alone."""

    function: str
    """Such as `my.py:half_norm`, in a file beside the configuration: `(sae, blocks) -> dict` of numbers by name, which become columns `my.<name>`."""
    code: Code | None = None
    """Its file's hash, which is filled in when the configuration is read."""

    @model_validator(mode="before")
    @classmethod
    def _take_name(cls, content: Any) -> Any:
        return {"function": content} if isinstance(content, str) else content

    @model_validator(mode="after")
    def _check_function(self) -> "Metric":
        if not split_name(self.function):
            message = f"{self.function!r} names no function in a file, such as my.py:half_norm"
            raise ValueError(message)
        return self

    @property
    def prefix(self) -> str:
        """What the names of its columns begin with: its file's, without folder and suffix."""
        return PurePosixPath(self.function.partition(":")[0]).stem


class HeadsConfig(Section):
    """Which attention heads are shown, and what evidence is gathered; nothing is made of them without this section. All identity."""

    layers: Literal["all"] | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = "all"
    """Layers whose heads are shown, from 0; `all` that attend."""
    top_k: Annotated[int, Field(ge=1)] = 20
    """Strongest examples per head, one of a document."""
    n_intervals: Annotated[int, Field(ge=1, le=64)] = 10
    """Quantile intervals of the row score, from each of which examples are shown."""
    examples_per_interval: Annotated[int, Field(ge=1, le=16)] = 5
    """Examples shown from one interval."""
    key_tokens: Annotated[int, Field(ge=1, le=1 << 20)] = 2048
    """Tokens that masses are told apart by: the most frequent ones of the first shard; all others are counted together."""
    max_shards: Annotated[int, Field(ge=1)] = 1 << 20
    """Corpus shards whose text is read, the first ones: what heads do shows in a few, and a forward over all text is the price."""
    prompts: dict[Name, str] = {}
    """Texts by name, over each of which every head's whole pattern is kept."""

    @model_validator(mode="after")
    def _check_layers(self) -> "HeadsConfig":
        if self.layers != "all" and self.layers != sorted(set(self.layers)):
            message = f"layers is {self.layers}: name each layer once, in order"
            raise ValueError(message)
        return self

    @property
    def n_kept_top(self) -> int:
        """How many of a head's strongest rows each shard keeps to choose the top examples from: repeated texts are left out."""
        return self.top_k * OVERKEEP


class SearchConfig(Section):
    """How a sweep finds latents that change what is written, and some that do not: on every other prompt, to be dosed on the rest. All identity."""

    candidates: Annotated[int, Field(ge=2)] = 64
    """Live latents that are tried, evenly over how often they fire."""
    strength: float = 5.0
    """What each is set to, in units of `steering.unit`."""
    shown: Annotated[int, Field(ge=1)] = 3
    """Of those that move predictions most beyond their controls, and of those that move them least, so many are dosed."""


class MatchesConfig(Section):
    """Which SAEs' latents are looked for in each other; nothing is matched without this section. All identity."""

    saes: Annotated[list[Name], Field(min_length=2, max_length=16)]
    """Names of SAEs; every pair of them whose decoders are of one space is matched."""
    rows: Annotated[int, Field(ge=1)] = 65_536
    """Held-out rows, the first ones, over which firings are correlated."""


class StopConfig(Section):
    """When an SAE is given up because others do better. Execution: those that are trained to their end are what they would be without it."""

    at: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(min_length=1)] = (0.25, 0.5)
    """Shares of its steps at which an SAE is compared with those that read the same rows and take as many."""
    margin: Annotated[float, Field(ge=0)] = 0.05
    """It is given up where another one is as sparse or sparser, and its FVU by more than this share of it less."""


class SteeringConfig(Section):
    """Which latents are dosed, on which prompts; nothing is steered without this section. All identity."""

    recipes: dict[Name, list[dict[str, Any]]] = {}
    """By name: edits as in a recipe's file, of which one clamps a latent of an SAE of `features.saes`. Each is a partition."""
    search: SearchConfig | None = None
    """Latents that a sweep finds, of each SAE of `features.saes`; none without it."""
    prompts: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
    """Texts that are continued."""
    strengths: Annotated[list[float], Field(min_length=1)] = [-10.0, -2.0, 0.0, 1.0, 2.0, 5.0, 10.0]
    """What the clamped latent is set to, in units of `unit`."""
    unit: Literal["max", "raw", "norm"] = "max"
    """Of the strengths: the latent's largest activation, the units of activations, or the mean norm at its hook point."""
    new_tokens: Annotated[int, Field(ge=1)] = 32
    """Tokens that are added to a prompt."""
    n: Annotated[int, Field(ge=1)] = 1
    """Continuations of each prompt; more than one makes sense with a temperature."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 takes the most probable token."""

    @model_validator(mode="after")
    def _check_work(self) -> "SteeringConfig":
        if not self.recipes and not self.search:
            message = "there is nothing to steer by: write steering.recipes, or `search: {}` to find latents"
            raise ValueError(message)
        return self
