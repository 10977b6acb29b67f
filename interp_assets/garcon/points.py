"""A hook point's name becomes a module of a loaded network, and the side of it on which the tensor is met.

Names are canonical (`resid_post.2`, see `adapters.py`), TransformerLens' (`blocks.2.hook_resid_post`) or raw (`module:model.layers.2.mlp`).
A name that does not fit is answered with the near ones, a point that a model does not have with the reason.
"""

import difflib
from functools import lru_cache
from typing import Any, Final, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from interp_assets.errors import InputError
from interp_assets.garcon.adapters import ADAPTERS, Adapter, Side, find_adapter, find_place
from interp_assets.garcon.attention import explain_blind, n_layers
from interp_assets.planning.hook_names import BY_HEAD, FIRST_KINDS, LAST_KINDS, LAYER_KINDS, alias_of, canonical_name, explain_other

MODULE: Final = "module:"
NORM: Final = "norm:"
"""Before a norm's path: what it divides by, [batch, context, 1]."""
_ATTENTION_KINDS: Final = ("q", "k", "v", "pattern")


class HookPoint(NamedTuple):
    """A place where activations are read and replaced."""

    name: str
    module_path: str
    """Dotted path from the loaded model, which itself is the empty path."""
    side: Side
    alias: str
    """TransformerLens' name, empty for `module:` paths."""
    refused: str = ""
    """Why this model does not have it; empty when it does."""

    @property
    def kind(self) -> str:
        """What it is, without the layer; `module` for a module's path, `norm` for what a norm divides by."""
        return _kind_of(self.name)


@lru_cache(maxsize=4096)
def _kind_of(name: str) -> str:
    known = next((prefix for prefix in (MODULE, NORM) if name.startswith(prefix)), "")
    return known.rstrip(":") or name.partition(".")[0]


_known: WeakKeyDictionary[PreTrainedModel, dict[str, HookPoint]] = WeakKeyDictionary()


def list_points(net: PreTrainedModel, *, with_refused: bool = False) -> list[HookPoint]:
    """List the canonical hook points of a network in the order of a forward; empty for a model type that is not in the table.

    `with_refused` adds those that the model does not have, each with the reason.
    """
    points = list(_known_points(net).values())
    return points if with_refused else [point for point in points if not point.refused]


def _known_points(net: PreTrainedModel) -> dict[str, HookPoint]:
    """Return all points of a network by name, found once: a trace asks for them many times."""
    known = _known.get(net)
    if known is None:
        known = _known[net] = {point.name: point for point in _make_points(net)}
    return known


def _make_points(net: PreTrainedModel) -> list[HookPoint]:
    adapter = find_adapter(net.config)
    if adapter is None:
        return []
    names = [*FIRST_KINDS, *(f"{kind}.{layer}" for layer in range(n_layers(net)) for kind in LAYER_KINDS), *LAST_KINDS]
    return [_canonical(net, adapter, name) for name in names]


def find_point(net: PreTrainedModel, name: str) -> HookPoint:
    """Resolve a hook point's name. Raises `InputError` that lists near names, or what can be named in a model of unknown type."""
    if name.startswith(MODULE):
        path = name.removeprefix(MODULE)
        known = [found for found, _ in net.named_modules() if found]
        if path not in known:
            raise InputError(f"Hook point {name!r}: the model has no module {path!r}. Near: {_near(path, known)}.")
        return HookPoint(name, path, "output", "")
    if name.startswith(NORM):
        norms = {point.name: point for point in list_norms(net)}
        if name not in norms:
            raise InputError(f"Hook point {name!r}: there is no norm of that path. Near: {_near(name, list(norms))}.")
        return norms[name]
    if point := _known_points(net).get(name):
        return _unless_refused(net, point, name)
    adapter = find_adapter(net.config)
    if adapter is None:
        raise InputError(
            f"Hook point {name!r}: where the residual stream of a {net.config.model_type!r} model lies is not known here{_peculiarity(net.config)} "
            f"(known: {sorted(ADAPTERS)}). Name a module instead: {_module_examples(net)}."
        )
    ours = own_name(net, name)
    if point := _known_points(net).get(ours):
        return _unless_refused(net, point, name)
    if meant := explain_other(name):
        raise InputError(f"Hook point {name!r} is TransformerLens' name of what has none here: {meant}.")
    near = _near(ours, [point.name for point in list_points(net)])
    raise InputError(
        f"{net.config.model_type} has no hook point {name!r}. Near: {near}. The names are {', '.join(f'{kind}.L' for kind in LAYER_KINDS)} "
        f"with L from 0 to {n_layers(net) - 1}, {', '.join((*FIRST_KINDS, *LAST_KINDS))}, or module:<path>."
    )


