"""What a notebook needs of a model, whether it is loaded here (`local.py`) or on a server (`remote/client.py`): names in, numbers out.

`session.py` turns what a person types into plans over this interface alone, so that the same words mean the same and give the same in both places.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from interp_assets.garcon.plan import GeneratePlan, Metric, Plan, ReducePlan, TensorName


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


class Token(NamedTuple):
    """A token that was added to a continuation."""

    continuation: int
    """Prompt times `n` plus which of its continuations."""
    is_default: bool
    """It belongs to the text without edits."""
    place: int
    """Among the new tokens."""
    token: int
    logprob: float
    """In nats, at temperature 1, under the model that wrote it."""
    base_logprob: float | None
    """Under the model without edits, over the same text; None where it was not asked."""
    kl: float | None
    """KL(without edits || with edits) of the prediction that it was drawn from, in nats, over the same text."""
    watched: tuple[float, ...] = ()
    """Log probabilities of the plan's watched tokens in that prediction."""
    latents: tuple[float, ...] = ()
    """The plan's latents, one SAE after the other, at the position of that prediction: of the token before this one."""


class Continuation(NamedTuple):
    """The new tokens of one text."""

    tokens: list[Token]
    is_stopped: bool
    """It ended by a stop token, not by its length."""


class Effect(NamedTuple):
    """What one edit did, as means over the places it reached in each continuation; NaN where it reached none."""

    n_places: Tensor
    """[continuations]."""
    moved: Tensor
    """|x' - x| / |x|, [continuations]."""
    before: Tensor
    """What its latents read as the activation arrives, [continuations, latents]; no latents but for writes by an SAE."""
    after: Tensor
    """What they read after all writes at the point, likewise; NaN for transcoders and crosscoders, which read elsewhere than they are written."""


class Generated(NamedTuple):
    """What a plan that generates gave."""

    texts: list[Continuation]
    """By continuation: prompt times `n` plus which of its continuations."""
    defaults: list[Continuation]
    """The same without edits; empty unless they were to be compared."""
    effects: list[Effect]
    """One an edit."""
    fvu: dict[str, float]
    """Of each SAE that is written, over the edited texts without special tokens: what share of the variance it does not explain."""


class Chats(NamedTuple):
    """Tokens of conversations up to where an answer begins, and whose words each is of; or of texts, which have no roles."""

    rows: tuple[tuple[int, ...], ...]
    roles: tuple[tuple[str, ...] | None, ...]
    """Of every token, `template` for what is nobody's words. None where the template changes what it is given, so that nobody can tell."""

    @property
    def assistant(self) -> tuple[tuple[int, ...] | None, ...]:
        """The positions of the assistant's words in each conversation."""
        return tuple(None if roles is None else tuple(i for i, role in enumerate(roles) if role == "assistant") for roles in self.roles)


class Controls(NamedTuple):
    """What a latent of an SAE is compared with when it is steered."""

    direction: Tensor
    """Its decoder row, [d_out]."""
    other: int | None
    """Another live latent that fires about as often; None where nobody knows, or there is none."""


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

    def weight(self, name: str, head: int | None = None) -> Tensor:
        """Return a copy of a weight, of one head if `head` is given: see `weights.py`."""
        ...


@runtime_checkable
class WritingBackend(Backend, Protocol):
    """A model that continues texts and goes over many, too."""

    @property
    def name(self) -> str:
        """What the model is called."""
        ...

    @property
    def special_tokens(self) -> tuple[int, ...]:
        """Ids that stand for no text."""
        ...

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        """Ids that end a text."""
        ...

    def chats(self, conversations: Sequence[Sequence[Mapping[str, Any]]]) -> Chats:
        """Render conversations by the model's own template. Raises `InputError` where it has none or refuses one."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Return what token ids say together."""
        ...

    def latent_strength(self, written: str | float, sae: str, latent: int) -> float:
        """Return the number of a latent's strength with a unit: see `steering/strengths.py`."""
        ...

    def vector_strength(self, written: str | float, point: str, length: float) -> float:
        """Return how many times a vector of a length is added at a point."""
        ...

    @property
    def most_texts(self) -> int:
        """How many texts one plan may write."""
        ...

    def controls(self, sae: str, latent: int, seed: int) -> Controls:
        """Return what a latent is compared with, the other one drawn by a seed."""
        ...

    def generate(self, plan: GeneratePlan, tensors: Mapping[str, Tensor], on_token: Callable[[Token], None] | None = None) -> Generated:
        """Run a plan that generates, and hand out its tokens as they come."""
        ...

    def reduce(self, plan: ReducePlan, progress: Callable[[int], None] | None = None) -> dict[str, dict[str, Any]]:
        """Run a plan that reduces: see `reduce.py`."""
        ...
