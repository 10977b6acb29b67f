"""A network's forward on a CPU becomes the same bits for any number of threads.

torch divides an operator among its threads, and three kinds of operator follow the number of them:

1. Matrix products: a library divides them along the sum too (`products.py`).
2. Functions of single elements such as SiLU: vectors of 8 or 16 elements are computed by one formula, what is left over at the end of a
   thread's share by another, which rounds differently. With 37 contexts of 61 tokens and 48 neurons, two threads changed one element in 10,000.
3. Attention where MKL has no vectors of 512 bits: each thread has a buffer of its own, and the library's bits follow how it is aligned.
   Likewise convolutions, solvers of small systems, and the derivatives of all these.

`AnyThreads` hears every operator of the thread that opens it and runs these in tiles that follow from the sizes alone, each by one thread.
All else torch divides by row or by matrix.
"""

from functools import partial
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from interp_assets.compute.products import cut, multiply, run_each

_aten: Final = torch.ops.aten
_PRODUCTS: Final = frozenset([_aten.mm.default, _aten.addmm.default])
_PERIODIC: Final = frozenset(["acos", "acosh", "asin", "asinh", "atan", "atanh", "cos", "cosh", "sin", "sinc", "sinh", "tan", "tanh"])
_GROWING: Final = frozenset(["erf", "erfc", "erfinv", "exp", "exp2", "expm1", "lgamma", "log", "log10", "log1p", "log2", "logit", "pow", "rsqrt"])
_GATING: Final = frozenset(["celu", "elu", "gelu", "mish", "selu", "sigmoid", "silu", "softplus"])
_BY_ELEMENT: Final = _PERIODIC | _GROWING | _GATING
_BY_ONE_THREAD: Final = frozenset(
    ["atan2", "convolution", "linalg_solve_triangular", "log_sigmoid_forward", "logaddexp", "triangular_solve", "xlogy"]
)
_UNDIVIDED: Final = 2048
"""So many elements torch never divides."""
_TILE: Final = 1 << 14
"""Elements of a tile, at least: a multiple of any vector."""
_MOST_TILES: Final = 64
"""Of rows that do not lie side by side."""
_NAME: Final = "threads::divided"


class AnyThreads(TorchDispatchMode):
    """While it is open, what this thread computes on a CPU has the bits of any other number of threads, derivatives too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Answer an operator whose bits follow the threads; leave all others to torch."""
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        first = args[-1] if func in _PRODUCTS else args[0] if args else None
        if not isinstance(first, Tensor) or first.device.type != "cpu":
            return func(*args, **kwargs)
        if func in _PRODUCTS and not kwargs:
            return _multiply(*args)
        if name == "_scaled_dot_product_flash_attention_for_cpu":
            return _attend(func, *args, **kwargs)
        if name in _BY_ELEMENT and first.is_floating_point() and not any(isinstance(value, Tensor) for value in args[1:]):
            return func(*args, **kwargs) if first.numel() <= _UNDIVIDED else _map(partial(func, **kwargs), *args)
        if name in _BY_ONE_THREAD or name.removesuffix("_") in _BY_ELEMENT or "_backward" in name:
            return _run_alone(partial(func, *args, **kwargs))
        return func(*args, **kwargs)


def _multiply(*args: Tensor) -> Tensor:
    """Answer `a @ b` and `bias + a @ b`."""
    *bias, a, b = args
    out = a.new_empty(a.shape[0], b.shape[1])
    if not bias or bias[0].ndim == 1:
        return multiply(a, b, out, bias=bias[0] if bias else None)
    return multiply(a, b, out.copy_(bias[0]), is_added=True)


def _map(func: Any, x: Tensor, *rest: Any) -> Tensor:
    """Apply a function of single elements, in the order in which they lie in memory; where they do not lie side by side, row by row."""
    out = torch.empty_like(x)
    if torch.ops.aten.is_non_overlapping_and_dense(x) and out.stride() == x.stride():
        source, target = (value.as_strided((x.numel(),), (1,)) for value in (x, out))
        tiles = cut(x.numel(), _TILE)
    else:
        axis = next(i for i, size in enumerate(x.shape) if size > 1)
        source, target = x.movedim(axis, 0), out.movedim(axis, 0)
        n = x.shape[axis]
        step = max(1, _TILE * n // x.numel(), -(-n // _MOST_TILES))
        tiles = [slice(start, start + step) for start in range(0, n, step)]

    @torch.no_grad()
    def fill(tile: slice) -> None:
        target[tile] = func(source[tile], *rest)

    run_each([partial(fill, tile) for tile in tiles], _NAME)
    return out


def _attend(func: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, attn_mask: Tensor | None = None, **options: Any) -> Any:
    """Return what the heads took and the logarithms of their sums: each context by itself, or each head of keys where there is one context."""
    n_contexts, n_heads = key.shape[:2]
    width = query.shape[1] // n_heads
    whole = slice(None)
    parts = [(slice(i, i + 1), whole, whole) for i in range(n_contexts)]
    if n_contexts == 1:
        parts = [(whole, slice(i * width, (i + 1) * width), slice(i, i + 1)) for i in range(n_heads)]
    found: list[Any] = [None] * len(parts)

    @torch.no_grad()
    def fill(i: int, contexts: slice, queries: slice, keys: slice) -> None:
        mask = None if attn_mask is None else attn_mask.expand(n_contexts, query.shape[1], -1, -1)[contexts, queries]
        found[i] = func(query[contexts, queries], key[contexts, keys], value[contexts, keys], *rest, attn_mask=mask, **options)

    run_each([partial(fill, i, *part) for i, part in enumerate(parts)], _NAME)
    return tuple(torch.cat(each, dim=int(n_contexts == 1)) for each in zip(*found, strict=True))


def _run_alone(func: Any) -> Any:
    """Run an operator with one thread."""
    found: list[Any] = []
    run_each([torch.no_grad()(lambda: found.append(func()))], _NAME)
    return found[0]
