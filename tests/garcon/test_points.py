"""Names of hook points: what is known is found, what is not is answered with what is near."""

import re
from pathlib import Path

import pytest
import torch
from tiny_models import make_net, make_subject, make_tokenizer, save_model
from torch import nn
from transformers import BloomConfig, BloomForCausalLM, T5Config

from interp_assets.errors import InputError
from interp_assets.garcon.locate import fingerprint_model, fingerprint_tokenizer, load_model_config, locate_model
from interp_assets.garcon.points import HookPoint, find_point, list_points, tensor_in, with_tensor
from interp_assets.garcon.tokenizer import affixes, leading_token, load_tokenizer, separator_token, special_token_ids, tokenize_texts
from interp_assets.planning.config import ModelConfig


def test_points_carry_module_path_and_alias() -> None:
    """Both names are stored with artifacts, so that nobody has to guess which tensor was read."""
    points = {point.name: point for point in make_subject("gemma2").points()}
    assert points["mlp_out.1"].module_path == "model.layers.1.post_feedforward_layernorm"
    assert points["mlp_out.1"].alias == "blocks.1.hook_mlp_out"
    assert points["resid_pre.0"].side == "input"
    assert points["z.0"] == HookPoint("z.0", "model.layers.0.self_attn.o_proj", "input", "blocks.0.attn.hook_z")
    assert len(points) == 2 * 15 + 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resid_pots.1", "gpt2 has no hook point 'resid_pots.1'. Near: resid_post.1"),
        ("resid_post.7", "with L from 0 to 1"),
        ("blocks.2.hook_resid_post", "gpt2 has no hook point 'blocks.2.hook_resid_post'. Near: resid_post"),
        (
            "blocks.1.hook_mlp_in",
            "what has none here: it is the residual stream before the norm: name resid_mid.1, or mlp_in.1",
        ),
        ("module:transformer.h.1.mpl", "the model has no module 'transformer.h.1.mpl'. Near: transformer.h.1.mlp"),
    ],
)
def test_an_unknown_name_is_answered_with_near_ones(name: str, message: str) -> None:
    """The user should not have to print the model."""
    with pytest.raises(InputError, match=re.escape(message)):
        find_point(make_net("gpt2"), name)


def test_an_unknown_model_type_is_refused_not_guessed() -> None:
    """Bloom's MLP returns its input plus its contribution: a guess by name would be wrong. Its modules can be named."""
    net = BloomForCausalLM(BloomConfig(n_layer=2, n_head=2, hidden_size=16, vocab_size=50))
    assert list_points(net) == []
    with pytest.raises(InputError, match=r"residual stream of a 'bloom' model lies is not known here .*Name a module instead: module:transformer"):
        find_point(net, "mlp_out.1")
    assert find_point(net, "module:transformer.h.1").module_path == "transformer.h.1"


def test_a_bare_tensor_is_not_indexed() -> None:
    """Under transformers 5 blocks return bare tensors; `output[0]` would be batch element 0."""
    value = torch.ones(2, 3, 4)
    assert tensor_in(value, "here") is value
    assert tensor_in((value, None), "here") is value
    assert with_tensor((value, "cache"), value * 2)[1] == "cache"  # type: ignore[index]
    with pytest.raises(InputError, match="here returns a dict that does not start with a tensor"):
        tensor_in({"a": 1}, "here")


def test_a_missing_model_is_named_with_the_next_step(tmp_path: Path) -> None:
    """Folder, package and hub are told apart."""
    with pytest.raises(InputError, match=r"No model 'builtin:nothing' ships with this package"):
        locate_model(ModelConfig(name="builtin:nothing"))
    with pytest.raises(InputError, match="There is no model folder /no/such/folder"):
        locate_model(ModelConfig(name="/no/such/folder"))
    with pytest.raises(InputError, match=r"holds no config\.json"):
        locate_model(ModelConfig(name=str(tmp_path)))


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    """There are two residual streams, and the corpus has only one text."""
    T5Config(num_layers=1, d_model=8).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"is an encoder-decoder \(t5\)"):
        load_model_config(ModelConfig(name=str(tmp_path)))


def test_fingerprints_follow_content_not_place(tmp_path: Path) -> None:
    """A copied folder gives the same artifacts; a changed weight or tokenizer gives others."""
    first, second = (ModelConfig(name=str(save_model(tmp_path / name, "gpt2"))) for name in ("a", "b"))
    assert fingerprint_model(first) == fingerprint_model(second)
    assert fingerprint_tokenizer(first) == fingerprint_tokenizer(second)
    net = make_net("gpt2")
    embedding = net.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    with torch.no_grad():
        embedding.weight[0, 0] += 1
    net.save_pretrained(tmp_path / "b")
    assert fingerprint_model(first) != fingerprint_model(second)
    assert fingerprint_tokenizer(first) == fingerprint_tokenizer(second)


def test_a_model_without_tokenizer_is_refused(tmp_path: Path) -> None:
    """Else an empty vocabulary would tokenize to nothing."""
    make_net("llama").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="tokenizer of"):
        load_tokenizer(ModelConfig(name=str(tmp_path)))


def test_special_tokens_are_found() -> None:
    """They are stored but never trained on."""
    decoder, encoder = make_tokenizer(), make_tokenizer(is_encoder=True)
    assert special_token_ids(decoder) == [256, 257, 258]
    assert (leading_token(decoder), separator_token(decoder)) == (256, 257)
    assert (leading_token(encoder), separator_token(encoder)) == (None, None)
    assert affixes(encoder) == ([256], [257])
    assert affixes(decoder) == ([], [])
    assert [len(ids) for ids in tokenize_texts(decoder, ["abc", "", "é"])] == [3, 0, 2]
