"""Attention that is listened to: the very pattern of eager attention in every family, from a forward that keeps its own bits."""

import re

import pytest
import torch
from tiny_models import ATTENDING_CONFIGS, CONTEXT, INSIDE, VOCABULARY, make_net
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    FalconConfig,
    JambaConfig,
    MambaConfig,
    PreTrainedModel,
    Qwen3NextConfig,
    T5Config,
    T5Model,
)

from interp_assets.errors import InputError
from interp_assets.garcon.attention import Attended, attention_heard, gram, list_attention, list_other_layers
from interp_assets.garcon.subject import SubjectModel

HEARD = [kind for kind in (*INSIDE, *ATTENDING_CONFIGS) if kind != "gpt_neo"]
BOTH_WAYS = ("bert", "distilbert", "roberta", "electra")


def _tokens(n_contexts: int = 3, length: int = 10) -> Tensor:
    return torch.randint(0, VOCABULARY - 3, (n_contexts, length), generator=torch.Generator().manual_seed(1))


def _hear(net: PreTrainedModel, **arguments: Tensor) -> tuple[dict[int, Attended], Tensor]:
    found: dict[int, Attended] = {}
    listeners = {layer.module: lambda heard, number=layer.layer: found.update({number: heard}) for layer in list_attention(net)}
    with attention_heard(listeners), torch.no_grad():
        return found, net(**arguments)[0]


@pytest.mark.parametrize("kind", HEARD)
def test_rows_of_the_pattern_are_those_of_eager_attention(kind: str) -> None:
    """The oracle is the family's own eager attention, to the last bit; blocks of queries do not show in lengths that the harvest pads to."""
    tokens = _tokens(length=32)
    oracle = make_net(kind)
    oracle.set_attn_implementation("eager")
    with torch.no_grad():
        expected = oracle(input_ids=tokens, output_attentions=True).attentions
    slow = make_net(kind)
    slow.set_attn_implementation("eager")
    heard, _ = _hear(SubjectModel(slow).net, input_ids=tokens)
    assert sorted(heard) == list(range(len(expected)))
    fast, _ = _hear(SubjectModel(make_net(kind)).net, input_ids=tokens)  # behind its first layer its hidden states are rounded otherwise
    for layer, attended in [*heard.items(), (0, fast[0])]:
        for block in (32, 16):
            rows = [attended.pattern(context, slice(first, first + block)) for context in range(3) for first in range(0, 32, block)]
            pattern = torch.cat(rows, dim=1).unflatten(1, (3, 32)).transpose(0, 1)
            assert (pattern - expected[layer]).abs().max() == 0.0


