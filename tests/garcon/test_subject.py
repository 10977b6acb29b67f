"""Reading and replacing activations: right values, at the right place, in every architecture."""

from pathlib import Path

import pytest
import torch
from tiny_models import CONTEXT, D_MODEL, DECODERS, VOCABULARY, make_net, make_subject, save_model
from torch import Tensor

from interp_assets.errors import InputError
from interp_assets.garcon.subject import SubjectModel, choose_device, load_subject_model, make_meta_model, token_losses
from interp_assets.planning.config import ExecutionConfig, ModelConfig


def _tokens(n_contexts: int = 3, length: int = 10) -> Tensor:
    return torch.randint(0, VOCABULARY - 3, (n_contexts, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", [*DECODERS, "bert"])
def test_the_residual_stream_equals_the_models_own_hidden_states(kind: str) -> None:
    """The oracle is what transformers itself reports, before the final norm of decoders."""
    subject = make_subject(kind)
    token_ids = _tokens()
    captured = subject.capture(token_ids, None, ["resid_pre.0", "resid_post.0", "resid_pre.1", "resid_post.1"])
    hidden = subject.net.base_model(input_ids=token_ids, output_hidden_states=True).hidden_states
    assert torch.equal(captured["resid_pre.0"], hidden[0])
    assert torch.equal(captured["resid_post.0"], hidden[1])
    assert torch.equal(captured["resid_pre.1"], hidden[1])
    norm = {"gpt2": "ln_f", "gpt_neox": "final_layer_norm", "bert": ""}.get(kind, "norm")
    last = subject.net.base_model.get_submodule(norm)(captured["resid_post.1"]) if norm else captured["resid_post.1"]
    torch.testing.assert_close(last, hidden[2])


@pytest.mark.parametrize("kind", DECODERS)
def test_a_block_adds_what_attention_and_mlp_contribute(kind: str) -> None:
    """`mlp_out` read before Gemma's post-norm would be another vector with no error anywhere: an SAE on it gave FVU 9.8 instead of 0.26."""
    subject = make_subject(kind)
    captured = subject.capture(_tokens(), None, [f"{point}.1" for point in ("resid_pre", "attn_out", "mlp_out", "resid_post")])
    total = captured["resid_pre.1"] + captured["attn_out.1"] + captured["mlp_out.1"]
    torch.testing.assert_close(total, captured["resid_post.1"])
    assert captured["mlp_out.1"].norm() > 0.01


def test_an_encoder_block_normalises_after_adding() -> None:
    """In the BERT family contributions are added before two norms."""
    subject = make_subject("bert")
    captured = subject.capture(_tokens(), None, [f"{point}.1" for point in ("resid_pre", "attn_out", "mlp_out", "resid_post")])
    layer = subject.net.get_submodule("encoder.layer.1")
    middle = layer.get_submodule("attention.output.LayerNorm")(captured["resid_pre.1"] + captured["attn_out.1"])
    torch.testing.assert_close(layer.get_submodule("output.LayerNorm")(middle + captured["mlp_out.1"]), captured["resid_post.1"])


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("point", ["resid_pre.1", "attn_out.0", "mlp_out.1", "resid_post.0"])
def test_an_identity_patch_changes_nothing_and_a_zero_patch_something(kind: str, point: str) -> None:
    """The loss recovered by an SAE stands between these two."""
    subject = make_subject(kind)
    token_ids = _tokens()
    loss = subject.loss(token_ids, None)
    assert loss.shape == (3, 9)
    logits = subject.logits(token_ids, None)
    assert torch.equal(subject.logits_with_patch(token_ids, None, point, lambda rows: rows), logits)
    assert not torch.allclose(subject.logits_with_patch(token_ids, None, point, torch.zeros_like), logits)
    assert torch.equal(subject.loss(token_ids, None), loss), "a hook was left behind"


def test_the_loss_is_the_mean_that_transformers_reports() -> None:
    """The oracle of the cross entropy; padding counts zero."""
    subject = make_subject("llama")
    token_ids = _tokens()
    torch.testing.assert_close(subject.loss(token_ids, None).mean(), subject.net(input_ids=token_ids, labels=token_ids).loss)
    mask = torch.ones(token_ids.shape, dtype=torch.bool)
    mask[0, 6:] = False
    masked = subject.loss(token_ids, mask)
    assert masked[0, 5:].eq(0).all()
    assert masked[0, :5].gt(0).all()


def test_what_is_captured_is_a_copy() -> None:
    """Later in-place work in the network, or in the caller, must not change what was read."""
    subject = make_subject("gpt2")
    first = subject.capture(_tokens(), None, ["resid_pre.1", "resid_post.0"])
    first["resid_pre.1"].zero_()
    assert first["resid_post.0"].abs().sum() > 0


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2"])
def test_padding_on_the_right_leaves_no_trace_in_a_decoder(kind: str) -> None:
    """Nothing looks at what follows, so no mask is needed and rows are bit-equal whatever follows them."""
    subject = make_subject(kind)
    token_ids = _tokens(length=16)
    other = token_ids.clone()
    other[:, 10:] = 0
    mask = torch.arange(16)[None, :].expand(3, 16) < 10
    full = subject.capture(token_ids, None, ["resid_post.1"])["resid_post.1"]
    padded = subject.capture(other, mask, ["resid_post.1"])["resid_post.1"]
    assert torch.equal(full[:, :10], padded[:, :10])


def test_padding_is_hidden_from_an_encoder() -> None:
    """An encoder looks both ways: what stands in the padding must not matter."""
    subject = make_subject("bert")
    token_ids = _tokens(length=16)
    mask = torch.arange(16)[None, :].expand(3, 16) < 10
    short = subject.capture(token_ids[:, :10], None, ["resid_post.1"])["resid_post.1"]
    padded = subject.capture(token_ids, mask, ["resid_post.1"])["resid_post.1"]
    torch.testing.assert_close(padded[:, :10], short)


def test_a_module_path_is_a_hook_point() -> None:
    """What the table does not name can be read anyway: here what Gemma's MLP emits before its post-norm."""
    subject = make_subject("gemma2")
    captured = subject.capture(_tokens(), None, ["module:model.layers.1.mlp", "mlp_out.1"])
    norm = subject.net.get_submodule("model.layers.1.post_feedforward_layernorm")
    torch.testing.assert_close(norm(captured["module:model.layers.1.mlp"]), captured["mlp_out.1"])
    assert subject.d_in("module:model.layers.1.mlp.gate_proj") == 32


def test_a_hook_point_that_took_no_part_is_an_error() -> None:
    """A silent hook would give an empty shard."""
    subject = make_subject("gpt2")
    with pytest.raises(InputError, match="'module:lm_head' did not fire"):
        subject.capture(_tokens(), None, ["module:lm_head"])


def test_a_module_without_rows_is_refused() -> None:
    """Attention's projections by head, or a rotary table, are no `[batch, context, d_in]`."""
    subject = make_subject("llama")
    with pytest.raises(InputError, match=r"'module:model.rotary_emb' gives .*rows need \[batch, context, d_in\]"):
        subject.capture(_tokens(), None, ["module:model.rotary_emb"])


def test_token_ids_of_another_tokenizer_are_refused() -> None:
    """An index error deep inside an embedding names nothing."""
    with pytest.raises(InputError, match=r"Token id 9,999 is outside the 259 embeddings of tiny gpt2: the tokenizer belongs to another model"):
        make_subject("gpt2").capture(torch.tensor([[1, 9999]]), None, ["resid_post.0"])


def test_a_context_longer_than_the_models_is_refused() -> None:
    """Rotary models would compute nonsense without an error."""
    with pytest.raises(InputError, match=rf"context of {CONTEXT + 1} tokens is longer than the {CONTEXT} of tiny llama"):
        make_subject("llama").capture(_tokens(1, CONTEXT + 1), None, ["resid_post.0"])


def test_an_encoder_has_no_loss() -> None:
    """The evaluation must skip it with a reason."""
    subject = make_subject("bert")
    with pytest.raises(InputError, match="has no language-model head"):
        subject.loss(_tokens(), None)
    assert subject.unembedding().matrix is None
    assert "no language-model head" in subject.unembedding().reason


def test_a_patch_of_another_shape_is_refused() -> None:
    """Broadcasting would hide it."""
    with pytest.raises(InputError, match=r"replacement at 'resid_post.0' has shape \[3, 10, 1\]"):
        make_subject("gpt2").logits_with_patch(_tokens(), None, "resid_post.0", lambda rows: rows[..., :1])


@pytest.mark.parametrize("kind", DECODERS)
def test_the_unembedding_predicts_what_a_direction_does_to_the_logits(kind: str) -> None:
    """Oracle: push the last residual stream far along a direction; the centred logits' derivative is the matrix's row over sigma."""
    subject = SubjectModel(make_net(kind))
    net = subject.net.double()
    matrix, _, modules = subject.unembedding()
    assert matrix is not None
    assert {point.module_path for point in subject.points() if point.name in ("resid_post.0", "mlp_out.0", "attn_out.0")} <= modules
    norm_name = {"gpt2": "ln_f", "gpt_neox": "final_layer_norm"}.get(kind, "norm")
    norm, head = net.base_model.get_submodule(norm_name), net.get_output_embeddings()
    generator = torch.Generator().manual_seed(2)
    direction = torch.randn(D_MODEL, generator=generator, dtype=torch.float64)
    assert head is not None
    logits = head(norm(direction * 1e6))
    effect = direction.float() @ matrix
    bias = head(norm(direction * 0))
    centred = (logits - bias) - (logits - bias).mean()
    cosine = torch.nn.functional.cosine_similarity(centred.float(), effect, dim=0)
    assert cosine > 0.9999


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "bert"])
def test_a_saved_model_loads_and_is_planned_without_weights(kind: str, tmp_path: Path) -> None:
    """Loading keeps every weight; the meta model knows the widths and costs no memory."""
    folder = save_model(tmp_path / kind, kind)
    config = ModelConfig(name=str(folder))
    subject = load_subject_model(config, ExecutionConfig(device="cpu"))
    token_ids = _tokens()
    expected = make_subject(kind).capture(token_ids, None, ["resid_post.1"])["resid_post.1"]
    assert torch.equal(subject.capture(token_ids, None, ["resid_post.1"])["resid_post.1"], expected)
    meta = make_meta_model(config)
    path = {"gpt2": "transformer.h.0.mlp.c_fc", "gemma2": "model.layers.0.mlp.up_proj", "bert": "encoder.layer.0.intermediate"}[kind]
    for point in ("resid_post.1", f"module:{path}"):
        assert meta.d_in(point) == subject.d_in(point)
    assert next(meta.net.parameters()).is_meta
    assert (meta.max_context, meta.vocabulary_size) == (CONTEXT, VOCABULARY)


def test_a_missing_weight_is_refused(tmp_path: Path) -> None:
    """Transformers would fill it with random numbers and a warning."""
    net = make_net("llama")
    state = {name: value for name, value in net.state_dict().items() if "layers.1.mlp" not in name}
    net.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(InputError, match=r"lacks 3 weights of a llama model, the first is 'model.layers.1.mlp.down_proj.weight'"):
        load_subject_model(ModelConfig(name=str(tmp_path)), ExecutionConfig(device="cpu"))


def test_a_missing_device_is_refused() -> None:
    """The message says what there is."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(InputError, match=r"execution.device is 'cuda', but this machine has only \['cpu'\]"):
        choose_device("cuda")


def test_losses_of_one_context_are_those_of_its_batch() -> None:
    """Per-token losses belong to their tokens."""
    subject = make_subject("qwen2")
    token_ids = _tokens()
    logits = subject.logits(token_ids, None)
    torch.testing.assert_close(token_losses(logits[1:2], token_ids[1:2], None)[0], subject.loss(token_ids, None)[1])
