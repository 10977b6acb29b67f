"""A model that is loaded here answers plans, as `backend.py` has it."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

from torch import Tensor

from interp_assets.errors import InputError
from interp_assets.garcon.backend import Answer, Chats, Controls, Generated, PointRow, Token
from interp_assets.garcon.chat import UNKNOWN, tokenize_chat
from interp_assets.garcon.features import AttachedSae
from interp_assets.garcon.plan import GeneratePlan, Metric, Plan, ReducePlan
from interp_assets.garcon.points import find_point, list_norms, list_points, point_shape
from interp_assets.garcon.reduce import reduce_texts
from interp_assets.garcon.run import run_plan
from interp_assets.garcon.steering.attach import TEXT, try_sae
from interp_assets.garcon.steering.controls import find_controls
from interp_assets.garcon.steering.decode import generate
from interp_assets.garcon.steering.strengths import latent_strength, vector_strength
from interp_assets.garcon.subject import SubjectModel
from interp_assets.garcon.sweep import run_sweep
from interp_assets.garcon.tokenizer import special_token_ids
from interp_assets.garcon.weights import read_weight


class LocalBackend:
    """A subject model, the tokenizer that belongs to it, and SAEs by name."""

    def __init__(self, subject: SubjectModel, tokenizer: Any, saes: Mapping[str, AttachedSae] | None = None) -> None:
        """Hold what was loaded."""
        self.subject, self.tokenizer, self.saes = subject, tokenizer, saes or {}
        self.norms: Mapping[str, float] = {}
        """Mean norm of the activations at hook points whose pipeline tells."""

    @cached_property
    def pieces(self) -> Callable[[Sequence[Sequence[int]]], list[list[str]]]:
        """What writes every token of some rows as text."""
        return partial(_write, self.tokenizer)

    def attach(self, name: str, attached: AttachedSae, texts: Sequence[Sequence[int]] | None = None) -> None:
        """Add an SAE, after it was tried on texts, by default a short one. Raises `InputError` for one that explains less than nothing there."""
        tried = try_sae(self.subject, name, attached, texts or self.tokenize([TEXT], special=True), self.special_tokens)
        self.saes = {**self.saes, name: tried}

    def list_points(self) -> list[PointRow]:
        """List the canonical points."""
        net = self.subject.net
        rows = []
        for point in list_points(net, with_refused=True):
            shape = "" if point.refused else str(list(point_shape(net, point) or ())).replace("'", "")
            rows.append(PointRow(point.name, shape, point.module_path, point.alias, point.refused))
        rows += [PointRow(point.name, "[batch, context, 1]", point.module_path, "", "") for point in list_norms(net)]
        return rows

    def find_point(self, name: str) -> str:
        """Return the canonical name of a point."""
        return find_point(self.subject.net, name).name

    def tokenize(self, texts: Sequence[str], *, special: bool) -> list[list[int]]:
        """Return the token ids of each text."""
        return [[int(token) for token in self.tokenizer(text, add_special_tokens=special)["input_ids"]] for text in texts]

    def run(self, plan: Plan, tensors: Mapping[str, Tensor], *, exact: bool = False, keep: bool = False) -> Answer:
        """Execute a plan: alone, and its answer is kept here anyhow."""
        del keep
        return run_plan(self.subject, plan, tensors, self.saes, exact=exact)

    def sweep(self, row: Sequence[int], names: Sequence[str], source: Mapping[str, Tensor] | str, metric: Metric, by: str) -> tuple[float, Tensor]:
        """Sweep."""
        return run_sweep(self.subject, row, names, source, metric, by)

    def weight(self, name: str, head: int | None = None) -> Tensor:
        """Return a copy of a weight."""
        return read_weight(self.subject.net, name, head)

    @property
    def name(self) -> str:
        """What the model is called."""
        return self.subject.name

    @cached_property
    def special_tokens(self) -> tuple[int, ...]:
        """Ids that stand for no text."""
        return tuple(special_token_ids(self.tokenizer))

    @cached_property
    def stop_tokens(self) -> tuple[int, ...]:
        """Ids that end a text."""
        return _stop_tokens(self.tokenizer, self.subject)

    def chats(self, conversations: Sequence[Sequence[Mapping[str, Any]]]) -> Chats:
        """Render conversations by the model's own template."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise InputError(
                f"The prompt is a conversation, but the tokenizer of {self.name!r} has no chat template. Give a text, or use its chat version."
            )
        rows, roles = [], []
        for i, messages in enumerate(conversations):
            chat = tokenize_chat(self.tokenizer, [dict(message) for message in messages], opens_answer=True)
            if chat.refusal or not len(chat.token_ids):
                raise InputError(f"The chat template of {self.name!r} refuses conversation {i}: {chat.refusal or 'it renders to nothing'}.")
            rows.append(tuple(int(token) for token in chat.token_ids))
            roles.append(None if UNKNOWN in chat.roles else tuple(chat.roles))
        return Chats(tuple(rows), tuple(roles))

    def decode(self, tokens: Sequence[int]) -> str:
        """Return what token ids say together."""
        return self.tokenizer.decode(list(tokens))

    @property
    def most_texts(self) -> int:
        """How many texts one plan may write: as many as make a forward worth its while."""
        return 512

    def controls(self, sae: str, latent: int, seed: int) -> Controls:
        """Return what a latent is compared with."""
        return find_controls(self._sae(sae), latent, seed)

    def latent_strength(self, written: str | float, sae: str, latent: int) -> float:
        """Return the number of a latent's strength."""
        attached = self._sae(sae)
        return latent_strength(written, attached, sae, latent, self.norms.get(attached.written_at))

    def _sae(self, name: str) -> AttachedSae:
        if name not in self.saes:
            raise InputError(f"No SAE is called {name!r} here; there are {sorted(self.saes)}. `lab.open(...).model()` brings a pipeline's.")
        return self.saes[name]

    def vector_strength(self, written: str | float, point: str, length: float) -> float:
        """Return how many times a vector is added."""
        return vector_strength(written, point, length, self.norms.get(point))

    def generate(self, plan: GeneratePlan, tensors: Mapping[str, Tensor], on_token: Callable[[Token], None] | None = None) -> Generated:
        """Run a plan that generates."""
        return generate(self.subject, plan, tensors, self.saes, on_token)

    def reduce(self, plan: ReducePlan, progress: Callable[[int], None] | None = None) -> dict[str, dict[str, Any]]:
        """Run a plan that reduces."""
        return reduce_texts(self.subject, plan, progress)


def _stop_tokens(tokenizer: Any, subject: SubjectModel) -> tuple[int, ...]:
    """Return the tokens that end a text, as the model's own generation settings name them, and the tokenizer's end."""
    told = getattr(getattr(subject.net, "generation_config", None), "eos_token_id", None)
    told = subject.net.config.get_text_config().eos_token_id if told is None else told
    ids = [told] if isinstance(told, int) else list(told or [])
    end = getattr(tokenizer, "eos_token_id", None)
    return tuple(sorted({*ids, *([end] if isinstance(end, int) else [])}))


def _write(tokenizer: Any, rows: Sequence[Sequence[int]]) -> list[list[str]]:
    return [[tokenizer.decode([token]) for token in row] for row in rows]
