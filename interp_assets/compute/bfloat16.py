"""bfloat16 numbers become float32 and back inside compiled loops, as the upper halves of float32's bits: Numba has no bfloat16 of its own.

A loop that reads with `widen` and writes with `narrow` is compiled for arrays of either kind, float32 as they are and uint16 as halves; it
computes in float32. Rounding is to the nearest, ties to even, as torch rounds. The NaN that processors make stays a NaN; those whose lower half is
full of ones, which only a program could write, might become 0.
"""

from typing import Any

import numpy as np
import torch
from numba import types
from numba.extending import overload
from numpy.typing import NDArray
from torch import Tensor

from interp_assets.compute.compiled import compiled


def as_array(value: Tensor) -> NDArray[Any]:
    """View a tensor on the CPU as the array that loops take: bfloat16 as uint16, all else as it is."""
    return value.view(torch.uint16).numpy() if value.dtype == torch.bfloat16 else value.numpy()


def widen(value: Any) -> Any:
    """Return a number read from an array as float32."""
    raise NotImplementedError("This exists in compiled loops only.")


def narrow(value: Any, array: Any) -> Any:
    """Return a float32 as it is to be written into `array`."""
    raise NotImplementedError("This exists in compiled loops only.")


@compiled
def _from_half(half: Any) -> Any:
    return np.uint32(np.uint32(half) << np.uint32(16)).view(np.float32)


@compiled
def _to_half(value: Any) -> Any:
    bits = np.float32(value).view(np.uint32)
    is_odd = np.uint32((bits >> np.uint32(16)) & np.uint32(1))  # cast at each step: Numba's sums of uint32 are uint64, half as fast
    return np.uint16(np.uint32(bits + np.uint32(0x7FFF) + is_odd) >> np.uint32(16))


# Numba compares the parameters of what an overload returns with its own, names and annotations: lambdas have none.
@overload(widen)
def _widen(value):  # noqa: ANN001, ANN202 - as above
    return (lambda value: _from_half(value)) if value == types.uint16 else (lambda value: value)  # noqa: PLW0108 - it wants a function of Python's


@overload(narrow)
def _narrow(value, array):  # noqa: ANN001, ANN202, ARG001 - as above
    return (lambda value, array: _to_half(value)) if array.dtype == types.uint16 else (lambda value, array: value)  # noqa: ARG005 - as above
