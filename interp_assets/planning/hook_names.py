"""Names of hook points: TransformerLens' become ours, and ours TransformerLens'. Pure text; what a model has of them, `garcon` knows.

Two names that look alike may be two tensors, so only equal tensors are translated. TransformerLens' `hook_q` and `hook_k` are read before
RoPE where a model has it, our `q` and `k` after it: `hook_rot_q` and `hook_rot_k` are these, and `hook_q` is accepted where there is no
RoPE. `hook_attn_out` and `hook_mlp_out` are what is added to the residual stream (`attn_out`, `mlp_out`), `attn.hook_out` and
`mlp.hook_out` what the modules return (`attn_raw`, `mlp_raw`): after a post-norm (Gemma 2 and 3, OLMo 2) these differ.
"""

import re
from typing import Final

LAYER_KINDS: Final = (
    "resid_pre",
    "attn_in",
    "q",
    "k",
    "v",
    "pattern",
    "z",
    "attn_raw",
    "attn_out",
    "resid_mid",
    "mlp_in",
    "mlp_act",
    "mlp_raw",
    "mlp_out",
    "resid_post",
)
"""Kinds of hook points that each block has, in the order in which a forward reaches them."""
STREAM_KINDS: Final = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
"""Kinds that are the residual stream, or added to it as they are."""
BY_HEAD: Final = ("q", "k", "v", "z")
"""Kinds with heads: [batch, context, heads, d_head]; a pattern is [batch, heads, queries, keys], all others are [batch, context, d_in]."""
FIRST_KINDS: Final = ("embed",)
LAST_KINDS: Final = ("final_norm", "logits")
_IN_BLOCK: Final = {
    "resid_pre": "hook_resid_pre",
    "attn_in": "attn.hook_in",
    "q": "attn.hook_rot_q",
    "k": "attn.hook_rot_k",
    "v": "attn.hook_v",
    "pattern": "attn.hook_pattern",
    "z": "attn.hook_z",
    "attn_raw": "attn.hook_out",
    "attn_out": "hook_attn_out",
    "resid_mid": "hook_resid_mid",
    "mlp_in": "mlp.hook_in",
    "mlp_act": "mlp.hook_post",
    "mlp_raw": "mlp.hook_out",
    "mlp_out": "hook_mlp_out",
    "resid_post": "hook_resid_post",
}
_OUTSIDE: Final = {"embed": "hook_embed", "final_norm": "unembed.hook_in", "logits": "unembed.hook_out"}
_KINDS: Final = {alias: kind for kind, alias in _IN_BLOCK.items()}
_KINDS_OUTSIDE: Final = {alias: kind for kind, alias in _OUTSIDE.items()}
_ALIAS: Final = re.compile(r"blocks\.(\d+)\.(.+)")
_OTHERS: Final = {
    "attn.hook_q": "it is read before RoPE, q.{layer} after it: name q.{layer}, or blocks.{layer}.attn.hook_rot_q",
    "attn.hook_k": "it is read before RoPE, k.{layer} after it: name k.{layer}, or blocks.{layer}.attn.hook_rot_k",
    "hook_attn_in": "it is the residual stream before the norm: name resid_pre.{layer}, or attn_in.{layer} for what attention reads after it",
    "hook_mlp_in": "it is the residual stream before the norm: name resid_mid.{layer}, or mlp_in.{layer} for what the MLP reads after it",
    "ln1.hook_normalized": "it is read before or after the gain, as the kind of norm wills: attn_in.{layer} is after it",
    "ln2.hook_normalized": "it is read before or after the gain, as the kind of norm wills: mlp_in.{layer} is after it",
    "attn.hook_attn_scores": "scores before the softmax are not read here: pattern.{layer} is what follows them",
    "mlp.hook_pre": "what enters the MLP's activation function has no name of its own here: name the module",
    "attn.hook_result": "it is z.{layer} by head times the head's rows of W_O",
}


def canonical_name(name: str) -> str:
    """Return our name of a hook point that is called as TransformerLens does; any other name as it is."""
    if found := _ALIAS.fullmatch(name):
        kind = _KINDS.get(found[2])
        return f"{kind}.{int(found[1])}" if kind else name
    return _KINDS_OUTSIDE.get(name, name)


def alias_of(name: str, *, has_rope: bool = True) -> str:
    """Return TransformerLens' name of the same tensor; empty when it has none, as for `module:` paths."""
    kind, _, layer = name.partition(".")
    if not layer:
        return _OUTSIDE.get(kind, "")
    if kind not in _IN_BLOCK or not layer.isdecimal():
        return ""
    alias = _IN_BLOCK[kind]
    return f"blocks.{layer}.{alias if has_rope else alias.replace('hook_rot_', 'hook_')}"


def explain_other(name: str) -> str:
    """Say what TransformerLens means by a name that is none of ours, and what to name instead; empty for names that are not TransformerLens'."""
    if name == "ln_final.hook_normalized":
        return "it is read before or after the gain, as the kind of norm wills: final_norm is after it"
    found = _ALIAS.fullmatch(name)
    return _OTHERS.get(found[2], "").format(layer=int(found[1])) if found else ""
