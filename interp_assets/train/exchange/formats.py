"""A `Sae` becomes the tensors that sparsify and dictionary_learning load, and theirs and SAELens' become a `Sae`.

SAELens' format is the artifact's own (`train/checkpoint.py`). The others differ in orientation (`nn.Linear`: encoder `[d_sae, d_in]`) and in that
their encoders see x - b_dec, which moves between the biases: bias = b_enc + b_dec W_enc. Only what a format can hold is exported:

    sparsify               topk                `cfg.json`, `sae.safetensors`: encoder.weight, encoder.bias, W_dec, b_dec, W_skip [d_out, d_in]
    dictionary_learning    topk                AutoEncoderTopK: encoder.weight, encoder.bias, decoder.weight, b_dec, k, threshold
                           relu, jump_relu     JumpReluAutoEncoder: W_enc, b_enc, W_dec, b_dec, threshold

BatchTopK, Matryoshka and Gated are `jump_relu` here, with their calibrated thresholds. Neither of the two can reconstruct rows of another
width. Read is more than is written:

    SAELens                standard, topk, jumprelu, gated and transcoders, of releases before 6.0 too: encoders that see x - b_dec, gates, and
                           TopK that compares activations times decoder norms, which move into the encoder; checkpoints of a training, whose
                           scaling of the rows lies beside them, are folded
    dictionary_learning    AutoEncoder (whose decoder norms its loader moves into the encoder, and so do we), AutoEncoderNew, GatedAutoEncoder,
                           AutoEncoderTopK, BatchTopKSAE, MatryoshkaBatchTopKSAE, JumpReluAutoEncoder
    Gemma Scope            jump_relu: W_enc, b_enc, W_dec, b_dec, threshold

What cannot be the same function here is refused, not approximated; keys and tensors that are not known are refused too (`known.py`). Files and
folders: `folders.py`.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from interp_assets.errors import InputError
from interp_assets.train.checkpoint import KINDS
from interp_assets.train.exchange.known import check_dictionary, check_saelens, check_sparsify, check_tensors
from interp_assets.train.sae import Sae, SaeKind

_SAELENS_KINDS: Final[dict[str, SaeKind]] = {**KINDS, "gated": "jump_relu"}
_SCALINGS: Final = ("none", "expected_average_only_in", "covariance_whitening")
"""Values of `normalize_activations` that are read: what the last two do is folded into the weights at the end of a training, and lies in files beside
those of its checkpoints."""


_SHAPES: Final[dict[str, tuple[str, ...]]] = {
    "W_enc": ("d_in", "d_sae"),
    "W_dec": ("d_sae", "d_out"),
    "b_dec": ("d_out",),
    **dict.fromkeys(("b_enc", "b_gate", "b_mag", "r_mag", "threshold", "encoder.bias", "gate_bias", "mag_bias"), ("d_sae",)),
    **dict.fromkeys(("bias", "decoder_bias", "decoder.bias"), ("d_out",)),
    "encoder.weight": ("d_sae", "d_in"),
    "decoder.weight": ("d_out", "d_sae"),
    "W_skip": ("d_out", "d_in"),
}
"""Shapes by name, whichever the tool; `W_skip` where there is one."""
_DICTIONARIES: Final[dict[str, tuple[str, ...]]] = {
    "AutoEncoder": ("encoder.weight", "encoder.bias", "decoder.weight", "bias"),
    "AutoEncoderNew": ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"),
    "GatedAutoEncoder": ("encoder.weight", "gate_bias", "mag_bias", "r_mag", "decoder.weight", "decoder_bias"),
    "AutoEncoderTopK": ("encoder.weight", "encoder.bias", "decoder.weight", "b_dec"),
    "BatchTopKSAE": ("encoder.weight", "encoder.bias", "decoder.weight", "b_dec"),
    "MatryoshkaBatchTopKSAE": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "JumpReluAutoEncoder": ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"),
}
"""The tensors of dictionary_learning's classes that are read."""
_COUNTERS: Final = {
    "AutoEncoderTopK": ("k", "threshold"),
    "BatchTopKSAE": ("k", "threshold"),
    "MatryoshkaBatchTopKSAE": ("k", "threshold", "group_sizes"),
}
"""Those that newer releases add; the threshold of a TopK is used on request only, group sizes in training."""


