"""Points inside attention and MLP: the right tensor in every family, read and written, and an untouched network where nobody asks."""

import re

import pytest
import torch
from tiny_models import D_MODEL, ENCODERS, INSIDE, VOCABULARY, make_net, make_subject
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DeepseekV3Config, LlamaConfig, PreTrainedModel

from interp_assets.errors import InputError
from interp_assets.garcon.points import find_point, list_points, module_of, point_shape
from interp_assets.garcon.subject import SubjectModel
from interp_assets.garcon.taps import Tap, tapped

PARALLEL = ("gpt_neox", "gptj", "phi")


def _tokens(n_contexts: int = 3, length: int = 10) -> Tensor:
    return torch.randint(0, VOCABULARY - 3, (n_contexts, length), generator=torch.Generator().manual_seed(1))


def _eager(kind: str) -> PreTrainedModel:
    net = make_net(kind)
    net.set_attn_implementation("eager")
    return net


def _read(subject: SubjectModel, names: list[str], tokens: Tensor) -> dict[str, Tensor]:
    """Read points in their own shapes, to the end of a forward."""
    found: dict[str, Tensor] = {}
    with tapped(subject.net, [_reader(subject, name, found) for name in names], tokens.shape[1]), torch.no_grad():
        found["end"] = subject.net(input_ids=tokens)[0]
    return found


def _reader(subject: SubjectModel, name: str, found: dict[str, Tensor]) -> Tap:
    return Tap(find_point(subject.net, name), lambda value: found.update({name: value.clone()}) or value)


@pytest.mark.parametrize("kind", INSIDE)
def test_a_network_that_nobody_asks_computes_the_same_bits(kind: str) -> None:
    """Stored activations were made by the untouched network: its ids would be lies otherwise. Masked batches too."""
    tokens = _tokens()
    mask = torch.arange(10)[None, :].expand(3, 10) < torch.tensor([10, 7, 4])[:, None]
    ours, theirs = SubjectModel(make_net(kind)).net, make_net(kind)
    with torch.no_grad():
        for arguments in ({}, {"attention_mask": mask.long()}):
            assert torch.equal(ours(input_ids=tokens, **arguments)[0], theirs(input_ids=tokens, **arguments)[0])


@pytest.mark.parametrize("kind", INSIDE)
def test_patterns_are_those_of_eager_attention(kind: str) -> None:
    """The oracle is the family's own eager attention: soft caps, windows, sinks and grouped heads included; the output moves by rounding alone."""
    tokens = _tokens()
    subject, oracle = make_subject(kind), _eager(kind)
    found = _read(subject, ["pattern.0", "pattern.1"], tokens)
    with torch.no_grad():
        expected = oracle(input_ids=tokens, output_attentions=True)
    for layer in (0, 1):
        assert torch.equal(found[f"pattern.{layer}"], expected.attentions[layer])
    torch.testing.assert_close(found["end"], expected[0], rtol=1e-5, atol=2e-6)
    sums = found["pattern.1"].sum(-1)
    assert sums.lt(0.99).any() if kind == "gpt_oss" else torch.allclose(sums, torch.ones(()))
    if kind not in ENCODERS:
        assert found["pattern.0"].triu(1).eq(0).all()


