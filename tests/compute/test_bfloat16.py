"""Halves of float32's bits in compiled loops are torch's bfloat16, all 65,536 of them."""

from typing import Any

import numpy as np
import pytest
import torch

from interp_assets.compute.bfloat16 import as_array, narrow, widen
from interp_assets.compute.compiled import reordered


@reordered
def copy_numbers(source: Any, target: Any) -> None:
    """Read and write, in whatever the arrays hold."""
    for i in range(len(source)):
        target[i] = narrow(widen(source[i]), target)


def test_every_half_is_read_as_torch_reads_it() -> None:
    """Infinities, denormal numbers and every NaN included."""
    halves = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    found = torch.empty(len(halves))
    copy_numbers(as_array(halves), as_array(found))
    torch.testing.assert_close(found, halves.float(), rtol=0, atol=0, equal_nan=True)
    again = torch.empty_like(halves)
    copy_numbers(as_array(halves), as_array(again))
    assert torch.equal(again.view(torch.int16), halves.view(torch.int16))


def test_rounding_is_torchs() -> None:
    """To the nearest, ties to even, up to infinity; a NaN that arithmetic makes stays one."""
    bits = np.random.default_rng(0).integers(0, 1 << 32, 1 << 18, dtype=np.uint32)
    ties = (np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)) | np.uint32(0x8000)
    values = torch.from_numpy(np.concatenate([bits, ties, ties + np.uint32(1), ties - np.uint32(1)]).view(np.float32))
    values = torch.cat([values[~values.isnan()], torch.tensor([float("inf"), -float("inf"), float("inf") - float("inf"), 3.4e38])])
    found = torch.empty(len(values), dtype=torch.bfloat16)
    copy_numbers(as_array(values), as_array(found))
    torch.testing.assert_close(found, values.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)


def test_float32_passes_as_it_is() -> None:
    """One loop serves both."""
    values = torch.tensor([1 + 2**-20, -0.0, 3e-40])
    found = torch.empty(3)
    copy_numbers(as_array(values), as_array(found))
    assert torch.equal(found, values)


def test_outside_of_loops_there_is_neither() -> None:
    """They would do nothing there, and nobody would notice."""
    for call in (lambda: widen(1), lambda: narrow(1.0, np.zeros(1))):
        with pytest.raises(NotImplementedError, match="compiled loops"):
            call()
