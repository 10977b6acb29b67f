"""An edge of a head becomes pairs of latents whose terms sum to its score, and latents whose terms sum to what it writes.

    x = sum a_i d_i + bias + error          of the residual stream that the layer reads, at the query's and at the key's position
    q = sum q_i,  k = sum k_j,  v = sum v_j       each term through the norm before, the weights, the norms behind them and the rotary embedding
    score - mean = sum_ij q_i (k_j - mean of k_j over the keys that the query sees)
    A[q, k] r v W_O w = sum_j A[q, k] r v_j W_O w         of a target (`targets.py`)

1. Norms divide as they do in the text: then all is linear. The module itself is run again, one row a term, each with its own position, in float64
   on the CPU: so every family's rotary embedding, shared heads and fused weights are the family's own.
2. The softmax sees no constant, so of each term on the key's side its mean over the visible keys is taken away. Latents that fire at other visible
   keys alone are the term `other latents`; `bias` is the SAE's and the network's, `error` what the SAE does not explain.
3. A score is taken before its soft cap, whose slope there stands beside.

Cost: a row a visible key for the stream, the bias and the error, and one a firing of the key's latents at a visible key.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from interp_assets.errors import InputError, TooLargeError
from interp_assets.garcon.adapters import Adapter, find_adapter
from interp_assets.garcon.attention import Attended, AttentionLayer, attention_heard, list_attention
from interp_assets.garcon.features import AttachedSae
from interp_assets.garcon.patterns.targets import STREAM, Target, explain_targets, norm_gain
from interp_assets.garcon.points import is_norm, norm_divisor
from interp_assets.garcon.subject import SubjectModel
from interp_assets.planning.hook_names import canonical_name

ERROR, BIAS, OTHER = "error", "bias", "other latents"
MAX_ROWS: Final = 1 << 16
"""Firings of the key's latents at visible keys, and pairs over 64: beyond them an SAE is too dense to be shown so."""
_CHUNK: Final = 128
"""Rows that are run at once."""


class Edge(NamedTuple):
    """A head's attention from a query to a key."""

    layer: int
    head: int
    query: int
    key: int


class EdgeTerms(NamedTuple):
    """What an edge is made of."""

    sae: str
    score: float
    """Of this query and key, before a soft cap."""
    mean: float
    """Of the scores of this query with all keys that it sees."""
    slope: float
    """Of the soft cap at the score; 1 without."""
    mass: float
    """The edge: A[query, key]."""
    queries: list[int | str]
    """Latents at the query, then `error` and `bias`."""
    keys: list[int | str]
    """Latents at the key, then `error`, `bias` and `other latents`."""
    pairs: NDArray[np.float64]
    """[queries, keys]: they sum to score - mean."""
    written: dict[str, NDArray[np.float64]]
    """[keys] by target, `other latents` left out: they sum to what the edge adds to it."""


def explain_edge(
    subject: SubjectModel, row: Sequence[int], edge: Edge, saes: Mapping[str, AttachedSae], sae: str = "", targets: Sequence[Target] = ()
) -> EdgeTerms:
    """Return the pairs of latents of one SAE that an edge's score is made of, and what the latents at its key add to targets.

    `sae` may be left out where one SAE reads what the layer reads. Raises `InputError` for an edge that is not there, for an SAE at another point,
    with the point's name, and for models whose norms are not known; `TooLargeError` where too many latents fire.
    """
    adapter, layer = find_edge(subject, len(row), edge)
    name = find_sae(saes, edge.layer, sae)
    stream, call, heard = _read_layer(subject, row, layer)
    sees = heard.sees(0, slice(edge.query, edge.query + 1))
    visible = torch.arange(len(row)) if sees is None else torch.nonzero(sees[0].cpu())[:, 0]
    if edge.key not in visible:
        raise InputError(f"Query {edge.query} does not see key {edge.key}: it is outside of the window of layer {edge.layer}.")
    parts = _split(saes[name], stream, torch.cat([visible, torch.tensor([edge.query])]))
    with _replaying(subject, adapter, layer, call, edge.head) as replay:
        replay.remember(stream)
        query, query_names = _at_query(replay, parts)
        key, key_names, value = _at_key(replay, parts, int((visible == edge.key).nonzero()[0, 0]))
        keys = replay.run(parts.rows[:-1], visible).key
        ends = replay.run(parts.rows[[-1]], torch.tensor([edge.query])).query
    scores = heard.rescale(keys @ ends[0])
    place = visible.tolist().index(edge.key)
    score, cap = float(scores[place]), heard.softcap
    mass = float(heard.pattern(0, slice(edge.query, edge.query + 1))[edge.head, 0, edge.key])
    written = {}
    for found in explain_targets(subject, row, targets, saes):
        into = found.into.get(edge.layer)
        scale = 0.0 if into is None else mass * found.scales[edge.layer][edge.query]
        written[found.name] = np.zeros(len(value)) if into is None else value.numpy() @ into[edge.head] * scale
    slope = 1.0 if cap is None else 1.0 - float(np.tanh(score / cap)) ** 2
    pairs = heard.rescale(query @ key.T).numpy()
    return EdgeTerms(name, score, float(scores.mean()), slope, mass, query_names, key_names, pairs, written)