class Scaler(NamedTuple):
    """What SAELens does to rows before an SAE in training, and undoes behind it: z = (factor x - mean) matrix."""

    factor: float = 1.0
    mean: Tensor | None = None
    """`[d_in]`"""
    matrix: Tensor | None = None
    """`[d_in, d_in]`"""
    inverse: Tensor | None = None


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
    """Read what sparsify wrote. Raises `InputError` for an activation that is not TopK, or a key or tensor that is missing or of another shape."""
    check_sparsify(config)
    if config.get("activation", "topk") != "topk":
        raise InputError(f"This sparsify SAE has the activation {config['activation']!r}; only 'topk' is read.")
    names = ("encoder.weight", "encoder.bias", "W_dec", "b_dec", *(["W_skip"] if config.get("skip_connection") else []))
    _require(tensors, names, "sparsify")
    check_tensors("sparsify", tensors, names)
    W_enc, b_dec = tensors["encoder.weight"].double().T, tensors["b_dec"].double()
    b_enc = tensors["encoder.bias"].double()
    if not config.get("transcode", False):
        b_enc = b_enc - b_dec @ W_enc
    k = int(need(config, "k", "cfg.json", "sparsify"))
    return _make("topk", {"W_enc": W_enc, "b_enc": b_enc, "W_dec": tensors["W_dec"], "b_dec": b_dec}, None, k, tensors.get("W_skip"))


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
    """Read what dictionary_learning holds. Raises `InputError` for a class that is not known here, or a key or tensor that is missing."""
    check_dictionary(config)
    trainer = need(config, "trainer", "config.json", "dictionary_learning")
    kind = str(need(trainer, "dict_class", "config.json (trainer)", "dictionary_learning"))
    if kind not in _DICTIONARIES:
        raise InputError(f"This dictionary_learning SAE is a {kind}; {', '.join(_DICTIONARIES)} are read.")
    _require(tensors, _DICTIONARIES[kind], "dictionary_learning")
    check_tensors("dictionary_learning", tensors, (*_DICTIONARIES[kind], *_COUNTERS.get(kind, ())))
    exact = {name: value.double() for name, value in tensors.items()}
    W_enc, W_dec = (exact["W_enc"], exact["W_dec"]) if "W_enc" in exact else (exact["encoder.weight"].T, exact["decoder.weight"].T)
    b_dec = next(exact[name] for name in ("b_dec", "bias", "decoder_bias", "decoder.bias") if name in exact)
    if kind == "GatedAutoEncoder":
        gates = _Gates(exact["gate_bias"], exact["mag_bias"], exact["r_mag"])
        return _make_gated(W_enc, gates, W_dec, b_dec, b_dec)
    b_enc = exact["b_enc"] if "b_enc" in exact else exact["encoder.bias"]
    if kind not in ("AutoEncoderNew", "JumpReluAutoEncoder"):
        b_enc = b_enc - b_dec @ W_enc
    if kind == "AutoEncoder":
        norm = W_dec.norm(dim=1)
        norm = torch.where(norm > 0, norm, 1.0)
        W_enc, b_enc, W_dec = W_enc * norm, b_enc * norm, W_dec / norm[:, None]
    weights = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    if kind == "JumpReluAutoEncoder":
        return _make("jump_relu", weights, exact["threshold"].clamp(min=0), 0, None)
    if kind in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        if "threshold" not in tensors:
            raise InputError(
                f"This {kind} has no threshold in ae.pt: without one, whether a latent fires depends on the other rows of its batch, which is no "
                "function of a row. Train it with a release of dictionary_learning that keeps one, or add the threshold that gives its k on rows."
            )
        threshold = float(tensors["threshold"])
        if not math.isfinite(threshold):
            raise InputError(f"The threshold of this dictionary_learning SAE is {threshold}. Take another checkpoint of that training.")
        return _make("jump_relu", weights, torch.full_like(b_enc, max(0.0, threshold)), 0, None)
    if kind == "AutoEncoderTopK":
        return _make("topk", weights, None, _read_k(trainer, tensors), None)
    return _make("relu", weights, None, 0, None)


