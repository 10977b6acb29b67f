"""A module's output has the canonical name only where it is the same tensor."""

import pytest
import torch
from tiny_models import VOCABULARY, make_subject
from torch import Tensor, nn

from interp_assets.garcon.points import name_module, tensor_in

TOKENS = torch.randint(0, VOCABULARY - 3, (2, 9), generator=torch.Generator().manual_seed(4))
MODULES = {
    "gpt2": {"h.1": "resid_post.1", "h.1.mlp": "mlp_out.1 mlp_raw.1", "transformer.h.1.attn": "attn_out.1 attn_raw.1"},
    "llama": {"layers.1": "resid_post.1", "model.layers.1.mlp": "mlp_out.1 mlp_raw.1", "layers.1.self_attn": "attn_out.1 attn_raw.1"},
    "gpt_neox": {"layers.1": "resid_post.1", "gpt_neox.layers.1.mlp": "mlp_out.1 mlp_raw.1", "layers.1.attention": "attn_out.1 attn_raw.1"},
    "gemma2": {"layers.1.mlp": "mlp_raw.1", "layers.1.self_attn": "attn_raw.1", "layers.1.post_feedforward_layernorm": "mlp_out.1"},
    "gemma3_text": {"layers.1.mlp": "mlp_raw.1", "layers.1.self_attn": "attn_raw.1", "layers.1.post_attention_layernorm": "attn_out.1"},
    "olmo2": {"layers.1.mlp": "mlp_raw.1", "layers.1.self_attn": "attn_raw.1", "layers.1.post_feedforward_layernorm": "mlp_out.1"},
    "qwen3": {"layers.1.mlp": "mlp_out.1 mlp_raw.1", "layers.1.mlp.down_proj": ""},
    "bert": {"encoder.layer.1": "resid_post.1", "encoder.layer.1.attention": "", "encoder.layer.1.output.dense": "mlp_out.1 mlp_raw.1"},
}


@pytest.mark.parametrize(("kind", "path"), [(kind, path) for kind, paths in MODULES.items() for path in paths])
def test_a_modules_name_reads_that_very_tensor(kind: str, path: str) -> None:
    """An SAE of `layers.1.mlp` belongs to what that module returns, whatever is called `mlp_out` here. The oracle is a hook on the module."""
    subject = make_subject(kind)
    names = name_module(subject.net, path)
    assert names[:-1] == MODULES[kind][path].split()
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _args: object, output: object) -> None:
        seen.append(tensor_in(output, path).clone())

    handle = subject.net.get_submodule(names[-1].removeprefix("module:")).register_forward_hook(keep)
    subject.net.base_model(input_ids=TOKENS, use_cache=False) if kind != "bert" else subject.net.base_model(input_ids=TOKENS)
    handle.remove()
    for name in names:
        assert torch.equal(subject.capture(TOKENS, None, [name])[name], seen[0])


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text", "olmo2"])
def test_where_a_norm_follows_the_module_returns_another_tensor(kind: str) -> None:
    """That is why the name must not be guessed: the difference is not small."""
    subject = make_subject(kind)
    for path, point in (("module:model.layers.1.mlp", "mlp_out.1"), ("module:model.layers.1.self_attn", "attn_out.1")):
        captured = subject.capture(TOKENS, None, [path, point])
        assert (captured[path] - captured[point]).norm() > 0.1 * captured[point].norm()


def test_a_path_that_is_no_module_has_no_name() -> None:
    """Of another model's folder, for example."""
    assert name_module(make_subject("gpt2").net, "layers.1.mlp") == []