def find_edge(subject: SubjectModel, n_tokens: int, edge: Edge) -> tuple[Adapter, AttentionLayer]:
    """Return where an edge's head is. Raises `InputError` for one that is not there, or not known."""
    adapter, known = find_adapter(subject.net.config), {layer.layer: layer for layer in list_attention(subject.net)}
    if adapter is None:
        raise InputError(f"Pairs are not known of a {subject.net.config.model_type} model here: its norms are not in the table of `adapters.py`.")
    if edge.layer not in known:
        raise InputError(f"{subject.name} has no attention in layer {edge.layer}; those that attend are {sorted(known)}.")
    layer = known[edge.layer]
    if not 0 <= edge.head < layer.n_heads:
        raise InputError(f"There is no head {edge.layer}.{edge.head}; layer {edge.layer} has heads 0 to {layer.n_heads - 1}.")
    if not (0 <= edge.query < n_tokens and 0 <= edge.key < n_tokens) or (subject.is_causal and edge.key > edge.query):
        raise InputError(f"There is no edge from query {edge.query} to key {edge.key}: a query looks at itself and at what was before.")
    parameters = list(layer.module.parameters())
    if any(hasattr(module, "_hf_hook") for module in layer.module.modules()) or not all(each.is_floating_point() for each in parameters):
        raise InputError("Pairs need a layer's weights in one place, as floating-point numbers: load the model without device_map and quantisation.")
    return adapter, layer


def find_sae(saes: Mapping[str, AttachedSae], layer: int, wanted: str = "") -> str:
    """Return the name of the SAE that reads what a layer reads. Raises `InputError` with the point where one would be needed."""
    points = [f"resid_pre.{layer}", *([f"{STREAM}.{layer - 1}"] if layer else [])]
    fitting = [name for name, each in saes.items() if canonical_name(each.hook_point) in points and not each.is_transcoder and not each.more]
    if wanted in fitting:
        return wanted
    where = " or ".join(points)
    if wanted and wanted not in saes:
        raise InputError(f"No SAE is called {wanted!r:.80} here; there are {sorted(saes)}.")
    if wanted:
        read = ", ".join(saes[wanted].hook_points)
        raise InputError(f"The SAE {wanted!r} reads {read}, layer {layer} reads {where}: its pairs take an SAE there.")
    if not fitting:
        have = ", ".join(f"{name} at {each.hook_point}" for name, each in saes.items()) or "none"
        raise InputError(f"Pairs of layer {layer} take an SAE at {where}, what the layer reads. There are: {have}.")
    if len(fitting) > 1:
        raise InputError(f"Several SAEs read {where}: name one of {sorted(fitting)}.")
    return fitting[0]


def _read_layer(subject: SubjectModel, row: Sequence[int], layer: AttentionLayer) -> tuple[Tensor, "_Call", Attended]:
    """Run a text up to a layer's attention; return the stream that the layer reads, what its module was called with, and what attended."""
    heard: list[Attended] = []
    calls: list[_Call] = []
    handle = layer.module.register_forward_pre_hook(lambda _, args, kwargs: calls.append(_Call(args, kwargs)), with_kwargs=True)
    try:
        with attention_heard({layer.module: heard.append}):
            points = [f"resid_pre.{layer.layer}", f"attn_raw.{layer.layer}"]
            stream = subject.capture(torch.tensor([list(row)]), None, points)[points[0]]
    finally:
        handle.remove()
    return stream[0].double().cpu(), calls[0], heard[0]


