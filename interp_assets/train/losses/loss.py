"""What every loss receives and returns: one batch of normalised rows becomes a loss, its gradients and firing counts.

Rows are centred and scaled (`train/recipes.py`), so a row has mean 0 and its squared norm has mean d, the width of its hook point. x is what
is encoded and y what is reconstructed (the same rows, but for transcoders); |d_i| is a decoder row's norm, summed over the hook points
of a crosscoder. With pre = x W_enc + b_enc:

    relu              sum error^2 + lambda sum_i f_i |d_i|                              Anthropic, April 2024 update              dense.py
    jump_relu         mean error^2 + lambda (L0 / k - 1)^2 + pre-activation loss        Anthropic, January 2025, with a target L0 dense.py
    jump_relu_tanh    sum error^2 + lambda sum_i tanh(4 f_i |d_i|) + pre-act. loss      Anthropic, January 2025                   dense.py
    jump_relu_step    mean error^2 + lambda L0                                          Rajamanoharan et al. 2024 (2407.14435)    dense.py
    gated             sum error^2 + lambda sum_i relu(gate_i) + sum gate_error^2        Rajamanoharan et al. 2024 (2404.16014)    gated.py
    topk, batch_topk  mean error^2 + AuxK / 32                                          Gao et al. 2024, Bussmann et al. 2024     topk.py
    matryoshka_...    mean over prefixes of mean error^2, + AuxK / 32                   Bussmann et al. 2025 (2503.17547)         topk.py

"sum" is over dimensions and "mean" over rows and dimensions; errors are the batch aggregate, never relative to a row's own norm, which
would starve the rows of high variance. Every returned number is this rank's share: the global one is the sum over ranks; gradients are
to be summed over the ranks that hold the same latents.

Where few latents can fire or get a gradient (`FEW`), a dense architecture takes the path of the pairs too: in the same regime of L0
its step costs about what a TopK step costs.

Gradients are written out by hand. Autograd would keep every intermediate tensor of the batch; here a step goes through the batch in
blocks of rows, forward and backward at once, and what lies between the products is one compiled pass (`compute/elementwise.py`): 1.1 times the
bare matrix products where autograd took 1.4.
"""

from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from interp_assets.compute.elementwise import sum_rows
from interp_assets.compute.kernels import Scratch, product
from interp_assets.train.parallel import Ranks

Weights = dict[str, Tensor]
"""Trained tensors by name; the encoder lies as `W_enc_T [d_sae, d_in]`, so that a latent's weights are contiguous."""

REPLICATED: Final = ("b_dec", "W_skip")
"""Weights that every latent slice holds whole; of all others it holds its own latents."""
_BLOCK_VALUES: Final = 1 << 25
"""Pre-activations of a block of rows (128 MiB): enough for fast products and few additions to the gradients."""
_DEVICE_BLOCK_VALUES: Final = 1 << 30
"""The same on a GPU (4 GiB): its memory is larger, adding to gradients costs more than caches gain, and torch's scans take no more than 2^31."""


