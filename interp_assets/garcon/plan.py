"""What is asked of a model in one forward becomes a plan: plain data of a closed set of operations, with a canonical text and a hash.

A plan is the same in a notebook, on a wire and as an asset's identity, so it holds no code and no arrays: a tensor is named by its digest,
dtype and shape, and travels beside it. Fields that stand at their defaults are left out of the text, so a later field does not change the
hash of an earlier plan.

Names of points are canonical, positions and rows are numbers: who types text and TransformerLens' names is `session.py`, who executes a
plan `run.py`. What a model lacks is found there; here only what is wrong in any model.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from typing import Annotated, Any, Final, Literal, TypeVar, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor
from typing_extensions import TypeIs

from interp_assets.errors import InputError

VERSION: Final = 1
DTYPES: Final = ("float32", "float16", "bfloat16", "int64", "bool")
_DIGEST: Final = r"^[0-9a-f]{32}$"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class TensorName(_Part):
    """A tensor that lies beside the plan."""

    tensor: Annotated[str, Field(pattern=_DIGEST)]
    """Its digest: see `digest_tensor`."""
    dtype: Literal["float32", "float16", "bfloat16", "int64", "bool"]
    shape: tuple[int, ...]


class ReadName(_Part):
    """What another operation of the same plan reads."""

    read: str


class Span(_Part):
    """Positions as a slice, counted in each row by itself."""

    start: int | None = None
    stop: int | None = None
    step: int | None = None


Positions = int | tuple[int, ...] | Span | None
"""One position, which takes the axis away; some; a slice; or all. Negative ones count from the end of each row."""


class _At(_Part):
    """A part of the activation at a point."""

    point: str
    rows: tuple[int, ...] | None = None
    """Rows of the plan; None means all."""
    pos: Positions = None
    """Positions in the row; of a pattern its queries."""
    heads: tuple[int, ...] | None = None
    """Heads of a point that has heads; None means all, or that it has none."""


class When(_Part):
    """Where a write takes place: at positions where a latent of an SAE is above a value, as the SAE's point is before the plan's writes there."""

    sae: str
    latent: Annotated[int, Field(ge=0)]
    above: float = 0.0


class _Write(_At):
    """What all writes share."""

    when: When | None = None
    """None means everywhere."""


class Read(_At):
    """Keep a copy of an activation."""

    op: Literal["read"] = "read"
    name: str
    after: bool = False
    """Read what the network goes on with, after the writes at this point; else what it arrived with."""


class Patch(_Write):
    """Put other values in the place of an activation."""

    op: Literal["patch"] = "patch"
    value: TensorName | ReadName | Literal["zero", "mean"]
    """`mean` is the mean over the positions of its own row that are no padding."""


class Add(_Write):
    """Add a vector, times `times`, at every position; or a tensor of the part's own shape."""

    op: Literal["add"] = "add"
    value: TensorName
    times: float = 1.0


class Scale(_Write):
    """Multiply an activation."""

    op: Literal["scale"] = "scale"
    times: float


class ProjectOut(_Write):
    """Take away what points along a vector: x - (x.v) v / |v|^2."""

    op: Literal["project_out"] = "project_out"
    value: TensorName


class Cap(_Write):
    """Take away what points along a vector beyond a limit: x - max(0, x.u - limit) u, with u = v / |v|."""

    op: Literal["cap"] = "cap"
    value: TensorName
    limit: float


class _SaeWrite(_Write):
    """What writes by an SAE share."""

    sae: str
    latents: Annotated[tuple[int, ...], Field(min_length=1)]
    values: tuple[float, ...]
    """One a latent, in the units of raw activations."""
    along: TensorName | None = None
    """Other directions in the place of the decoder rows, [latents, d_out]; None means these."""


class SaeClamp(_SaeWrite):
    """Set latents of an SAE and leave all else, its error too: x + sum (value_i - f_i(x)) d_i."""

    op: Literal["sae_clamp"] = "sae_clamp"