class _Call(NamedTuple):
    """What a module was called with, for one text."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def turned(self, rows: Tensor, positions: Tensor, n_tokens: int) -> "_Call":
        """Return it for other hidden states [rows, 1, d_model], each alone at a position of the text."""

        def turn(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(turn, value))
            if not isinstance(value, Tensor):
                return None if hasattr(value, "update") else value  # a cache
            if value.ndim == 4 or value.dtype == torch.bool:  # a mask
                return None
            own = value.cpu()
            if own.ndim > 1 and own.shape[:2] == (1, n_tokens):  # angles, or positions themselves
                own = own[0, positions][:, None]
            return own.double() if own.is_floating_point() else own

        args = (rows, *map(turn, self.args[1:])) if self.args else ()
        kwargs = {name: turn(value) for name, value in self.kwargs.items()}
        return _Call(args, kwargs if args else {**kwargs, "hidden_states": rows})


class _Parts(NamedTuple):
    """The stream at the keys that a query sees, and last at the query, as an SAE takes it apart."""

    rows: Tensor
    """[places, d_model]"""
    places: Tensor
    bias: Tensor
    """[d_model]"""
    error: Tensor
    """[places, d_model]"""
    latents: Tensor
    """[latents]: those that fire anywhere here."""
    activations: Tensor
    """[places, latents]"""
    directions: Tensor
    """[latents, d_model]"""


def _split(attached: AttachedSae, stream: Tensor, places: Tensor) -> _Parts:
    sae, rows = attached.sae, stream[places]
    device = sae.W_dec.device
    x = rows.float().to(device)
    if x.shape[1] != sae.d_in:
        raise InputError(f"The SAE of {attached.hook_point!r} encodes rows of {sae.d_in}; there are rows of {x.shape[1]}.")
    with torch.no_grad():
        found = sae.encode(x)
        bias = sae.reconstruct(x[:1], torch.zeros_like(found[:1]))[0].double().cpu()
        latents = torch.nonzero((found != 0).any(dim=0))[:, 0]
        activations, directions = found[:, latents].double().cpu(), sae.W_dec[latents].detach().double().cpu()
    return _Parts(rows, places, bias, rows - bias - activations @ directions, latents.cpu(), activations, directions)


class _States(NamedTuple):
    """Of one head, [rows, d_head] float64, after everything that comes before the product."""

    query: Tensor
    key: Tensor
    value: Tensor


class _Replay:
    """Runs rows through one layer's attention as its norms are in the text."""

    def __init__(self, adapter: Adapter, layer: AttentionLayer, norm: nn.Module | None, call: _Call, head: int) -> None:
        self.adapter, self.layer, self.norm, self.call, self.head = adapter, layer, norm, call, head
        self.n_tokens = 0
        self.divisors: dict[nn.Module, list[Tensor]] = {}
        self.places: Tensor | None = None
        """Positions of the rows that are run; None while divisors are remembered."""

    def remember(self, stream: Tensor) -> None:
        """Run the text itself, [tokens, d_model], and keep what every norm divides by."""
        self.n_tokens = len(stream)
        for positions in torch.arange(self.n_tokens).split(_CHUNK):
            self._run(stream[positions], positions, is_linear=False)

    def run(self, rows: Tensor, positions: Tensor, *, is_linear: bool = False) -> _States:
        """Run rows [rows, d_model] that stand at these positions; `is_linear` leaves all biases out."""
        found = []
        for some, where in zip(rows.split(_CHUNK), positions.split(_CHUNK), strict=True):
            self.places = where
            found.append(self._run(some, where, is_linear=is_linear))
        return _States(*map(torch.cat, zip(*found, strict=True)))

    def _run(self, rows: Tensor, positions: Tensor, *, is_linear: bool) -> _States:
        hidden = rows[:, None]
        if self.norm is not None:
            hidden = functional_call(self.norm, _weights(self.norm, is_linear=is_linear), (hidden,))
        call = self.call.turned(hidden, positions, self.n_tokens)
        heard: list[Attended] = []
        module = self.layer.module
        with attention_heard({module: heard.append}), torch.no_grad():
            functional_call(module, _weights(module, is_linear=is_linear), call.args, call.kwargs)
        shared = self.head * self.layer.n_key_heads // self.layer.n_heads
        return _States(heard[0].query[:, self.head, 0], heard[0].key[:, shared, 0], heard[0].value[:, shared, 0])

    def divide(self, module: nn.Module, args: tuple[Any, ...], _output: Tensor) -> Tensor:
        """Take the place of a norm: it divides by what it divides by in the text."""
        x = args[0]
        if self.places is None:
            divisor = norm_divisor(module, x)
            self.divisors.setdefault(module, []).append(divisor)
        else:
            divisor = torch.cat(self.divisors[module])[self.places]
        centred = x - x.mean(dim=-1, keepdim=True) if isinstance(module, nn.LayerNorm) else x
        gained = centred / divisor * norm_gain(module, self.adapter)
        bias = getattr(module, "bias", None)
        return gained if bias is None else gained + bias


