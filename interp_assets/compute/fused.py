"""What lies between the dense products of a block becomes one pass over it on a GPU, as `loops.py` makes it on a CPU: Triton kernels.

T rows of a block     F latents     a part is `PART` rows; a program goes through one part of `BN` latents, `BM` rows at a time

Written as torch's own operations each pass reads and writes the block seven to thirteen times. For d_in 4096, 131,072 latents and 8,192 rows a block
has 2^30 values, and the products of a step take 56 ms at 790 TFLOP/s; one float32 pass of reading or writing takes 0.9 ms at 4.8 TB/s.
(Arithmetic; not measured yet.)

Sums by column are kept for each part and added afterwards, never by atomic additions: the same bits at every run. The tests run the kernels in
Triton's interpreter on a CPU against their definition in `elementwise.py`, and compile them for an H200 where a compiler of Triton's is.
"""

import importlib.util
from functools import cache
from typing import Any, Final

import torch
from jaxtyping import Float
from torch import Tensor

PART: Final = 512
BM: Final = 16
BN: Final = 256

Block = Float[Tensor, "T F"]


@cache
def has_triton() -> bool:
    """Tell whether Triton can be imported: it comes with PyTorch's builds for CUDA."""
    return importlib.util.find_spec("triton") is not None


def is_fusable(pre: Tensor, *others: Tensor) -> bool:
    """Tell whether the kernels take these tensors: on a GPU, side by side in memory, pre-activations in float32."""
    return pre.is_cuda and pre.dtype == torch.float32 and all(value.is_contiguous() for value in (pre, *others)) and has_triton()


def fire(pre: Block, offset: Float[Tensor, " F"], latents: Block) -> Float[Tensor, "2 F"]:
    """Write the latents of a block; return sums over its rows: latents, firings."""
    return _launch("fire_pass", 2, pre, (offset.contiguous(), latents))


def pull(
    pre: Block, grad: Block, columns: Float[Tensor, "3 F"], grad_n_fired: Tensor, width: float, *, reaches_encoder: bool
) -> Float[Tensor, "3 F"]:
    """Turn gradients of latents into those of pre-activations, in place; return sums over rows: gradient, through, pre.

    `columns` are rise, drop and threshold, as in `elementwise.Slopes`.
    """
    scalars = (width / 2, 1 / width if width else 0.0)
    grad_n_fired = grad_n_fired.to(pre)
    return _launch("pull_pass", 3, pre, (grad, columns, grad_n_fired), scalars, HAS_WIDTH=width > 0, REACHES=reaches_encoder)


def open_gates(gate: Block, columns: Float[Tensor, "3 F"], opened: Block, latents: Block) -> Float[Tensor, "2 F"]:
    """Write open gates and latents; return sums over rows: firings, open gates. `columns` are those of `elementwise.Gates`."""
    return _launch("open_pass", 2, gate, (columns, opened, latents))


def close_gates(gate: Block, columns: Float[Tensor, "3 F"], grads: tuple[Block, Block], latents: Block, penalty: float) -> Float[Tensor, "3 F"]:
    """Turn the gradients of latents and open gates, the first in place, into that of the projection; return sums, as `elementwise.Closed`."""
    return _launch("close_pass", 3, gate, (columns, *grads, latents), (penalty,))


def _launch(kernel: str, n_sums: int, pre: Block, tensors: tuple[Tensor, ...], scalars: tuple[float, ...] = (), **constants: bool) -> Tensor:
    from interp_assets.compute import fused_kernels  # noqa: PLC0415 - needs Triton

    n_rows, n_latents = pre.shape
    n_parts = -(-n_rows // PART)
    sums = pre.new_zeros((n_sums, max(1, n_parts), n_latents))
    if n_parts and n_latents:
        launch: Any = getattr(fused_kernels, kernel)[(-(-n_latents // BN), n_parts)]
        # the sums stand after the tensors, and before scalars
        launch(pre, *tensors, sums, *scalars, n_rows, n_latents, n_parts, **constants, PART=PART, BM=BM, BN=BN, num_warps=4)
    return sums.sum(1)
