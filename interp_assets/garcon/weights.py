"""A weight's name becomes a copy of it, by head and turned as TransformerLens writes it: rows go in, columns come out.

    W_E [vocabulary, d_model]          W_pos [context, d_model]         W_U [d_model, vocabulary]          b_U [vocabulary]
    W_Q W_K W_V [heads, d_model, d_head]    W_O [heads, d_head, d_model]     b_Q b_K b_V [heads, d_head]        b_O [d_model]
    W_in W_gate [d_model, d_mlp]       W_out [d_mlp, d_model]           b_in b_gate [d_mlp]                b_out [d_model]

These are the network's own numbers, nothing is folded or centred (TransformerLens' `from_pretrained_no_processing`), so
q = attn_in W_Q + b_Q before a norm of queries and RoPE, attn_raw = sum of z W_O over heads + b_O, mlp_raw = mlp_act W_out + b_out. Keys and
values that several heads share stand once, and `head` counts them, not the queries' heads.

Where the modules are is `adapters.py`'s; how queries, keys and values lie in them is told by the module's name: three modules, one
that holds them one after the other (`c_attn`, `qkv_proj`), or one that holds them head by head (`query_key_value`).
"""

import difflib
import re
from typing import Any, Final

from torch import Tensor, nn
from transformers import PreTrainedModel

from interp_assets.errors import InputError
from interp_assets.garcon.adapters import Adapter, find_adapter
from interp_assets.garcon.points import n_heads, n_layers
from interp_assets.garcon.spread import read_parameter

OUTSIDE: Final = ("W_E", "W_pos", "W_U", "b_U")
IN_BLOCK: Final = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O", "W_in", "W_gate", "W_out", "b_in", "b_gate", "b_out")
_BY_HEAD: Final = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V")
_TRANSFORMERLENS: Final = re.compile(r"blocks\.(\d+)\.(?:attn|mlp)\.(\w+)|(?:embed|pos_embed|unembed)\.(\w+)")
_STATES: Final = {"Q": ("q_proj", "query", "q_lin"), "K": ("k_proj", "key", "k_lin"), "V": ("v_proj", "value", "v_lin")}
_IN_A_ROW: Final = ("c_attn", "qkv_proj")
_BY_TURNS: Final = "query_key_value"
_UP: Final = ("up_proj", "c_fc", "fc1", "fc_in", "dense_h_to_4h", "dense", "lin1")
_GATE_AND_UP: Final = "gate_up_proj"
_POSITIONS: Final = ("wpe", "position_embeddings", "embed_positions")


def read_weight(net: PreTrainedModel, name: str, head: int | None = None) -> Tensor:
    """Return a copy of a weight, of one head if `head` is given. Raises `InputError` for what this model does not have, with the reason."""
    kind, layer = _parse(net, name)
    adapter = find_adapter(net.config)
    if layer is None or adapter is None:
        value = _outside(net, kind)
    elif kind[2:] in "QKV":
        value = _state(net, adapter, kind, layer)
    elif kind[2:] == "O":
        value = _output(net, adapter, kind, layer)
    else:
        value = _mlp(net, adapter, kind, layer)
    if head is None:
        return value.detach().clone()
    if kind not in _BY_HEAD:
        raise InputError(f"{name} has no heads: leave `head` out. By head are {', '.join(_BY_HEAD)}.")
    if not 0 <= head < len(value):
        raise InputError(f"{name} has heads 0 to {len(value) - 1}; found {head}.")
    return value[head].detach().clone()


def _parse(net: PreTrainedModel, name: str) -> tuple[str, int | None]:
    found = _TRANSFORMERLENS.fullmatch(name)
    ours = (f"{found[2]}.{found[1]}" if found[2] else found[3]) if found else name
    kind, _, layer = ours.partition(".")
    if kind in OUTSIDE and not layer:
        return kind, None
    if find_adapter(net.config) is None:
        raise InputError(f"Weight {name!r}: where the blocks of a {net.config.model_type!r} model lie is not known here; {', '.join(OUTSIDE)} are.")
    if kind in IN_BLOCK and layer.isdecimal() and int(layer) < n_layers(net):
        return kind, int(layer)
    known = [*OUTSIDE, *(f"{kind}.{index}" for index in range(n_layers(net)) for kind in IN_BLOCK)]
    raise InputError(
        f"There is no weight {name!r}. Near: {', '.join(difflib.get_close_matches(ours, known, 4, 0.4)) or 'none'}. The names are "
        f"{', '.join(OUTSIDE)}, and {', '.join(f'{kind}.L' for kind in IN_BLOCK)} with L from 0 to {n_layers(net) - 1}."
    )


