"""Tiny models of several architectures with random weights and a byte-level tokenizer, saved as `save_pretrained` does."""

from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    DeepseekV3Config,
    DistilBertConfig,
    ElectraConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Olmo3Config,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
)

from interp_assets.garcon.subject import SubjectModel, is_encoder
from interp_assets.planning.config import PipelineConfig, make_config

torch.set_num_threads(1)  # operators this small only wait for each other on several threads

VOCABULARY = 256 + 3
CONTEXT = 48
D_MODEL = 16
SPECIAL = {"bos": 256, "eos": 257, "pad": 258}
_SIZES: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": D_MODEL,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 1, "head_dim": 8}
CONFIGS: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2Config(n_layer=2, n_head=2, n_embd=D_MODEL, n_positions=CONTEXT, vocab_size=VOCABULARY, bos_token_id=256, eos_token_id=257),
    "llama": LlamaConfig(**_GROUPED),
    "gpt_neox": GPTNeoXConfig(**_SIZES),
    "gemma2": Gemma2Config(**_GROUPED),
    "gemma3_text": Gemma3TextConfig(**_GROUPED),
    "qwen2": Qwen2Config(**{**_SIZES, "num_key_value_heads": 1}),
    "qwen3": Qwen3Config(**_GROUPED),
    "olmo2": Olmo2Config(**{**_SIZES, "num_key_value_heads": 1}),
    "bert": BertConfig(**_SIZES),
}
DECODERS = [name for name in CONFIGS if name != "bert"]
_OLD = {"n_layer": 2, "n_head": 2, "n_embd": D_MODEL, "n_positions": CONTEXT, "vocab_size": VOCABULARY, "bos_token_id": 256, "eos_token_id": 257}
_OPT = {**_SIZES, "ffn_dim": 32, "word_embed_proj_dim": D_MODEL}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
_LAYERS = {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "window_size": 4}
MORE_CONFIGS: dict[str, PreTrainedConfig] = {
    "gpt_neo": GPTNeoConfig(**{**_SIZES, **_LAYERS}),
    "gptj": GPTJConfig(**_OLD, rotary_dim=4),
    "mistral": MistralConfig(**_GROUPED, sliding_window=4),
    "phi": PhiConfig(**_SIZES),
    "gpt_oss": GptOssConfig(**{**_GROUPED, "num_attention_heads": 4, "num_key_value_heads": 2, **_EXPERTS}),
    "opt": OPTConfig(**_OPT),
    "opt_350m": OPTConfig(**_OPT, do_layer_norm_before=False),
    "neox_serial": GPTNeoXConfig(**_SIZES, use_parallel_residual=False),
    "distilbert": DistilBertConfig(n_layers=2, n_heads=2, dim=D_MODEL, hidden_dim=32, vocab_size=VOCABULARY, max_position_embeddings=CONTEXT),
}
"""More architectures, for what is inside a block."""
_LATENT = {"kv_lora_rank": 4, "q_lora_rank": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4, "num_key_value_heads": 2}
_ROUTED = {"n_routed_experts": 2, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "first_k_dense_replace": 1}
ATTENDING_CONFIGS: dict[str, PreTrainedConfig] = {
    "gemma": GemmaConfig(**_GROUPED),
    "smollm3": SmolLM3Config(**_GROUPED),
    "phi3": Phi3Config(**{**_SIZES, "num_key_value_heads": 1}),
    "stablelm": StableLmConfig(**{**_SIZES, "num_key_value_heads": 1}),
    "starcoder2": Starcoder2Config(**{**_SIZES, "num_key_value_heads": 1}, sliding_window=4),
    "olmo3": Olmo3Config(**{**_SIZES, "num_key_value_heads": 1}, sliding_window=4),
    "deepseek_v3": DeepseekV3Config(**_SIZES, **_LATENT, **_ROUTED),
    "roberta": RobertaConfig(**{**_SIZES, "max_position_embeddings": CONTEXT + VOCABULARY}),
    "electra": ElectraConfig(**_SIZES, embedding_size=8),
}
"""More architectures yet, for attention alone."""
INSIDE = [*CONFIGS, *MORE_CONFIGS]
ENCODERS = ["bert", "distilbert"]


def make_net(kind: str) -> PreTrainedModel:
    """Build a network whose every weight, norms and biases too, is random but the same each time."""
    config = deepcopy({**CONFIGS, **MORE_CONFIGS, **ATTENDING_CONFIGS}[kind])  # a network writes into its own
    net = (AutoModel if is_encoder(config) else AutoModelForCausalLM).from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            is_norm = parameter.ndim == 1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + (1.0 if is_norm else 0.0))
    return net.eval()


@cache
def make_subject(kind: str) -> SubjectModel:
    """Wrap such a network; tests share it and must not change it."""
    return SubjectModel(make_net(kind), f"tiny {kind}")


def make_tokenizer(*, is_encoder: bool = False) -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per byte, and BOS, EOS and padding (for an encoder: [CLS], [SEP] and padding, which it adds)."""
    first, last = ("[CLS]", "[SEP]") if is_encoder else ("<s>", "</s>")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([first, last, "[PAD]"])
    if is_encoder:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{first} $A {last}", special_tokens=[(first, 256), (last, 257)])
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, cls_token=first, sep_token=last, pad_token="[PAD]")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=first, eos_token=last, pad_token="[PAD]")


def save_model(folder: Path, kind: str) -> Path:
    """Save a tiny model and its tokenizer and return the folder."""
    make_net(kind).save_pretrained(folder)
    make_tokenizer(is_encoder=kind == "bert").save_pretrained(folder)
    return folder


def write_texts(folder: Path, n_files: int = 6, n_chars: int = 300) -> Path:
    """Write text files of unequal length and return their folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n_files):
        words = [f"word{(i * 37 + j * j) % 101}" for j in range(n_chars // 6 + i)]
        (folder / f"{i}.txt").write_text(" ".join(words))
    return folder


def make_tiny_config(model: Path, texts: Path, **changes: Any) -> PipelineConfig:
    """Return a configuration over a saved model and a folder of texts; `changes` replace whole sections' fields."""
    sections: dict[str, Any] = {
        "name": "tiny",
        "model": {"name": str(model)},
        "corpus": {"source": "files", "path": str(texts), "context_length": 24, "shard_bytes": 600},
        "harvest": {"hook_points": ["resid_post.0"]},
        "saes": [{"name": "demo", "hook_point": "resid_post.0", "d_sae": 32, "k": 4}],
    }
    for section, fields in changes.items():
        sections[section] = {**sections.get(section, {}), **fields} if isinstance(fields, dict) else fields
    return make_config(sections)
