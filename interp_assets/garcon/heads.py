"""A network becomes the list of its attending modules: which layer each is of, its heads, and what multiplies what they mix.

A type in the adapter table is asked by its paths; of any other, modules that are called attention, know their layer and call attention functions
count. Layers without such a module (state space, linear attention) are left out, and named by who asks.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from interp_assets.errors import InputError
from interp_assets.garcon.adapters import find_adapter
from interp_assets.garcon.attention import explain_deaf
from interp_assets.garcon.points import n_layers


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


def absent_layers(net: PreTrainedModel) -> list[int]:
    """Return the layers that do not attend."""
    attending = {layer.layer for layer in list_attention(net)}
    return [layer for layer in range(n_layers(net)) if layer not in attending]


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
