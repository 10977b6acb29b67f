"""Weights by TransformerLens' names: with the points of the same block they compute what the network does, in every family."""

from functools import partial

import pytest
import torch
from tiny_models import CONTEXT, D_MODEL, ENCODERS, INSIDE, VOCABULARY, make_net, make_subject
from torch import Tensor
from transformers import Phi3Config
from transformers.activations import ACT2FN
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from interp_assets.errors import InputError
from interp_assets.garcon.subject import SubjectModel
from interp_assets.garcon.taps import Tap, tapped
from interp_assets.garcon.weights import read_weight

TOKENS = torch.randint(0, VOCABULARY - 3, (2, 9), generator=torch.Generator().manual_seed(1))
NORMED_QUERIES = ("qwen3", "gemma3_text", "olmo2")


def _read(subject: SubjectModel) -> dict[str, Tensor]:
    """Return every point of a forward, in its own shape."""
    found: dict[str, Tensor] = {}

    def keep(name: str, value: Tensor) -> Tensor:
        found[name] = value.clone()
        return value

    with tapped(subject.net, [Tap(point, partial(keep, point.name)) for point in subject.points()], TOKENS.shape[1]), torch.no_grad():
        subject.net(input_ids=TOKENS)
    return found


def _bias(subject: SubjectModel, name: str) -> Tensor | float:
    """Return a bias, or zero where the model says that it has none."""
    try:
        return read_weight(subject.net, name)
    except InputError as error:
        if "has no bias" not in str(error):
            raise
        return 0.0


def _check(subject: SubjectModel, kind: str) -> None:
    """Compare products of points and weights with the points that follow them."""
    found = _read(subject)
    for layer in (0, 1):
        at = {name.partition(".")[0]: value for name, value in found.items() if name.endswith(f".{layer}")}

        def weight(name: str, layer: int = layer) -> Tensor:
            return read_weight(subject.net, f"{name}.{layer}")

        mixed = torch.einsum("bqhd,hdm->bqm", at["z"], weight("W_O")) + _bias(subject, f"b_O.{layer}")
        torch.testing.assert_close(mixed, at["attn_raw"], rtol=1e-5, atol=2e-6)
        for state in "qkv":
            if state != "v" and kind in NORMED_QUERIES:
                continue
            made = torch.einsum("bqm,hmd->bqhd", at["attn_in"], weight(f"W_{state.upper()}")) + _bias(subject, f"b_{state.upper()}.{layer}")
            if state == "q" and kind.startswith("opt"):
                made = made * at[state].shape[-1] ** -0.5  # OPT scales its queries, not its scores
            n_unturned = made.shape[1] if state == "v" or subject.net.config.model_type in ("gpt2", "gpt_neo", "opt", "bert", "distilbert") else 1
            torch.testing.assert_close(made[:, :n_unturned], at[state][:, :n_unturned], rtol=1e-5, atol=2e-6)
        if "mlp_act" in at:
            torch.testing.assert_close(at["mlp_act"] @ weight("W_out") + _bias(subject, f"b_out.{layer}"), at["mlp_raw"], rtol=1e-5, atol=2e-6)
            names = ("hidden_act", "activation_function", "hidden_activation", "activation")
            act = ACT2FN[next(getattr(subject.net.config, name) for name in names if hasattr(subject.net.config, name))]
            made = at["mlp_in"] @ weight("W_in") + _bias(subject, f"b_in.{layer}")
            try:
                made = act(at["mlp_in"] @ weight("W_gate")) * made
            except InputError:
                made = act(made)
            torch.testing.assert_close(made, at["mlp_act"], rtol=1e-5, atol=2e-6)
    if "final_norm" in found and kind != "gemma2":
        torch.testing.assert_close(
            found["final_norm"] @ read_weight(subject.net, "W_U") + _bias(subject, "b_U"), found["logits"], rtol=1e-5, atol=2e-6
        )


@pytest.mark.parametrize("kind", INSIDE)
def test_weights_compute_what_the_network_does(kind: str) -> None:
    """A matrix turned, cut or taken from the wrong third would give other numbers; queries and keys are compared where RoPE does not turn them."""
    _check(make_subject(kind), kind)