class SaeAdd(_SaeWrite):
    """Add decoder rows of an SAE: x + sum value_i d_i, whatever its latents are."""

    op: Literal["sae_add"] = "sae_add"


class SaeRead(_At):
    """Keep the latent activations of an SAE at its point: [rows, positions, latents]."""

    op: Literal["sae_read"] = "sae_read"
    name: str
    sae: str
    latents: tuple[int, ...] | None = None
    """None means all of them."""
    after: bool = False
    """Of what the network goes on with, after the writes at this point; else of what it arrived with."""


class Freeze(_Part):
    """Keep attention where it looks without the plan's writes: patterns are those of the same tokens in an unedited forward."""

    op: Literal["freeze"] = "freeze"
    points: Annotated[tuple[str, ...], Field(min_length=1)]


class _Scalar(_Part):
    """One number for each row, from the logits."""

    op: Literal["metric"] = "metric"
    name: str
    rows: tuple[int, ...] | None = None


Tokens = int | tuple[int, ...]
"""One token id for all rows, or one for each."""


class LogitDiff(_Scalar):
    """Logit of one token less that of another."""

    metric: Literal["logit_diff"] = "logit_diff"
    token: Tokens
    other: Tokens
    pos: int = -1


class LogProb(_Scalar):
    """Log probability of a token, in nats."""

    metric: Literal["logprob"] = "logprob"
    token: Tokens
    pos: int = -1


class Loss(_Scalar):
    """Mean cross entropy of the next tokens, in nats."""

    metric: Literal["loss"] = "loss"


class Divergence(_Scalar):
    """KL divergence in nats of this prediction from another run's: sum p_other (log p_other - log p)."""

    metric: Literal["kl"] = "kl"
    other: TensorName
    """Logits of the other run, [rows, vocabulary]."""
    pos: int = -1


Metric = Annotated[LogitDiff | LogProb | Loss | Divergence, Field(discriminator="metric")]


class Grad(_Part):
    """Derivatives of the sum of a metric over its rows, at points as they are before the plan's writes."""

    op: Literal["grad"] = "grad"
    name: str
    of: str
    at: Annotated[tuple[str, ...], Field(min_length=1)]


class Attribute(_Part):
    """First-order effect of putting `source` in the place of each activation: the derivative times the change, summed over its vector."""

    op: Literal["attribute"] = "attribute"
    name: str
    of: str
    at: Annotated[tuple[str, ...], Field(min_length=1)]
    source: Literal["zero"] | tuple[TensorName, ...]
    """One tensor a point, of the point's whole shape."""


Write = Patch | Add | Scale | ProjectOut | Cap | SaeClamp | SaeAdd
Operation = Annotated[Read | SaeRead | Write | Freeze | Metric | Grad | Attribute, Field(discriminator="op")]


_WRITES: Final = frozenset(get_args(Write))
_ANSWERED: Final = frozenset((Read, SaeRead, LogitDiff, LogProb, Loss, Divergence))
_OF_SAE: Final = frozenset((SaeRead, SaeClamp, SaeAdd))
"""Kinds are told by their class itself: `isinstance` of a pydantic model costs a microsecond a class, and a trace asks dozens of times."""


def is_write(operation: object) -> TypeIs[Write]:
    """Tell whether an operation puts something in the place of an activation."""
    return type(operation) in _WRITES


def is_answered(operation: object) -> TypeIs[Read | SaeRead | LogitDiff | LogProb | Loss | Divergence]:
    """Tell whether an operation is answered by one tensor."""
    return type(operation) in _ANSWERED


def is_of_sae(operation: object) -> TypeIs[SaeRead | SaeClamp | SaeAdd]:
    """Tell whether an operation reads or writes latents of an SAE."""
    return type(operation) in _OF_SAE


