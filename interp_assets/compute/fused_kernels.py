"""What lies between the dense products of a block, in one pass on a GPU: the Triton kernels of `fused.py`, which tells shapes and steps.

They stand alone because they need Triton, which has no use without a GPU but for its interpreter. All compute in float32; what is stored is
rounded to the type of the tensor it goes to.
"""

import triton
import triton.language as tl

# ruff: noqa: ANN001, D103 - Triton's arguments are pointers and numbers; kernels are launched with everything they touch


@triton.jit
def _save_sums(sums, which, values, column, is_column, n_parts, F) -> None:
    """Write what a program summed of `sums [which, part, column]`."""
    tl.store(sums + (which * n_parts + tl.program_id(1)).to(tl.int64) * F + column, values, mask=is_column)


@triton.jit
def fire_pass(pre, offset, latents, sums, T, F, n_parts, PART: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr) -> None:
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    is_column = column < F
    added = tl.load(offset + column, mask=is_column, other=0.0)
    total, count = tl.zeros((BN,), tl.float32), tl.zeros((BN,), tl.float32)
    for first in range(0, PART, BM):
        row = tl.program_id(1) * PART + first + tl.arange(0, BM)
        place = row[:, None].to(tl.int64) * F + column[None, :]
        is_there = (row < T)[:, None] & is_column[None, :]
        p = tl.load(pre + place, mask=is_there, other=0.0)
        f = tl.where(p > 0, p + added[None, :], 0.0)
        tl.store(latents + place, f.to(latents.dtype.element_ty), mask=is_there)
        total += tl.sum(f, axis=0)
        count += tl.sum((p > 0).to(tl.float32), axis=0)
    _save_sums(sums, 0, total, column, is_column, n_parts, F)
    _save_sums(sums, 1, count, column, is_column, n_parts, F)


@triton.jit
def pull_pass(
    pre,
    grad,
    slopes,
    grad_n_fired,
    sums,
    half,
    share,
    T,
    F,
    n_parts,
    HAS_WIDTH: tl.constexpr,
    REACHES: tl.constexpr,
    PART: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
) -> None:
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    is_column = column < F
    rise = tl.load(slopes + column, mask=is_column, other=0.0)[None, :]
    drop = tl.load(slopes + F + column, mask=is_column, other=0.0)[None, :]
    threshold = tl.load(slopes + 2 * F + column, mask=is_column, other=0.0)[None, :]
    fired = tl.load(grad_n_fired)
    total, total_through, total_pre = tl.zeros((BN,), tl.float32), tl.zeros((BN,), tl.float32), tl.zeros((BN,), tl.float32)
    for first in range(0, PART, BM):
        row = tl.program_id(1) * PART + first + tl.arange(0, BM)
        place = row[:, None].to(tl.int64) * F + column[None, :]
        is_there = (row < T)[:, None] & is_column[None, :]
        p = tl.load(pre + place, mask=is_there, other=0.0)
        raised = tl.load(grad + place, mask=is_there, other=0.0).to(tl.float32) + rise
        value = tl.where(p > 0, raised, drop + tl.zeros_like(p))
        if HAS_WIDTH:
            through = tl.where((tl.abs(p) < half) & is_there, (fired + raised * threshold) * share, 0.0)
            total_through += tl.sum(through, axis=0)
            total_pre += tl.sum(p, axis=0)
            if REACHES:
                value += through
        value = tl.where(is_there, value, 0.0)
        tl.store(grad + place, value.to(grad.dtype.element_ty), mask=is_there)
        total += tl.sum(value, axis=0)
    _save_sums(sums, 0, total, column, is_column, n_parts, F)
    _save_sums(sums, 1, total_through, column, is_column, n_parts, F)
    _save_sums(sums, 2, total_pre, column, is_column, n_parts, F)


@triton.jit
def open_pass(gate, gates, opened, latents, sums, T, F, n_parts, PART: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr) -> None:
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    is_column = column < F
    bias = tl.load(gates + column, mask=is_column, other=0.0)[None, :]
    gain = tl.load(gates + F + column, mask=is_column, other=0.0)[None, :]
    bias_magnitude = tl.load(gates + 2 * F + column, mask=is_column, other=0.0)[None, :]
    count, total = tl.zeros((BN,), tl.float32), tl.zeros((BN,), tl.float32)
    for first in range(0, PART, BM):
        row = tl.program_id(1) * PART + first + tl.arange(0, BM)
        place = row[:, None].to(tl.int64) * F + column[None, :]
        is_there = (row < T)[:, None] & is_column[None, :]
        p = tl.load(gate + place, mask=is_there, other=0.0)
        o = tl.maximum(p, 0.0)
        magnitude = (p - bias) * gain + bias_magnitude
        f = tl.where((p > 0) & (magnitude > 0), magnitude, 0.0)
        tl.store(opened + place, o.to(opened.dtype.element_ty), mask=is_there)
        tl.store(latents + place, f.to(latents.dtype.element_ty), mask=is_there)
        count += tl.sum((f > 0).to(tl.float32), axis=0)
        total += tl.sum(o, axis=0)
    _save_sums(sums, 0, count, column, is_column, n_parts, F)
    _save_sums(sums, 1, total, column, is_column, n_parts, F)


@triton.jit
def close_pass(gate, gates, grad, grad_gate, latents, sums, penalty, T, F, n_parts, PART: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr) -> None:
    column = tl.program_id(0) * BN + tl.arange(0, BN)
    is_column = column < F
    bias = tl.load(gates + column, mask=is_column, other=0.0)[None, :]
    gain = tl.load(gates + F + column, mask=is_column, other=0.0)[None, :]
    total_magnitude, total_gain, total_gate = tl.zeros((BN,), tl.float32), tl.zeros((BN,), tl.float32), tl.zeros((BN,), tl.float32)
    for first in range(0, PART, BM):
        row = tl.program_id(1) * PART + first + tl.arange(0, BM)
        place = row[:, None].to(tl.int64) * F + column[None, :]
        is_there = (row < T)[:, None] & is_column[None, :]
        p = tl.load(gate + place, mask=is_there, other=0.0)
        f = tl.load(latents + place, mask=is_there, other=0.0).to(tl.float32)
        magnitude = tl.where(f > 0, tl.load(grad + place, mask=is_there, other=0.0).to(tl.float32), 0.0)
        total_magnitude += tl.sum(magnitude, axis=0)
        magnitude *= gain
        total_gain += tl.sum(magnitude * (p - bias), axis=0)
        q = tl.where(p > 0, tl.load(grad_gate + place, mask=is_there, other=0.0).to(tl.float32) + penalty, 0.0)
        total_gate += tl.sum(q, axis=0)
        tl.store(grad + place, (magnitude + q).to(grad.dtype.element_ty), mask=is_there)
    _save_sums(sums, 0, total_magnitude, column, is_column, n_parts, F)
    _save_sums(sums, 1, total_gain, column, is_column, n_parts, F)
    _save_sums(sums, 2, total_gate, column, is_column, n_parts, F)
