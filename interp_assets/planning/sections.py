"""Sections of a configuration: those with paths, and those of the corpus, of attention heads, and of files of one's own."""

from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Final, Literal

from pydantic import Field, PrivateAttr, model_validator

from interp_assets.planning.identity import Name, Section
from interp_assets.planning.own import split_name

OVERKEEP: Final = 4
"""Strongest firings that are kept for each top example, with `features.distinct_tokens`."""


class Placed(Section):
    """A section that names a path, which may lie beside the configuration's file."""

    _folder: str = PrivateAttr("")

    @property
    def looked_in(self) -> str:
        """Where a relative path was looked for in vain, for messages; nothing for others."""
        return f" (looked in {' and '.join(dict.fromkeys([str(Path.cwd()), self._folder]))})" if self._folder else ""


class FrequencyConfig(Section):
    """How often planted features fire: from the most frequent one to the least by a power of their rank. Identity."""

    zipf: Annotated[float, Field(ge=0)] = 0.5
    """Exponent of the rank; 0: all alike."""
    most: Annotated[float, Field(gt=0, lt=1)] = 0.4
    """Probability of the most frequent one."""
    least: Annotated[float, Field(gt=0, lt=1)] = 5e-4
    """Probability of the least frequent one."""

    @model_validator(mode="after")
    def _check_order(self) -> "FrequencyConfig":
        if self.zipf and self.least > self.most:
            message = f"the least frequent feature fires with {self.least:g}, and the most frequent with {self.most:g}: lower frequency.least"
            raise ValueError(message)
        return self


class HierarchyConfig(Section):
    """Trees of planted features: the first ones are roots, their children follow, level by level; what is left stands alone. Identity."""

    roots: Annotated[int, Field(ge=1)] = 16
    """Number of trees."""
    branching: Annotated[int, Field(ge=1)] = 4
    """Children of each feature that has any."""
    depth: Annotated[int, Field(ge=1)] = 2
    """Levels below the roots."""
    probability: Annotated[float, Field(gt=0, le=1)] = 0.2
    """That a child fires where its parent does; it never does elsewhere."""
    exclusive: bool = True
    """Of the children of one parent at most one fires."""

    @property
    def n_features(self) -> int:
        """Features of all trees."""
        return self.roots * sum(self.branching**level for level in range(self.depth + 1))


class CorrelationConfig(Section):
    """A Gaussian copula of low rank over planted features. Identity."""

    rank: Annotated[int, Field(ge=1)] = 25
    """Number of common causes."""
    scale: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """How much of what makes a feature fire is due to each of them: the root of the sum of squares stays below 1."""

    @model_validator(mode="after")
    def _check_scale(self) -> "CorrelationConfig":
        if self.scale**2 * self.rank >= 1:
            message = f"scale² x rank is {self.scale**2 * self.rank:.2f}, and has to be below 1: lower one of them"
            raise ValueError(message)
        return self


_FIELDS_OF: Final = {
    ("files", "huggingface"): "path text_field",
    ("huggingface",): "subset split revision documents_per_shard",
    ("stdlib", "files", "huggingface"): "text_kind contexts",
    ("stdlib", "files"): "shard_bytes",
    ("planted",): "features width n_rows rows_per_shard frequency hierarchy correlation noise",
}
"""Fields of a corpus that only some sources read, by these sources."""

TextKind = Literal["plain", "with_special_tokens", "messages"]