def own_name(net: PreTrainedModel, name: str) -> str:
    """Return our name of what TransformerLens calls `name` in this network; any other name as it is."""
    adapter = find_adapter(net.config)
    has_rope = adapter is None or adapter.has_rope
    return canonical_name(name if has_rope else name.replace(".hook_q", ".hook_rot_q").replace(".hook_k", ".hook_rot_k"))


def list_norms(net: PreTrainedModel) -> list[HookPoint]:
    """List what the norms of a network divide by, in the order of its modules."""
    return [HookPoint(NORM + path, path, "norm", "") for path, module in net.named_modules() if is_norm(module)]


def is_norm(module: nn.Module) -> bool:
    """Tell whether a module divides its input by its standard deviation or its root mean square."""
    return isinstance(module, nn.LayerNorm) or "RMSNorm" in type(module).__name__


def norm_divisor(module: nn.Module, x: Tensor) -> Tensor:
    """Return what a norm divides an input by, [..., 1], in float32."""
    told = next((getattr(module, name) for name in ("variance_epsilon", "eps") if getattr(module, name, None) is not None), None)
    epsilon = torch.finfo(x.dtype).eps if told is None else float(told)
    wide = x if x.dtype == torch.float64 else x.float()
    centred = wide - wide.mean(-1, keepdim=True) if isinstance(module, nn.LayerNorm) else wide
    return (centred.square().mean(-1, keepdim=True) + epsilon).sqrt()


def name_module(net: PreTrainedModel, path: str) -> list[str]:
    """Return the names of a module's output: canonical ones first, the contribution before the raw output, last `module:<path>`; [] for no module.

    `path` is as other tools write it: from the loaded model or from its base model. Whether the output of `layers.3.mlp` is `mlp_out.3` is for
    the model to say: where a norm follows, it is not what is added to the residual stream.
    """
    known = {found for found, _ in net.named_modules() if found}
    full = next((candidate for candidate in (path, f"{net.base_model_prefix}.{path}") if candidate in known), None)
    if full is None:
        return []
    found = [point.name for point in list_points(net) if point.module_path == full and point.side == "output"]
    return [*sorted(found, key=lambda name: "_raw" in name), MODULE + full]


def name_block_part(net: PreTrainedModel, part: Literal["mlp", "attn"], layer: int) -> list[str]:
    """Return the names, as `name_module` does, of what the MLP or the attention of block `layer` returns; none where the block has no such module."""
    adapter = find_adapter(net.config)
    modules = {"mlp": ("mlp",), "attn": ("attn", "self_attn", "attention")}[part]
    found = (name_module(net, f"{adapter.block.format(layer=layer)}.{module}") for module in modules) if adapter else ()
    return next((names for names in found if names), [])


def module_of(net: PreTrainedModel, point: HookPoint) -> nn.Module:
    """Return the module of a hook point."""
    module: Any = net
    for name in filter(None, point.module_path.split(".")):  # what `get_submodule` does, at a tenth of its cost
        module = module._modules[name]  # noqa: SLF001 - as above
    return module


def n_heads(net: PreTrainedModel, kind: str) -> int:
    """Return the number of heads of a kind that has heads: of keys and values there may be fewer than of queries."""
    config = net.config.get_text_config()
    heads = int(config.num_attention_heads)
    return int(getattr(config, "num_key_value_heads", None) or heads) if kind in ("k", "v") else heads


