"""A trained SAE becomes a folder that another tool opens, and such a folder, whoever wrote it, becomes a `Sae`.

    saelens               cfg.json, sae_weights.safetensors, sparsity.safetensors (log10 firing frequency); of a checkpoint activation_scaler.json
                          and activation_whitening.safetensors
    sparsify              cfg.json, sae.safetensors
    dictionary_learning   config.json, ae.pt
    gemma_scope           params.npz; read only

`ae.pt` is that tool's own choice, a zip of tensors with a pickled table of contents. It is read with torch's `weights_only`, which rebuilds tensors
and nothing else, so a stranger's file cannot run code; nothing of ours is ever stored that way. What each format can hold: `formats.py`.

Besides weights a folder tells where they come from, each tool in its own words: model, data, and the hook point, which is translated to ours
where the name alone says it (`blocks.20.hook_resid_post`, `resid_post_layer_20`: both are `resid_post.20`). A path of a module (a folder called
`layers.20.mlp`) means what that module returns; what that is called here, the subject model says (`garcon/points.py`).
"""

import hashlib
import io
import json
import math
import re
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from interp_assets.errors import InputError
from interp_assets.planning.config import SaeConfig
from interp_assets.planning.hook_names import canonical_name
from interp_assets.planning.pipeline import Pipeline
from interp_assets.storage.foreign import check_npz, check_zip, parse_json
from interp_assets.storage.manifest import load_manifest, read_file
from interp_assets.storage.store import Store
from interp_assets.storage.tensors import load_tensors
from interp_assets.train.checkpoint import CONFIG, FREQUENCY, WEIGHTS, read_sae
from interp_assets.train.exchange import formats
from interp_assets.train.exchange.fit import Claims
from interp_assets.train.exchange.known import check_files
from interp_assets.train.refs import sae_ref
from interp_assets.train.sae import Sae

SAE_FORMATS: Final = ("saelens", "sparsify", "dictionary_learning")
MAX_CONFIG_BYTES: Final = 4 << 20
_NEVER: Final = 1e-10
"""What SAELens writes for the frequency of a latent that never fires."""
_NEVER_LOG: Final = -9.99
_ROUNDING: Final = 1e-6
"""How far above 1 a frequency of 1 may come out of its logarithm."""


_FOLDERS: Final = {
    "saelens": ("cfg.json", "sae_weights.safetensors"),
    "sparsify": ("cfg.json", "sae.safetensors"),
    "dictionary_learning": ("config.json", "ae.pt"),
    "gemma_scope": ("params.npz",),
}
"""By what a folder is known."""
_FREQUENCIES: Final = "sparsity.safetensors"
_SCALER: Final = "activation_scaler.json"
_WHITENING: Final = "activation_whitening.safetensors"
_EXTRAS: Final = {"saelens": (_SCALER, _WHITENING)}
"""What is read beside them, and the frequencies, where it is there, and decides what comes out of the import."""
_RESULTS: Final = "eval_results.json"
"""dictionary_learning's own measurements: shown, and no part of the SAE."""
_UNREADABLE: Final = (
    *(ValueError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError, EOFError),
    *(SafetensorError, zipfile.BadZipFile, zlib.error, MemoryError),
)
"""What libraries raise for files that are cut off, empty, or something else."""
_TRANSFORMER_LENS: Final = re.compile(r"(?:^|\.)(blocks\..+)$")
_HOOKS: Final = (
    re.compile(r"^(?P<kind>resid_pre|resid_post)_layer_(?P<layer>\d+)$"),
    re.compile(r"^(?P<kind>resid)_out_layer_?(?P<layer>\d+)$"),
)
"""What dictionary_learning calls hook points, where the name says all; TransformerLens' names are everybody's."""
BLOCK_PART: Final = re.compile(r"^(?P<part>mlp|attn)(?:_out)?_layer_?(?P<layer>\d+)$")
"""What a module of a block returns, in dictionary_learning's names."""
_MODULE: Final = re.compile(r"^(?:\w+\.)*(?:layers|layer|h|blocks)\.\d+(?:\.[A-Za-z_]\w*)*$")
"""A module in a block, as sparsify calls its folders."""


class Origin(NamedTuple):
    """What a folder tells of its SAE besides the weights; empty where it does not."""

    tool: str
    architecture: str
    """In the tool's words."""
    hook: str
    """Likewise; `target_hook` too."""
    hook_point: str
    """The same in ours, where the name alone says it; `target_hook_point` too."""
    target_hook: str
    target_hook_point: str
    model: str
    dataset: str
    context_length: int | None
    l0: float | None
    dtype: str
    """Of the stored weights; read they become float32."""


