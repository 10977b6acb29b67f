"""What a notebook needs of a model, whether it is loaded here (`local.py`) or on a server (`client.py`): names in, numbers out.

`session.py` turns what a person types into plans over this interface alone, so that the same words mean the same and give the same in both places.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from interp_assets.garcon.plan import Metric, Plan, TensorName


class Answer(NamedTuple):
    """What a plan gave, by the names of its operations: tensors, or what a server keeps of them (`Kept`)."""

    tensors: dict[str, Any]
    """Reads, [rows, positions, ...] or [rows, ...] for a single position; metrics, [rows]."""
    derivatives: dict[str, dict[str, Any]]
    """Of every `grad` and `attribute`, by point."""
    batch: tuple[int, int] = (0, 0)
    """Rows and tokens of the forward that it came from, strangers' rows too: bits depend on this shape, and on nothing else of the company."""


class Kept(NamedTuple):
    """A tensor that stayed on the server: later plans may name it, and it is fetched when somebody looks."""

    name: TensorName
    owner: Any
    """The backend that it stayed with."""
    fetch: Callable[[TensorName], Tensor]


class PointRow(NamedTuple):
    """One line of a model's table of points."""

    name: str
    shape: str
    """Sizes, with words where they depend on the input; empty when it is refused."""
    module: str
    alias: str
    """TransformerLens' name."""
    refused: str
    """Why this model does not have it; empty when it does."""


@runtime_checkable
class Backend(Protocol):
    """A model that answers plans. All of it raises `InputError` for what the model does not have or take."""

    @property
    def saes(self) -> Mapping[str, Any]:
        """SAEs by name; each has a `hook_point`."""
        ...

    @property
    def pieces(self) -> Callable[[Sequence[Sequence[int]]], list[list[str]]]:
        """What writes every token of some rows as text; it does not hold the model."""
        ...

    def list_points(self) -> list[PointRow]:
        """List the canonical points in the order of a forward, those that the model does not have too."""
        ...

    def find_point(self, name: str) -> str:
        """Return the canonical name of a point."""
        ...

    def tokenize(self, texts: Sequence[str], *, special: bool) -> list[list[int]]:
        """Return the token ids of each text, with the special tokens that the tokenizer adds or without them."""
        ...

    def run(self, plan: Plan, tensors: Mapping[str, Tensor], *, exact: bool = False, keep: bool = False) -> Answer:
        """Execute a plan; `tensors` holds what it names, by digest. `exact`: in a forward of its own. `keep`: the answer stays where the model is."""
        ...

    def sweep(self, row: Sequence[int], names: Sequence[str], source: Mapping[str, Tensor] | str, metric: Metric, by: str) -> tuple[float, Tensor]:
        """Return a metric without a patch, and [points, positions or heads] of it with each: see `sweep.py`."""
        ...
