"""A retraining starts as the SAE that it continues: unfolding is the inverse of folding."""

import pytest
import torch

from interp_assets.planning.config import SaeConfig
from interp_assets.train.fold import fold_weights, unfold_weights
from interp_assets.train.recipes import RECIPES, Normalization, make_weights

OLD = Normalization(torch.linspace(-1, 1, 6, dtype=torch.float64), torch.full((6,), 0.7, dtype=torch.float64))
NEW = Normalization(torch.linspace(-0.5, 2, 6, dtype=torch.float64), torch.full((6,), 1.9, dtype=torch.float64))


@pytest.mark.parametrize("architecture", sorted(RECIPES))
def test_unfolding_and_folding_give_the_same_sae(architecture: str) -> None:
    """Under the old normalisation or a new one, in every architecture: the first step of a retraining sees the published SAE."""
    config = SaeConfig(architecture=architecture, d_sae=10, k=3)
    generator = torch.Generator().manual_seed(0)
    weights = make_weights(config, torch.randn(40, 6, generator=generator), 6, generator)
    weights = {name: value + 0.1 * torch.rand(value.shape, generator=generator) for name, value in weights.items()}
    sae = fold_weights(config, weights, OLD, OLD, (6,))
    x = torch.randn(20, 6, generator=generator)
    for normalization in (OLD, NEW):
        again = fold_weights(config, unfold_weights(config, sae, normalization, normalization), normalization, normalization, (6,))
        assert again.kind == sae.kind
        for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
            torch.testing.assert_close(getattr(again, name), getattr(sae, name), rtol=1e-4, atol=1e-5)
        if sae.kind != "topk":
            torch.testing.assert_close(again.threshold, sae.threshold, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(again.decode(again.encode(x)), sae.decode(sae.encode(x)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("architecture", ["relu", "topk", "jump_relu_tanh"])
def test_a_skip_transcoder_comes_back_too(architecture: str) -> None:
    """Two normalisations, a linear map, and decoders that are free or not."""
    config = SaeConfig(architecture=architecture, task="skip_transcoder", target_hook_point="mlp_out.2", d_sae=10, k=3)
    generator, target = (
        torch.Generator().manual_seed(0),
        Normalization(torch.rand(4, dtype=torch.float64), torch.full((4,), 0.3, dtype=torch.float64)),
    )
    weights = make_weights(config, torch.randn(40, 6, generator=generator), 4, generator)
    weights = {name: value + 0.1 * torch.rand(value.shape, generator=generator) for name, value in weights.items()}
    sae = fold_weights(config, weights, OLD, target, (4,))
    again = fold_weights(config, unfold_weights(config, sae, NEW, target), NEW, target, (4,))
    x = torch.randn(20, 6, generator=generator)
    torch.testing.assert_close(again.reconstruct(x, again.encode(x)), sae.reconstruct(x, sae.encode(x)), rtol=1e-3, atol=1e-3)