def test_fused_projections_are_cut_apart() -> None:
    """Phi-3 keeps queries, keys and values in one matrix, and gate and input in another, with fewer heads of keys than of queries."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(3)
    config = Phi3Config(**sizes, vocab_size=VOCABULARY, max_position_embeddings=CONTEXT, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    subject = SubjectModel(AutoModelForCausalLM.from_config(config))
    _check(subject, "phi3")
    assert read_weight(subject.net, "W_K.1").shape == (2, 16, 4)
    assert read_weight(subject.net, "W_gate.0").shape == (16, 24)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neo", "opt"])
def test_positions_are_those_that_are_added(kind: str) -> None:
    """OPT keeps two rows in front that no position has."""
    subject = make_subject(kind)
    found = _read(subject)
    table = read_weight(subject.net, "W_pos")
    assert table.shape == (CONTEXT, D_MODEL)
    embedded = read_weight(subject.net, "W_E")[TOKENS]
    assert torch.equal(embedded, found["embed"])
    torch.testing.assert_close(embedded + table[: TOKENS.shape[1]], found["resid_pre.0"])


def test_transformerlens_names_and_heads_name_the_same_numbers() -> None:
    """As one finds them in other people's notebooks."""
    net = make_net("llama")
    for theirs, ours in {"blocks.1.attn.W_O": "W_O.1", "blocks.0.mlp.W_gate": "W_gate.0", "embed.W_E": "W_E", "unembed.W_U": "W_U"}.items():
        assert torch.equal(read_weight(net, theirs), read_weight(net, ours))
    assert read_weight(net, "W_Q.0").shape == (2, D_MODEL, 8)
    assert read_weight(net, "W_K.0").shape == (1, D_MODEL, 8)
    assert torch.equal(read_weight(net, "W_O.1", head=1), read_weight(net, "W_O.1")[1])


def test_what_is_returned_is_a_copy() -> None:
    """A notebook that scales what it was given must not change the model for everybody."""
    net = make_net("gpt2")
    before = net.get_input_embeddings().weight.detach().clone()  # type: ignore[union-attr]
    read_weight(net, "W_E").zero_()
    read_weight(net, "W_U").zero_()
    read_weight(net, "W_Q.0", head=0).zero_()
    assert torch.equal(net.get_input_embeddings().weight, before)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("kind", "name", "head", "message"),
    [
        ("gpt2", "W_0.1", None, r"no weight 'W_0.1'. Near: .*W_O.1.* with L from 0 to 1"),
        ("gpt2", "W_O.2", None, r"no weight 'W_O.2'. Near: "),
        ("gpt2", "W_O", None, r"no weight 'W_O'. Near: "),
        ("gpt2", "W_O.1", 2, r"W_O.1 has heads 0 to 1; found 2"),
        ("gpt2", "W_O.1", -1, r"W_O.1 has heads 0 to 1; found -1"),
        ("gpt2", "W_in.1", 0, r"W_in.1 has no heads: leave `head` out"),
        ("gpt2", "W_gate.0", None, r"A gpt2 model has no W_gate.0: the modules of its MLP are "),
        ("gpt_oss", "W_in.0", None, r"no single W_in.0: its MLP is a mixture of experts"),
        ("llama", "W_pos", None, r"A llama model has no W_pos: it has no table of positions"),
        ("llama", "b_Q.0", None, r"There is no b_Q: q_proj of this model has no bias"),
        ("bert", "W_U", None, r"A bert model as it is loaded here has no language-model head, and no W_U"),
    ],
)
def test_what_a_model_does_not_have_is_refused_with_the_reason(kind: str, name: str, head: int | None, message: str) -> None:
    """Zeros in the place of what is missing would be taken for numbers of the model."""
    with pytest.raises(InputError, match=message):
        read_weight(make_net(kind), name, head)


def test_encoders_have_positions_but_no_unembedding() -> None:
    """As long as their longest context."""
    for kind in ENCODERS:
        assert read_weight(make_net(kind), "W_pos").shape == (CONTEXT, D_MODEL)
