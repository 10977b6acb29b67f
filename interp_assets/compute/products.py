"""The kind of CPU becomes the library that multiplies float32 matrices here: MKL as torch has it, or oneDNN where MKL runs at half speed.

On AMD's processors MKL does not use the vectors of 512 bits: its float32 products take 1.9 to 2.3 times as long as oneDNN's (Zen 5). torch
sends `mm`, `addmm`, `bmm` and what is built on them to oneDNN when it is allowed to round operands to bfloat16, and oneDNN makes use of that
permission only where the processor has tiles (AMX): elsewhere it multiplies by the same float32 kernels as without. So

1. the permission is given by kind of CPU, never by timing: equal inputs make equal bytes on machines of one kind;
2. only to AMD's Zen with AVX-512 and without tiles: Intel's, where MKL is the fastest and tiles may round, never get it;
3. a product is compared with float64 before anybody depends on it, and the permission taken back should operands have been rounded;
4. whoever has set a precision in this process is left alone.

A library divides a product among its threads as it likes, also along the sum, so that its bits depend on how many there are. `multiply` divides
it into tiles that follow from its sizes alone, each by one thread: equal bits for any number of threads. A network asks torch and not us:
`any_threads.py` sees to its products.

Price: `torch.get_float32_matmul_precision()` raises after it, because that older setting cannot express this one. Whoever calls
`torch.set_float32_matmul_precision` later in the process replaces the permission: do that before, or not at all.
Numbers: `docs/decisions/0008-products-by-cpu.md`.
"""

import logging
import platform
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from threading import Barrier, Lock
from typing import Any, Final

import torch
from llvmlite import binding
from torch import Tensor
from torch.profiler import record_function

_UNSET: Final = "none"
"""What torch answers where nobody has chosen a precision."""
_LIMIT: Final = 1e-5
"""Relative error of a product of 512 float32 summands: some 3e-7; 2e-3 with bfloat16 operands, 3e-4 with TF32."""
_MOST_TILES: Final = 64
PRODUCT: Final = "products::multiply"
"""What a product of several tiles is called in profiles."""
_SIZES: Final = ((256, 512, 384), (64, 512, 1024))
_lock = Lock()
_decided: list[bool] = []

Multiply = Callable[[Tensor, Tensor], Tensor]


def use_fastest_products() -> bool:
    """Let oneDNN multiply float32 in this process where the CPU calls for it; return whether it does so by our choice.

    It decides once: later calls, also those from other threads that come while it decides, return what was decided. Call it before work
    that multiplies, in every process.
    """
    with _lock:
        if not _decided:
            is_suited = is_faster_by_onednn(platform.machine(), binding.get_host_cpu_name(), find_features())
            _decided.append(is_suited and permit_onednn(getattr(torch.backends.mkldnn, "matmul", None)))
        return _decided[0]


def make_product_pool(n_threads: int, name: str) -> ThreadPoolExecutor:
    """Return threads whose products use one thread each.

    What a thread sets is what threads that begin later take over, wherever: so all of the pool begin here, and the number is set back.
    """
    before, together = torch.get_num_threads(), Barrier(n_threads)
    pool = ThreadPoolExecutor(n_threads, name, initializer=_use_one_thread)
    for future in [pool.submit(together.wait) for _ in range(n_threads)]:
        future.result()
    torch.set_num_threads(before)
    return pool


def multiply(a: Tensor, b: Tensor, out: Tensor, *, bias: Tensor | None = None, is_added: bool = False) -> Tensor:
    """Write (or add) the product of two matrices, plus a row vector, into `out`: the same bits for any number of a CPU's threads. No gradients."""

    @torch.no_grad()
    def fill(rows: slice, columns: slice) -> None:
        x, y, part = a[rows], b[:, columns], out[rows, columns]
        if is_added:
            part.addmm_(x, y)
        elif bias is None:
            torch.mm(x, y, out=part)
        else:
            torch.addmm(bias[columns], x, y, out=part)

    whole = slice(None)
    if out.device.type != "cpu":
        fill(whole, whole)
        return out
    n = max(out.shape)
    tiles = cut(n, _tile(n))
    run_each([partial(fill, tile, whole) if out.shape[0] == n else partial(fill, whole, tile) for tile in tiles], PRODUCT)
    return out


def _tile(n: int) -> int:
    """Return how many of `n` rows or columns one thread computes, a multiple of 64, so that tiles of aligned tensors are aligned.

    Each tile copies the operand that all share into the library's order anew: with 256 columns that is 4 to 15% of a product's time, with 1,024
    up to 3%. Few tiles keep few threads busy.
    """
    return max(256, min(512, n // 4), min(1024, n // 8)) // 64 * 64


def cut(n: int, least: int) -> list[slice]:
    """Cut `n` places into tiles of at least `least`, a multiple of 64: where the cuts are follows from `n` alone."""
    step = max(least, -(-n // _MOST_TILES // 64) * 64)
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def run_each(parts: Sequence[Callable[[], object]], name: str) -> None:
    """Run parts of an operator, each with one thread, side by side; `name` is what a profile calls them together. Raises what a part raises."""
    if (n_threads := torch.get_num_threads()) == 1:
        for part in parts:
            part()
        return
    if len(parts) == 1:  # cheaper than to wake another thread
        torch.set_num_threads(1)
        try:
            parts[0]()
        finally:
            torch.set_num_threads(n_threads)
        return
    pool = _pool(n_threads)
    with record_function(name):
        futures = [pool.submit(part) for part in parts]
        for future in futures:
            future.result()


def _use_one_thread() -> None:
    """Let torch use one thread in this one. It is asked first: a thread takes over what others have set at its first question, later than here."""
    torch.get_num_threads()
    torch.set_num_threads(1)


@cache
def _pool(n_threads: int) -> ThreadPoolExecutor:
    return make_product_pool(n_threads, "products")


def is_faster_by_onednn(machine: str, cpu: str, features: Collection[str]) -> bool:
    """Tell it from the architecture, from the name that LLVM has for the CPU, and from what the CPU has of LLVM's features."""
    has_tiles = any(name.startswith("amx") for name in features)
    return machine.lower() in ("x86_64", "amd64") and cpu.startswith("znver") and "avx512f" in features and not has_tiles


def find_features() -> set[str]:
    """Return LLVM's names of what this CPU and its operating system support."""
    try:
        return {name for name, is_there in binding.get_host_cpu_features().items() if is_there}
    except RuntimeError:  # LLVM does not know how to ask this kind
        return set()


def permit_onednn(setting: Any, multiply: Multiply = torch.mm) -> bool:
    """Set the permission, unless somebody has set anything or torch has no such setting; take it back where `multiply` then rounds."""
    if getattr(setting, "fp32_precision", "") != _UNSET:
        return False
    setting.fp32_precision = "bf16"
    if is_float32(multiply):
        return True
    setting.fp32_precision = _UNSET
    logging.getLogger(__name__).warning(
        "oneDNN rounds the operands of float32 products on %s: products stay with torch's own choice.", binding.get_host_cpu_name()
    )
    return False


def is_float32(multiply: Multiply) -> bool:
    """Tell whether products of several shapes and layouts have float32's accuracy, against float64."""
    generator = torch.Generator().manual_seed(0)
    for rows, width, columns in _SIZES:
        a, b = torch.randn(rows, width, generator=generator), torch.randn(width, columns, generator=generator)
        exact = a.double() @ b.double()
        for right in (b, b.T.contiguous().T):
            error = (multiply(a, right).double() - exact).norm() / exact.norm()
            if not float(error) < _LIMIT:
                return False
    return True
