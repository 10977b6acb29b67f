"""A piece of rows times a piece of encoder columns becomes firings in a bin: the Triton kernel of `fused.py`, which tells shapes and steps.

It stands alone because it needs Triton, which has no use without a GPU but for its interpreter.
"""

import triton
import triton.language as tl


@triton.jit
def encode_and_append(  # noqa: D103 - a kernel is launched with everything it touches; described above
    x_TD,  # noqa: ANN001 - Triton's arguments are pointers and numbers
    W_FD,  # noqa: ANN001
    bias_F,  # noqa: ANN001
    threshold_F,  # noqa: ANN001
    limit_T,  # noqa: ANN001
    latent_BC,  # noqa: ANN001
    row_BC,  # noqa: ANN001
    value_BC,  # noqa: ANN001
    cursor_B,  # noqa: ANN001
    C,  # noqa: ANN001
    T,  # noqa: ANN001
    F,  # noqa: ANN001
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GM: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    n_m = tl.cdiv(T, BM)
    n_n = tl.cdiv(F, BN)
    group = program // (GM * n_n)
    group_rows = min(n_m - group * GM, GM)
    piece_m = group * GM + (program % (GM * n_n)) % group_rows
    piece_n = (program % (GM * n_n)) // group_rows
    row = piece_m * BM + tl.arange(0, BM)
    latent = piece_n * BN + tl.arange(0, BN)
    is_row = row < T
    total = tl.zeros((BM, BN), tl.float32)
    for first in range(0, D, BK):
        d = first + tl.arange(0, BK)
        x = tl.load(x_TD + row[:, None].to(tl.int64) * D + d[None, :], mask=is_row[:, None] & (d < D)[None, :], other=0.0)
        w = tl.load(W_FD + latent[None, :].to(tl.int64) * D + d[:, None], mask=(d < D)[:, None], other=0.0)
        total = tl.dot(x, w, total, input_precision="ieee")
    total += tl.load(bias_F + latent)[None, :]
    threshold = tl.load(threshold_F + latent)
    limit = tl.load(limit_T + row, mask=is_row, other=float("inf"))
    fires = (total > threshold[None, :]) & (total > limit[:, None])
    zeros = tl.zeros((BM, BN), tl.int32)
    place = tl.atomic_add(cursor_B + piece_n + zeros, zeros + 1, mask=fires)
    is_inside = fires & (place < C)
    target = piece_n.to(tl.int64) * C + place.to(tl.int64)
    tl.store(latent_BC + target, latent[None, :] + zeros, mask=is_inside)
    tl.store(row_BC + target, row[:, None] + zeros, mask=is_inside)
    tl.store(value_BC + target, total, mask=is_inside)