@contextmanager
def _replaying(subject: SubjectModel, adapter: Adapter, layer: AttentionLayer, call: _Call, head: int) -> Iterator[_Replay]:
    norm = subject.net.base_model.get_submodule(adapter.attn_norm.format(layer=layer.layer)) if adapter.attn_norm else None
    replay = _Replay(adapter, layer, norm, call, head)
    with ExitStack() as stack:
        for module in filter(is_norm, [*layer.module.modules(), *([norm] if norm is not None else [])]):
            stack.callback(module.register_forward_hook(replay.divide).remove)
        yield replay


def _weights(module: nn.Module, *, is_linear: bool) -> dict[str, Tensor]:
    found = {}
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        own = value.detach().cpu()
        own = own.double() if own.is_floating_point() else own
        found[name] = torch.zeros_like(own) if is_linear and name.endswith("bias") else own
    return found


def _at_query(replay: _Replay, parts: _Parts) -> tuple[Tensor, list[int | str]]:
    """Return the query's terms, [terms, d_head]."""
    fires = torch.nonzero(parts.activations[-1])[:, 0]
    rows = torch.cat([parts.activations[-1, fires, None] * parts.directions[fires], parts.error[-1:]])
    here = parts.places[-1:]
    terms = replay.run(rows, here.expand(len(rows)), is_linear=True).query
    bias = replay.run(parts.bias[None], here).query
    return torch.cat([terms, bias]), [*parts.latents[fires].tolist(), ERROR, BIAS]


def _at_key(replay: _Replay, parts: _Parts, place: int) -> tuple[Tensor, list[int | str], Tensor]:
    """Return the key's terms less their means over all keys, [terms, d_head], and those of its value, without `OTHER`."""
    keys, activations = parts.places[:-1], parts.activations[:-1]
    fires = torch.nonzero(activations[place])[:, 0]
    where, which = torch.nonzero(activations[:, fires], as_tuple=True)
    if len(where) > MAX_ROWS or (len(fires) + 3) * len(parts.latents) > 64 * MAX_ROWS:
        raise TooLargeError(f"{len(fires):,} latents fire at the key, {len(where):,} times at visible keys: at most {MAX_ROWS:,} are explained.")
    rows = activations[where, fires[which], None] * parts.directions[fires[which]]
    firings = replay.run(rows, keys[where], is_linear=True) if len(rows) else None
    error = replay.run(parts.error[:-1], keys, is_linear=True)
    bias = replay.run(parts.bias.expand(len(keys), -1), keys)
    whole = replay.run(parts.rows[:-1], keys)
    n, d_head = len(fires), error.key.shape[1]
    means, own, values = torch.zeros(n, d_head).double(), torch.zeros(n, d_head).double(), torch.zeros(n, error.value.shape[1]).double()
    if firings:
        means.index_add_(0, which, firings.key / len(keys))
        here = where == place
        own[which[here]], values[which[here]] = firings.key[here], firings.value[here]
    rest = whole.key.mean(dim=0) - means.sum(dim=0) - error.key.mean(dim=0) - bias.key.mean(dim=0)
    sides = [own - means, error.key[place] - error.key.mean(dim=0), bias.key[place] - bias.key.mean(dim=0), -rest]
    terms = torch.cat([sides[0], torch.stack(sides[1:])])
    return terms, [*parts.latents[fires].tolist(), ERROR, BIAS, OTHER], torch.cat([values, error.value[[place]], bias.value[[place]]])
