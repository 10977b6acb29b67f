"""What is asked of a model in one forward becomes a plan: plain data of a closed set of operations, with a canonical text and a hash.

A plan is the same in a notebook, on a wire and as an asset's identity, so it holds no code and no arrays: a tensor is named by its digest,
dtype and shape, and travels beside it. Fields that stand at their defaults are left out of the text, so a later field does not change the
hash of an earlier plan.

Names of points are canonical, positions and rows are numbers: who types text and TransformerLens' names is `session.py`, who executes a
plan `run.py`. What a model lacks is found there; here only what is wrong in any model.
"""

import hashlib
import json
from collections.abc import Iterator
from typing import Annotated, Final, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

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


class SaeClamp(_Write):
    """Set latents of an SAE and leave all else, its error too: x + sum (value_i - f_i(x)) d_i."""

    op: Literal["sae_clamp"] = "sae_clamp"
    sae: str
    latents: Annotated[tuple[int, ...], Field(min_length=1)]
    values: tuple[float, ...]
    """One a latent, in the units of raw activations."""


class SaeRead(_At):
    """Keep the latent activations of an SAE at its point, as it arrives there: [rows, positions, latents]."""

    op: Literal["sae_read"] = "sae_read"
    name: str
    sae: str
    latents: tuple[int, ...] | None = None
    """None means all of them."""


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


Write = Patch | Add | Scale | ProjectOut | Cap | SaeClamp
Operation = Annotated[Read | SaeRead | Write | Freeze | Metric | Grad | Attribute, Field(discriminator="op")]


class Plan(_Part):
    """Rows of tokens, and what is read and written while a model runs over them."""

    version: Literal[1] = VERSION
    rows: Annotated[tuple[tuple[int, ...], ...], Field(min_length=1)]
    """Token ids of every row; rows run together in one forward."""
    operations: Annotated[tuple[Operation, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _check(self) -> "Plan":
        named = [operation.name for operation in self.operations if isinstance(operation, Read | SaeRead | _Scalar | Grad | Attribute)]
        if twice := sorted({name for name in named if named.count(name) > 1}):
            message = f"two operations have one name: {twice}"
            raise ValueError(message)
        reads = {operation.name for operation in self.operations if isinstance(operation, Read)}
        metrics = {operation.name for operation in self.operations if isinstance(operation, _Scalar)}
        for operation in self.operations:
            if isinstance(operation, Patch) and isinstance(operation.value, ReadName) and operation.value.read not in reads:
                message = f"a patch at {operation.point} takes the read {operation.value.read!r}; the reads are {sorted(reads)}"
                raise ValueError(message)
            if isinstance(operation, Grad | Attribute) and operation.of not in metrics:
                message = f"{operation.name!r} is of the metric {operation.of!r}; the metrics are {sorted(metrics)}"
                raise ValueError(message)
            if isinstance(operation, SaeClamp) and len(operation.latents) != len(operation.values):
                message = f"a clamp at {operation.point} has {len(operation.latents)} latents and {len(operation.values)} values"
                raise ValueError(message)
            rows = getattr(operation, "rows", None)
            if rows is not None and (not rows or min(rows) < 0 or max(rows) >= len(self.rows)):
                message = f"an operation is on rows {list(rows)}; the plan has rows 0 to {len(self.rows) - 1}"
                raise ValueError(message)
        return self

    def json(self) -> str:  # type: ignore[override] - pydantic's own method of this name is deprecated
        """Return the canonical text: sorted keys, no spaces, no defaults."""
        content = {"version": self.version, **self.model_dump(mode="json", exclude_defaults=True)}
        content["operations"] = [
            {**{name: getattr(operation, name) for name in ("op", "metric") if hasattr(operation, name)}, **dumped}
            for operation, dumped in zip(self.operations, content["operations"], strict=True)
        ]
        return json.dumps(content, sort_keys=True, separators=(",", ":"))

    @property
    def hash(self) -> str:
        """BLAKE2b of the canonical text, and so of the digests of all tensors."""
        return hashlib.blake2b(self.json().encode(), digest_size=16).hexdigest()

    def tensors(self) -> Iterator[TensorName]:
        """Yield the tensors that must lie beside the plan."""
        for operation in self.operations:
            for value in (getattr(operation, "value", None), getattr(operation, "other", None), *_sources(operation)):
                if isinstance(value, TensorName):
                    yield value


def parse_plan(text: str) -> Plan:
    """Read a plan's text. Raises `InputError` that names the operation, the field and what is allowed."""
    try:
        return Plan.model_validate_json(text)
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
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        place = (~torch.isfinite(tensor)).nonzero()[0].tolist()
        raise InputError(f"A tensor of shape {list(tensor.shape)} holds {float(tensor[tuple(place)])} at {place}. Give finite numbers.")
    return TensorName(tensor=digest_tensor(tensor), dtype=dtype, shape=tuple(tensor.shape))


def digest_tensor(tensor: Tensor) -> str:
    """Hash dtype, shape and bytes of a tensor."""
    content = tensor.detach().cpu().contiguous()
    state = hashlib.blake2b(f"{content.dtype} {list(content.shape)}\n".encode(), digest_size=16)
    state.update(content.reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def _sources(operation: object) -> tuple[TensorName, ...]:
    return operation.source if isinstance(operation, Attribute) and operation.source != "zero" else ()


class SweepPlan(_Part):
    """One row of tokens, and the cells in which a source takes the place of what is there, one at a time: see `sweep.py`."""

    version: Literal[1] = VERSION
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
            message = f"there are {len(self.source)} sources for {len(self.points)} points"
            raise ValueError(message)
        return self

    def json(self) -> str:  # type: ignore[override] - as in `Plan`
        """Return it as text."""
        return self.model_dump_json()

    def tensors(self) -> Iterator[TensorName]:
        """Yield the tensors that must lie beside it."""
        if not isinstance(self.source, str):
            yield from self.source


def parse_sweep(text: str) -> SweepPlan:
    """Read a sweep's text. Raises `InputError`."""
    try:
        return SweepPlan.model_validate_json(text)
    except ValidationError as error:
        raise InputError(explain_plan(error)) from error
