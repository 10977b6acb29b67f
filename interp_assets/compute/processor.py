"""The processor becomes a few words: its kind, which instructions it has of those that matter here, and which paths are taken because of that.

Nothing forces a path: each is chosen from what the processor has, or by a trial in which its result is checked, and a processor that lacks an
instruction gets the slower one. What is found is the same on all of them (`coarse.py`); products round by kind of CPU (`products.py`).
"""

import platform
from typing import Final, NamedTuple

import torch
from llvmlite import binding

from interp_assets.compute.coarse import fastest_kind
from interp_assets.compute.products import find_features, use_fastest_products

_TELLING: Final = (
    *("avx2", "avx512f", "avx512vnni", "avxvnni", "avx512bf16", "amx-int8", "amx-bf16"),  # x86
    *("neon", "dotprod", "i8mm", "bf16", "sve", "sve2"),  # ARM
)
_TRIED_WIDTH: Final = 512
"""Of the products by which digits are chosen."""


class Processor(NamedTuple):
    """What figures are to be read beside."""

    kind: str
    """The architecture, and LLVM's name for the processor: `x86_64 znver5`."""
    features: tuple[str, ...]
    """Which it has of the instructions that decide how fast products, digits and loops are, by LLVM's names."""


class Paths(NamedTuple):
    """What is used here because of what the processor has."""

    products: str
    """Who multiplies float32: oneDNN, or torch's own choice."""
    digits: str
    """By which kind of digits pre-activations are found: int8, or float32."""
    vectors: str
    """The widest vectors of torch's own kernels, which `ATEN_CPU_CAPABILITY` narrows."""


def find_processor() -> Processor:
    """Ask the processor, in a millisecond."""
    found = find_features()
    return Processor(f"{platform.machine()} {binding.get_host_cpu_name()}", tuple(name for name in _TELLING if name in found))


def find_paths() -> Paths:
    """Decide what this process would decide anyway, in some milliseconds of trials."""
    products = "oneDNN" if use_fastest_products() else "torch's choice"
    return Paths(products, fastest_kind(_TRIED_WIDTH), torch.backends.cpu.get_cpu_capability())


def explain_processor() -> str:
    """Return one line for a report of a fault: the processor's kind and features, and the paths that are used on it."""
    kind, features = find_processor()
    products, digits, vectors = find_paths()
    has = " ".join(features) or "none of the instructions that matter here"
    return f"Processor {kind} ({has}): float32 products by {products}, digits {digits}, torch's kernels {vectors}"