class CorpusConfig(Placed):
    """Which text, and how it becomes token shards. All identity."""

    source: Literal["stdlib", "files", "huggingface", "planted"] = "stdlib"
    """`stdlib`: Python's own sources; `files`: text, JSONL or Parquet files; `huggingface`: a dataset; `planted`: rows of known features, no text."""
    path: str = ""
    """`files`: a file or a folder; `huggingface`: the dataset's id or local folder. Unused for `stdlib`."""
    subset: str = "default"
    """`huggingface`: the dataset's configuration name."""
    split: str = "train"
    """`huggingface`: the split."""
    revision: str = "main"
    """`huggingface`: the dataset's revision."""
    text_field: str = "text"
    """Column or key that holds the text (or the messages), in JSONL, Parquet and Hugging Face datasets."""
    text_kind: TextKind = "plain"
    """`plain`: names of special tokens are text; `with_special_tokens`: they are these tokens; `messages`: the chat template renders them."""
    context_length: Annotated[int, Field(ge=2)] = 256
    """Tokens per context, a leading BOS included."""
    contexts: Literal["packed", "per_document"] = "packed"
    """`packed`: documents follow each other in a context and attend to those before; `per_document`: a context holds one (encoders, messages)."""
    shard_bytes: Annotated[int, Field(ge=1)] = 256 << 10
    """UTF-8 bytes of text per shard, reached by whole documents."""
    documents_per_shard: Annotated[int, Field(ge=1)] = 1000
    """`huggingface` only: documents per shard, because a stream has no sizes."""
    max_shards: Annotated[int, Field(ge=1)] = 1 << 20
    """Stop after this many shards."""
    held_out_shards: Annotated[int, Field(ge=1)] = 1
    """The first shards are never trained on: they measure FVU, L0 and loss recovered."""
    features: Annotated[int, Field(ge=1)] = 512
    """`planted`: features that rows are made of, the most frequent first."""
    width: Annotated[int, Field(ge=2)] = 64
    """`planted`: size of a row."""
    n_rows: Annotated[int, Field(ge=2)] = 131_072
    """`planted`: rows in all."""
    rows_per_shard: Annotated[int, Field(ge=1)] = 16_384
    """`planted`: rows of a shard."""
    frequency: FrequencyConfig = FrequencyConfig()
    """`planted`: how often features fire."""
    hierarchy: HierarchyConfig | None = None
    """`planted`: features that fire only where another one does."""
    correlation: CorrelationConfig | None = None
    """`planted`: features that fire together more, or less, often than by chance."""
    noise: Annotated[float, Field(ge=0)] = 0.0
    """`planted`: standard deviation of what is added to each number of a row."""

    @model_validator(mode="after")
    def _check_path(self) -> "CorpusConfig":
        if self.path and "path" in self.unread:
            given = "is" if "source" in self.model_fields_set else "is not said, and so"
            message = (
                f"corpus.path is {self.path!r}, but corpus.source {given} {self.source}, which reads no path: write `source: files` (or "
                "huggingface), or leave path out"
            )
            raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _check_contexts(self) -> "CorpusConfig":
        if self.text_kind == "messages" and self.contexts != "per_document":
            message = "text_kind messages needs contexts: per_document, because a chat template begins and ends a conversation itself"
            raise ValueError(message)
        if self.hierarchy and self.hierarchy.n_features > self.features:
            message = f"hierarchy has {self.hierarchy.n_features:,} features (roots, branching, depth), and corpus.features is {self.features:,}"
            raise ValueError(message)
        return self

    @property
    def is_planted(self) -> bool:
        """Tell whether rows are planted, and there is neither text nor a model."""
        return self.source == "planted"

    @property
    def unread(self) -> frozenset[str]:
        """The fields that this source does not read, such as those of planted rows where there is text."""
        return frozenset(name for sources, names in _FIELDS_OF.items() if self.source not in sources for name in names.split())

    def planting(self) -> dict[str, Any]:
        """Return what planted rows depend on, besides the seed."""
        return self.model_dump(mode="json", include={"features", "width", "rows_per_shard", "frequency", "hierarchy", "correlation", "noise"})


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


class HeadPrompt(Section):
    """A text over which heads are shown, and what their edges are weighted by besides. Identity of `prompt_patterns`, and of `prompt_targets`."""

    text: str
    """The text."""
    logits: Annotated[list[str], Field(max_length=8)] = []
    """Tokens as text, of which what each edge adds to the logit is kept; most words begin with their space."""
    latents: Annotated[list[Annotated[str, Field(pattern=r"^.+:\d+$")]], Field(max_length=8)] = []
    """Latents of SAEs at `resid_post.L`, such as `demo:123`, likewise of their pre-activation."""

    @property
    def wanted(self) -> list[tuple[str, int]]:
        """SAEs with their latents."""
        return [(name, int(latent)) for name, _, latent in (each.rpartition(":") for each in self.latents)]


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
    prompts: dict[Name, str | HeadPrompt] = {}
    """Texts by name, over each of which every head's whole pattern is kept; one may have targets: `{text: "...", logits: [" os"]}`."""

    @model_validator(mode="after")
    def _check_layers(self) -> "HeadsConfig":
        if self.layers != "all" and self.layers != sorted(set(self.layers)):
            message = f"layers is {self.layers}: name each layer once, in order"
            raise ValueError(message)
        return self

    def prompt(self, name: str) -> HeadPrompt:
        """Return a text with its targets, of which there may be none."""
        found = self.prompts[name]
        return HeadPrompt(text=found) if isinstance(found, str) else found

    @property
    def explained(self) -> dict[str, HeadPrompt]:
        """The texts that have targets."""
        found = {name: self.prompt(name) for name in self.prompts}
        return {name: prompt for name, prompt in found.items() if prompt.logits or prompt.latents}

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
    """When an SAE is given up because others of a run do better. Execution: those that are trained to their end are what they would be without."""

    at: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(min_length=1)] = (0.25, 0.5)
    """Shares of its steps at which an SAE is compared with those that one run trains beside it, on the same rows and as long; others are not."""
    margin: Annotated[float, Field(ge=0)] = 0.05
    """It is given up where another one is as sparse or sparser, and its FVU by more than this share of it less."""
