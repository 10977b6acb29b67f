"""A latent (or a head) and a row become a 64-bit priority, by which uniform samples are drawn that do not depend on how jobs are cut.

    M(x)       splitmix64's finaliser, a bijection on 64-bit words (Steele, Lea & Flood 2014)
    priority   M(latent_key[latent] ^ row_key[row])

The random examples of a latent are the activating rows of smallest priority:

1. For one latent, row -> priority is injective (a composition of bijections), so there are no ties and the sample is unique.
2. smallest(A + B) = smallest(smallest(A) + smallest(B)): any sharding, any order and any repetition give the same set.
3. If priorities behave like random words, the sample is uniform without replacement. Tests measure that they do.

A priority is recomputed from its row id, so it is never stored. A few ns per firing, no state, no generator to hand around.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from interp_assets.compute.seeds import stream

_LATENT_STEP: Final = np.uint64(0x9E3779B97F4A7C15)
_SEED_STEP: Final = np.uint64(0xD6E8FEB86659FD93)
_ROW_STEP: Final = np.uint64(0xD1B54A32D192ED03)


def mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64-bit words one to one."""
    words = words ^ (words >> np.uint64(30))
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(27)
    words *= np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    return words


def sample_seed(root_seed: int, stage: str, purpose: str) -> np.uint64:
    """Draw the word that tells one family of priorities from another."""
    return stream(root_seed, stage, purpose).words(1)[0]


def latent_keys(latents: NDArray[np.uint64], seed: np.uint64) -> NDArray[np.uint64]:
    """Return the key of each latent."""
    return mix(latents * _LATENT_STEP + np.full(1, seed) * _SEED_STEP + np.uint64(1))


def row_keys(row_ids: NDArray[np.uint64], seed: np.uint64) -> NDArray[np.uint64]:
    """Return the key of each row: injective, so it is also a priority of rows."""
    return mix(row_ids * _ROW_STEP + np.full(1, seed))


def priorities(latent_keys: NDArray[np.uint64], row_keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the priority of each pair; the arrays broadcast."""
    return mix(latent_keys ^ row_keys)