def _outside(net: PreTrainedModel, kind: str) -> Tensor:
    if kind == "W_E":
        return _weight(net.get_input_embeddings())
    if kind == "W_pos":
        return _positions(net)
    head: Any = net.get_output_embeddings()
    if head is None:
        raise InputError(f"A {net.config.model_type} model as it is loaded here has no language-model head, and no {kind}.")
    return _part_of(head, kind, "unembedding")


def _positions(net: PreTrainedModel) -> Tensor:
    for path, module in net.named_modules():
        if path.rpartition(".")[2] in _POSITIONS and isinstance(module, nn.Embedding):
            first = getattr(module, "offset", 0) or (0 if module.padding_idx is None else module.padding_idx + 1)
            return _weight(module)[first:]
    raise InputError(f"A {net.config.model_type} model has no W_pos: it has no table of positions, they turn its queries and keys.")


def _state(net: PreTrainedModel, adapter: Adapter, kind: str, layer: int) -> Tensor:
    """Return W_Q, W_K, W_V or their biases by head."""
    attention = _module(net, adapter.attention, layer)
    states, wanted = _children(attention), kind[2:]
    heads = [n_heads(net, state) for state in "qkv"]
    if name := next((name for name in _STATES[wanted] if name in states), None):
        return _by_head(_part_of(states[name], kind, name), heads["QKV".index(wanted)])
    if name := next((name for name in _IN_A_ROW if name in states), None):
        whole = _part_of(states[name], kind, name)
        d_head = whole.shape[-1] // sum(heads)
        return _by_head(whole.split([count * d_head for count in heads], dim=-1)["QKV".index(wanted)], heads["QKV".index(wanted)])
    if _BY_TURNS in states:
        whole = _by_head(_part_of(states[_BY_TURNS], kind, _BY_TURNS), heads[0])
        return whole.chunk(3, dim=-1)["QKV".index(wanted)]
    raise InputError(f"Where {type(attention).__name__} keeps {kind} is not known here: its modules are {sorted(states)}.")


def _by_head(value: Tensor, heads: int) -> Tensor:
    """Turn [d_model, heads * d_head] into [heads, d_model, d_head], and [heads * d_head] into [heads, d_head]."""
    split = value.unflatten(-1, (heads, -1))
    return split if split.ndim == 2 else split.transpose(0, 1)


def _output(net: PreTrainedModel, adapter: Adapter, kind: str, layer: int) -> Tensor:
    value = _part_of(_module(net, adapter.o_proj, layer), kind, adapter.o_proj.rpartition(".")[2])
    return value if kind == "b_O" else value.unflatten(0, (n_heads(net, "z"), -1))


def _mlp(net: PreTrainedModel, adapter: Adapter, kind: str, layer: int) -> Tensor:
    if not adapter.mlp_act:
        raise InputError(f"A {net.config.model_type} model has no single {kind}.{layer}: its MLP is a mixture of experts. Read its modules instead.")
    if kind[2:] == "out":
        return _part_of(_module(net, adapter.mlp_act, layer), kind, adapter.mlp_act.rpartition(".")[2])
    entry = _module(net, adapter.mlp_in, layer)
    modules = _children(entry) or {"fc1": entry}
    if _GATE_AND_UP in modules:
        return _part_of(modules[_GATE_AND_UP], kind, _GATE_AND_UP).chunk(2, dim=-1)[kind[2:] == "in"]
    wanted = ("gate_proj",) if kind[2:] == "gate" else _UP
    name = next((name for name in wanted if name in modules), None)
    if name is None:
        raise InputError(f"A {net.config.model_type} model has no {kind}.{layer}: the modules of its MLP are {sorted(modules)}.")
    return _part_of(modules[name], kind, name)


def _module(net: PreTrainedModel, path: str, layer: int) -> nn.Module:
    return net.base_model.get_submodule(path.format(layer=layer))


def _children(module: nn.Module) -> dict[str, nn.Module]:
    return dict(module.named_children())


def _part_of(module: nn.Module, kind: str, name: str) -> Tensor:
    """Return a module's bias, or its weight as [in, out]: as transformers' `Conv1D` keeps it, and the other way round than `Linear`."""
    if kind.startswith("b_"):
        bias = read_parameter(module, "bias")
        if bias is None:
            raise InputError(f"There is no {kind}: {name} of this model has no bias.")
        return bias
    return _weight(module) if type(module).__name__ == "Conv1D" else _weight(module).T


def _weight(module: Any) -> Tensor:
    weight = read_parameter(module, "weight")
    assert weight is not None
    if not weight.is_floating_point():
        raise InputError(
            f"{type(module).__name__} keeps its weight as {str(weight.dtype).removeprefix('torch.')}: load the model without quantisation."
        )
    return weight
