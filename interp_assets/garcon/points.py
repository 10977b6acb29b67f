"""A hook point's name becomes a module of a loaded network, and whether its input or its output is meant.

Names are canonical (`resid_post.2`, see `adapters.py`) or raw (`module:model.layers.2.mlp`). A name that does not fit is answered with
the near ones.
"""

import difflib
from typing import Literal, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from interp_assets.errors import InputError
from interp_assets.garcon.adapters import ADAPTERS, KINDS, Adapter, module_path

MODULE = "module:"


class HookPoint(NamedTuple):
    """A place where activations are read and replaced."""

    name: str
    module_path: str
    """Dotted path from the loaded model."""
    side: Literal["input", "output"]
    alias: str
    """TransformerLens' name, empty for `module:` paths."""


def list_points(net: PreTrainedModel) -> list[HookPoint]:
    """List the canonical hook points of a network, block by block; empty for a model type that is not in the table."""
    adapter = ADAPTERS.get(net.config.model_type)
    if adapter is None:
        return []
    return [_canonical(net, adapter, kind, layer) for layer in range(n_layers(net)) for kind in KINDS]


def find_point(net: PreTrainedModel, name: str) -> HookPoint:
    """Resolve a hook point's name. Raises `InputError` that lists near names, or what can be named in a model of unknown type."""
    if name.startswith(MODULE):
        path = name.removeprefix(MODULE)
        known = [found for found, _ in net.named_modules() if found]
        if path not in known:
            raise InputError(f"Hook point {name!r}: the model has no module {path!r}. Near: {_near(path, known)}.")
        return HookPoint(name, path, "output", "")
    points = list_points(net)
    for point in points:
        if point.name == name:
            return point
    if not points:
        raise InputError(
            f"Hook point {name!r}: where the residual stream of a {net.config.model_type!r} model lies is not known here "
            f"(known: {sorted(ADAPTERS)}). Name a module instead: {_module_examples(net)}."
        )
    for point in points:
        if point.alias == name:
            raise InputError(f"Hook point {name!r} is TransformerLens' name: here it is {point.name!r}.")
    near = _near(name, [point.name for point in points])
    raise InputError(
        f"{net.config.model_type} has no hook point {name!r}. Near: {near}. The names are {', '.join(f'{kind}.L' for kind in KINDS)} "
        f"with L from 0 to {n_layers(net) - 1}, or module:<path>."
    )


def name_module(net: PreTrainedModel, path: str) -> list[str]:
    """Return the names of a module's output: the canonical one first, where it has one, then `module:<path>`; none for no module of the network.

    `path` is as other tools write it: from the loaded model or from its base model. Whether the output of `layers.3.mlp` is `mlp_out.3` is for
    the model to say: where a norm follows, it is not what is added to the residual stream.
    """
    known = {found for found, _ in net.named_modules() if found}
    full = next((candidate for candidate in (path, f"{net.base_model_prefix}.{path}") if candidate in known), None)
    if full is None:
        return []
    return [*(point.name for point in list_points(net) if point.module_path == full and point.side == "output"), MODULE + full]


def name_block_part(net: PreTrainedModel, part: Literal["mlp", "attn"], layer: int) -> list[str]:
    """Return the names, as `name_module` does, of what the MLP or the attention of block `layer` returns; none where the block has no such module."""
    adapter = ADAPTERS.get(net.config.model_type)
    modules = {"mlp": ("mlp",), "attn": ("attn", "self_attn", "attention")}[part]
    found = (name_module(net, f"{adapter.block.format(layer=layer)}.{module}") for module in modules) if adapter else ()
    return next((names for names in found if names), [])


def module_of(net: PreTrainedModel, point: HookPoint) -> nn.Module:
    """Return the module of a hook point."""
    return net.get_submodule(point.module_path)


def n_layers(net: PreTrainedModel) -> int:
    """Return the number of blocks."""
    return int(net.config.get_text_config().num_hidden_layers)


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


def _canonical(net: PreTrainedModel, adapter: Adapter, kind: str, layer: int) -> HookPoint:
    prefix = "" if net.base_model is net else f"{net.base_model_prefix}."
    path = prefix + module_path(adapter, kind, layer)
    return HookPoint(f"{kind}.{layer}", path, "input" if kind == "resid_pre" else "output", f"blocks.{layer}.hook_{kind}")


def _near(name: str, known: list[str]) -> str:
    found = difflib.get_close_matches(name, known, n=4, cutoff=0.4) or known[:4]
    return ", ".join(found)


def _module_examples(net: PreTrainedModel) -> str:
    paths = [path for path, module in net.named_modules() if path and not isinstance(module, nn.ModuleList)]
    return ", ".join(f"{MODULE}{path}" for path in paths[:12]) + (f" and {len(paths) - 12} more" if len(paths) > 12 else "")
