"""A token's logit or a latent's pre-activation becomes what adds to it: a number a key of every head, and what all else in the model gives.

    W[q, k] = A[q, k] c[k] r[q]          c = v W_O w: one number a key of a head, whatever the query

Of a logit w is the token's column of the unembedding with the last norm's gain folded in, centred over the vocabulary (softmax sees no constant)
and, where the norm centres, over the stream; r = 1 / sigma of that norm, frozen as this forward has it. Of a latent of an SAE at `resid_post.L` w is
its column of W_enc and r is 1. Where a norm stands behind attention (Gemma 2, 3, OLMo 2, 3) its gain goes into w and its scale into r.

Everything is summed in float64. All terms together are the target; what is left, because the network rounds its sums, is the term `rounding`.
This is the direct path: what later layers make of an edge is not in it. A bounded logit is taken before its bound.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from interp_assets.errors import InputError
from interp_assets.garcon.adapters import Adapter, find_adapter
from interp_assets.garcon.attention import Attended, AttentionLayer, attention_heard, list_attention
from interp_assets.garcon.features import AttachedSae, check_latents
from interp_assets.garcon.points import find_point, n_layers, norm_divisor
from interp_assets.garcon.spread import read_parameter
from interp_assets.garcon.subject import SubjectModel

STREAM: Final = "resid_post"
_ROWS: Final = 8192
"""Of an unembedding that are summed at once."""


class Logit(NamedTuple):
    """A token's logit at every position, centred over the vocabulary."""

    token: int


class Latent(NamedTuple):
    """The pre-activation of a latent at every position."""

    sae: str
    latent: int


Target = Logit | Latent


@runtime_checkable
class Linear(Protocol):
    """An SAE whose pre-activations are `x W_enc + b_enc` of raw activations."""

    @property
    def W_enc(self) -> Tensor:
        """The encoder's columns, [d_in, d_sae]."""
        ...

    @property
    def b_enc(self) -> Tensor:
        """[d_sae]."""
        ...


class Terms(NamedTuple):
    """What adds to one target over a text."""

    name: str
    """`logit:<token>` or `feature:<sae>:<latent>`."""
    value: NDArray[np.float64]
    """[positions]: the target itself, of the residual stream as the model has it."""
    columns: dict[int, NDArray[np.float64]]
    """[heads, keys] by layer: what an edge is multiplied by at its key."""
    scales: dict[int, NDArray[np.float64]]
    """[queries] by layer: and at its query."""
    into: dict[int, NDArray[np.float64]]
    """[heads, d_value] by layer: what each number of a key's value counts, W_O w."""
    heads: dict[int, NDArray[np.float64]]
    """[heads, queries] by layer: what all edges of a query give."""
    others: dict[str, NDArray[np.float64]]
    """[positions]: `embedding`, `mlp.L`, `bias` (of the attention, the last norm, the head or the SAE) and `rounding`."""
    note: str

    def edges(self, head: str, pattern: NDArray[np.floating]) -> NDArray[np.float64]:
        """Return what every edge of a head gives, [queries, keys], by its pattern."""
        layer, place = map(int, head.split("."))
        return pattern * self.columns[layer][place][None, :] * self.scales[layer][:, None]


class _Direction(NamedTuple):
    """Where a target lies in the residual stream."""

    name: str
    w: Tensor
    bias: float
    last: int
    """The last layer that adds to it."""
    norm: nn.Module | None
    note: str


def explain_targets(subject: SubjectModel, row: Sequence[int], targets: Sequence[Target], saes: Mapping[str, AttachedSae]) -> list[Terms]:
    """Run one row of token ids once and return what adds to each target.

    Raises `InputError` for a model whose norms are not known here, a token or latent that is not there, and an SAE at another point.
    """
    adapter = find_adapter(subject.net.config)
    directions = [_point_at(subject, adapter, target, saes) for target in targets]
    if not directions:
        return []
    assert adapter
    layers = [layer for layer in list_attention(subject.net) if layer.layer <= max(direction.last for direction in directions)]
    ends = sorted({direction.last for direction in directions})
    kinds = ("mlp_out", "attn_raw") if adapter.attn_raw else ("mlp_out",)
    points = ["resid_pre.0", *(f"{kind}.{layer.layer}" for layer in layers for kind in kinds), *(f"{STREAM}.{last}" for last in ends)]
    heard: dict[int, Attended] = {}
    listeners = {layer.module: lambda found, number=layer.layer: heard.update({number: found}) for layer in layers}
    with attention_heard(listeners):
        captured = subject.capture(torch.tensor([list(row)]), None, points)
    streams = {name: value[0].double().cpu() for name, value in captured.items()}
    seen = _Seen(adapter, subject, layers, heard, streams)
    return [_add_up(seen, direction) for direction in directions]


class _Seen(NamedTuple):
    adapter: Adapter
    subject: SubjectModel
    layers: list[AttentionLayer]
    heard: dict[int, Attended]
    streams: dict[str, Tensor]


