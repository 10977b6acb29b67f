"""Float32 numbers become bins of a histogram, four to an octave over all of float32, read off their bits: nothing is rounded, no scale is chosen."""

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

N_BINS: Final = 1 << 10
"""Bins of numbers that are not negative."""
_SHIFT: Final = 21


def bins_of(values: Tensor) -> Tensor:
    """Return the bin of each number that is not negative, int64."""
    return (values.to(torch.float32).view(torch.int32) >> _SHIFT).to(torch.int64)


def bin_edges() -> NDArray[np.float64]:
    """Return the 1,025 edges of the bins: bin i holds numbers in [edges[i], edges[i + 1]). Those beyond float32 are infinite."""
    bits = np.minimum(np.arange(N_BINS + 1, dtype=np.uint32) << np.uint32(_SHIFT), np.float32(np.inf).view(np.uint32))
    return bits.view(np.float32).astype(np.float64)
