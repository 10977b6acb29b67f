"""What every section of a configuration is, and small ones: heads, matches, stop, and files of one's own."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PrivateAttr, model_serializer, model_validator

from interp_assets.planning.identity import leave_out_later

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
