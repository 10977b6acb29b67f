"""A decoder row becomes the tokens that it makes more and less likely: the direct path from the residual stream to the logits.

    effects = W_dec[latent] @ unembedding          (the final norm is folded in, subject.py; its scale per token is a positive factor)

One matrix product in blocks of latents. Special tokens and rows of the embedding that no text reaches are left out: their effects are
artefacts of training, and they crowd out the lists.
"""

from typing import Final, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from interp_assets.compute.products import use_fastest_products
from interp_assets.garcon.tokenizer import special_token_ids

N_TOKENS: Final = 10
"""Tokens in each list."""
N_BINS: Final = 40
_BLOCK_BYTES: Final = 64 << 20


class LogitEffects(NamedTuple):
    """Effects of some consecutive latents on the used vocabulary."""

    top_ids: NDArray[np.int64]
    """`[latents, n]`, strongest first."""
    top: NDArray[np.float32]
    bottom_ids: NDArray[np.int64]
    bottom: NDArray[np.float32]
    low: NDArray[np.float32]
    high: NDArray[np.float32]
    histogram: NDArray[np.int64]
    """`[latents, N_BINS]` tokens by effect, equal bins from low to high."""


def used_token_ids(tokenizer: PreTrainedTokenizerBase, vocabulary_size: int) -> NDArray[np.int64]:
    """List the token ids that stand for text: neither special nor beyond or between what the tokenizer knows."""
    n_known = min(len(tokenizer), vocabulary_size)
    special = set(special_token_ids(tokenizer))
    pieces = tokenizer.convert_ids_to_tokens(list(range(n_known)))
    return np.array([i for i in range(n_known) if i not in special and pieces[i] is not None], np.int64)


def measure_logits(
    directions: Float[Tensor, "latents d_model"], unembedding: Float[Tensor, "d_model vocabulary"], used: NDArray[np.int64]
) -> LogitEffects:
    """Compute the strongest effects of each direction on the `used` tokens, and their histogram. Equal effects are listed by token id."""
    use_fastest_products()
    matrix = unembedding[:, torch.from_numpy(used)].contiguous()
    n_block = max(1, _BLOCK_BYTES // (4 * len(used)))
    blocks = [_measure(directions[i : i + n_block] @ matrix, used) for i in range(0, len(directions), n_block)]
    return LogitEffects(*(np.concatenate(parts) for parts in zip(*blocks, strict=True)))


def _measure(effects: Tensor, used: NDArray[np.int64]) -> LogitEffects:
    n = min(N_TOKENS, len(used))
    top, bottom = effects.topk(n, dim=1), effects.topk(n, dim=1, largest=False)
    low, high = bottom.values[:, :1], top.values[:, :1]
    scale = torch.where(high > low, N_BINS / (high - low), 0.0)
    bins = ((effects - low) * scale).to(torch.int64).clamp_(0, N_BINS - 1)
    places = bins + torch.arange(len(effects))[:, None] * N_BINS
    histogram = torch.bincount(places.view(-1), minlength=len(effects) * N_BINS).view(-1, N_BINS)
    return LogitEffects(
        *_ordered(top.values, top.indices, used),
        *_ordered(-bottom.values, bottom.indices, used, sign=-1.0),
        low[:, 0].numpy(),
        high[:, 0].numpy(),
        histogram.numpy(),
    )


def _ordered(values: Tensor, places: Tensor, used: NDArray[np.int64], sign: float = 1.0) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Order each row by falling value, then token id."""
    found, ids = values.numpy(), used[places.numpy()]
    order = np.lexsort((ids, -found), axis=1)
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(found, order, axis=1) * np.float32(sign)
