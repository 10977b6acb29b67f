"""Models by module path: each language model and encoder of transformers that can be built small is planned and harvested, or refused."""

import time
from typing import Any, Final

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils.generic import ModelOutput

from interp_assets.compute.any_threads import AnyThreads
from interp_assets.errors import InputError
from interp_assets.garcon.subject import SubjectModel, is_encoder, max_context, require_causal

WIDTH, VOCABULARY, LONGEST = 32, 64, 72
_FIELDS: Final[dict[int, str]] = {
    VOCABULARY: "vocab_size",
    WIDTH: "hidden_size d_model n_embd dim embed_dim word_embed_proj_dim rnn_hidden_size lru_width",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_experts_per_tok eos_token_id",
    4: "num_attention_heads n_head n_heads num_heads num_key_value_heads num_kv_heads encoder_attention_heads decoder_attention_heads "
    "num_experts num_local_experts n_routed_experts conv_kernel rotary_dim",
    8: "head_dim q_lora_rank kv_lora_rank qk_rope_head_dim qk_nope_head_dim v_head_dim state_size mamba_n_heads mamba_d_head mamba_d_state "
    "mamba_num_heads mamba_head_dim",
    48: "intermediate_size ffn_dim n_inner d_ff hidden_dim encoder_ffn_dim decoder_ffn_dim",
    16: "embedding_size moe_intermediate_size shared_expert_intermediate_size",
    LONGEST: "max_position_embeddings n_positions max_seq_len n_ctx",
    0: "pad_token_id",
    1: "bos_token_id n_group topk_group n_shared_experts first_k_dense_replace mamba_n_groups n_groups",
}
SMALL: Final[dict[str, int]] = {name: size for size, names in _FIELDS.items() for name in names.split()}
_LAYERS: Final = ["sliding_attention", "full_attention"]
OWN: Final[dict[str, dict[str, Any]]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8},
    "zamba": {"layers_block_type": ["mamba", "hybrid"], "num_hidden_layers": 2, "n_mamba_heads": 2},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "num_hidden_layers": 2, "mamba_ngroups": 1, "n_mamba_heads": 8},
    "funnel": {"block_sizes": [1, 1], "num_decoder_layers": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "reformer": {"axial_pos_shape": [8, 9], "axial_pos_embds_dim": [16, 16], "attn_layers": ["local", "lsh"], "num_hidden_layers": 2},
    "roc_bert": {"pronunciation_vocab_size": 20, "shape_vocab_size": 20, "pronunciation_embed_dim": 8, "shape_embed_dim": 8},
    "squeezebert": {"embedding_size": 32},
    "luke": {"entity_vocab_size": 20, "entity_emb_size": 16},
    "perceiver": {"d_latents": 32, "num_latents": 8, "num_blocks": 1, "num_self_attends_per_block": 1, "qk_channels": 16, "v_channels": 32},
    "gemma4_text": {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8},
    "gemma3n_text": {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "layer_types": _LAYERS},
    "neomme": {"head_dim": 16},
    "zaya": {"num_experts_per_tok": 1},
    "gemma4": {"text_config": {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8}},
}
"""Fields of one type that its class needs besides, or that make it small."""
NOT_SMALL: Final[dict[str, str]] = {
    "blt": "tables of hashes of half a million entries, of a size that no field tells",
    "cohere_compass_text": "the defaults of its rotary embedding know no full attention",
    "dbrx": "its attention has no rope_theta in this release",
    "dots3_note": "fields of single layers, by the numbers of its default size",
    "funnel": "its class refuses a number of layers: these follow from its blocks",
    "gemma3n": "its picture part needs timm",
    "gemma4_assistant": "works beside another model, by whose layers it is sized",
    "gemma4_unified_assistant": "works beside another model, by whose layers it is sized",
    "git": "its picture part looks for an attention by a name of its own, not by the one that is set",
    "perceiver": "its embedding is a parameter and no module",
    "phi4_multimodal": "6 M parameters in parts whose sizes no field tells",
    "zamba": "ties weights of layers that two layers do not have",
}
"""Types that no few fields make small, and why."""
MAX_PARAMETERS: Final = 5_000_000
EVERY: Final = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_MASKED_LM_MAPPING_NAMES})
VARIED: Final = (
    "opt",
    "bloom",
    "falcon",
    "mpt",
    "mamba",
    "gpt_bigcode",
    "xglm",
    "mixtral",
    "granitemoe",
    "deberta-v2",
    "albert",
    "ernie",
    "convbert",
    "xlnet",
)
FAMILIES_THAT_WORK: Final = frozenset(VARIED) - {"xlnet"}
TOKENS: Final = torch.randint(3, VOCABULARY - 4, (3, 7), generator=torch.Generator().manual_seed(2))


