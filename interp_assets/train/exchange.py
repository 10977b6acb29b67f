"""A `Sae` becomes the tensors that sparsify and dictionary_learning load, and theirs and SAELens' become a `Sae`.

SAELens' format is the artifact's own (`checkpoint.py`). The others differ in orientation (`nn.Linear`: encoder `[d_sae, d_in]`) and in that
their encoders see x - b_dec, which moves between the biases: bias = b_enc + b_dec W_enc. Only what a format can hold is exported:

    sparsify               topk                `cfg.json`, `sae.safetensors`: encoder.weight, encoder.bias, W_dec, b_dec, W_skip [d_out, d_in]
    dictionary_learning    topk                AutoEncoderTopK: encoder.weight, encoder.bias, decoder.weight, b_dec, k, threshold
                           relu, jump_relu     JumpReluAutoEncoder: W_enc, b_enc, W_dec, b_dec, threshold

BatchTopK, Matryoshka and Gated are `jump_relu` here, with their calibrated thresholds. Neither of the two can reconstruct rows of another
width. From SAELens come what others write, too: encoders that see x - b_dec, gates, and TopK that compares activations times decoder norms,
which moves into the encoder. Files and folders: `exchange_files.py`.
"""

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from interp_assets.errors import InputError
from interp_assets.train.sae import Sae, SaeKind

_SAELENS_KINDS: Final[dict[str, SaeKind]] = {
    "standard": "relu",
    "topk": "topk",
    "jumprelu": "jump_relu",
    "gated": "jump_relu",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jump_relu",
    "jumprelu_skip_transcoder": "jump_relu",
    "topk_transcoder": "topk",
    "topk_skip_transcoder": "topk",
}
"""The last two are ours: SAELens does not have them."""


class Exchange(NamedTuple):
    """What one of the formats stores."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]


def to_sparsify(sae: Sae) -> Exchange:
    """Write a TopK SAE or transcoder as sparsify does. Raises `InputError` for another kind, which it cannot express."""
    if sae.kind != "topk":
        raise InputError(f"sparsify holds TopK SAEs only, this one is {sae.kind!r}. Export it as saelens or dictionary_learning.")
    _require_one_width(sae, "sparsify")
    is_transcoder = sae.W_skip is not None
    bias = sae.b_enc if is_transcoder else sae.b_enc + sae.b_dec @ sae.W_enc
    tensors = {"encoder.weight": sae.W_enc.T, "encoder.bias": bias, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    if sae.W_skip is not None:
        tensors["W_skip"] = sae.W_skip.T
    config = {
        "activation": "topk",
        "expansion_factor": max(1, sae.d_sae // sae.d_in),
        "normalize_decoder": not is_transcoder,
        "num_latents": sae.d_sae,
        "k": sae.k,
        "multi_topk": False,
        "skip_connection": sae.W_skip is not None,
        "transcode": is_transcoder,
        "d_in": sae.d_in,
    }
    return Exchange(config, _contiguous(tensors))


def from_sparsify(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Sae:
    """Read what sparsify wrote. Raises `InputError` for an activation that is not TopK, or a tensor that is missing."""
    if config.get("activation", "topk") != "topk":
        raise InputError(f"This sparsify SAE has the activation {config['activation']!r}; only 'topk' is read.")
    _require(tensors, ("encoder.weight", "encoder.bias", "W_dec", "b_dec"), "sparsify")
    W_enc, b_dec = tensors["encoder.weight"].T, tensors["b_dec"]
    b_enc = tensors["encoder.bias"] if config.get("transcode", False) else tensors["encoder.bias"] - b_dec @ W_enc
    skip = tensors.get("W_skip")
    return _make("topk", {"W_enc": W_enc, "b_enc": b_enc, "W_dec": tensors["W_dec"], "b_dec": b_dec}, None, int(config["k"]), skip)


def to_dictionary_learning(sae: Sae) -> Exchange:
    """Write an SAE as dictionary_learning's classes hold it. Raises `InputError` for a skip, which none of them has."""
    if sae.W_skip is not None:
        raise InputError("dictionary_learning has no skip transcoders. Export this one as saelens or sparsify.")
    _require_one_width(sae, "dictionary_learning")
    sizes = {"activation_dim": sae.d_in, "dict_size": sae.d_sae}
    if sae.kind == "topk":
        config = {"trainer": {"dict_class": "AutoEncoderTopK", "k": sae.k, **sizes}}
        tensors = {
            "encoder.weight": sae.W_enc.T,
            "encoder.bias": sae.b_enc + sae.b_dec @ sae.W_enc,
            "decoder.weight": sae.W_dec.T,
            "b_dec": sae.b_dec,
            "k": torch.tensor(sae.k, dtype=torch.int32),
            "threshold": torch.tensor(-1.0),
        }
    else:
        config = {"trainer": {"dict_class": "JumpReluAutoEncoder", **sizes}}
        tensors = {"W_enc": sae.W_enc, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec, "threshold": sae.threshold}
    return Exchange(config, _contiguous(tensors))