@pytest.mark.parametrize("kind", INSIDE)
def test_heads_are_queries_keys_values_and_what_they_mix(kind: str) -> None:
    """What W_O multiplies is the pattern times the values; the pattern's scores are queries times keys, where no soft cap bends them."""
    tokens = _tokens()
    subject = make_subject(kind)
    found = _read(subject, ["q.1", "k.1", "v.1", "pattern.1", "z.1"], tokens)
    pattern, heads = found["pattern.1"], found["q.1"].shape[2]
    keys, values = (found[name].repeat_interleave(heads // found[name].shape[2], dim=2) for name in ("k.1", "v.1"))
    torch.testing.assert_close(found["z.1"], torch.einsum("bhqk,bkhd->bqhd", pattern, values), rtol=1e-5, atol=1e-6)
    for name in ("q.1", "k.1", "v.1", "pattern.1", "z.1"):
        shape = point_shape(subject.net, find_point(subject.net, name))
        assert shape is not None
        assert [size for size in shape if isinstance(size, int)] == [*found[name].shape[2:]] if name != "pattern.1" else shape[1] == heads
    if kind != "gemma2":
        scores = torch.einsum("bqhd,bkhd->bhqk", found["q.1"], keys)
        ratio = (pattern[..., 9, 9] / pattern[..., 9, 8]).log() / (scores[..., 9, 9] - scores[..., 9, 8])
        torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio), rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("kind", INSIDE)
def test_blocks_are_the_sum_of_their_points(kind: str) -> None:
    """Every point of a block against the modules that make one of the other: the wrong side of a norm would show."""
    tokens = _tokens()
    subject = make_subject(kind)
    there = {point.kind for point in subject.points()}
    found = _read(subject, [point.name for point in subject.points()], tokens)
    head = subject.net.get_output_embeddings()
    for layer in (0, 1):
        at = {kind_: found[f"{kind_}.{layer}"] for kind_ in there if f"{kind_}.{layer}" in found}
        by_name = {point.kind: module_of(subject.net, point) for point in subject.points() if point.name.endswith(f".{layer}")}
        torch.testing.assert_close(by_name["z"](at["z"].flatten(2)), at["attn_raw"])
        if "mlp_act" in there:
            torch.testing.assert_close(by_name["mlp_act"](at["mlp_act"]), at["mlp_raw"])
        if kind in ENCODERS or kind == "opt_350m":
            assert at["attn_out"] is not at["resid_mid"]
            torch.testing.assert_close(at["mlp_in"], at["resid_mid"])
            continue
        torch.testing.assert_close(at["resid_pre"] + at["attn_out"] + at["mlp_out"], at["resid_post"])
        assert ("resid_mid" in at) == (kind not in PARALLEL)
        if "resid_mid" in at:
            torch.testing.assert_close(at["resid_pre"] + at["attn_out"], at["resid_mid"])
            norm = by_name["resid_mid"]
            if not kind.startswith("olmo"):
                torch.testing.assert_close(norm(at["resid_mid"]), at["mlp_in"])
        differ = kind in ("gemma2", "gemma3_text", "olmo2")
        assert torch.equal(at["attn_raw"], at["attn_out"]) != differ
        assert torch.equal(at["mlp_raw"], at["mlp_out"]) != differ
    if "final_norm" in there and head is not None and kind != "gemma2":
        torch.testing.assert_close(head(found["final_norm"]), found["logits"])
    assert found["embed"].shape == (3, 10, D_MODEL)


@pytest.mark.parametrize("kind", INSIDE)
def test_rows_of_every_point_have_the_width_that_the_plan_is_told(kind: str) -> None:
    """A plan is made without weights; a shard of another width could not be written. A pattern has no rows and says so."""
    subject = make_subject(kind)
    tokens = _tokens()
    names = [point.name for point in subject.points() if point.kind != "pattern"]
    captured = subject.capture(tokens, None, names)
    assert {name: rows.shape[2] for name, rows in captured.items()} == {name: subject.d_in(name) for name in names}
    with pytest.raises(InputError, match="has no rows: a pattern is as wide as its context is long"):
        subject.d_in("pattern.0")


@pytest.mark.parametrize("kind", INSIDE)
def test_a_write_at_every_point_reaches_the_end_and_an_equal_one_changes_nothing(kind: str) -> None:
    """A hook that fires without effect is the commonest fault of such tools. Only the last context changes when only it is written."""
    subject, tokens = make_subject(kind), _tokens(n_contexts=2, length=5)
    plain = _read(subject, [], tokens)["end"]
    with tapped(subject.net, [Tap(point, torch.clone) for point in subject.points()], 5), torch.no_grad():
        torch.testing.assert_close(subject.net(input_ids=tokens)[0], plain, rtol=1e-5, atol=2e-6)
    for point in [point for point in subject.points() if not point.name.endswith(".0")]:
        with tapped(subject.net, [Tap(point, _scale_last)], 5), torch.no_grad():
            changed = subject.net(input_ids=tokens)[0]
        torch.testing.assert_close(changed[0], plain[0], rtol=1e-5, atol=2e-6)
        assert (changed[1] - plain[1]).abs().max() > 1e-4, point.name
    assert torch.equal(_read(subject, [], tokens)["end"], plain), "a hook was left behind"


def _scale_last(value: Tensor) -> Tensor:
    changed = value.clone()
    changed[-1] = changed[-1] * torch.linspace(0.5, 2, value.shape[-1])
    return changed


@pytest.mark.parametrize("kind", [kind for kind in INSIDE if kind not in (*PARALLEL, *ENCODERS, "opt_350m")])
def test_a_write_in_the_middle_of_a_block_reaches_both_ways(kind: str) -> None:
    """The stream enters the MLP's norm and is added to later: what leaves the block is the new stream plus the MLP of the new stream."""
    subject, tokens = make_subject(kind), _tokens()
    new = torch.randn(3, 10, D_MODEL, generator=torch.Generator().manual_seed(3))
    found: dict[str, Tensor] = {}
    taps = [
        Tap(find_point(subject.net, "resid_mid.0"), lambda _value: new),
        *(_reader(subject, name, found) for name in ("mlp_out.0", "resid_post.0")),
    ]
    with tapped(subject.net, taps, 10), torch.no_grad():
        subject.net(input_ids=tokens)
    torch.testing.assert_close(found["resid_post.0"], new + found["mlp_out.0"])


@pytest.mark.parametrize("kind", INSIDE)
def test_zeroing_a_head_subtracts_its_part_of_the_output(kind: str) -> None:
    """The oracle is W_O's slice."""
    subject, tokens = make_subject(kind), _tokens()
    found = _read(subject, ["z.1", "attn_raw.1"], tokens)
    point = find_point(subject.net, "z.1")
    module = module_of(subject.net, point)
    alone = torch.zeros_like(found["z.1"])
    alone[:, :, 1] = found["z.1"][:, :, 1]
    part = module(alone.flatten(2)) - module(torch.zeros_like(alone.flatten(2)))
    taps = [
        Tap(point, lambda value: torch.cat([value[:, :, :1], torch.zeros_like(value[:, :, 1:2]), value[:, :, 2:]], 2)),
        _reader(subject, "attn_raw.1", after := {}),
    ]
    with tapped(subject.net, taps, 10), torch.no_grad():
        subject.net(input_ids=tokens)
    torch.testing.assert_close(after["attn_raw.1"], found["attn_raw.1"] - part, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("gptj", "resid_mid.0", "attention and MLP read the same residual stream side by side"),
        ("gpt_neox", "blocks.1.hook_resid_mid", "side by side"),
        ("gpt_oss", "mlp_act.1", "its MLP is a mixture of experts"),
        ("bert", "final_norm", "no norm stands after its last block"),
        ("opt_350m", "final_norm", "no norm stands after its last block"),
        ("bert", "logits", "it has no language-model head"),
        ("llama", "blocks.0.attn.hook_q", "it is read before RoPE, q.0 after it"),
        ("gpt2", "ln_final.hook_normalized", "final_norm is after it"),
        ("gpt2", "z.02", "has no hook point 'z.02'. Near: z."),
    ],
)
def test_a_point_that_a_model_lacks_is_refused_with_the_reason(kind: str, name: str, message: str) -> None:
    """A near tensor under the wrong name is worse than none."""
    net = make_subject(kind).net
    with pytest.raises(InputError, match=re.escape(message)):
        find_point(net, name)
    refused = {point.name: point.refused for point in list_points(net, with_refused=True) if point.refused}
    assert set(refused).isdisjoint(point.name for point in list_points(net))


