"""A model type becomes the places of its inside: which module's input or output is which canonical hook point.

    name            what                                                        TransformerLens
    embed           what the token embedding returns                            hook_embed
    resid_pre.L     residual stream that enters block L                         blocks.L.hook_resid_pre
    attn_in.L       what attention reads, after norm and gain                   blocks.L.attn.hook_in
    q.L k.L         queries and keys by head, after their norm and RoPE         blocks.L.attn.hook_rot_q, .hook_rot_k (no RoPE: .hook_q, .hook_k)
    v.L             values by head                                              blocks.L.attn.hook_v
    pattern.L       how much each query looks at each key, by head              blocks.L.attn.hook_pattern
    z.L             values mixed by the pattern, by head; what W_O multiplies   blocks.L.attn.hook_z
    attn_raw.L      what the attention module returns                           blocks.L.attn.hook_out
    attn_out.L      what attention adds to the residual stream                  blocks.L.hook_attn_out
    resid_mid.L     residual stream between attention and MLP                   blocks.L.hook_resid_mid
    mlp_in.L        what the MLP reads, after norm and gain                     blocks.L.mlp.hook_in
    mlp_act.L       what the MLP's last matrix multiplies                       blocks.L.mlp.hook_post
    mlp_raw.L       what the MLP module returns                                 blocks.L.mlp.hook_out
    mlp_out.L       what the MLP adds to the residual stream                    blocks.L.hook_mlp_out
    resid_post.L    residual stream that leaves block L                         blocks.L.hook_resid_post
    final_norm      what the last norm returns, after its gain                  unembed.hook_in
    logits          what the model returns                                      unembed.hook_out

`attn_out` and `mlp_out` are *contributions*: in Gemma 2 and 3 and OLMo 2 they are read after the post-norm, because that is what is
added, so resid_post = resid_pre + attn_out + mlp_out holds in every decoder of the table. What the module emits before its post-norm is
`attn_raw` and `mlp_raw`; other tools call these `mlp_out`. Encoders of the BERT family normalise after adding:
resid_mid = LN(resid_pre + attn_out), resid_post = LN(resid_mid + mlp_out).

A type that is not in the table is refused by its canonical names, never guessed; its modules can be named as `module:<path>`.
"""

from typing import Any, Final, Literal, NamedTuple

NormKind = Literal["layer", "rms", "rms_plus_one"]
Side = Literal["input", "output", "stream", "attention", "norm"]
"""Where a tensor is met: what enters a module, what leaves it, what enters it and is added to later (so that a change must reach both), what
the module's attention function is handed, or what a norm divides by."""


class Place(NamedTuple):
    """A module, by its path, and the side of it on which a tensor is met."""

    path: str
    side: Side


class Adapter(NamedTuple):
    """Module paths of one model type, below its base model; `{layer}` stands for the index of the block."""

    block: str
    attn_out: str
    mlp_out: str
    final_norm: str
    norm_kind: NormKind
    """`layer` centres and scales, `rms` scales only, `rms_plus_one` scales by 1 + weight (Gemma)."""
    attn_norm: str
    """The norm between the residual stream and attention; empty where attention reads the stream itself."""
    attention: str
    """The module that calls the attention function."""
    o_proj: str
    """The module that multiplies by W_O."""
    mlp_in: str
    mlp_act: str
    """The module that multiplies by the MLP's last matrix; empty where there is more than one (a mixture of experts)."""
    resid_mid: Place | None
    """None where attention and MLP read the residual stream side by side."""
    attn_raw: str = ""
    """Where it is not the module of `attn_out`."""
    mlp_raw: str = ""
    """Where it is not the module of `mlp_out`."""
    has_rope: bool = True


