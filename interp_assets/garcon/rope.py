"""Rotary embeddings whose frequencies follow the length of what is run: a context must have its own length's, whatever runs beside or before it.

`longrope` (Phi-3) takes one of two sets of frequencies by the longest position of the batch, padding included; `dynamic` stretches them with it, and
keeps the stretch for later forwards. So such a model is run on contexts of one length, unpadded, and forgets between forwards.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def follows_length(config: Any) -> bool:
    """Tell whether a model's rotary frequencies depend on the length of the forward."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kinds = [str(part.get("rope_type") or part.get("type") or "") for part in (rope, *rope.values()) if isinstance(part, dict)]
    return any("dynamic" in kind or kind == "longrope" for kind in kinds)


def forget_lengths(net: nn.Module) -> None:
    """Put frequencies that earlier forwards have stretched back to what they were."""
    for module in net.modules():
        if not hasattr(module, "original_max_seq_len") or not hasattr(module, "max_seq_len_cached"):
            continue
        for name in [name for name, _ in module.named_buffers(recurse=False) if name.endswith("original_inv_freq")]:
            prefix = name.removesuffix("original_inv_freq")
            original, current = getattr(module, name), getattr(module, f"{prefix}inv_freq")
            module.register_buffer(f"{prefix}inv_freq", original.to(current.device).clone(), persistent=False)
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def split_lengths(attention_mask: Tensor) -> Sequence[tuple[Tensor, int]]:
    """List the contexts of each length, `[n]` indices and the length, of a mask that is False on padding on the right."""
    lengths = attention_mask.sum(dim=1)
    return [(torch.nonzero(lengths == length)[:, 0], int(length)) for length in lengths.unique() if length]


def fixed_length(config: Any) -> int | None:
    """Return up to which length frequencies are those of every shorter one, so that keys may be kept; None where they never change."""
    if not follows_length(config):
        return None
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    told = [part.get("original_max_position_embeddings") for part in (rope, *rope.values()) if isinstance(part, dict)]
    return min(int(length) for length in (*told, text.max_position_embeddings) if length)
