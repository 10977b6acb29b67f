"""A text of one's own becomes the files of a prompt, by a model that is served; an edge its pairs of latents; a cut head or edge, what that changes.

    POST /api/models/{m}/attention     every head over `text` or `ids`, with columns of `targets`: docs/formats/attention_answer.md
    POST /api/models/{m}/pairs         JSON: the pairs of latents that the score of an edge is made of, and what those at its key add to `targets`
    POST /api/models/{m}/cut           JSON: logits and KL divergence at `position` with a head, or an edge of it, taken away
    POST /api/models/{m}/cuts          JSON: the KL divergence of every head taken away by itself

What is asked is checked here; `models.py` has the routes. Each is a job of the model's thread, so others have their turn between its steps.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Final, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from interp_assets.errors import InputError, TooLargeError
from interp_assets.garcon.attention import list_attention
from interp_assets.garcon.local import LocalBackend
from interp_assets.garcon.patterns.cuts import Cut, check_cuts, each_head, measure_cut, sweep_heads
from interp_assets.garcon.patterns.pairs import Edge, EdgeTerms, explain_edge, find_edge, find_sae
from interp_assets.garcon.patterns.targets import Latent, Logit, Target, explain_targets
from interp_assets.garcon.patterns.view import read_attention
from interp_assets.garcon.plan import explain_plan
from interp_assets.garcon.remote.batch import Steps
from interp_assets.garcon.remote.limits import Limits
from interp_assets.harvest.heads.prompts import PROMPT, pack_prompt, pack_targets, target_columns

BYTES: Final = "application/octet-stream"
_MAX_TARGETS: Final = 8
_SHOWN_PAIRS: Final = 200
_COLUMN_BYTES: Final = 16
"""Of a target, head and token, while columns and terms are held."""
_DIGITS: Final = 6


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class AskedTarget(_Part):
    """A token, by id or as text of one token, or a latent of an SAE."""

    token: int | str | None = None
    sae: str = ""
    latent: int = 0

    @model_validator(mode="after")
    def _check(self) -> "AskedTarget":
        if (self.token is None) == (not self.sae):
            message = "a target is a token, or a latent of an sae"
            raise ValueError(message)
        return self


class _OnText(_Part):
    """A text, or its tokens."""

    text: str = ""
    ids: list[Annotated[int, Field(ge=0, lt=1 << 62)]] = []


class AskedAttention(_OnText):
    """What is asked of a text."""

    layers: list[int] | None = None
    targets: Annotated[list[AskedTarget], Field(max_length=_MAX_TARGETS)] = []


class AskedCut(_OnText):
    """What is taken away, and where that is measured."""

    head: Annotated[str, Field(pattern=r"^\d{1,6}\.\d{1,6}$")]
    how: Literal["zero", "mean"] = "zero"
    query: int | None = None
    key: int | None = None
    position: int = -1
    tokens: Annotated[list[int | str], Field(max_length=_MAX_TARGETS)] = []


class AskedPairs(_OnText):
    """An edge, and the SAE by whose latents it is explained."""

    head: Annotated[str, Field(pattern=r"^\d{1,6}\.\d{1,6}$")]
    query: int
    key: int
    sae: str = ""
    targets: Annotated[list[AskedTarget], Field(max_length=_MAX_TARGETS)] = []


class AskedCuts(_OnText):
    """How every head is taken away, and where that is measured."""

    how: Literal["zero", "mean"] = "zero"
    position: int = -1


Asked = TypeVar("Asked", bound=BaseModel)


def read_asked(kind: type[Asked], body: bytes | bytearray) -> Asked:
    """Read what is asked. Raises `InputError` that names the wrong field."""
    try:
        return kind.model_validate_json(bytes(body))
    except ValidationError as error:
        raise InputError(explain_plan(error).replace("The plan", "What is asked", 1)) from error


def attend(backend: LocalBackend, asked: AskedAttention, limits: Limits) -> Steps:
    """Begin to run a text; the job returns the pieces of the answer. Raises `InputError`, and `TooLargeError` with what would fit."""
    row, note = _row_of(backend, asked, limits)
    targets = [_target_of(backend, each) for each in asked.targets]
    known = {layer.layer: layer.n_heads for layer in list_attention(backend.subject.net)}
    _check_size(known, asked.layers, len(row), len(targets), limits)
    return _attend(backend, row, asked.layers, targets, known, note)


def _attend(
    backend: LocalBackend, row: list[int], chosen: Sequence[int] | None, targets: Sequence[Target], known: Mapping[int, int], note: str
) -> Steps:
    yield 0, 2
    seen = read_attention(backend.subject, row, backend.pieces([row])[0], chosen)
    yield 1, 2
    terms = explain_targets(backend.subject, row, targets, backend.saes)
    heads = {layer: known[layer] for layer in seen.patterns}
    files = pack_prompt(seen, row, both_ways=not backend.subject.is_causal, more=target_columns(terms, heads))
    described = json.loads(files[PROMPT])
    files[PROMPT] = json.dumps({**described, "note": " ".join(filter(None, (note, seen.note, *(each.note for each in terms))))}).encode()
    return pack_files(files | pack_targets(terms, heads, lambda token: backend.pieces([[token]])[0][0]))


def cut(backend: LocalBackend, asked: AskedCut, limits: Limits) -> Steps:
    """Begin to take a head or an edge away; the job returns what that changes. Raises as `attend` does."""
    row, _ = _row_of(backend, asked, limits)
    layer, head = map(int, asked.head.split("."))
    wanted = Cut(layer, head, asked.how, asked.query, asked.key)
    position = check_cuts(backend.subject, row, [wanted], asked.position)
    return _cut(backend, row, wanted, position, [_token_of(backend, token) for token in asked.tokens])


def _cut(backend: LocalBackend, row: list[int], wanted: Cut, position: int, tokens: Sequence[int]) -> Steps:
    yield 0, 1
    change = measure_cut(backend.subject, row, wanted, position, tokens)
    values = zip(change.before, change.after, change.p_before, change.p_after, strict=True)
    names = ("before", "after", "p_before", "p_after")
    pieces = backend.pieces([change.tokens])[0]
    shown = [
        {"id": token, "text": text, **dict(zip(names, map(_short, four), strict=True))}
        for token, text, four in zip(change.tokens, pieces, values, strict=True)
    ]
    return {"kl": _short(change.kl), "position": position, "tokens": shown}


def cut_each(backend: LocalBackend, asked: AskedCuts, limits: Limits) -> Steps:
    """Begin to take every head away by itself; the job returns the KL divergences by head. Raises as `attend` does."""
    row, _ = _row_of(backend, asked, limits)
    check_cuts(backend.subject, row, each_head(backend.subject, asked.how), asked.position)
    return _cut_each(backend, asked, row)


def _cut_each(backend: LocalBackend, asked: AskedCuts, row: list[int]) -> Steps:
    found: dict[str, float] = {}
    total = sum(layer.n_heads for layer in list_attention(backend.subject.net))
    yield 0, total
    for cuts, divergences in sweep_heads(backend.subject, row, asked.how, asked.position):
        found |= {f"{each.layer}.{each.head}": _short(kl) for each, kl in zip(cuts, divergences.tolist(), strict=True)}
        yield len(found), total
    return {"position": asked.position % len(row), "kl": found}


def pair(backend: LocalBackend, asked: AskedPairs, limits: Limits) -> Steps:
    """Begin to take an edge apart; the job returns its strongest pairs and what all others sum to. Raises as `attend` does."""
    row, _ = _row_of(backend, asked, limits)
    layer, head = map(int, asked.head.split("."))
    edge = Edge(layer, head, asked.query, asked.key)
    find_edge(backend.subject, len(row), edge)
    sae = find_sae(backend.saes, layer, asked.sae)
    return _pair(backend, row, edge, sae, [_target_of(backend, each) for each in asked.targets])


def _pair(backend: LocalBackend, row: list[int], edge: Edge, sae: str, targets: Sequence[Target]) -> Steps:
    yield 0, 1
    return _describe_pairs(explain_edge(backend.subject, row, edge, backend.saes, sae, targets))


def _describe_pairs(found: EdgeTerms) -> dict[str, Any]:
    flat = found.pairs.ravel()
    order = np.argsort(-np.abs(flat), kind="stable")
    places = [divmod(int(place), found.pairs.shape[1]) for place in order[:_SHOWN_PAIRS]]
    return {
        **{name: _short(getattr(found, name)) for name in ("score", "mean", "slope", "mass")},
        "sae": found.sae,
        "pairs": [[found.queries[i], found.keys[j], _short(found.pairs[i, j])] for i, j in places],
        "others": {"n": len(order) - len(places), "sum": _short(flat[order[_SHOWN_PAIRS:]].sum())},
        "queries": [[name, _short(value)] for name, value in zip(found.queries, found.pairs.sum(axis=1), strict=True)],
        "keys": [[name, _short(value)] for name, value in zip(found.keys, found.pairs.sum(axis=0), strict=True)],
        "written": {
            target: [[name, _short(value)] for name, value in zip(found.keys, terms, strict=False)] for target, terms in found.written.items()
        },
    }


def pack_files(files: Mapping[str, bytes]) -> list[bytes | memoryview]:
    """Return the pieces of one answer: the length of a header, the header with each file's place, and the files."""
    places, offset = {}, 0
    for name, data in files.items():
        places[name] = [offset, offset + len(data)]
        offset += len(data)
    header = json.dumps({"files": places}, separators=(",", ":")).encode()
    return [len(header).to_bytes(8, "little"), header, *files.values()]