_LLAMA: Final = Adapter(
    block="layers.{layer}",
    attn_out="layers.{layer}.self_attn",
    mlp_out="layers.{layer}.mlp",
    final_norm="norm",
    norm_kind="rms",
    attn_norm="layers.{layer}.input_layernorm",
    attention="layers.{layer}.self_attn",
    o_proj="layers.{layer}.self_attn.o_proj",
    mlp_in="layers.{layer}.mlp",
    mlp_act="layers.{layer}.mlp.down_proj",
    resid_mid=Place("layers.{layer}.post_attention_layernorm", "stream"),
)
_POST_NORM: Final = _LLAMA._replace(
    attn_out="layers.{layer}.post_attention_layernorm",
    mlp_out="layers.{layer}.post_feedforward_layernorm",
    attn_raw="layers.{layer}.self_attn",
    mlp_raw="layers.{layer}.mlp",
)
_GEMMA: Final = _POST_NORM._replace(norm_kind="rms_plus_one", resid_mid=Place("layers.{layer}.pre_feedforward_layernorm", "stream"))
_OLMO: Final = _POST_NORM._replace(attn_norm="", resid_mid=Place("layers.{layer}.mlp", "stream"))
_GPT2: Final = Adapter(
    block="h.{layer}",
    attn_out="h.{layer}.attn",
    mlp_out="h.{layer}.mlp",
    final_norm="ln_f",
    norm_kind="layer",
    attn_norm="h.{layer}.ln_1",
    attention="h.{layer}.attn",
    o_proj="h.{layer}.attn.c_proj",
    mlp_in="h.{layer}.mlp",
    mlp_act="h.{layer}.mlp.c_proj",
    resid_mid=Place("h.{layer}.ln_2", "stream"),
    has_rope=False,
)
_GPT_NEOX: Final = Adapter(
    block="layers.{layer}",
    attn_out="layers.{layer}.attention",
    mlp_out="layers.{layer}.mlp",
    final_norm="final_layer_norm",
    norm_kind="layer",
    attn_norm="layers.{layer}.input_layernorm",
    attention="layers.{layer}.attention",
    o_proj="layers.{layer}.attention.dense",
    mlp_in="layers.{layer}.mlp",
    mlp_act="layers.{layer}.mlp.dense_4h_to_h",
    resid_mid=Place("layers.{layer}.post_attention_layernorm", "stream"),
)
_OPT: Final = Adapter(
    block="decoder.layers.{layer}",
    attn_out="decoder.layers.{layer}.self_attn",
    mlp_out="decoder.layers.{layer}.fc2",
    final_norm="decoder.final_layer_norm",
    norm_kind="layer",
    attn_norm="decoder.layers.{layer}.self_attn_layer_norm",
    attention="decoder.layers.{layer}.self_attn",
    o_proj="decoder.layers.{layer}.self_attn.out_proj",
    mlp_in="decoder.layers.{layer}.fc1",
    mlp_act="decoder.layers.{layer}.fc2",
    resid_mid=Place("decoder.layers.{layer}.final_layer_norm", "stream"),
    has_rope=False,
)
_BERT: Final = Adapter(
    block="encoder.layer.{layer}",
    attn_out="encoder.layer.{layer}.attention.output.dense",
    mlp_out="encoder.layer.{layer}.output.dense",
    final_norm="",
    norm_kind="layer",
    attn_norm="",
    attention="encoder.layer.{layer}.attention.self",
    o_proj="encoder.layer.{layer}.attention.output.dense",
    mlp_in="encoder.layer.{layer}.intermediate",
    mlp_act="encoder.layer.{layer}.output.dense",
    resid_mid=Place("encoder.layer.{layer}.attention.output", "output"),
    has_rope=False,
)
_DISTILBERT: Final = Adapter(
    block="transformer.layer.{layer}",
    attn_out="transformer.layer.{layer}.attention.out_lin",
    mlp_out="transformer.layer.{layer}.ffn",
    final_norm="",
    norm_kind="layer",
    attn_norm="",
    attention="transformer.layer.{layer}.attention",
    o_proj="transformer.layer.{layer}.attention.out_lin",
    mlp_in="transformer.layer.{layer}.ffn",
    mlp_act="transformer.layer.{layer}.ffn.lin2",
    resid_mid=Place("transformer.layer.{layer}.sa_layer_norm", "output"),
    has_rope=False,
)

DECODERS: Final[dict[str, Adapter]] = {
    "gpt2": _GPT2,
    "gpt_neo": _GPT2._replace(attention="h.{layer}.attn.attention", o_proj="h.{layer}.attn.attention.out_proj"),
    "gptj": _GPT2._replace(o_proj="h.{layer}.attn.out_proj", mlp_act="h.{layer}.mlp.fc_out", resid_mid=None, has_rope=True),
    "gpt_neox": _GPT_NEOX,
    "gpt_oss": _LLAMA._replace(mlp_act=""),
    "opt": _OPT,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "smollm3": _LLAMA,
    "phi3": _LLAMA,
    "phi": _LLAMA._replace(
        final_norm="final_layernorm",
        norm_kind="layer",
        o_proj="layers.{layer}.self_attn.dense",
        mlp_act="layers.{layer}.mlp.fc2",
        resid_mid=None,
    ),
    "stablelm": _LLAMA._replace(norm_kind="layer"),
    "starcoder2": _LLAMA._replace(norm_kind="layer", mlp_act="layers.{layer}.mlp.c_proj"),
    "gemma": _LLAMA._replace(norm_kind="rms_plus_one"),
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "olmo2": _OLMO,
    "olmo3": _OLMO,
}
ENCODERS: Final[dict[str, Adapter]] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "camembert": _BERT,
    "electra": _BERT,
    "distilbert": _DISTILBERT,
}
ADAPTERS: Final[dict[str, Adapter]] = {**DECODERS, **ENCODERS}


def find_adapter(config: Any) -> Adapter | None:
    """Return the places of a model's type, as its configuration moves them; None for a type that is not in the table."""
    adapter = ADAPTERS.get(config.model_type)
    if adapter is None:
        return None
    if getattr(config, "use_parallel_residual", False):  # GPT-NeoX and StableLM
        adapter = adapter._replace(resid_mid=None)
    if not getattr(config, "do_layer_norm_before", True):  # OPT-350m normalises after adding, as BERT does
        adapter = adapter._replace(resid_mid=Place("decoder.layers.{layer}.self_attn_layer_norm", "output"), final_norm="", attn_norm="")
    return adapter


def find_place(adapter: Adapter, kind: str) -> Place | None:
    """Return where a kind of hook point is met, with `{layer}` for the block's index; None where this type has none."""
    if kind in ("q", "k", "v", "pattern"):
        return Place(adapter.attention, "attention")
    if kind == "resid_mid":
        return adapter.resid_mid
    inputs = {"resid_pre": adapter.block, "attn_in": adapter.attention, "z": adapter.o_proj, "mlp_in": adapter.mlp_in, "mlp_act": adapter.mlp_act}
    outputs = {
        "attn_raw": adapter.attn_raw or adapter.attn_out,
        "attn_out": adapter.attn_out,
        "mlp_raw": adapter.mlp_raw or adapter.mlp_out,
        "mlp_out": adapter.mlp_out,
        "resid_post": adapter.block,
        "final_norm": adapter.final_norm,
    }
    path = inputs.get(kind) or outputs.get(kind)
    return Place(path, "input" if kind in inputs else "output") if path else None