def _read_k(trainer: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int:
    """Return k of a TopK: since 2025 it is in `ae.pt` too, and both must agree."""
    told = trainer.get("k")
    k = int(need(trainer, "k", "config.json (trainer)", "dictionary_learning")) if "k" not in tensors else int(tensors["k"])
    if k < 1 or (told is not None and int(told) != k):
        raise InputError(f"k of this dictionary_learning SAE is {k} in ae.pt and {told} in config.json: the two files are not of one training.")
    return k


def from_saelens(config: Mapping[str, Any], tensors: Mapping[str, Tensor], scaler: Scaler | None = None) -> Sae:
    """Read what SAELens saved, whoever trained it; `scaler` is what lies beside a checkpoint of a training.

    Raises `InputError` for an architecture or a scaling that is not known here.
    """
    check_saelens(config)
    config = modern_saelens(config)
    architecture = config["architecture"]
    if architecture not in _SAELENS_KINDS:
        raise InputError(f"This SAELens SAE is of architecture {architecture!r}; {sorted(_SAELENS_KINDS)} are read.")
    _check_scaling(config, scaler)
    factor = tensors.get("scaling_factor", torch.ones(()))
    if not torch.equal(factor, torch.ones_like(factor)):
        raise InputError("This SAELens SAE has a scaling_factor of its latents, which SAELens itself no longer reads. Fold it into W_dec first.")
    is_gated = architecture == "gated"
    biases = ("b_gate", "b_mag", "r_mag") if is_gated else ("b_enc",)
    kind = _SAELENS_KINDS[architecture]
    has_threshold, has_skip = kind == "jump_relu" and not is_gated, "skip" in architecture
    names = ("W_enc", *biases, "W_dec", "b_dec", *(["threshold"] if has_threshold else []), *(["W_skip"] if has_skip else []))
    _require(tensors, names, "SAELens")
    check_tensors("SAELens", tensors, (*names, "scaling_factor"))
    exact = {name: value.double() for name, value in tensors.items()}
    W_enc, W_dec, b_dec = exact["W_enc"], exact["W_dec"], exact["b_dec"]
    is_centred = config.get("apply_b_dec_to_input", "transcoder" not in architecture)
    if is_gated:
        gates = _Gates(exact["b_gate"], exact["b_mag"], exact["r_mag"])
        return _fold(_make_gated(W_enc, gates, W_dec, b_dec, b_dec if is_centred else torch.zeros_like(b_dec)), scaler)
    b_enc = exact["b_enc"] - b_dec @ W_enc if is_centred else exact["b_enc"]
    if config.get("rescale_acts_by_decoder_norm", False):
        norm = W_dec.norm(dim=1)
        W_enc, b_enc, W_dec = W_enc * norm, b_enc * norm, W_dec / norm[:, None]
    weights = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    threshold = exact["threshold"].clamp(min=0) if kind == "jump_relu" else None
    k = int(need(config, "k", "cfg.json", "SAELens")) if kind == "topk" else 0
    return _fold(_make(kind, weights, threshold, k, tensors.get("W_skip")), scaler)


def _check_scaling(config: Mapping[str, Any], scaler: Scaler | None) -> None:
    """Raise `InputError` where rows are changed in a way that weights cannot hold, or that is not told."""
    scaling, reshaping = config.get("normalize_activations") or "none", config.get("reshape_activations") or "none"
    if scaling not in _SCALINGS or reshaping not in ("none", "hook_z"):  # rows at z have their heads side by side
        raise InputError(
            f"This SAELens SAE changes its input (normalize_activations {scaling!r}, reshape_activations {reshaping!r}) row by row, which no weights "
            f"can hold; normalize_activations {', '.join(_SCALINGS)} and reshape_activations none and hook_z are read."
        )
    has_factor, has_whitening = scaler is not None and scaler.factor != 1, scaler is not None and scaler.matrix is not None
    if scaling == "none" and (has_factor or has_whitening):
        raise InputError(
            "cfg.json says normalize_activations none, and activation_scaler.json beside it that rows were scaled: either the scale is folded into "
            "these weights (then delete that file), or it is not (then set normalize_activations to what it was in training)."
        )
    if (scaling == "expected_average_only_in" and scaler is None) or (scaling == "covariance_whitening" and not has_whitening):
        raise InputError(
            f"normalize_activations in cfg.json is {scaling}, and its statistics are not beside it (activation_scaler.json, "
            "activation_whitening.safetensors): rows were scaled by a factor that the folder does not tell. Add these files of the training's "
            'checkpoint, or {"scaling_factor": factor} as activation_scaler.json; or, if the scale is folded in, set normalize_activations to none.'
        )


def _fold(sae: Sae, scaler: Scaler | None) -> Sae:
    """Make an SAE of scaled rows one of raw rows: the same latents, and a reconstruction in the rows' own units."""
    if scaler is None:
        return sae
    W_enc, b_enc, W_dec, b_dec = (value.double() for value in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec))
    if scaler.mean is not None and scaler.matrix is not None and scaler.inverse is not None:
        if sae.W_skip is not None or not sae.d_in == sae.d_out == len(scaler.mean):
            raise InputError(f"activation_whitening.safetensors is of {len(scaler.mean)} dimensions, and this SAE maps {sae.d_in} to {sae.d_out}.")
        mean, matrix, inverse = scaler.mean.double(), scaler.matrix.double(), scaler.inverse.double()
        W_enc = matrix @ W_enc
        b_enc, W_dec, b_dec = b_enc - mean @ W_enc, W_dec @ inverse, b_dec @ inverse + mean
    weights = {"W_enc": W_enc * scaler.factor, "b_enc": b_enc, "W_dec": W_dec / scaler.factor, "b_dec": b_dec / scaler.factor}
    return replace(sae, **{name: value.float().contiguous() for name, value in weights.items()})