class Constants(NamedTuple):
    """Constants of the losses that people vary; of an architecture without one it is not read."""

    auxk_weight: float = 1 / 32
    groups: tuple[float, ...] = (1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
    """Nested groups of a Matryoshka SAE, as shares of `d_sae`."""
    jump_width: float = 2.0
    """Width of the rectangle, in units of a normalised row's dimensions (Anthropic, January 2025)."""
    step_width: float = 0.001
    """`jump_relu_step`: width of the rectangle for rows of squared norm 1 (Rajamanoharan et al. 2024), times sqrt(d_in) here."""
    tanh_scale: float = 4.0
    pre_activation_weight: float = 3e-6
    """Of the loss that pulls silent latents back (Anthropic, January 2025)."""
    p: float = 1.0
    """`relu`: the penalty is on this power of the latents."""


USUAL: Final = Constants()


class LossContext(NamedTuple):
    """What a loss depends on besides weights and rows."""

    k: int
    coefficient: float
    """Sparsity coefficient after its warm-up."""
    n_rows: int
    """Rows of the global batch."""
    is_dead: Bool[Tensor, " latents"]
    """Of this rank's latents."""
    ranks: Ranks
    scratch: Scratch
    widths: tuple[int, ...]
    """Width of each hook point that is reconstructed; several for a crosscoder."""
    dtype: torch.dtype = torch.float32
    """Type that the operands of matrix products are rounded to.

    Smaller than float32 as in torch's autocast: weights, optimizer and sums (losses, gradients of biases and of weights over blocks) are float32,
    and a product's result is rounded once before it is added to them.
    """
    constants: Constants = USUAL
    step: int = 0
    """Which step of the training it is, from 0, and of how many: for losses that change on the way."""
    n_steps: int = 1


class StepLoss(NamedTuple):
    """This rank's share of a step's loss, its gradients, and what it saw."""

    loss: Float[Tensor, ""]
    squared_error: Float[Tensor, ""]
    """Sum over rows and dimensions."""
    sparsity_loss: Float[Tensor, ""]
    auxk_loss: Float[Tensor, ""]
    n_fired: Int64[Tensor, " latents"]
    """Number of this rank's rows on which each of its latents fired."""
    gradients: Weights
    """By the name of the weight; a weight that gets none is left out."""
    terms: dict[str, Float[Tensor, ""]] = {}  # noqa: RUF012 - nobody changes it
    """Further terms that an architecture of one's own wants logged."""


FEW: Final = 1 / 9
"""Share of pre-activations below which pairs are faster than dense products (2 cores, d_in 512; equal at 1/8)."""

LossFunction = Callable[[Weights, Float[Tensor, "batch d_in"], Float[Tensor, "batch d_out"], LossContext], StepLoss]


def row_blocks(rows: Tensor, n_latents: int) -> Iterator[slice]:
    """Cut the rows of a batch into blocks of about as many pre-activations as their device works on best."""
    n_rows, n = len(rows), max(64, (_BLOCK_VALUES if rows.device.type == "cpu" else _DEVICE_BLOCK_VALUES) // n_latents)
    return (slice(start, min(start + n, n_rows)) for start in range(0, n_rows, n))


def latent_norms(W_dec: Float[Tensor, "latents d_out"], widths: tuple[int, ...]) -> Float[Tensor, " latents"]:
    """Return the norm of each decoder row; for a crosscoder the sum of the norms of its parts, one per hook point."""
    if len(widths) == 1:
        return W_dec.norm(dim=1)
    return torch.stack([part.norm(dim=1) for part in W_dec.split(widths, dim=1)]).sum(0)


def add_norm_gradient(gradient: Tensor, W_dec: Tensor, widths: tuple[int, ...], scale: Float[Tensor, " latents"]) -> None:
    """Add the gradient of `sum_i scale_i |d_i|` to a decoder's gradient, in place; 0 for a row of zeros."""
    for part, target in zip(W_dec.split(widths, dim=1), gradient.split(widths, dim=1), strict=True):
        norm = part.norm(dim=1)
        target.addcmul_(part, torch.where(norm > 0, scale / norm, 0.0)[:, None])


def reconstruct(weights: Weights, x: Tensor, latents: Tensor, context: LossContext, name: str) -> Tensor:
    """Decode a block of latents densely, over all slices, into the buffer `name`: `[rows, d_out]`."""
    x_hat = context.scratch.take(name, (len(latents), len(weights["b_dec"])), x)
    product(latents, weights["W_dec"], x_hat, dtype=context.dtype, scratch=context.scratch)
    return add_offsets(weights, x, context.ranks.sum_slices(x_hat))


def add_offsets(weights: Weights, x: Tensor, x_hat: Tensor) -> Tensor:
    """Add what every slice holds whole, in place: the decoder's bias, and the linear skip of a skip transcoder."""
    if "W_skip" in weights:
        product(x, weights["W_skip"], x_hat, is_added=True)
    return x_hat.add_(weights["b_dec"])


def make_gradients(weights: Weights, scratch: Scratch) -> Weights:
    """Return zeros for every weight, in buffers that the next step will use again."""
    return {name: scratch.take(f"gradient.{name}", tuple(value.shape), value).zero_() for name, value in weights.items()}


def add_offset_gradients(weights: Weights, gradients: Weights, x: Tensor, gradient: Float[Tensor, "rows d_out"], scale: float = 1.0) -> None:
    """Add the gradients of `add_offsets`, given that of the reconstruction as `scale` times `gradient`."""
    gradients["b_dec"].add_(sum_rows(gradient), alpha=scale)
    if "W_skip" in weights:
        product(x.T, gradient * scale, gradients["W_skip"], is_added=True)