def test_attention_without_heads_is_refused_with_the_reason() -> None:
    """Latent attention has no keys and values by head: an answer by shape alone would be another tensor."""
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 20}
    latent = {"kv_lora_rank": 4, "q_lora_rank": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
    experts = {"n_routed_experts": 2, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
    config = DeepseekV3Config(**sizes, **latent, **experts, num_key_value_heads=2, first_k_dense_replace=1)
    with torch.device("meta"):
        net = AutoModelForCausalLM.from_config(config)
    with pytest.raises(InputError, match="its attention is latent: keys and values are not there by head"):
        find_point(net, "k.0")


def test_other_kernels_keep_their_own_attention() -> None:
    """A network that was loaded with another kernel is not slowed down behind its user's back; the points that it hides are refused."""
    config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=20)
    net = AutoModelForCausalLM.from_config(config, attn_implementation="flex_attention")
    subject = SubjectModel(net)
    assert net.config._attn_implementation == "flex_attention"
    with pytest.raises(InputError, match="LlamaAttention computes attention by 'flex_attention', which hands out neither"):
        find_point(net, "pattern.0")
    assert "z.0" in {point.name for point in subject.points()}


@pytest.mark.parametrize("kind", INSIDE)
def test_every_point_answers_to_its_name_in_transformer_lens(kind: str) -> None:
    """Published code and SAEs name hook points so."""
    net = make_subject(kind).net
    for point in list_points(net):
        assert find_point(net, point.alias) == point
    assert isinstance(net.get_submodule(find_point(net, "embed").module_path), nn.Embedding)
