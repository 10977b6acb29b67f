"""Other tools' formats, against the formulas of their encoders."""

from typing import Any

import pytest
import torch

from interp_assets.errors import InputError
from interp_assets.train.exchange.formats import from_dictionary_learning, from_sparsify, to_dictionary_learning, to_sparsify
from interp_assets.train.sae import Sae, SaeKind

D_IN, D_SAE, K = 6, 16, 3
X = torch.randn(50, D_IN, generator=torch.Generator().manual_seed(2))


def make_sae(kind: SaeKind, *, d_out: int = D_IN, with_skip: bool = False) -> Sae:
    """Draw a small SAE whose every tensor matters."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    threshold = draw(D_SAE).abs() if kind == "jump_relu" else torch.zeros(D_SAE)
    tensors: dict[str, Any] = {"W_enc": draw(D_IN, D_SAE), "b_enc": draw(D_SAE), "W_dec": draw(D_SAE, d_out), "b_dec": draw(d_out)}
    return Sae(kind=kind, **tensors, threshold=threshold, k=K if kind == "topk" else 0, W_skip=draw(D_IN, d_out) if with_skip else None)


def test_sparsify_encodes_the_export_alike() -> None:
    """Its encoder sees x - b_dec, and keeps the k largest."""
    sae = make_sae("topk")
    config, tensors = to_sparsify(sae)
    pre = ((X - tensors["b_dec"]) @ tensors["encoder.weight"].T + tensors["encoder.bias"]).relu()
    values, indices = pre.topk(config["k"], dim=1)
    latents = torch.zeros(len(X), D_SAE).scatter(1, indices, values)
    torch.testing.assert_close(latents, sae.encode(X), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(latents @ tensors["W_dec"] + tensors["b_dec"], sae.reconstruct(X, sae.encode(X)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("d_out", "with_skip"), [(D_IN, False), (D_IN, True)])
def test_sparsify_round_trip(d_out: int, with_skip: bool) -> None:
    """Transcoders do not subtract the decoder's bias."""
    sae = make_sae("topk", d_out=d_out, with_skip=with_skip)
    again = from_sparsify(*to_sparsify(sae))
    torch.testing.assert_close(again.reconstruct(X, again.encode(X)), sae.reconstruct(X, sae.encode(X)), rtol=1e-4, atol=1e-4)


def test_dictionary_learning_encodes_the_export_alike() -> None:
    """JumpReluAutoEncoder does not subtract the decoder's bias, AutoEncoderTopK does."""
    sae = make_sae("jump_relu")
    tensors = to_dictionary_learning(sae).tensors
    pre = X @ tensors["W_enc"] + tensors["b_enc"]
    torch.testing.assert_close((pre * (pre > tensors["threshold"])).relu(), sae.encode(X))
    sae = make_sae("topk")
    tensors = to_dictionary_learning(sae).tensors
    pre = ((X - tensors["b_dec"]) @ tensors["encoder.weight"].T + tensors["encoder.bias"]).relu()
    values, indices = pre.topk(int(tensors["k"]), dim=1)
    torch.testing.assert_close(torch.zeros(len(X), D_SAE).scatter(1, indices, values), sae.encode(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["relu", "jump_relu", "topk"])
def test_dictionary_learning_round_trip(kind: SaeKind) -> None:
    """A relu SAE comes back as a jump_relu one with thresholds 0: the same function."""
    sae = make_sae(kind)
    again = from_dictionary_learning(*to_dictionary_learning(sae))
    torch.testing.assert_close(again.encode(X), sae.encode(X), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(again.decode(again.encode(X)), sae.decode(sae.encode(X)), rtol=1e-4, atol=1e-4)


def test_a_batch_topk_of_dictionary_learning_fires_by_its_threshold() -> None:
    """Its inference rule."""
    config, tensors = to_dictionary_learning(make_sae("topk"))
    again = from_dictionary_learning({"trainer": {**config["trainer"], "dict_class": "BatchTopKSAE"}}, {**tensors, "threshold": torch.tensor(0.7)})
    pre = make_sae("topk").pre_activations(X)
    torch.testing.assert_close(again.encode(X), pre * (pre > 0.7), rtol=1e-5, atol=1e-5)


def test_what_a_format_cannot_hold_is_refused() -> None:
    """With the format that can."""
    with pytest.raises(InputError, match=r"sparsify holds TopK SAEs only, this one is 'jump_relu'. Export it as saelens"):
        to_sparsify(make_sae("jump_relu"))
    with pytest.raises(InputError, match="no skip transcoders"):
        to_dictionary_learning(make_sae("topk", with_skip=True))
    with pytest.raises(InputError, match=r"is a IdentityDict; AutoEncoder, .* are read"):
        from_dictionary_learning({"trainer": {"dict_class": "IdentityDict"}}, {})
    with pytest.raises(InputError, match=r"\['encoder.weight', 'encoder.bias', 'W_dec', 'b_dec'\] missing"):
        from_sparsify({"k": 3}, {})
    with pytest.raises(InputError, match="has the activation 'groupmax'"):
        from_sparsify({"activation": "groupmax"}, {})