@pytest.mark.parametrize("kind", HEARD)
def test_a_network_that_is_heard_computes_the_same_bits(kind: str) -> None:
    """Statistics of heads are of the model whose activations are harvested; padded encoders too. What is mixed is the pattern times the values."""
    tokens = _tokens()
    mask = torch.arange(10)[None, :].expand(3, 10) < torch.tensor([10, 7, 4])[:, None]
    for arguments in ({}, {"attention_mask": mask.long()} if kind in BOTH_WAYS else {}):
        heard, output = _hear(SubjectModel(make_net(kind)).net, input_ids=tokens, **arguments)
        with torch.no_grad():
            assert torch.equal(output, SubjectModel(make_net(kind)).net(input_ids=tokens, **arguments)[0])
        attended = heard[1]
        pattern = attended.pattern(1, slice(0, 10))
        assert not arguments or pattern[..., 7:].eq(0).all()
        values = attended.value[1].repeat_interleave(len(pattern) // attended.value.shape[1], dim=0)
        torch.testing.assert_close(torch.matmul(pattern, values).transpose(0, 1), attended.mixed[1], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("kind", HEARD)
def test_the_output_matrix_of_each_head_is_found(kind: str) -> None:
    """What the heads mix, each times its own matrix, adds up to what the module returns, less a bias."""
    net = SubjectModel(make_net(kind)).net
    heard, _ = _hear(net, input_ids=_tokens())
    layer = list_attention(net)[1]
    mixed = heard[1].mixed[0]
    added = torch.einsum("qhd,hdm->qm", mixed, layer.W_O())
    with torch.no_grad():
        expected = layer.o_proj(mixed.flatten(1)) - layer.o_proj(torch.zeros_like(mixed.flatten(1)))
    torch.testing.assert_close(added, expected, rtol=1e-4, atol=1e-5)
    lengths = torch.einsum("qhd,hdm->hqm", mixed, layer.W_O()).norm(dim=-1)
    squared = torch.einsum("qhd,hde,qhe->hq", mixed, gram(layer), mixed)
    torch.testing.assert_close(squared.sqrt(), lengths, rtol=1e-4, atol=1e-6)


def test_half_precision_rows_are_near_eager_ones_and_sum_to_one() -> None:
    """Eager attention rounds its rows to bfloat16; ours are float32 of the same queries and keys."""
    tokens = _tokens()
    for kind in ("gpt2", "llama", "gemma2", "qwen3"):
        oracle = make_net(kind).bfloat16()
        oracle.set_attn_implementation("eager")
        with torch.no_grad():
            expected = oracle(input_ids=tokens, output_attentions=True).attentions[0]
        heard, _ = _hear(SubjectModel(make_net(kind).bfloat16()).net, input_ids=tokens)
        pattern = torch.stack([heard[0].pattern(context, slice(0, 10)) for context in range(3)])
        assert (pattern - expected.float()).abs().max() < 0.03
        torch.testing.assert_close(pattern.sum(-1), torch.ones(pattern.shape[:-1]))


def test_windows_are_told_by_layer() -> None:
    """A window explains why a head cannot look far; what it sees comes from the mask, not from this number."""
    assert [layer.window for layer in list_attention(SubjectModel(make_net("gpt_oss")).net)] == [4, None]
    assert [layer.window for layer in list_attention(SubjectModel(make_net("mistral")).net)] == [4, 4]
    assert [layer.window for layer in list_attention(SubjectModel(make_net("llama")).net)] == [None, None]
    heard, _ = _hear(SubjectModel(make_net("gpt_oss")).net, input_ids=_tokens())
    seen = heard[0].sees(0, slice(9, 10))
    assert seen is not None
    assert seen[0].nonzero()[:, 0].tolist() == [6, 7, 8, 9]
    assert heard[0].sinks is not None


def test_layers_that_do_not_attend_are_named() -> None:
    """A map with layers 1 and 3 alone would look like a model that was cut."""
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 4}
    linear = Qwen3NextConfig(**sizes, head_dim=8, layer_types=["linear_attention", "full_attention"] * 2, num_experts=2, moe_intermediate_size=8)
    state_space = JambaConfig(**sizes, attn_layer_period=2, attn_layer_offset=0, num_experts=2)
    for config, attending, others in (
        (linear, [1, 3], {0: "linear attention", 2: "linear attention"}),
        (state_space, [0, 2], {1: "mamba", 3: "mamba"}),
    ):
        with torch.device("meta"):
            net = AutoModelForCausalLM.from_config(config)
        assert [layer.layer for layer in list_attention(SubjectModel(net).net)] == attending
        assert list_other_layers(net) == others
    assert list_other_layers(SubjectModel(make_net("gpt2")).net) == {}


def test_a_model_whose_heads_cannot_be_heard_is_refused_with_the_reason() -> None:
    """A pattern that does not follow from queries and keys would be another one; structure alone tells, before weights are loaded."""
    sizes = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1}
    encoder_decoder = T5Model(T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    cases = [
        (make_net("gpt_neo"), "masks keys inside its own method"),
        (encoder_decoder, "attends from a decoder to an encoder"),
        (AutoModel.from_config(FalconConfig(**sizes, num_attention_heads=2)), "heads of a falcon model cannot be shown"),
        (AutoModel.from_config(MambaConfig(**sizes, state_size=4)), "none of its layers attends by an attention function"),
    ]
    for net, message in cases:
        with pytest.raises(InputError, match=re.escape(message)):
            list_attention(net)


def test_a_mask_that_favours_keys_is_refused() -> None:
    """With a bias by position the scores would not be those of queries and keys."""
    net = SubjectModel(make_net("llama")).net
    bias = torch.zeros(1, 1, CONTEXT, CONTEXT).masked_fill(torch.ones(CONTEXT, CONTEXT).triu(1).bool(), torch.finfo(torch.float32).min) - 0.5
    with pytest.raises(InputError, match="adds a bias of its own to the scores"):
        _hear(net, input_ids=_tokens(1, CONTEXT), attention_mask=bias)


def test_nothing_is_left_behind() -> None:
    """A listener that stays would slow down and leak every later forward."""
    net = SubjectModel(make_net("gptj")).net
    layers = list_attention(net)
    with pytest.raises(ZeroDivisionError), attention_heard({layer.module: _fail for layer in layers}), torch.no_grad():
        net(input_ids=_tokens())
    with torch.no_grad():
        net(input_ids=_tokens())
    assert not any("_attn" in vars(layer.module) for layer in layers)


def _fail(_attended: Attended) -> None:
    raise ZeroDivisionError