def _point_at(subject: SubjectModel, adapter: Adapter | None, target: Target, saes: Mapping[str, AttachedSae]) -> _Direction:
    kind = subject.net.config.model_type
    if adapter is None or not subject.is_causal:
        raise InputError(f"What adds to a target is not known of a {kind} model here: its norms and streams are not in the table of `adapters.py`.")
    if isinstance(target, Logit):
        return _point_at_logit(subject, adapter, target.token)
    if target.sae not in saes:
        raise InputError(f"No SAE is called {target.sae!r:.80} here; there are {sorted(saes)}.")
    attached = saes[target.sae]
    check_latents(attached, (target.latent,))
    point = find_point(subject.net, attached.hook_point)
    if point.kind != STREAM or attached.more:
        where = ", ".join(attached.hook_points)
        raise InputError(f"The SAE {target.sae!r} reads {where}: edges add up to what is read at {STREAM}.L alone. Choose an SAE there.")
    if not isinstance(attached.sae, Linear):
        raise InputError(f"The SAE {target.sae!r} has no W_enc and b_enc: what adds to its pre-activations is not known here.")
    w, bias = attached.sae.W_enc[:, target.latent].double().cpu(), float(attached.sae.b_enc[target.latent])
    return _Direction(f"feature:{target.sae}:{target.latent}", w, bias, int(point.name.partition(".")[2]), None, "")


def _point_at_logit(subject: SubjectModel, adapter: Adapter, token: int) -> _Direction:
    head, kind = subject.net.get_output_embeddings(), subject.net.config.model_type
    if head is None or not adapter.final_norm:
        raise InputError(
            f"A {kind} model has {'no language-model head' if head is None else 'no last norm'} here: edges do not add up to its logits."
        )
    matrix, bias = read_parameter(head, "weight"), read_parameter(head, "bias")
    assert matrix is not None
    if not 0 <= token < len(matrix):
        raise InputError(f"There is no token {token:,}: the model has logits of tokens 0 to {len(matrix) - 1:,}.")
    if matrix.shape[1] != subject.d_model:
        raise InputError(
            f"The logits of this {kind} model are of vectors of {matrix.shape[1]}, its stream is {subject.d_model} wide: edges do not add up."
        )
    norm = subject.net.base_model.get_submodule(adapter.final_norm)
    mean = torch.stack([part.sum(dim=0, dtype=torch.float64) for part in matrix.detach().split(_ROWS)]).sum(dim=0) / len(matrix)
    column = (matrix[token].detach().double() - mean).cpu()
    w = column * norm_gain(norm, adapter)
    beta = read_parameter(norm, "bias")
    constant = 0.0 if beta is None else float(beta.detach().double().cpu() @ column)
    constant += 0.0 if bias is None else float(bias[token].double() - bias.mean(dtype=torch.float64))
    if adapter.norm_kind == "layer":
        w = w - w.mean()
    cap = getattr(subject.net.config.get_text_config(), "final_logit_softcapping", None)
    note = f"The logit before it is bounded by {cap:g}." if cap else ""
    return _Direction(f"logit:{token}", w, constant, n_layers(subject.net) - 1, norm, note)


def norm_gain(norm: nn.Module, adapter: Adapter) -> Tensor:
    """Return what a norm multiplies by, float64 on the CPU."""
    weight = read_parameter(norm, "weight")
    assert weight is not None
    gain = weight.detach().double().cpu()
    return 1.0 + gain if adapter.norm_kind == "rms_plus_one" else gain


def _add_up(seen: _Seen, direction: _Direction) -> Terms:
    stream, w = seen.streams[f"{STREAM}.{direction.last}"], direction.w
    r = torch.ones(len(stream), dtype=torch.float64) if direction.norm is None else 1.0 / norm_divisor(direction.norm, stream)[:, 0]
    value = stream @ w * r + direction.bias
    others = {"embedding": seen.streams["resid_pre.0"] @ w * r}
    bias = torch.full_like(value, direction.bias)
    columns, scales, into, heads = {}, {}, {}, {}
    for layer in (each for each in seen.layers if each.layer <= direction.last):
        own, scale = _behind_norm(seen, layer, w, r)
        own_into = layer.W_O().double().cpu() @ own
        columns[layer.layer], heads[layer.layer] = _weigh(seen.heard[layer.layer], layer, own_into, scale)
        scales[layer.layer], into[layer.layer] = scale.numpy(), own_into.numpy()
        own_bias = read_parameter(layer.o_proj, "bias")
        bias = bias if own_bias is None else bias + float(own_bias.detach().double().cpu() @ own) * scale
        others[f"mlp.{layer.layer}"] = seen.streams[f"mlp_out.{layer.layer}"] @ w * r
    others["bias"] = bias
    terms = {name: term.numpy() for name, term in others.items()}
    terms["rounding"] = value.numpy() - sum(terms.values()) - sum(found.sum(axis=0) for found in heads.values())
    return Terms(direction.name, value.numpy(), columns, scales, into, heads, terms, direction.note)


def _behind_norm(seen: _Seen, layer: AttentionLayer, w: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Return direction and scale of what a layer's attention returns, which a norm may stand behind."""
    if not seen.adapter.attn_raw:
        return w, r
    norm = seen.subject.net.base_model.get_submodule(seen.adapter.attn_out.format(layer=layer.layer))
    return w * norm_gain(norm, seen.adapter), r / norm_divisor(norm, seen.streams[f"attn_raw.{layer.layer}"])[:, 0]


def _weigh(heard: Attended, layer: AttentionLayer, into: Tensor, r: Tensor) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return a layer's columns [heads, keys], and what each head gives [heads, queries]."""
    value, mixed = heard.value[0].double().cpu(), heard.mixed[0].double().cpu()
    value = value.repeat_interleave(layer.n_heads // len(value), dim=0)
    return torch.einsum("hkd,hd->hk", value, into).numpy(), (torch.einsum("qhd,hd->hq", mixed, into) * r).numpy()
