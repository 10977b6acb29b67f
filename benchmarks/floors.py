"""A work becomes the same work with products as torch multiplies unless told otherwise: what other tools have, beside the fastest library here."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


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
