"""What all benchmarks share: the machine in every line, and floors that are fast on this processor.

A floor is the same work by the library and the type that are fast here, else a ratio to it flatters: where bfloat16 is emulated, a bare product
of it takes a hundred times as long as float32's, and the floor is float32's. Beside it stands the same work as torch multiplies unless told
otherwise, which is what other tools have.
"""

import json
import os
import subprocess
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Final, TypeVar

import torch

from interp_assets.compute.processor import find_processor

Result = TypeVar("Result")
_TRIAL: Final = (128, 512, 512)
_FAST: Final = 1.5
"""Times a float32 product: what is slower is emulated."""


def by_torchs_choice(run: Callable[[], Result]) -> Callable[[], Result]:
    """Return a run during which torch chooses the library of its float32 products."""
    setting: Any = getattr(torch.backends.mkldnn, "matmul", None)

    def measure() -> Result:
        chosen, setting.fp32_precision = setting.fp32_precision, "none"
        try:
            return run()
        finally:
            setting.fp32_precision = chosen

    return measure


@cache
def floor_dtype(name: str) -> str:
    """Return the type of a floor whose operands are `name`: that, or float32 where products of it are emulated."""
    if name == "float32":
        return name
    return name if _product_s(getattr(torch, name)) < _FAST * _product_s(torch.float32) else "float32"


def _product_s(dtype: torch.dtype) -> float:
    n_rows, width, n_columns = _TRIAL
    a, b = torch.ones(n_rows, width, dtype=dtype), torch.ones(width, n_columns, dtype=dtype)
    return min(_seconds(lambda: torch.mm(a, b)) for _ in range(4))


def _seconds(run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def describe_machine() -> dict[str, Any]:
    """Return what every line of every benchmark says of its machine: processor, cores that may be used, load of the last minute, commit."""
    kind, features = find_processor()
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        cores = os.cpu_count() or 1
    return {"hardware": f"{kind}, {cores} cores", "features": list(features), "load": round(os.getloadavg()[0], 1), "commit": _commit()}


@cache
def _commit() -> str:
    try:
        command = ["git", "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def report(line: dict[str, Any], append: str = "") -> None:
    """Print one line with the machine in it, at once, and append it to a file too: what is cut short keeps the lines that it had."""
    text = json.dumps({**line, **describe_machine()})
    print(text, flush=True)
    if append:
        with Path(append).open("a") as file:
            file.write(text + "\n")
