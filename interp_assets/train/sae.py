"""A trained sparse autoencoder as frozen weights that act on raw activations: two equations and one firing rule.

    latents = act(x W_enc + b_enc)          x_hat = latents W_dec + b_dec

What training needs besides (normalisation, centring, decoder norms, gates) has been folded into these four tensors when the SAE was
saved (`checkpoint.py`), so that a reader needs no statistics and a latent slice needs only its own columns. Every architecture ends as
one of three kinds, told apart by the threshold a pre-activation must exceed to fire; a latent that fires has its pre-activation as
its activation:

    relu        0
    jump_relu   `threshold[latent]`, never negative. BatchTopK and Matryoshka (one calibrated value) and Gated (Rajamanoharan et al.
                2024, section 3: tied gates equal a threshold) are saved as this kind.
    topk        one value per row, below its k-th largest pre-activation and not below the next, none below 0: their midpoint, or where they tie
                the float32 just below. Of those that tie with the k-th the first fire, so many that k do, in training too.

Training does not belong here: see `recipes.py` and `loop.py`.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from interp_assets.compute.elementwise import reach
from interp_assets.compute.products import multiply

SaeKind = Literal["relu", "jump_relu", "topk"]


@dataclass(frozen=True, kw_only=True)
class Sae:
    """Frozen weights in float32, in the units of raw activations."""

    kind: SaeKind
    W_enc: Float[Tensor, "d_in d_sae"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_out"]
    b_dec: Float[Tensor, " d_out"]
    threshold: Float[Tensor, " d_sae"]
    """What a pre-activation must exceed; zeros for `relu` and `topk`."""
    k: int
    """Active latents per row of `topk`; 0 for the other kinds."""
    W_skip: Float[Tensor, "d_in d_out"] | None = None
    """The linear map beside the latents of a skip transcoder."""

    @property
    def d_in(self) -> int:
        """Size of what is encoded: an activation, or those of a crosscoder side by side."""
        return self.W_enc.shape[0]

    @property
    def d_out(self) -> int:
        """Size of a reconstruction; that of an activation, but for transcoders."""
        return self.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.W_enc.shape[1]

    def pre_activations(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
        """Compute `x W_enc + b_enc` for raw activations of any floating dtype, in float32."""
        return multiply(x.to(self.W_enc), self.W_enc, self.W_enc.new_empty(len(x), self.d_sae), bias=self.b_enc)

    def threshold_for(self, pre: Float[Tensor, "batch d_sae"]) -> Float[Tensor, "rows d_sae_or_1"]:
        """Return the thresholds of a block of pre-activations, to be broadcast against it: `[1, d_sae]`, or `[batch, 1]` for `topk`.

        For `topk` the block must hold all latents: the rule looks at the whole row.
        """
        if self.kind != "topk":
            return self.threshold[None]
        if self.k >= pre.shape[1]:
            return pre.new_zeros(pre.shape[0], 1)
        return topk_threshold(pre.topk(self.k + 1, dim=1).values)[:, None]

    def encode(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
        """Return the latent activations of raw activations: the pre-activation where it exceeds its threshold, else 0."""
        pre = self.pre_activations(x)
        threshold = self.threshold_for(pre)
        fires = pre > threshold
        if self.kind == "topk" and (crowded := fires.sum(1) > self.k).any():
            kth = torch.nextafter(threshold[crowded], torch.full_like(threshold[crowded], torch.inf))
            fires[crowded] = reach(pre[crowded], kth, self.k - (pre[crowded] > kth).sum(1, keepdim=True))
        return torch.where(fires, pre, 0.0)

    def decode(self, latents: Float[Tensor, "batch d_sae"]) -> Float[Tensor, "batch d_out"]:
        """Reconstruct raw activations from latents alone, without the skip of a skip transcoder."""
        return multiply(latents, self.W_dec, self.W_dec.new_empty(len(latents), self.d_out), bias=self.b_dec)

    def reconstruct(self, x: Float[Tensor, "batch d_in"], latents: Float[Tensor, "batch d_sae"]) -> Float[Tensor, "batch d_out"]:
        """Reconstruct raw activations from latents and, in a skip transcoder, from what was encoded."""
        x_hat = self.decode(latents)
        return x_hat if self.W_skip is None else multiply(x.to(self.W_skip), self.W_skip, x_hat, is_added=True)

    def narrow(self, start: int, stop: int) -> "Sae":
        """Return latents [start, stop) alone (views). A slice of a `topk` SAE cannot tell by itself which of its latents fire."""
        return replace(
            self,
            W_enc=self.W_enc[:, start:stop],
            b_enc=self.b_enc[start:stop],
            W_dec=self.W_dec[start:stop],
            threshold=self.threshold[start:stop],
        )

    def to(self, device: torch.device | str) -> "Sae":
        """Return the SAE on another device."""
        return replace(self, **{name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)})


def topk_threshold(largest: Float[Tensor, "batch k_and_1"]) -> Float[Tensor, " batch"]:
    """Return what a pre-activation must exceed to be among the k largest of its row, given the k + 1 largest in falling order."""
    following = largest[:, -1].clamp_min(0.0)
    if largest.shape[1] == 1:
        return following
    kth = largest[:, -2].clamp_min(0.0)
    return torch.minimum((kth + following) / 2, torch.nextafter(kth, torch.full_like(kth, -torch.inf))).clamp_min(0.0)
