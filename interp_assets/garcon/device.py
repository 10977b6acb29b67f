"""The configured device becomes one that this machine has; kept apart so that training processes need not import transformers."""

from typing import Literal

import torch

from interp_assets.compute.products import use_fastest_products
from interp_assets.errors import InputError


def choose_device(device: Literal["auto", "cpu", "cuda", "mps"]) -> torch.device:
    """Return the configured device; `auto` takes CUDA, then MPS, then the CPU. Raises `InputError` when it is not there.

    Whoever asks will multiply, so the CPU's products go to its fastest library from here on (`compute/products.py`).
    """
    use_fastest_products()
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return torch.device(next(name for name, is_present in present.items() if is_present))
    if not present[device]:
        raise InputError(f"execution.device is {device!r}, but this machine has only {[name for name, here in present.items() if here]}.")
    return torch.device(device)
