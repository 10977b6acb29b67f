"""Rotary embeddings whose frequencies follow the length of what is run: a context must have its own length's, whatever runs beside or before it.

`longrope` (Phi-3) takes one of two sets of frequencies by the longest position of the batch, padding included; `dynamic` stretches them with it, and
keeps the stretch for later forwards. So such a model forgets between forwards, and in a padded batch the tables of angles are made for each length by
itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel


def follows_length(config: Any) -> bool:
    """Tell whether a model's rotary frequencies depend on the length of the forward."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kinds = [str(part.get("rope_type") or part.get("type") or "") for part in (rope, *rope.values()) if isinstance(part, dict)]
    return any("dynamic" in kind or kind == "longrope" for kind in kinds)


@contextmanager
def own_lengths(net: PreTrainedModel, attention_mask: Tensor | None) -> Iterator[None]:
    """Give each context of a batch, right-padded where the mask is False, the frequencies of its own length in every forward while this is open."""
    handles: list[Any] = []
    if attention_mask is not None and follows_length(net.config) and not bool(attention_mask.all()):
        lengths = attention_mask.sum(dim=1).clamp_min(1).tolist()
        handles = [module.register_forward_hook(partial(_by_length, lengths), with_kwargs=True) for module in _stretching(net)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def forget_lengths(net: nn.Module) -> None:
    """Put frequencies that earlier forwards have stretched back to what they were."""
    for module in _stretching(net):
        _forget(module)


def _stretching(net: nn.Module) -> list[nn.Module]:
    return [module for module in net.modules() if hasattr(module, "original_max_seq_len") and hasattr(module, "max_seq_len_cached")]


def _forget(module: nn.Module) -> None:
    for name in [name for name, _ in module.named_buffers(recurse=False) if name.endswith("original_inv_freq")]:
        prefix = name.removesuffix("original_inv_freq")
        original, current = getattr(module, name), getattr(module, f"{prefix}inv_freq")
        module.register_buffer(f"{prefix}inv_freq", original.to(current.device).clone(), persistent=False)
        setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def _by_length(
    lengths: list[int], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], tables: tuple[Tensor, Tensor]
) -> tuple[Tensor, ...]:
    """Return cosines and sines for contexts of these lengths, [contexts, positions, angles], in the place of one table for all; zero on padding."""
    made: dict[int, tuple[Tensor, Tensor]] = {}
    for length in set(lengths):
        _forget(module)
        own = partial(_first, length)
        made[length] = module.forward(*map(own, args), **{name: own(value) for name, value in kwargs.items()})
    found = [table.new_zeros((len(lengths), *table.shape[1:])) for table in tables]
    for table, whole in enumerate(found):
        for context, length in enumerate(lengths):
            whole[context, :length] = made[length][table][0]
    return tuple(found)


def _first(length: int, value: object) -> object:
    """Cut positions, the only integers among a module's arguments."""
    return value[:1, :length] if isinstance(value, Tensor) and not value.is_floating_point() else value


def fixed_length(config: Any) -> int | None:
    """Return up to which length frequencies are those of every shorter one, so that keys may be kept; None where they never change."""
    if not follows_length(config):
        return None
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    told = [part.get("original_max_position_embeddings") for part in (rope, *rope.values()) if isinstance(part, dict)]
    return min(int(length) for length in (*told, text.max_position_embeddings) if length)
