"""A model's name becomes the folder that it lies in, or its exact place on the Hugging Face hub, and a fingerprint of its content.

`builtin:<folder>` is a model shipped inside this package, an existing folder is local, anything else is an id on the hub. What is local
is identified by its bytes, what is on the hub by the commit that the revision stands for (from the cache when there is no network).
"""

import hashlib
import re
from collections.abc import Sequence
from functools import cache, partial
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import xxhash

from interp_assets.errors import InputError, first_line
from interp_assets.planning.config import ModelConfig
from interp_assets.storage.seen import SeenFiles

if TYPE_CHECKING:
    from transformers import PretrainedConfig

BUILTIN: Final = "builtin:"
_WEIGHT_FILES: Final = ("config.json", "*.safetensors", "*.safetensors.index.json")
_TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
)
_PATIENCE_S: Final = 10.0
_OWN_LENGTH: Final = "-own-length-2"
_BOTH_WAYS: Final = "-both-ways"
"""Added to the fingerprints of models whose rows came out otherwise before: so only theirs are made again."""
_WAYS: Final = 2
"""Raise it when `_way_to_run` answers otherwise."""
_BLOCK_BYTES: Final = 16 << 20


class ModelPlace(NamedTuple):
    """Where a model is: what `from_pretrained` takes, and the folder when it is local."""

    name: str
    options: dict[str, Any]
    folder: Path | None


def locate_model(model: ModelConfig) -> ModelPlace:
    """Resolve a model's name. Raises `InputError` when it means a folder that is not there."""
    options: dict[str, Any] = {"trust_remote_code": model.trust_remote_code}
    if model.name.startswith(BUILTIN):
        folder = Path(str(resources.files("interp_assets.garcon"))) / model.name.removeprefix(BUILTIN)
        if not (folder / "config.json").is_file():
            present = sorted(path.parent.name for path in folder.parent.glob("*/config.json"))
            raise InputError(f"No model {model.name!r} ships with this package; there are {[BUILTIN + name for name in present]}.")
        return ModelPlace(str(folder), options, folder)
    folder = Path(model.name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(f"The folder {folder} holds no config.json: `model.name` must be a folder written by `save_pretrained`.")
        return ModelPlace(str(folder), options, folder)
    if not is_hub_id(model.name):
        raise InputError(f"There is no model folder {model.name}{model.looked_in}. Give an existing folder, or an id on the Hugging Face hub.")
    if not _answers(model.name, model.revision):
        options["local_files_only"] = True
    return ModelPlace(model.name, {**options, "revision": model.revision}, None)


def is_hub_id(name: str) -> bool:
    """Tell whether a name may be an id on the Hugging Face hub: `gpt2` or `EleutherAI/pythia-70m`."""
    return re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", name, re.ASCII) is not None


@cache
def _answers(name: str, revision: str) -> bool:
    """Ask the hub once whether it can be reached: transformers' own attempts take half a minute for each file. What it has in its cache it finds."""
    from huggingface_hub import HfApi  # noqa: PLC0415 - takes a second, and local models do without
    from huggingface_hub.errors import HfHubHTTPError  # noqa: PLC0415 - as above

    try:
        HfApi().model_info(name, revision=revision, timeout=_PATIENCE_S)
    except HfHubHTTPError:  # an answer, too: transformers explains it
        return True
    except Exception:  # noqa: BLE001 - no network, a proxy, offline mode: the client's errors change from one release to the next
        return False
    return True


def load_model_config(model: ModelConfig) -> "PretrainedConfig":
    """Read a model's architecture without its weights. Raises `InputError` when it cannot be found or is of an unknown type."""
    from transformers import AutoConfig  # noqa: PLC0415 - takes PyTorch, and where a local model lies is known without

    place = locate_model(model)
    try:
        config = AutoConfig.from_pretrained(place.name, **place.options)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"Cannot read the configuration of model {model.name!r}: {first_line(error)}. {next_step(model)}") from error
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{model.name!r} is an encoder-decoder ({config.model_type}); language models and encoders are supported.")
    return config


def fingerprint_model(model: ModelConfig, seen: SeenFiles | None = None) -> str:
    """Identify the weights and the configuration: a hash of the local files, or the commit on the hub; and how the model is run, where that changed.

    Reads all local weights, but for files that `seen` knows and that have not changed; nor is the configuration of such a model looked at again,
    unless code beside it may say something else.
    """
    place = locate_model(model)

    def find_way() -> bytes:
        return _way_to_run(load_model_config(model)).encode()

    if place.folder is None:
        return _commit(model) + find_way().decode()
    if model.trust_remote_code:
        return hash_files(place.folder, (*_WEIGHT_FILES, "*.py"), seen) + find_way().decode()
    way = seen.answer(place.folder / "config.json", f"way to run {_WAYS}, transformers {version('transformers')}", find_way) if seen else find_way()
    return hash_files(place.folder, _WEIGHT_FILES, seen) + way.decode()


def fingerprint_tokenizer(model: ModelConfig) -> str:
    """Identify the tokenizer: a hash of its local files, or the commit on the hub."""
    place = locate_model(model)
    return _commit(model) if place.folder is None else hash_files(place.folder, _TOKENIZER_FILES)


def _way_to_run(config: Any) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # noqa: PLC0415 - as above

    from interp_assets.garcon.adapters import ENCODERS  # noqa: PLC0415 - as above
    from interp_assets.garcon.rope import follows_length  # noqa: PLC0415 - as above

    if follows_length(config):
        return _OWN_LENGTH
    was_decoder = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and config.model_type not in ENCODERS
    return _BOTH_WAYS if was_decoder and looks_both_ways(config) else ""


def looks_both_ways(config: Any) -> bool:
    """Tell whether a model of a masked-language-model type is what it was made as: a causal head on it leaves its attention looking both ways."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES  # noqa: PLC0415 - as above

    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)


def hash_files(folder: Path, patterns: Sequence[str], seen: SeenFiles | None = None) -> str:
    """Hash names and contents of the files of `folder` that match `patterns`, in order of name. `seen` spares reading unchanged ones."""
    total = hashlib.blake2b(digest_size=16)
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        read = partial(digest_file, path)
        digest = seen.answer(path, "xxh3-128", read) if seen else read()
        total.update(f"{path.name}\0{path.stat().st_size}\0{digest.hex()}\n".encode())
    return total.hexdigest()


def digest_file(path: Path) -> bytes:
    """Return the XXH3-128 of a file."""
    content = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            content.update(block)
    return content.digest()


def next_step(model: ModelConfig) -> str:
    """Tell what to try when a model cannot be loaded."""
    if Path(model.name).is_dir() or model.name.startswith(BUILTIN):
        return "The folder must be one that `save_pretrained` wrote, with safetensors weights and a tokenizer."
    return (
        f"It is no folder{model.looked_in}. Check the id and revision {model.revision!r}, the network, and HF_TOKEN for gated models; "
        "without a network, give the folder of a downloaded copy."
    )


def _commit(model: ModelConfig) -> str:
    commit = getattr(load_model_config(model), "_commit_hash", None)
    if not commit:
        raise InputError(f"The hub did not tell which commit revision {model.revision!r} of {model.name!r} is. Give the commit hash as `revision`.")
    return str(commit)