class Foreign(NamedTuple):
    """An SAE that somebody else's tool wrote."""

    sae: Sae
    origin: Origin
    recorded: Origin
    """The same without what only the folder's name tells: it may move."""
    digest: str
    """Of all files that are read for the SAE, byte by byte."""
    firing_frequency: Tensor | None
    """Share of the rows on which each latent fired, where the tool stored it: `[d_sae]`."""
    claims: Claims


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
        is_counted = any(entry.name == FREQUENCY for entry in manifest.files)
        frequency = load_tensors(store, ref.path, manifest, FREQUENCY)["firing_frequency"] if is_counted else None
        cfg = json.loads(read_file(store, ref.path, manifest, CONFIG))
        cfg["metadata"].setdefault("model_name", pipeline.config.model.shown_name)  # of a folder, which the artifact leaves out
        files = _saelens_files(sae, cfg, read_file(store, ref.path, manifest, WEIGHTS), frequency)
    elif format_name == "sparsify":
        exchange = formats.to_sparsify(sae)
        files = {"cfg.json": _json(exchange.config), "sae.safetensors": save_safetensors(exchange.tensors)}
    else:
        exchange = formats.to_dictionary_learning(sae)
        trainer = {**exchange.config["trainer"], **_origin(pipeline, config)}
        files = {"config.json": _json({**exchange.config, "trainer": trainer}), "ae.pt": _torch_file(exchange.tensors)}
    for file, data in files.items():
        out.put(file, data)
    return ExportedSae(sorted(files), sum(len(data) for data in files.values()))


def read_foreign(folder: Store) -> Foreign:
    """Read the SAE in a folder that SAELens, sparsify, dictionary_learning or `export_sae` wrote, and all that the folder tells of it.

    Raises `InputError`, naming folder, file and what is wrong.
    """
    found = {item.path for item in folder.list("")}
    tool = next((tool for tool, files in _FOLDERS.items() if found.issuperset(files)), None)
    if tool is None:
        inner = sorted({path.rpartition("/")[0] for path in found if path.rpartition("/")[2] in {files[-1] for files in _FOLDERS.values()}})
        hint = f" It is in folders below: name one of {inner[:8]}." if inner else ""
        raise InputError(
            f"{folder.url} holds no SAE: expected cfg.json and sae_weights.safetensors (SAELens), cfg.json and sae.safetensors (sparsify), "
            f"config.json and ae.pt (dictionary_learning), or params.npz (Gemma Scope); found {sorted(found)[:8]}.{hint}"
        )
    names = (*_FOLDERS[tool], *(name for name in (_FREQUENCIES, *_EXTRAS.get(tool, ())) if name in found))
    files = {name: folder.get(name) for name in names}
    try:
        config = _read_config(names[0], files[names[0]]) if tool != "gemma_scope" else {}
        tensors = _read_tensors(tool, files[_FOLDERS[tool][-1]])
        sae = _convert(tool, config, tensors, files)
        frequency = _read_frequency(files[_FREQUENCIES], sae.d_sae) if _FREQUENCIES in files else None
        check_files(tool, found, names)
        origin, recorded = (_describe(tool, config, tensors, url) for url in (folder.url, ""))
        results = folder.get(_RESULTS) if tool == "dictionary_learning" and _RESULTS in found else b"{}"
        return Foreign(sae, origin, recorded, _digest(files), frequency, _read_claims(origin, frequency, results))
    except InputError as error:
        raise InputError(f"The SAE in {folder.url} cannot be used: {error}") from error
    except _UNREADABLE as error:
        raise InputError(f"The SAE in {folder.url} cannot be read ({', '.join(files)}: {type(error).__name__}: {error}). Copy it again.") from error


def _convert(tool: str, config: Mapping[str, Any], tensors: dict[str, Tensor], files: Mapping[str, bytes]) -> Sae:
    match tool:
        case "saelens":
            return formats.from_saelens(config, tensors, _read_scaler(files))
        case "sparsify":
            return formats.from_sparsify(config, tensors)
        case "dictionary_learning":
            return formats.from_dictionary_learning(config, tensors)
        case _:
            return formats.from_gemma_scope(tensors)