def make_config(kind: str) -> PreTrainedConfig:
    """Make a small configuration of one type, or raise what its class does."""
    return _make_small(CONFIG_MAPPING[kind], OWN.get(kind, {}))


def _make_small(make: Any, own: dict[str, Any]) -> PreTrainedConfig:
    """Make a small configuration of a class, and of those inside it; `own` are fields that its class needs besides."""
    default = make()
    aliases: dict[str, str] = getattr(default, "attribute_map", {})
    known = {*default.to_dict(), *aliases}
    fields: dict[str, Any] = {name: size for name, size in SMALL.items() if name in known and aliases.get(name) not in SMALL}
    for name in getattr(make, "sub_configs", {}):
        if (inner := getattr(default, name, None)) is not None:
            fields[name] = _make_small(type(inner), own.get(name, {})).to_dict()
    return make(**{**fields, **{name: value for name, value in own.items() if name not in fields or not isinstance(value, dict)}})


def build(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the network that `load_subject_model` would."""
    net: PreTrainedModel = (AutoModel if is_encoder(config) else AutoModelForCausalLM).from_config(config)
    return net


def first_tensor(output: Any) -> Tensor | None:
    """Return the tensor that an output is or begins with: written anew, as an oracle."""
    if isinstance(output, ModelOutput):
        output = tuple(output.values())
    output = output[0] if isinstance(output, tuple) and output else output
    return output.detach().clone() if isinstance(output, Tensor) and output.is_floating_point() else None


def observe(net: PreTrainedModel, *, is_causal: bool) -> dict[str, Tensor]:
    """Return what every module gave first in a forward, where it is a row for each token."""
    seen: dict[str, Tensor] = {}

    def watch(path: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            value = first_tensor(output)
            if value is not None and value.ndim == 3 and value.shape[:2] == TOKENS.shape:
                seen.setdefault(path, value)

        return module.register_forward_hook(keep)

    handles = [watch(path, module) for path, module in net.named_modules() if path]
    with torch.no_grad(), AnyThreads():  # another library of products may round a tile otherwise than the whole
        net.base_model(input_ids=TOKENS, **({"use_cache": False} if is_causal else {}))
    for handle in handles:
        handle.remove()
    return seen


def try_model(kind: str, n_points: int) -> str:
    """Plan and harvest modules of one type; return `works ...`, `refused: ...`, `not built: ...` or `WRONG: ...`."""
    try:
        config = make_config(kind)
        if getattr(config, "is_encoder_decoder", False):
            return "refused: an encoder-decoder (load_model_config says so)"
        with torch.device("meta"):
            meta = SubjectModel(build(config), kind)
        if sum(parameter.numel() for parameter in meta.net.parameters()) > MAX_PARAMETERS:
            return "not built: its configuration does not let it be small"
        torch.manual_seed(0)
        subject = SubjectModel(build(config), kind)
        seen = observe(subject.net.eval(), is_causal=subject.is_causal)
    except Exception as error:  # noqa: BLE001 - a configuration that these sizes do not fit is not what is tested
        return f"not built: {type(error).__name__}: {str(error).strip().splitlines()[0][:90] if str(error).strip() else ''}"
    try:
        if subject.is_causal:
            require_causal(subject)
        paths = list(seen)
        chosen = [paths[i * (len(paths) - 1) // max(1, n_points - 1)] for i in range(n_points)] if paths else []
        for path in dict.fromkeys(chosen):
            name = f"module:{path}"
            captured = subject.capture(TOKENS, None, [name])[name]
            if not torch.equal(captured, seen[path]) and bool(torch.isfinite(captured).all()):
                return f"WRONG: {path} is another tensor than its module's output"
            if meta.d_in(name) != captured.shape[-1]:
                return f"WRONG: {path} is planned {meta.d_in(name)} wide, harvested {captured.shape[-1]}"
    except InputError as error:
        return f"refused: {error}"
    except Exception as error:  # noqa: BLE001 - all are collected
        return f"WRONG: {type(error).__name__}: {error}"
    return f"works, {len(dict.fromkeys(chosen))} points" if chosen else "refused: no module gives rows"


@pytest.mark.parametrize("kind", VARIED)
def test_a_family_is_planned_and_harvested_by_module_path(kind: str) -> None:
    """OPT and BLOOM ended in "too many values to unpack": planning made a mask in a shape that they do not take."""
    result = try_model(kind, 4)
    if kind in FAMILIES_THAT_WORK:
        assert result.startswith("works, 4"), result
    else:
        assert "is no causal language model as it is configured: what follows a token changes its activations" in result


@pytest.mark.parametrize("kind", ["llama", "gemma", "falcon_mamba", "convbert", "olmo_hybrid", "modernbert", "yoso"])
def test_bits_of_a_family_do_not_follow_the_threads(kind: str) -> None:
    """SiLU, GELU, softplus, convolutions, triangular solves and powers of many contexts had other bits with two threads than with one."""
    torch.manual_seed(0)
    subject = SubjectModel(build(make_config(kind)), kind)
    tokens = torch.randint(3, VOCABULARY - 4, (37, 61), generator=torch.Generator().manual_seed(2))
    point = "module:" + [path for path in observe(subject.net.eval(), is_causal=subject.is_causal) if "." in path][-1]
    found = []
    for n_threads in (1, 2, 3):
        torch.set_num_threads(n_threads)
        found.append(subject.capture(tokens, None, [point])[point])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.faults
def test_every_type_of_transformers_works_or_is_refused_by_a_sentence() -> None:
    """All failures are in one table; what these sizes do not build is named with a reason."""
    results: dict[str, str] = {}
    for kind in EVERY:
        started_s = time.perf_counter()
        results[kind] = f"{try_model(kind, 3)} ({time.perf_counter() - started_s:.1f} s)"
    table = "\n".join(f"{kind:32} {result[:200]}" for kind, result in results.items())
    wrong = [kind for kind, result in results.items() if result.startswith("WRONG")]
    n_working = sum(result.startswith("works") for result in results.values())
    assert not wrong, f"{len(wrong)} of {len(results)} fail: {wrong}\n{table}"
    assert n_working > 0.85 * len(results), table
    unbuilt = {kind for kind, result in results.items() if result.startswith("not built")}
    assert unbuilt <= set(NOT_SMALL), f"{sorted(unbuilt - set(NOT_SMALL))} are not built, and no reason is known\n{table}"
    print(table)  # noqa: T201 - for whoever runs it with -s


def test_positions_that_are_unlimited_or_offset_bound_the_context() -> None:
    """XLNet says -1; RoBERTa and its relatives keep the first positions for padding."""
    assert max_context(make_config("xlnet")) == 1 << 30
    for kind in ("roberta", "data2vec-text", "xlm-roberta-xl"):
        config = make_config(kind)
        longest = max_context(config)
        assert longest == LONGEST - 1 - int(config.pad_token_id or 0)
        subject = SubjectModel(build(config), kind)
        mask = torch.ones((1, longest), dtype=torch.bool)
        name = "module:" + next(path for path, _ in subject.net.named_modules() if path.endswith("layer.1"))
        assert subject.capture(torch.full((1, longest), 5), mask, [name])[name].shape == (1, longest, WIDTH)


def test_a_masked_language_model_with_a_causal_head_sees_the_whole_context() -> None:
    """Taken for a decoder it got no mask, and its rows depended on the padding."""
    config = make_config("ernie")
    config.architectures = ["ErnieForCausalLM"]
    assert is_encoder(config)
    config.is_decoder = True
    assert not is_encoder(config)
