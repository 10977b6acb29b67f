"""A trained SAE becomes a folder that another tool opens, and such a folder, whoever wrote it, becomes a `Sae`.

    saelens               cfg.json, sae_weights.safetensors, sparsity.safetensors (log10 firing frequency)
    sparsify              cfg.json, sae.safetensors
    dictionary_learning   config.json, ae.pt

`ae.pt` is that tool's own choice, a zip of tensors with a pickled table of contents. It is read with torch's `weights_only`, which rebuilds tensors
and nothing else, so a stranger's file cannot run code; nothing of ours is ever stored that way. What each format can hold: `exchange.py`.
"""

import io
import json
from typing import Any, Final, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from interp_assets.config import SaeConfig
from interp_assets.errors import InputError
from interp_assets.manifest import load_manifest, read_file
from interp_assets.pipeline import Pipeline
from interp_assets.store import Store
from interp_assets.tensors import load_tensors
from interp_assets.train.checkpoint import CONFIG, WEIGHTS, read_sae
from interp_assets.train.exchange import from_dictionary_learning, from_saelens, from_sparsify, to_dictionary_learning, to_sparsify
from interp_assets.train.loop import FREQUENCY
from interp_assets.train.refs import sae_ref
from interp_assets.train.sae import Sae

SAE_FORMATS: Final = ("saelens", "sparsify", "dictionary_learning")
_NEVER: Final = 1e-10
"""What SAELens writes for the frequency of a latent that never fires."""


class ExportedSae(NamedTuple):
    """What an export wrote."""

    files: list[str]
    n_bytes: int


def export_sae(pipeline: Pipeline, store: Store, name: str, format_name: str, out: Store) -> ExportedSae:
    """Write the trained SAE called `name` into the folder `out` as another tool loads it.

    Raises `InputError` when there is no such format, or when it cannot hold this SAE.
    """
    if format_name not in SAE_FORMATS:
        raise InputError(f"No format of SAEs is called {format_name!r}; there are {', '.join(SAE_FORMATS)}.")
    config, ref = pipeline.config.sae(name), sae_ref(pipeline, name)
    manifest = load_manifest(store, ref)
    sae = read_sae(store, ref.path, manifest)
    if format_name == "saelens":
        frequency = load_tensors(store, ref.path, manifest, FREQUENCY)["firing_frequency"]
        files = _saelens_files(sae, read_file(store, ref.path, manifest, CONFIG), read_file(store, ref.path, manifest, WEIGHTS), frequency)
    elif format_name == "sparsify":
        exchange = to_sparsify(sae)
        files = {"cfg.json": _json(exchange.config), "sae.safetensors": save_safetensors(exchange.tensors)}
    else:
        exchange = to_dictionary_learning(sae)
        trainer = {**exchange.config["trainer"], **_origin(pipeline, config)}
        files = {"config.json": _json({**exchange.config, "trainer": trainer}), "ae.pt": _torch_file(exchange.tensors)}
    for file, data in files.items():
        out.put(file, data)
    return ExportedSae(sorted(files), sum(len(data) for data in files.values()))


def read_exchange(folder: Store) -> Sae:
    """Read the SAE in a folder that SAELens, sparsify or dictionary_learning wrote, or `export_sae`. Raises `InputError`, naming what is wrong."""
    found = {item.path for item in folder.list("")}
    try:
        if {"cfg.json", "sae_weights.safetensors"} <= found:
            return from_saelens(json.loads(folder.get("cfg.json")), load_safetensors(folder.get("sae_weights.safetensors")))
        if {"cfg.json", "sae.safetensors"} <= found:
            return from_sparsify(json.loads(folder.get("cfg.json")), load_safetensors(folder.get("sae.safetensors")))
        if {"config.json", "ae.pt"} <= found:
            return from_dictionary_learning(json.loads(folder.get("config.json")), _load_torch_file(folder.get("ae.pt"), folder.url))
    except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise InputError(f"The SAE in {folder.url} cannot be read ({type(error).__name__}: {error}). Copy it again.") from error
    raise InputError(
        f"{folder.url} holds no SAE: expected cfg.json and sae_weights.safetensors (SAELens), cfg.json and sae.safetensors (sparsify), or "
        f"config.json and ae.pt (dictionary_learning); found {sorted(found)[:8]}."
    )


def _saelens_files(sae: Sae, cfg: bytes, weights: bytes, frequency: Tensor) -> dict[str, bytes]:
    """Return an artifact's own files, and the firing frequencies as SAELens keeps them."""
    if sae.kind == "topk" and json.loads(cfg)["architecture"] != "topk":
        raise InputError("SAELens has no TopK transcoders. Export this one as sparsify, or train it as batch_topk.")
    sparsity = frequency.clamp(min=_NEVER).log10().float().contiguous()
    return {"cfg.json": cfg, "sae_weights.safetensors": weights, "sparsity.safetensors": save_safetensors({"sparsity": sparsity})}


def _origin(pipeline: Pipeline, config: SaeConfig) -> dict[str, Any]:
    """Say of which model and hook point an SAE is, in the keys of dictionary_learning's trainers."""
    kind, _, layer = config.hook_point.partition(".")
    return {"lm_name": pipeline.config.model.name, "layer": int(layer) if layer.isdigit() else layer, "submodule_name": f"{kind}_layer_{layer}"}


def _torch_file(tensors: dict[str, Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()


def _load_torch_file(data: bytes, where: str) -> dict[str, Tensor]:
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"{where}/ae.pt is no file of tensors alone ({type(error).__name__}), and anything else is not loaded.") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise InputError(f"{where}/ae.pt holds a {type(content).__name__}, expected a state dict of tensors.")
    return content


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, sort_keys=True, indent=1) + "\n").encode()