def _read_scaler(files: Mapping[str, bytes]) -> formats.Scaler | None:
    """Read how SAELens scaled the rows of a training that has not folded it in yet; None where it did not."""
    if _SCALER not in files:
        return None
    told = _read_config(_SCALER, files[_SCALER])
    factor, has_whitening = told.get("scaling_factor"), bool(told.get("has_whitening", _WHITENING in files))
    if unknown := sorted({*told} - {"scaling_factor", "has_whitening"}):
        raise InputError(f"{_SCALER} has {', '.join(unknown)}, which is not known here and may change what the SAE computes.")
    if factor is not None and (isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < math.inf):
        raise InputError(f"scaling_factor in {_SCALER} is {factor!r}, expected a number above 0. Copy that file again.")
    if has_whitening and _WHITENING not in files:
        raise InputError(f"{_SCALER} says that rows were whitened, and {_WHITENING} is not beside it. Copy that file too.")
    if has_whitening:
        tensors = load_safetensors(files[_WHITENING])
        mean, matrix, inverse = (tensors[name] for name in ("mean", "matrix", "inverse_matrix"))
        if mean.ndim != 1 or not matrix.shape == inverse.shape == (len(mean), len(mean)):
            raise InputError(f"{_WHITENING} holds mean {list(mean.shape)} and matrices {list(matrix.shape)}, {list(inverse.shape)}. Copy it again.")
        return formats.Scaler(1.0 if factor is None else float(factor), mean, matrix, inverse)
    return None if factor is None else formats.Scaler(float(factor))


def _read_claims(origin: Origin, frequency: Tensor | None, results: bytes) -> Claims:
    """Collect what the folder says of its SAE's quality: measured where it says so, else what it was trained for."""
    try:
        told = parse_json(results, MAX_CONFIG_BYTES)
        told = told if isinstance(told, dict) else {}
    except (ValueError, InputError):
        told = {}
    explained = told.get("frac_variance_explained")
    claims = Claims(origin.l0, "its configuration" if origin.tool != "gemma_scope" else "its name") if origin.l0 else Claims()
    if frequency is not None:
        claims = Claims(float(frequency.sum()), _FREQUENCIES)
    if _number(told.get("l0")) is not None:
        claims = Claims(_number(told["l0"]), _RESULTS)
    return claims if not isinstance(explained, float) else claims._replace(fvu=1 - explained, fvu_from=_RESULTS)


def _read_config(name: str, data: bytes) -> dict[str, Any]:
    config = parse_json(data, MAX_CONFIG_BYTES)
    if not isinstance(config, dict):
        raise InputError(f"{name} holds a {type(config).__name__}, expected keys and values.")
    return config


def _read_tensors(tool: str, data: bytes) -> dict[str, Tensor]:
    if tool == "dictionary_learning":
        return _load_torch_file(data)
    if tool == "gemma_scope":
        check_npz(data)
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return {re.sub("^w_", "W_", name): torch.from_numpy(arrays[name]) for name in arrays.files}
    return load_safetensors(data)


def _describe(tool: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor], url: str) -> Origin:
    """Collect what each tool tells, in its own keys."""
    dtype = ", ".join(sorted({str(value.dtype).removeprefix("torch.") for value in tensors.values() if value.is_floating_point() and value.ndim}))
    last = url.rstrip("/").rpartition("/")[2]
    match tool:
        case "saelens":
            modern = formats.modern_saelens(config)
            told: Mapping[str, Any] = modern["metadata"]
            hook = str(told.get("hook_name") or "")
            return Origin(
                tool=tool,
                architecture=str(told.get("training_architecture") or modern["architecture"]),
                hook=hook,
                hook_point=str(told.get("hook_point") or translate_hook(hook)),
                target_hook=str(told.get("hook_name_out") or ""),
                target_hook_point=str(told.get("target_hook_point") or translate_hook(str(told.get("hook_name_out") or ""))),
                model=str(told.get("model_name") or ""),
                dataset=str(told.get("dataset_path") or ""),
                context_length=_whole(told.get("context_size")),
                l0=_number(told.get("l0")),
                dtype=dtype,
            )
        case "dictionary_learning":
            trainer, buffer = config["trainer"], config.get("buffer") or {}
            hook, model = str(trainer.get("submodule_name") or ""), str(trainer.get("lm_name") or "")
            hook = f"input of {hook}" if buffer.get("io") == "in" else hook
            hook_point = str(trainer.get("hook_point") or translate_hook(hook))
            l0 = _number(trainer.get("k")) or _number(trainer.get("target_l0"))
            return Origin(tool, str(trainer["dict_class"]), hook, hook_point, "", "", model, "", _whole(buffer.get("ctx_len")), l0, dtype)
        case "sparsify":
            module = last if _MODULE.match(last) else ""
            source, target = (f"input of {module}" if module else "", module) if config.get("transcode") else (module, "")
            task = "transcoder" if config.get("transcode") else "topk"
            return Origin(tool, task, source, "", target, "", "", "", None, _number(config.get("k")), dtype)
        case _:
            place = re.search(r"-res(?:-all)?/.*?layer_(\d+)/", url + "/")
            l0 = re.search(r"average_l0_(\d+)$", last)
            hook_point = f"resid_post.{place[1]}" if place else ""
            kind = "jumprelu_transcoder" if "-transcoders/" in url else "jumprelu"
            return Origin(tool, kind, "", hook_point, "", "", "", "", None, float(l0[1]) if l0 else None, dtype)


