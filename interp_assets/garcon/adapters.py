"""A model type becomes the places of its residual stream: which module's input or output is which canonical hook point.

    name            what                                         TransformerLens
    resid_pre.L     residual stream that enters block L          blocks.L.hook_resid_pre
    attn_out.L      what attention adds to the residual stream   blocks.L.hook_attn_out
    mlp_out.L       what the MLP adds to the residual stream     blocks.L.hook_mlp_out
    resid_post.L    residual stream that leaves block L          blocks.L.hook_resid_post

`attn_out` and `mlp_out` are *contributions*: in Gemma 2 and 3 and OLMo 2 they are read after the post-norm, because that is what is
added, so resid_post = resid_pre + attn_out + mlp_out holds in every decoder of the table. What the module emits before its post-norm is
`module:<path of the module>`. Encoders of the BERT family normalise after adding:
resid_post = LN(LN(resid_pre + attn_out) + mlp_out).

A type that is not in the table is refused by its canonical names, never guessed; its modules can be named as `module:<path>`.
"""

from typing import Final, Literal, NamedTuple

NormKind = Literal["layer", "rms", "rms_plus_one"]


class Adapter(NamedTuple):
    """Module paths of one model type, below its base model; `{layer}` stands for the index of the block."""

    block: str
    attn_out: str
    mlp_out: str
    final_norm: str
    norm_kind: NormKind
    """`layer` centres and scales, `rms` scales only, `rms_plus_one` scales by 1 + weight (Gemma)."""


_LLAMA: Final = Adapter("layers.{layer}", "layers.{layer}.self_attn", "layers.{layer}.mlp", "norm", "rms")
_POST_NORM: Final = Adapter("layers.{layer}", "layers.{layer}.post_attention_layernorm", "layers.{layer}.post_feedforward_layernorm", "norm", "rms")
_GPT2: Final = Adapter("h.{layer}", "h.{layer}.attn", "h.{layer}.mlp", "ln_f", "layer")
_BERT: Final = Adapter("encoder.layer.{layer}", "encoder.layer.{layer}.attention.output.dense", "encoder.layer.{layer}.output.dense", "", "layer")

DECODERS: Final[dict[str, Adapter]] = {
    "gpt2": _GPT2,
    "gpt_neo": _GPT2,
    "gptj": _GPT2,
    "gpt_neox": Adapter("layers.{layer}", "layers.{layer}.attention", "layers.{layer}.mlp", "final_layer_norm", "layer"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "smollm3": _LLAMA,
    "phi3": _LLAMA,
    "phi": _LLAMA._replace(final_norm="final_layernorm", norm_kind="layer"),
    "stablelm": _LLAMA._replace(norm_kind="layer"),
    "starcoder2": _LLAMA._replace(norm_kind="layer"),
    "gemma": _LLAMA._replace(norm_kind="rms_plus_one"),
    "gemma2": _POST_NORM._replace(norm_kind="rms_plus_one"),
    "gemma3_text": _POST_NORM._replace(norm_kind="rms_plus_one"),
    "olmo2": _POST_NORM,
    "olmo3": _POST_NORM,
}
ENCODERS: Final[dict[str, Adapter]] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "camembert": _BERT,
    "electra": _BERT,
    "distilbert": Adapter("transformer.layer.{layer}", "transformer.layer.{layer}.attention.out_lin", "transformer.layer.{layer}.ffn", "", "layer"),
}
ADAPTERS: Final[dict[str, Adapter]] = {**DECODERS, **ENCODERS}
KINDS: Final = ("resid_pre", "attn_out", "mlp_out", "resid_post")


def module_path(adapter: Adapter, kind: str, layer: int) -> str:
    """Return the path, below the base model, of the module whose input (`resid_pre`) or output is the hook point."""
    template = {"attn_out": adapter.attn_out, "mlp_out": adapter.mlp_out}.get(kind, adapter.block)
    return template.format(layer=layer)