def point_shape(net: PreTrainedModel, point: HookPoint) -> tuple[int | str, ...] | None:
    """Return the shape of a canonical point's tensor, with words where it depends on the input; None for a module's path."""
    config, kind = net.config.get_text_config(), point.kind
    if kind == "pattern":
        return ("batch", n_heads(net, kind), "queries", "keys")
    if kind in BY_HEAD:
        d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return ("batch", "context", n_heads(net, kind), int(d_head))
    if kind == "module":
        return None
    if kind == "norm":
        return ("batch", "context", 1)
    weight: Any = module_of(net, point).weight if kind in ("embed", "mlp_act") else None
    if kind == "mlp_act":
        hidden = set(weight.shape) - {config.hidden_size}
        return ("batch", "context", int(hidden.pop()) if hidden else int(config.hidden_size))
    if kind == "logits":
        head: Any = net.get_output_embeddings()
        return ("batch", "context", len(head.weight))
    return ("batch", "context", int(weight.shape[1]) if kind == "embed" else int(config.hidden_size))


def tensor_in(value: object, where: str) -> Tensor:
    """Take the activation out of what a module returned: a bare tensor, a tuple that starts with it, or a model output.

    Blocks return bare tensors in transformers 5 and tuples before; `value[0]` of a bare tensor would silently be batch element 0.
    """
    if isinstance(value, Tensor):
        return value
    first = next(iter(value.values()), None) if isinstance(value, ModelOutput) else value[0] if isinstance(value, tuple) and value else None
    if not isinstance(first, Tensor):
        raise InputError(f"{where} returns a {type(value).__name__} that does not start with a tensor: no activation can be read there.")
    return first


def with_tensor(value: object, replacement: Tensor) -> object:
    """Return what a module returned with its activation replaced."""
    if isinstance(value, Tensor):
        return replacement
    if isinstance(value, ModelOutput):
        changed = type(value)(**value)
        changed[next(iter(value.keys()))] = replacement
        return changed
    assert isinstance(value, tuple)
    return (replacement, *value[1:])


def _canonical(net: PreTrainedModel, adapter: Adapter, name: str) -> HookPoint:
    kind, _, layer = name.partition(".")
    alias = alias_of(name, has_rope=adapter.has_rope)
    if kind in ("embed", "logits"):
        path = "" if kind == "logits" else next(path for path, module in net.named_modules() if module is net.get_input_embeddings())
        is_missing = kind == "logits" and net.get_output_embeddings() is None
        return HookPoint(name, path, "output", alias, "it has no language-model head" if is_missing else "")
    place = find_place(adapter, kind)
    if place is None:
        return HookPoint(name, "", "output", alias, _ABSENT[kind])
    prefix = "" if net.base_model is net else f"{net.base_model_prefix}."
    path = prefix + place.path.format(layer=layer)
    refused = explain_blind(net.get_submodule(path)) if kind in _ATTENTION_KINDS else ""
    return HookPoint(name, path, place.side, alias, refused)


_ABSENT: Final = {
    "resid_mid": "attention and MLP read the same residual stream side by side, so there is none between them",
    "mlp_act": "its MLP is a mixture of experts, so what the last matrix multiplies differs from token to token",
    "final_norm": "no norm stands after its last block",
}


def _unless_refused(net: PreTrainedModel, point: HookPoint, name: str) -> HookPoint:
    if point.refused:
        raise InputError(f"A {net.config.model_type} model has no hook point {name!r}: {point.refused}.")
    return point


def _peculiarity(config: Any) -> str:
    """Say what an unknown type has in the place of attention, where its configuration tells."""
    if getattr(config, "kv_lora_rank", None):
        return " (its attention is latent: keys and values are not there by head)"
    if "linear_attention" in (getattr(config, "layer_types", None) or ()):
        return " (it has linear attention, which forms no pattern)"
    if getattr(config, "state_size", None) or getattr(config, "ssm_cfg", None) or getattr(config, "mamba_d_state", None):
        return " (it has state-space layers, which do not attend)"
    return ""


def _near(name: str, known: list[str]) -> str:
    found = difflib.get_close_matches(name, known, n=4, cutoff=0.4) or known[:4]
    return ", ".join(found)


def _module_examples(net: PreTrainedModel) -> str:
    paths = [path for path, module in net.named_modules() if path and not isinstance(module, nn.ModuleList)]
    return ", ".join(f"{MODULE}{path}" for path in paths[:12]) + (f" and {len(paths) - 12} more" if len(paths) > 12 else "")