def from_dictionary_learning(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Sae:
    """Read what dictionary_learning holds. Raises `InputError` for a class that is not known here, or a tensor that is missing."""
    kind = config["trainer"]["dict_class"]
    if kind == "JumpReluAutoEncoder":
        _require(tensors, ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"), "dictionary_learning")
        return _make("jump_relu", tensors, tensors["threshold"].clamp(min=0), 0, None)
    if kind not in ("AutoEncoderTopK", "BatchTopKSAE"):
        raise InputError(f"This dictionary_learning SAE is a {kind}; AutoEncoderTopK, BatchTopKSAE and JumpReluAutoEncoder are read.")
    _require(tensors, ("encoder.weight", "encoder.bias", "decoder.weight", "b_dec"), "dictionary_learning")
    W_enc, b_dec = tensors["encoder.weight"].T, tensors["b_dec"]
    weights = {"W_enc": W_enc, "b_enc": tensors["encoder.bias"] - b_dec @ W_enc, "W_dec": tensors["decoder.weight"].T, "b_dec": b_dec}
    if kind == "BatchTopKSAE":
        return _make("jump_relu", weights, torch.full_like(weights["b_enc"], max(0.0, float(tensors["threshold"]))), 0, None)
    return _make("topk", weights, None, int(tensors["k"]), None)


def from_saelens(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Sae:
    """Read what SAELens saved for inference, whoever trained it. Raises `InputError` for an architecture or a scaling that is not known here."""
    architecture = config["architecture"]
    if architecture not in _SAELENS_KINDS:
        raise InputError(f"This SAELens SAE is of architecture {architecture!r}; {sorted(_SAELENS_KINDS)} are read.")
    scaling, reshaping = config.get("normalize_activations", "none"), config.get("reshape_activations", "none")
    if scaling == "layer_norm" or reshaping not in ("none", None):
        raise InputError(
            f"This SAELens SAE changes its input (normalize_activations {scaling!r}, reshape_activations {reshaping!r}); 'none' is read, and what "
            "does nothing at inference. Fold the scale into the weights with SAELens' own fold_activation_norm_scaling_factor first."
        )
    is_gated = architecture == "gated"
    biases = ("b_gate", "b_mag", "r_mag") if is_gated else ("b_enc",)
    kind = _SAELENS_KINDS[architecture]
    _require(tensors, ("W_enc", *biases, "W_dec", "b_dec", *(("threshold",) if kind == "jump_relu" and not is_gated else ())), "SAELens")
    W_enc, W_dec, b_dec = tensors["W_enc"].double(), tensors["W_dec"].double(), tensors["b_dec"].double()
    threshold: Tensor | None = tensors["threshold"].double().clamp(min=0) if "threshold" in tensors else None
    if is_gated:
        gain, b_gate, b_enc = tensors["r_mag"].double().exp(), tensors["b_gate"].double(), tensors["b_mag"].double()
        W_enc, threshold = W_enc * gain, (b_enc - gain * b_gate).clamp(min=0)
    else:
        b_enc = tensors["b_enc"].double()
    if config.get("apply_b_dec_to_input", "transcoder" not in architecture):
        b_enc = b_enc - b_dec @ W_enc
    if config.get("rescale_acts_by_decoder_norm", False):
        norm = W_dec.norm(dim=1)
        W_enc, b_enc, W_dec = W_enc * norm, b_enc * norm, W_dec / norm[:, None]
    weights = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    return _make(kind, weights, threshold, int(config.get("k", 0)) if kind == "topk" else 0, tensors.get("W_skip"))


def _require_one_width(sae: Sae, tool: str) -> None:
    if sae.d_in != sae.d_out:
        raise InputError(
            f"{tool} cannot hold a transcoder between hook points of two widths: this one reads {sae.d_in} values and writes {sae.d_out}. "
            "Export it as saelens."
        )


def _make(kind: Any, weights: Mapping[str, Tensor], threshold: Tensor | None, k: int, skip: Tensor | None) -> Sae:
    tensors = {name: weights[name].float().contiguous() for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    level = torch.zeros_like(tensors["b_enc"]) if threshold is None else threshold.float()
    return Sae(kind=kind, **tensors, threshold=level, k=k, W_skip=None if skip is None else skip.T.float().contiguous())


def _require(tensors: Mapping[str, Tensor], names: tuple[str, ...], tool: str) -> None:
    missing = [name for name in names if name not in tensors]
    if missing:
        raise InputError(f"These are not the tensors of a {tool} SAE: {missing} missing, found {sorted(tensors)}.")


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.contiguous().clone() for name, value in tensors.items()}
