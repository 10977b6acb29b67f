"""A retraining starts as the SAE that it continues: unfolding is the inverse of folding."""

import pytest
import torch

from interp_assets.config import SaeConfig
from interp_assets.train.recipes import RECIPES, Normalization, fold_weights, make_weights
from interp_assets.train.warm import unfold_weights

OLD = Normalization(torch.linspace(-1, 1, 6, dtype=torch.float64), 0.7)
NEW = Normalization(torch.linspace(-0.5, 2, 6, dtype=torch.float64), 1.9)


@pytest.mark.parametrize("architecture", sorted(RECIPES))
def test_unfolding_and_folding_give_the_same_sae(architecture: str) -> None:
    """Under the old normalisation or a new one, in every architecture: the first step of a retraining sees the published SAE."""
    config = SaeConfig(architecture=architecture, d_sae=10, k=3)
    generator = torch.Generator().manual_seed(0)
    weights = make_weights(config, torch.randn(40, 6, generator=generator), generator)
    weights = {name: value + 0.1 * torch.rand(value.shape, generator=generator) for name, value in weights.items()}
    sae = fold_weights(config, weights, OLD)
    x = torch.randn(20, 6, generator=generator)
    for normalization in (OLD, NEW):
        again = fold_weights(config, unfold_weights(config, sae, normalization), normalization)
        assert again.kind == sae.kind
        for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
            torch.testing.assert_close(getattr(again, name), getattr(sae, name), rtol=1e-4, atol=1e-5)
        if sae.kind != "topk":
            torch.testing.assert_close(again.threshold, sae.threshold, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(again.decode(again.encode(x)), sae.decode(sae.encode(x)), rtol=1e-3, atol=1e-3)
