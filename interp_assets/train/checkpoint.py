"""A trained SAE becomes `cfg.json` and `sae_weights.safetensors`, as SAELens loads them, and comes back as a `Sae`.

The names and shapes of the exchange format live here and nowhere else (`docs/formats/sae.md`):

    kind         architecture in cfg.json    tensors
    relu         standard                    W_enc [d_in, d_sae], b_enc, W_dec [d_sae, d_in], b_dec
    jump_relu    jumprelu                    the same and threshold [d_sae]
    topk         topk                        the same four, and the key k in cfg.json

A transcoder's architecture is `transcoder`, `jumprelu_transcoder` or (which SAELens doesn't know) `topk_transcoder`, with `d_out`; with a
skip `skip_transcoder`, `jumprelu_skip_transcoder` or `topk_skip_transcoder`, and W_skip [d_out, d_in]. A crosscoder is written as an SAE
whose rows are those of its hook points (`metadata.hook_points`) side by side.

`apply_b_dec_to_input` is false: the subtraction of `b_dec` (and of the data-set mean) is folded into `b_enc`. `normalize_activations` is
`none`: SAELens ignores its other values at inference, so the scale is folded too. `metadata.sae_lens_version` makes SAELens read the
metadata at all.
"""

import json
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from interp_assets.errors import ArtifactForeignError, InputError
from interp_assets.planning.config import SaeConfig
from interp_assets.planning.pipeline import Pipeline
from interp_assets.storage.manifest import ArtifactWriter, Manifest, load_manifest, read_file
from interp_assets.storage.store import Store
from interp_assets.storage.tensors import load_tensors, save_tensors
from interp_assets.train.refs import sae_ref
from interp_assets.train.sae import Sae, SaeKind

WEIGHTS: Final = "sae_weights.safetensors"
CONFIG: Final = "cfg.json"
FREQUENCY: Final = "firing_frequency.safetensors"
"""How often each latent fired on the calibration rows; of an imported SAE where its tool says so."""
_ARCHITECTURES: Final[dict[SaeKind, str]] = {"relu": "standard", "jump_relu": "jumprelu", "topk": "topk"}
KINDS: Final[dict[str, SaeKind]] = {
    **{name: kind for kind, name in _ARCHITECTURES.items()},
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jump_relu",
    "jumprelu_skip_transcoder": "jump_relu",
    "topk_transcoder": "topk",
    "topk_skip_transcoder": "topk",
}
"""By SAELens' names; the last two are ours: SAELens does not have them."""


class Source(NamedTuple):
    """Where an SAE was trained, for the metadata that readers of other tools look at; empty where nobody told."""

    architecture: str
    model: str
    dataset: str
    context_length: int | None


def save_sae(art: ArtifactWriter, sae: Sae, pipeline: Pipeline, config: SaeConfig, *, l0: float | None, source: Source | None = None) -> None:
    """Write an SAE's two exchange files into its artifact; `l0` and `source`, by default the pipeline, are metadata for readers of other tools."""
    tensors = {"W_dec": sae.W_dec, "W_enc": sae.W_enc, "b_dec": sae.b_dec, "b_enc": sae.b_enc}
    if sae.kind == "jump_relu":
        tensors["threshold"] = sae.threshold
    if sae.W_skip is not None:
        tensors["W_skip"] = sae.W_skip.T
    save_tensors(art, WEIGHTS, {name: value.to(torch.float32).contiguous() for name, value in tensors.items()})
    cfg = _make_cfg(sae, pipeline, config, source or _source(pipeline, config), l0)
    art.put(CONFIG, (json.dumps(cfg, sort_keys=True, indent=1) + "\n").encode())


def load_sae(pipeline: Pipeline, store: Store, name: str) -> Sae:
    """Read the trained SAE called `name`, on the CPU. Raises `ArtifactMissingError` before it is trained."""
    ref = sae_ref(pipeline, name)
    return read_sae(store, ref.path, load_manifest(store, ref))


