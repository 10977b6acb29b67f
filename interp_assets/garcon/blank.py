"""A network without weights runs as far as its shapes go: what it asks of values is answered with zero.

On PyTorch's `meta` device tensors have shapes and no values, so a forward that looks at one (is this mask all ones, how many tokens does this expert
get) stops there. Widths of modules do not depend on the answer: it is 0, False, or every place that could have been meant.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_READ: Final = torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default  # noqa: SLF001 - what `bool(tensor)` becomes
_GROUPED: Final = torch.ops.aten._grouped_mm.default  # noqa: SLF001 - products of experts; without values PyTorch takes bfloat16 only
_PLACES: Final = torch.ops.aten.nonzero.default


class _Blank(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        value = args[0] if args else None
        if isinstance(value, torch.Tensor) and value.is_meta:
            if func in _READ:
                return False if value.dtype is torch.bool else 0.0 if value.is_floating_point() else 0
            if func is _PLACES:
                return value.new_empty((value.numel(), value.ndim), dtype=torch.int64)
            if func is _GROUPED and value.ndim == 2:
                return value.new_empty((len(value), args[1].shape[-1]))
        return func(*args, **(kwargs or {}))


@contextmanager
def answer_without_values() -> Iterator[None]:
    """Let forwards on the `meta` device read values, all zero."""
    with _Blank():
        yield