def _number(told: Any) -> float | None:
    """Read a number that only explains; tools write it as a number or as text, and what is neither tells nothing."""
    try:
        value = math.nan if isinstance(told, bool) else float(told)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) and value > 0 else None


def _whole(told: Any) -> int | None:
    value = _number(told)
    return None if value is None else round(value)


def translate_hook(name: str) -> str:
    """Return our name of what another tool calls a hook point; empty when the name alone does not say it."""
    if (found := _TRANSFORMER_LENS.search(name)) and (ours := canonical_name(found[1])) != found[1]:
        return ours
    for pattern in _HOOKS:
        if found := pattern.search(name):
            kind = found["kind"]
            return f"{'resid_post' if kind == 'resid' else kind}.{found['layer']}"
    return ""


def _digest(files: Mapping[str, bytes]) -> str:
    state = hashlib.blake2b(digest_size=16)
    for name, data in sorted(files.items()):
        state.update(f"{name}:{len(data)}\n".encode())
        state.update(data)
    return state.hexdigest()


def _read_frequency(data: bytes, d_sae: int) -> Tensor | None:
    stored = load_safetensors(data).get("sparsity")
    if stored is None:
        return None
    frequency = torch.where(stored <= _NEVER_LOG, 0.0, 10.0 ** stored.double())
    if stored.shape != (d_sae,) or not bool((frequency <= 1 + _ROUNDING).all()):
        highest = f", up to {float(frequency.max()):.3g}" if frequency.numel() else ""
        raise InputError(
            f"The tensor sparsity of {_FREQUENCIES} has the shape {list(stored.shape)} and holds logarithms of frequencies{highest}; expected "
            f"[d_sae] = [{d_sae}], from 0 to 1. Copy that file again, or delete it: the SAE works without."
        )
    return frequency.clamp(max=1)


def _saelens_files(sae: Sae, cfg: dict[str, Any], weights: bytes, frequency: Tensor | None) -> dict[str, bytes]:
    """Return an artifact's files, and the firing frequencies, where they are known, as SAELens keeps them."""
    if sae.kind == "topk" and cfg["architecture"] != "topk":
        raise InputError("SAELens has no TopK transcoders. Export this one as sparsify, or train it as batch_topk.")
    if frequency is None:
        return {"cfg.json": _json(cfg), "sae_weights.safetensors": weights}
    sparsity = frequency.clamp(min=_NEVER).log10().float().contiguous()
    return {"cfg.json": _json(cfg), "sae_weights.safetensors": weights, _FREQUENCIES: save_safetensors({"sparsity": sparsity})}


def _origin(pipeline: Pipeline, config: SaeConfig) -> dict[str, Any]:
    """Say of which model and hook point an SAE is, in the keys of dictionary_learning's trainers and, since `mlp_out` is ambiguous there, in ours."""
    kind, _, layer = config.hook_point.partition(".")
    place = {"layer": int(layer) if layer.isdigit() else layer, "submodule_name": f"{kind}_layer_{layer}", "hook_point": config.hook_point}
    return {"lm_name": pipeline.config.model.shown_name, **place}


def _torch_file(tensors: dict[str, Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()


def _load_torch_file(data: bytes) -> dict[str, Tensor]:
    check_zip(data)
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"ae.pt is no file of tensors alone ({type(error).__name__}), and anything else is not loaded.") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise InputError(f"ae.pt holds a {type(content).__name__}, expected a state dict of tensors.")
    n_bytes = sum(value.numel() * value.element_size() for value in content.values())
    if n_bytes > 2 * len(data):  # views that repeat a few bytes without end
        raise InputError(f"ae.pt has {len(data):,} bytes, and its tensors claim {n_bytes:,}.")
    return content


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, sort_keys=True, indent=1) + "\n").encode()