def from_gemma_scope(tensors: Mapping[str, Tensor]) -> Sae:
    """Read the arrays of one of Gemma Scope's JumpReLU SAEs. Raises `InputError` when one is missing or of another shape."""
    names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
    _require(tensors, names, "Gemma Scope")
    check_tensors("Gemma Scope", tensors, names)
    return _make("jump_relu", tensors, tensors["threshold"].clamp(min=0), 0, None)


def modern_saelens(config: Mapping[str, Any]) -> dict[str, Any]:
    """Bring a configuration that SAELens wrote before 6.0 to the keys of today; return one of today as it is.

    Raises `InputError` for an activation function that today's SAELens does not have.
    """
    if "metadata" in config and "architecture" in config:
        return dict(config)
    old = {"apply_b_dec_to_input": True, **config}
    old["architecture"] = config.get("architecture") or "standard"
    activation = config.get("activation_fn_str", config.get("activation_fn", "relu"))
    if activation == "topk":
        old |= {"architecture": "topk", "k": need(config.get("activation_fn_kwargs", {}), "k", "cfg.json (activation_fn_kwargs)", "SAELens")}
    elif activation != "relu":
        raise InputError(f"This SAELens SAE has the activation function {activation!r}; relu and topk are read.")
    scaling = config.get("normalize_activations") or "none"
    old["normalize_activations"] = "expected_average_only_in" if scaling is True else scaling
    hook_name = config.get("hook_name", config.get("hook_point", ""))
    old.setdefault("reshape_activations", "hook_z" if "hook_z" in str(hook_name) else "none")
    old["metadata"] = {**{name: config[name] for name in ("model_name", "dataset_path", "context_size") if name in config}, "hook_name": hook_name}
    return old


def need(content: Mapping[str, Any], key: str, where: str, tool: str) -> Any:
    """Return the value of a key that a format cannot do without. Raises `InputError` that names file, key and what there is."""
    if key not in content:
        raise InputError(f"{where} of this {tool} SAE has no {key!r}; it has {sorted(content)}. Copy or save it again.")
    return content[key]


class _Gates(NamedTuple):
    """A gate opens where p + bias > 0; behind it is p e^log_gain + magnitude_bias."""

    bias: Tensor
    magnitude_bias: Tensor
    log_gain: Tensor


def _make_gated(W_enc: Tensor, gates: _Gates, W_dec: Tensor, b_dec: Tensor, centre: Tensor) -> Sae:
    """Turn tied gates into thresholds (2404.16014, section 3); the encoder sees x - centre."""
    gain = gates.log_gain.exp()
    threshold = (gates.magnitude_bias - gain * gates.bias).clamp(min=0)
    weights = {"W_enc": W_enc * gain, "b_enc": gates.magnitude_bias - centre @ (W_enc * gain), "W_dec": W_dec, "b_dec": b_dec}
    return _make("jump_relu", weights, threshold, 0, None)


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
    """Raise `InputError` when a tensor is missing, has a shape that does not go with the others, or holds what is no number."""
    missing = [name for name in names if name not in tensors]
    if missing:
        raise InputError(f"These are not the tensors of a {tool} SAE: {missing} missing, found {sorted(tensors)}.")
    sizes: dict[str, int] = {}
    for name in names:
        value, axes = tensors[name], _SHAPES[name]
        for axis, size in zip(axes, value.shape, strict=False):
            sizes.setdefault(axis, size)
        expected = tuple(sizes.get(axis, -1) for axis in axes)
        if tuple(value.shape) != expected:
            raise InputError(
                f"The tensor {name} of this {tool} SAE has the shape {list(value.shape)}; with the tensors before it, it should be "
                f"[{', '.join(axes)}] = {list(expected)}. Copy or save it again."
            )
        if not bool(torch.isfinite(value).all()):
            raise InputError(f"The tensor {name} of this {tool} SAE holds NaN or infinity. Take another checkpoint of that training.")


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.contiguous().clone() for name, value in tensors.items()}