def is_derivative(operation: object) -> TypeIs[Grad | Attribute]:
    """Tell whether an operation is a derivative, at several points."""
    return type(operation) is Grad or type(operation) is Attribute


class Asked(_Part):
    """What all plans share: a canonical text, its hash, and tensors that lie beside it."""

    version: Literal[1] = VERSION

    def json(self) -> str:  # type: ignore[override] - pydantic's own method of this name is deprecated
        """Return the canonical text: sorted keys, no spaces, no defaults but what tells plans and operations apart."""
        return json.dumps(self._content(), sort_keys=True, separators=(",", ":"))

    @property
    def hash(self) -> str:
        """BLAKE2b of the canonical text, and so of the digests of all tensors."""
        return hashlib.blake2b(self.json().encode(), digest_size=16).hexdigest()

    def tensors(self) -> Iterator[TensorName]:
        """Yield the tensors that must lie beside the plan: none, unless it says which."""
        yield from ()

    def _content(self) -> dict[str, Any]:
        return _tagged(self, self.model_dump(mode="json", exclude_defaults=True))


_AnyPlan = TypeVar("_AnyPlan", bound=Asked)


class Plan(Asked):
    """Rows of tokens, and what is read and written while a model runs over them."""

    rows: Annotated[tuple[tuple[int, ...], ...], Field(min_length=1)]
    """Token ids of every row; rows run together in one forward."""
    operations: Annotated[tuple[Operation, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _check(self) -> "Plan":
        names: dict[str, list[str]] = {kind: [] for kind in ("read", "sae_read", "metric", "grad", "attribute")}
        for operation in self.operations:
            if operation.op in names:
                names[operation.op].append(getattr(operation, "name"))  # noqa: B009 - these kinds have one
        named = [name for of_kind in names.values() for name in of_kind]
        if len(set(named)) < len(named):
            raise ValueError(f"two operations have one name: {sorted({name for name in named if named.count(name) > 1})}")
        for operation in self.operations:
            self._check_operation(operation, names["read"], names["metric"])
        return self

    def _check_operation(self, operation: Operation, reads: list[str], metrics: list[str]) -> None:
        if operation.op == "patch" and isinstance(operation.value, ReadName) and operation.value.read not in reads:
            raise ValueError(f"a patch at {operation.point} takes the read {operation.value.read!r}; the reads are {sorted(reads)}")
        if is_derivative(operation) and operation.of not in metrics:
            raise ValueError(f"{operation.name!r} is of the metric {operation.of!r}; the metrics are {sorted(metrics)}")
        _check_values(operation)
        _check_rows("operation", getattr(operation, "rows", None), len(self.rows))

    def _content(self) -> dict[str, Any]:
        content = super()._content()
        return {**content, "operations": [_tagged(*pair) for pair in zip(self.operations, content["operations"], strict=True)]}

    def tensors(self) -> Iterator[TensorName]:
        """Yield the tensors that must lie beside the plan."""
        for operation in self.operations:
            yield from _tensors_of(operation)


class Edit(_Part):
    """A write at some positions of a text that is being written."""

    write: Annotated[Write, Field(discriminator="op")]
    """Rows are prompts; which positions is said by `where`."""
    where: Literal["all", "prompt", "generated", "assistant"] | tuple[int, ...] | Span = "all"
    """Positions count from the start of the prompt on, through what is generated; negative ones from the end of the prompt. A slice without
    an end has none."""
    special: bool = False
    """Write at special tokens too."""

    @model_validator(mode="after")
    def _check(self) -> "Edit":
        write = self.write
        if write.pos is not None:
            raise ValueError(f"an edit at {write.point} has positions in its write; say them as `where`")
        if isinstance(write, Patch) and (isinstance(write.value, ReadName) or write.value == "mean"):
            raise ValueError(f"a patch at {write.point} takes 'zero' or a vector while a text is written: what follows a position is not known there")
        if isinstance(self.where, Span) and (self.where.step or 1) < 1:
            raise ValueError(f"an edit at {write.point} steps by {self.where.step}; positions rise")
        _check_values(write)
        return self


class LatentsRead(_Part):
    """Latents of an SAE that are read while a text is written."""

    sae: str
    latents: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]


class GeneratePlan(Asked):
    """Prompts, how they are continued, and what is written into the model meanwhile."""

    whole: Literal["generate"] = "generate"
    rows: Annotated[tuple[Annotated[tuple[int, ...], Field(min_length=1)], ...], Field(min_length=1)]
    """Token ids of every prompt."""
    new_tokens: Annotated[int, Field(ge=1)]
    """Most tokens that are added to a prompt."""
    n: Annotated[int, Field(ge=1)] = 1
    """Continuations of each prompt. The i-th draws the same numbers whatever the prompt and whatever runs beside it."""
    seed: int = 0
    temperature: Annotated[float, Field(ge=0.0)] = 0.0
    """0 takes the most probable token."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Draw among so many most probable tokens; 0 means all."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Draw among the fewest most probable tokens that have this probability together."""
    stop: tuple[int, ...] = ()
    """Tokens that end a row; each is its last."""
    edits: tuple[Edit, ...] = ()
    freeze: tuple[str, ...] = ()
    """Points kept as they are over the same tokens without the edits."""
    special: tuple[int, ...] = ()
    """Ids of special tokens, which edits leave alone."""
    assistant: tuple[tuple[int, ...], ...] = ()
    """Positions of each prompt in turns of the assistant, whose words what is generated counts as; empty for prompts that are no conversations."""
    compare: bool = False
    """Continue each prompt without the edits too, with the same numbers; and what `score` does."""
    score: bool = False
    """Measure what the model without the edits says of every token."""
    watch: tuple[int, ...] = ()
    """Tokens whose log probability is told in every prediction."""
    latents: tuple[LatentsRead, ...] = ()
    """Latents that are told with every token: what they read, after the edits, at the position whose prediction it is drawn from."""

    @model_validator(mode="after")
    def _check(self) -> "GeneratePlan":
        for edit in self.edits:
            _check_rows("edit", edit.write.rows, len(self.rows))
            if edit.where == "assistant" and not self.assistant:
                raise ValueError(f"an edit at {edit.write.point} is on the assistant's turns, but the prompts are no conversations")
        if self.assistant and len(self.assistant) != len(self.rows):
            raise ValueError(f"positions of the assistant are given for {len(self.assistant)} of {len(self.rows)} prompts")
        return self

    def _content(self) -> dict[str, Any]:
        content = super()._content()
        for edit, dumped in zip(self.edits, content.get("edits", ()), strict=True):
            dumped["write"] = _tagged(edit.write, dumped["write"])
        return content

    def tensors(self) -> Iterator[TensorName]:
        """Yield the tensors that must lie beside the plan."""
        for edit in self.edits:
            yield from _tensors_of(edit.write)


class SweepPlan(Asked):
    """One row of tokens, and the cells in which a source takes the place of what is there, one at a time: see `sweep.py`."""

    row: Annotated[tuple[int, ...], Field(min_length=1)]
    points: Annotated[tuple[str, ...], Field(min_length=1)]
    source: str | tuple[TensorName, ...]
    """`zero`, or one tensor a point, of the point's whole shape."""
    metric: Metric
    by: str
    """`position` or `head`."""

    @model_validator(mode="after")
    def _check(self) -> "SweepPlan":
        if not isinstance(self.source, str) and len(self.source) != len(self.points):
            raise ValueError(f"there are {len(self.source)} sources for {len(self.points)} points")
        return self

    def json(self) -> str:
        """Return it as text."""
        return self.model_dump_json()

    def tensors(self) -> Iterator[TensorName]:
        """Yield the tensors that must lie beside it."""
        if not isinstance(self.source, str):
            yield from self.source


Reduction = Annotated[str, Field(pattern="^(mean|cov|norms|histogram|top:[1-9][0-9]{0,5})$")]


class ReducePlan(Asked):
    """Texts, and what is wanted of the activations at some points over all of them: see `reduce.py`."""

    whole: Literal["reduce"] = "reduce"
    rows: Annotated[tuple[Annotated[tuple[int, ...], Field(min_length=1)], ...], Field(min_length=1)]
    """Token ids of every text."""
    reductions: Annotated[dict[str, tuple[Reduction, ...]], Field(min_length=1)]
    """By point: `mean`, `cov`, `norms`, `histogram` or `top:` and a number."""
    special: tuple[int, ...] = ()
    """Ids of tokens that are left out."""


def parse_plan(kind: type[_AnyPlan], text: str) -> _AnyPlan:
    """Read the text of a plan of some kind. Raises `InputError` that names the operation, the field and what is allowed."""
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise InputError(explain_plan(error)) from error


def explain_plan(error: ValidationError) -> str:
    """Say in one line what is wrong with a plan."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"The plan is wrong{f' at {where}' if where else ''}: {first['msg'].removeprefix('Value error, ')}{more}."


def name_tensor(tensor: Tensor) -> TensorName:
    """Name a tensor by its content. Raises `InputError` for a dtype that does not travel, and for NaN or infinity, with the first place."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise InputError(f"A tensor of dtype {dtype} cannot stand in a plan; {', '.join(DTYPES)} can.")
    is_finite = not tensor.is_floating_point() or math.isfinite(float(tensor.sum()))  # a NaN or an infinity leaves no sum finite
    if not is_finite and not bool(torch.isfinite(tensor).all()):
        place = (~torch.isfinite(tensor)).nonzero()[0].tolist()
        raise InputError(f"A tensor of shape {list(tensor.shape)} holds {float(tensor[tuple(place)])} at {place}. Give finite numbers.")
    return TensorName(tensor=digest_tensor(tensor), dtype=dtype, shape=tuple(tensor.shape))


def digest_tensor(tensor: Tensor) -> str:
    """Hash dtype, shape and bytes of a tensor."""
    state = hashlib.blake2b(f"{tensor.dtype} {list(tensor.shape)}\n".encode(), digest_size=16)
    state.update(bytes_of(tensor))
    return state.hexdigest()


def bytes_of(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes in the order of its places; they are the tensor's own where it lies so on the CPU."""
    flat = tensor.detach().cpu().reshape(-1)
    if flat.stride() != (1,):  # one number of a larger tensor keeps that one's stride, and passes for contiguous
        flat = torch.empty_like(flat, memory_format=torch.contiguous_format).copy_(flat)
    return flat.view(torch.uint8).numpy().data


def _tensors_of(operation: object) -> Iterator[TensorName]:
    sources = operation.source if isinstance(operation, Attribute) and operation.source != "zero" else ()
    for value in (*(getattr(operation, name, None) for name in ("value", "other", "along")), *sources):
        if isinstance(value, TensorName):
            yield value


def _check_rows(what: str, rows: tuple[int, ...] | None, n_rows: int) -> None:
    if rows is not None and (not rows or min(rows) < 0 or max(rows) >= n_rows):
        raise ValueError(f"an {what} is on rows {list(rows)}; the plan has rows 0 to {n_rows - 1}")


def _check_values(operation: object) -> None:
    if isinstance(operation, _SaeWrite) and len(operation.latents) != len(operation.values):
        raise ValueError(
            f"a {getattr(operation, 'op', '')} at {operation.point} has {len(operation.latents)} latents and {len(operation.values)} values"
        )


def _tagged(part: object, dumped: dict[str, Any]) -> dict[str, Any]:
    """Put back what tells plans and operations apart: it stands at its default."""
    return {**{name: getattr(part, name) for name in ("version", "whole", "op", "metric") if hasattr(part, name)}, **dumped}