def _row_of(backend: LocalBackend, asked: _OnText, limits: Limits) -> tuple[list[int], str]:
    """Return the tokens that are run, and what was cut off; the model's own beginning of a text comes with a text."""
    if bool(asked.text) == bool(asked.ids):
        raise InputError("Give a text, or the ids of its tokens: one of both, and not an empty one.")
    row = list(asked.ids) or list(backend.tokenize([asked.text], special=True)[0])
    if not row:
        raise InputError("The text has no tokens: give at least one.")
    if len(row) > limits.tokens and limits.tokens < backend.subject.max_context:
        raise TooLargeError(f"The text has {len(row):,} tokens; at most {limits.tokens:,} are run at once. Shorten it.")
    most = backend.subject.max_context
    return row[:most], f"Cut to the {most:,} tokens that the model takes, of {len(row):,}." if len(row) > most else ""


def _check_size(known: Mapping[int, int], layers: Sequence[int] | None, n_tokens: int, n_targets: int, limits: Limits) -> None:
    """Refuse patterns of the chosen heads and columns of all heads that are too large together."""
    n_heads = sum(n for layer, n in known.items() if layers is None or layer in layers)
    a_head, a_target, room = 4 * n_tokens * n_tokens, _COLUMN_BYTES * sum(known.values()) * n_tokens, limits.answer_bytes
    total = n_heads * a_head + n_targets * a_target
    if total <= room:
        return
    half = n_targets * a_target / n_tokens / 2  # 4 heads tokens^2 + 2 half tokens = room
    fit = int(room / (half + (half * half + 4 * n_heads * room) ** 0.5))
    ways = {"heads": (room - n_targets * a_target) // a_head, "targets": (room - n_heads * a_head) // max(1, a_target) if n_targets else 0}
    others = "".join(f", or {most:,} {what}" for what, most in ways.items() if most > 0)
    targets = (f" and {n_targets} targets", " or `targets`") if n_targets else ("", "")
    raise TooLargeError(
        f"The patterns of {n_heads:,} heads over {n_tokens:,} tokens{targets[0]} take {total / 2**20:,.1f} MB; at most {room / 2**20:,.1f} MB are "
        f"held. {fit:,} tokens would fit{others}: shorten the text, or name fewer `layers`{targets[1]}."
    )


def _target_of(backend: LocalBackend, asked: AskedTarget) -> Target:
    return Latent(asked.sae, asked.latent) if asked.token is None else Logit(_token_of(backend, asked.token))


def _token_of(backend: LocalBackend, token: int | str) -> int:
    if isinstance(token, int):
        return token
    ids = backend.tokenize([token], special=False)[0]
    if len(ids) != 1:
        raise InputError(f"{token!r:.80} is {len(ids)} tokens: {backend.pieces([ids])[0]!r:.200}. Name one; most words begin with their space.")
    return int(ids[0])


def _short(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


ATTENTION: Final[dict[str, tuple[type[BaseModel], Callable[..., Steps]]]] = {
    "attention": (AskedAttention, attend),
    "pairs": (AskedPairs, pair),
    "cut": (AskedCut, cut),
    "cuts": (AskedCuts, cut_each),
}
"""What is asked at each address, and what begins to answer it."""