def check_sae(pipeline: Pipeline, sae: Sae, name: str) -> None:
    """Raise `InputError` when `sae` is not the SAE that the configuration describes."""
    config = pipeline.config.sae(name)
    expected = (pipeline.d_in(config.hook_point), config.d_sae)
    if (sae.d_in, sae.d_sae) != expected:
        raise InputError(
            f"SAE {name!r} is {sae.d_in} x {sae.d_sae} (d_in x d_sae), the configuration and hook point {config.hook_point} say "
            f"{expected[0]} x {expected[1]}: it was trained for another hook point or size. Train it again."
        )


def read_sae(store: Store, path: str, manifest: Manifest) -> Sae:
    """Read and verify the SAE artifact at `path`. Raises `ArtifactForeignError` for an architecture that this release does not know."""
    cfg = json.loads(read_file(store, path, manifest, CONFIG))
    if cfg["architecture"] not in KINDS or cfg["apply_b_dec_to_input"] or cfg["normalize_activations"] != "none":
        raise ArtifactForeignError(
            f"{store.url}/{path}/{CONFIG} describes a {cfg['architecture']!r} SAE (apply_b_dec_to_input {cfg['apply_b_dec_to_input']}, "
            f"normalize_activations {cfg['normalize_activations']!r}); this release reads {sorted(KINDS)} with false and 'none'. Train it again."
        )
    tensors: dict[str, Tensor] = load_tensors(store, path, manifest, WEIGHTS)
    return Sae(
        kind=KINDS[cfg["architecture"]],
        W_enc=tensors["W_enc"],
        b_enc=tensors["b_enc"],
        W_dec=tensors["W_dec"],
        b_dec=tensors["b_dec"],
        threshold=tensors.get("threshold", torch.zeros_like(tensors["b_enc"])),
        k=cfg.get("k", 0),
        W_skip=tensors["W_skip"].T.contiguous() if "W_skip" in tensors else None,
    )


def _architecture(sae: Sae, config: SaeConfig) -> str:
    name = _ARCHITECTURES[sae.kind]
    if not config.is_transcoder:
        return name
    return f"{'' if sae.kind == 'relu' else name + '_'}{config.task}"


def _source(pipeline: Pipeline, config: SaeConfig) -> Source:
    corpus, model = pipeline.config.corpus, pipeline.config.model
    dataset = _public_name(corpus.path) if corpus.source == "huggingface" else corpus.source
    return Source(config.architecture, _public_name(model.name), dataset, corpus.context_length)


def _public_name(name: str) -> str:
    """Return an id of the hub, or nothing for a folder: its content is in the SAE's id, and equal ids are to have equal bytes."""
    return "" if Path(name).expanduser().is_dir() else name


def _make_cfg(sae: Sae, pipeline: Pipeline, config: SaeConfig, source: Source, l0: float | None) -> dict[str, Any]:
    told = {
        "training_architecture": source.architecture,
        "model_name": source.model,
        "context_size": source.context_length,
        "dataset_path": source.dataset,
    }
    cfg: dict[str, Any] = {
        "architecture": _architecture(sae, config),
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if config.hook_point.startswith("z.") else "none",
        "metadata": {
            "sae_lens_version": "6.0.0",
            **{name: value for name, value in told.items() if value},
            "hook_name": pipeline.alias(config.hook_point),
            "hook_point": config.hook_point,
            "prepend_bos": True,
            "l0": l0,
        },
    }
    if config.is_transcoder:
        cfg["d_out"] = sae.d_out
        cfg["metadata"]["hook_name_out"] = pipeline.alias(config.target_hook_point)
        cfg["metadata"]["target_hook_point"] = config.target_hook_point
    if config.task == "crosscoder":
        cfg["metadata"]["hook_points"] = list(config.sources)
    if sae.kind == "topk":
        cfg["k"] = sae.k
        cfg["rescale_acts_by_decoder_norm"] = False
    return cfg
