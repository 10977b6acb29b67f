"""Attention becomes visible: queries, keys, values and patterns of the layers that are asked for, without changing those that are not.

Fast attention never holds the pattern. So a network is given, once, an attention function of ours in place of its own:

1. A module that nobody asks about is handed to the network's own function, with the network's own mask: the same bits, the same kernels.
2. A module that is asked about runs its family's eager function, so that soft caps, windows, sinks and grouped heads come along. That one
   wants an additive mask, which is made here of what the fast function was given (nothing, or a boolean mask).
3. If the pattern is replaced, the values are mixed again by the new one.
4. A module that is only listened to runs as in 1, and what its function was given is handed on: rows of the pattern follow from that alone
   (`Attended`), some queries at a time, so that no layer's whole pattern is ever held.

Which modules attend is told by the adapter table; of a type that is not in it, those count that are called attention, know their layer and call
attention functions. Layers without such a module (state space, linear attention) are left out.

Switching the implementation for one request instead would write into the configuration that all layers share. GPT-J and GPT-Neo do not
take attention functions; their own method is wrapped while somebody asks.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, NamedTuple
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from interp_assets.errors import InputError
from interp_assets.garcon.adapters import find_adapter

Act = Callable[[Tensor], Tensor]
"""Takes a tensor and returns what the network goes on with: the same object when nothing changes."""
_SDPA, _EAGER = "observed_sdpa", "observed_eager"
_OBSERVED: Final = {"sdpa": _SDPA, "eager": _EAGER}
_asked: WeakKeyDictionary[nn.Module, Mapping[str, Act]] = WeakKeyDictionary()


class Attended(NamedTuple):
    """What one module's attention was given, and what it made of that: all that its pattern follows from."""

    query: Tensor
    """[batch, heads, context, d_head], after rotary embedding and norm."""
    key: Tensor
    """[batch, key heads, context, d_head], likewise."""
    value: Tensor
    """[batch, key heads, context, d_value]."""
    mixed: Tensor
    """[batch, context, heads, d_value]: what the network goes on with."""
    rescale: Callable[[Tensor], Tensor]
    """Makes scores of products, in place."""
    softcap: float | None
    sinks: Tensor | None
    """[heads]: the logit of a key that is not there, where a model learns one."""
    visible: Tensor | None
    """[batch or 1, 1, queries, keys] booleans; None where every query sees all keys."""

    def products(self, context: int, queries: slice, n_keys: int | None = None) -> Tensor:
        """Return the scores of these queries with the first `n_keys` keys, [heads, queries, keys] float32, whether they see them or not."""
        query, key = self.query[context, :, queries].float(), self.key[context, :, :n_keys].float()
        scores = self.rescale(torch.matmul(query, repeat_kv(key[None], query.shape[0] // key.shape[0])[0].transpose(1, 2)))
        return scores if self.softcap is None else torch.tanh(scores / self.softcap) * self.softcap

    def scores(self, context: int, queries: slice) -> Tensor:
        """Return what the softmax is of, [heads, queries, keys] float32; -inf at keys that a query does not see."""
        scores, seen = self.products(context, queries), self.sees(context, queries)
        return scores if seen is None else scores.masked_fill_(~seen, -torch.inf)

    def sees(self, context: int, queries: slice) -> Tensor | None:
        """Return which keys these queries see, [queries, keys]; None where that is all of them."""
        return None if self.visible is None else self.visible[min(context, len(self.visible) - 1), 0, queries]

    def pattern(self, context: int, queries: slice) -> Tensor:
        """Return these queries' rows of the pattern, [heads, queries, keys] float32; what a learned sink takes is missing from their sums."""
        scores = self.scores(context, queries)
        if self.sinks is not None:
            scores = torch.cat([scores, self.sinks.float()[:, None, None].expand(*scores.shape[:2], 1)], dim=-1)
        pattern = torch.softmax(scores, dim=-1)
        return pattern if self.sinks is None else pattern[..., :-1]


Listener = Callable[[Attended], None]
_listened: WeakKeyDictionary[nn.Module, Listener] = WeakKeyDictionary()


def observe_attention(net: PreTrainedModel) -> None:
    """Give a network the attention function of this module. Networks with other kernels, and those that are observed already, stay as they are."""
    config = net.config.get_text_config()
    observed = _OBSERVED.get(config._attn_implementation or "")  # noqa: SLF001 - the only name it has
    reorders = getattr(config, "reorder_and_upcast_attn", False)  # a second eager path inside GPT-2, which the name "eager" selects
    if observed and not reorders and any(_eager_of(module) for module in net.modules()):
        config._attn_implementation = observed  # noqa: SLF001 - as above


def explain_blind(module: nn.Module) -> str:
    """Say why a module's queries, keys, values and pattern cannot be seen; empty when they can."""
    if hasattr(module, "_attn"):
        return ""
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
    if implementation in (_SDPA, _EAGER) and _eager_of(module):
        return ""
    return f"{type(module).__name__} computes attention by {implementation!r}, which hands out neither queries and keys nor patterns"


class AttentionLayer(NamedTuple):
    """One attending module."""

    layer: int
    module: nn.Module
    o_proj: nn.Module
    """The module that multiplies by W_O."""
    n_heads: int
    n_key_heads: int
    window: int | None
    """Keys that a query sees at most, itself included; None where it sees all before it."""

    def W_O(self) -> Float[Tensor, "heads d_value d_model"]:
        """Return what each head's mixed values are multiplied by, float32 on the module's device."""
        weight: Any = self.o_proj.weight
        matrix = weight.detach().float()
        if isinstance(self.o_proj, nn.Linear):
            matrix = matrix.T
        return matrix.reshape(self.n_heads, -1, matrix.shape[1])


def list_attention(net: PreTrainedModel) -> list[AttentionLayer]:
    """List the attending modules of a network in order of their layers.

    Raises `InputError` for a model none of whose layers can be listened to, with the reason.
    """
    kind = net.config.model_type
    if getattr(net.config, "is_encoder_decoder", False):
        raise InputError(f"A {kind} model attends from a decoder to an encoder: heads are shown of models that read one text.")
    found = list(_known(net)) or list(_unknown(net))
    reasons = {explain_deaf(layer.module) for layer in found} - {""}
    if not found or reasons:
        why = min(reasons) if reasons else "none of its layers attends by an attention function"
        raise InputError(f"The heads of a {kind} model cannot be shown: {why}. Leave `heads` out of the configuration.")
    return found


def list_other_layers(net: PreTrainedModel) -> dict[int, str]:
    """Name what stands in the layers that do not attend, such as `mamba` or `linear attention`. Raises as `list_attention` does."""
    config = net.config.get_text_config()
    attending = {layer.layer for layer in list_attention(net)}
    kinds = getattr(config, "layers_block_type", None) or getattr(config, "layer_types", None) or []
    others = (layer for layer in range(n_layers(net)) if layer not in attending)
    return {layer: str(kinds[layer]).replace("_", " ") if layer < len(kinds) else "no attention" for layer in others}


def runs_together(net: PreTrainedModel) -> bool:
    """Tell whether a context's bits are the same whatever others run beside it in batches of one size; not known of mixtures of experts."""
    adapter = find_adapter(net.config)
    return bool(adapter and adapter.mlp_act)


def _known(net: PreTrainedModel) -> Iterator[AttentionLayer]:
    adapter = find_adapter(net.config)
    for layer in range(n_layers(net)) if adapter else ():
        assert adapter
        yield _make(net, layer, *(net.base_model.get_submodule(path.format(layer=layer)) for path in (adapter.attention, adapter.o_proj)))


def _unknown(net: PreTrainedModel) -> Iterator[AttentionLayer]:
    for module in net.modules():
        layer, o_proj = getattr(module, "layer_idx", None), getattr(module, "o_proj", None)
        if isinstance(layer, int) and isinstance(o_proj, nn.Linear) and "Attention" in type(module).__name__:
            yield _make(net, layer, module, o_proj)


def _make(net: PreTrainedModel, layer: int, module: nn.Module, o_proj: nn.Module) -> AttentionLayer:
    config = net.config.get_text_config()
    heads = int(config.num_attention_heads)
    window = getattr(module, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if window is None and kinds is None:  # one window for all layers, which the mask alone knows
        window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return AttentionLayer(layer, module, o_proj, heads, int(getattr(config, "num_key_value_heads", None) or heads), window)


def gram(layer: AttentionLayer) -> Float[Tensor, "heads d_value d_value"]:
    """Return W_O W_O' of each head: by it the length of what a value becomes is found without making that."""
    W_O = layer.W_O()
    return torch.bmm(W_O, W_O.transpose(1, 2))


def n_layers(net: PreTrainedModel) -> int:
    """Return the number of blocks."""
    return int(net.config.get_text_config().num_hidden_layers)


def explain_deaf(module: nn.Module) -> str:
    """Say why a module cannot be listened to; empty when it can."""
    if hasattr(module, "_attn") and not hasattr(module, "scale_attn"):
        return f"{type(module).__name__} masks keys inside its own method, where no attention function is called"
    return explain_blind(module)


@contextmanager
def attention_heard(listeners: Mapping[nn.Module, Listener]) -> Iterator[None]:
    """Hand each module's `Attended` to its listener while this is open; the network computes what it computes without, bit for bit."""
    try:
        for module, listener in listeners.items():
            if own := getattr(module, "_attn", None):
                vars(module)["_attn"] = _hear_own(module, own, listener)
            else:
                _listened[module] = listener
        yield
    finally:
        for module in listeners:
            vars(module).pop("_attn", None)  # the class's own is found again
            _listened.pop(module, None)


def _hear_own(module: Any, own: Callable[..., Any], listener: Listener) -> Callable[..., Any]:
    """Return GPT-J's method with a listener: it divides, in float32, by a number that the module keeps."""

    def attend(query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        output, weights = own(query, key, value, attention_mask)
        seen = _boolean(module, query, key, attention_mask, is_causal=True)
        listener(Attended(query, key, value, output.transpose(1, 2), lambda scores: scores.div_(module.scale_attn), None, None, seen))
        return output, weights

    return attend


@contextmanager
def attention_tapped(module: nn.Module, acts: Mapping[str, Act]) -> Iterator[None]:
    """Hand `q`, `k`, `v` [batch, context, heads, d_head] and `pattern` [batch, heads, queries, keys] of a module to `acts` while this is open."""
    own: Any = getattr(module, "_attn", None)  # GPT-J and GPT-Neo have no other seam

    def attend(query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return _mix(acts, query, key, value, lambda *states: own(*states, attention_mask))

    if own:
        vars(module)["_attn"] = attend
    else:
        _asked[module] = acts
    try:
        yield
    finally:
        vars(module).pop("_attn", None)  # the class's own is found again
        _asked.pop(module, None)


def _observed(own: Callable[..., Any] | None) -> Callable[..., Any]:
    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any) -> tuple[Any, Any]:
        acts = _asked.get(module)
        if acts is None:
            output, weights = (own or _eager_of(module))(module, query, key, value, attention_mask, **options)
            if listener := _listened.get(module):
                seen = _boolean(module, query, key, attention_mask, options.get("is_causal"))
                scaling = options.get("scaling") or query.shape[-1] ** -0.5
                listener(Attended(query, key, value, output, lambda scores: scores.mul_(scaling), options.get("softcap"), options.get("s_aux"), seen))
            return output, weights
        eager = _eager_of(module)
        mask = attention_mask if own is None else _additive(module, query, key, attention_mask, options.get("is_causal"))
        output, weights = _mix(acts, query, key, value, lambda *states: _first_transposed(eager(module, *states, mask, **options)))
        return output.transpose(1, 2).contiguous(), weights

    return attend


def _mix(acts: Mapping[str, Act], query: Tensor, key: Tensor, value: Tensor, attend: Callable[..., Any]) -> tuple[Tensor, Tensor]:
    """Attend with what the acts make of queries, keys, values and pattern; `attend` returns [batch, heads, queries, d_head] and the pattern."""
    states = [_by_position(acts.get(name), state) for name, state in zip("qkv", (query, key, value), strict=True)]
    output, weights = attend(*states)
    if act := acts.get("pattern"):
        changed = act(weights)
        if changed is not weights:
            values = states[2]
            output = torch.matmul(changed, repeat_kv(values, changed.shape[1] // values.shape[1]))
            weights = changed
    return output, weights


def _by_position(act: Act | None, state: Tensor) -> Tensor:
    """Apply an act to a state whose heads stand before its positions."""
    if act is None:
        return state
    turned = state.transpose(1, 2)
    changed = act(turned)
    return state if changed is turned else changed.transpose(1, 2)


def _first_transposed(result: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return result[0].transpose(1, 2), result[1]


def _additive(module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool | None) -> Tensor | None:  # noqa: FBT001
    """Return what an eager function adds to the scores, for a mask as the fast function takes it: none (causal by itself), or boolean."""
    if mask is None or mask.dtype == torch.bool:
        mask = _boolean(module, query, key, mask, is_causal)
        return None if mask is None else torch.zeros((), dtype=query.dtype, device=query.device).where(mask, torch.finfo(query.dtype).min)
    return mask


def _boolean(module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool | None) -> Tensor | None:  # noqa: FBT001
    """Return which keys each query sees, for a mask as either function takes it; None where that is all of them.

    Raises `InputError` for a mask that also favours keys: the scores would not be those of queries and keys.
    """
    if mask is None:
        n_queries, n_keys = query.shape[2], key.shape[2]
        if n_queries == 1 or not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
            return None
        return torch.ones((n_queries, n_keys), dtype=torch.bool, device=query.device).tril(n_keys - n_queries)[None, None]
    if mask.dtype == torch.bool:
        return mask
    seen = mask == 0
    if not bool((seen | (mask <= torch.finfo(mask.dtype).min / 2)).all()):
        raise InputError(f"{type(module).__name__} adds a bias of its own to the scores of queries and keys: its pattern does not follow from them.")
    return seen


def _eager_of(module: nn.Module) -> Any:
    return getattr(sys.modules.get(type(module).__module__), "eager_attention_forward", None)


AttentionInterface.register(_SDPA, _observed(sdpa_attention_forward))
AttentionMaskInterface.register(_SDPA, sdpa_mask)
AttentionInterface.register(_EAGER, _observed(None))
AttentionMaskInterface.register(_EAGER, eager_mask)
