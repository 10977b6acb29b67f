"""What `interp serve` is told becomes models that notebooks ask, users who may, and the bundles beside them."""

# ruff: noqa: PLC0415 - as in cli.py: imports happen inside the commands, because `interp --help` should not take seconds

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import yaml

from interp_assets.errors import InputError, InterpError

if TYPE_CHECKING:
    import interp_assets.garcon.session
    import interp_assets.web.models
    from interp_assets.planning.config import PipelineConfig
    from interp_assets.storage.store import Store
    from interp_assets.web.opened import BundlePlace

_HASH: Final = re.compile(r"[0-9a-f]{64}")


def find_served_bundles(path: str | None, config: "PipelineConfig", *, is_needed: bool) -> "list[BundlePlace]":
    """Return the bundles that are named, or the pipeline's. Raises `InterpError` without any, unless models are served anyhow."""
    from interp_assets.web.opened import find_bundles

    try:
        return find_bundles(path or f"{config.root}/{config.name}")
    except InterpError:
        if is_needed:
            raise
        return []


def find_compared_saes(config: "PipelineConfig | None") -> "dict[str, Store]":
    """Return the pipeline's folder by its name where it has SAEs to compare; nothing else."""
    from interp_assets.planning.pipeline import open_pipeline_store
    from interp_assets.web.comparison import add_pipeline

    found: dict[str, Store] = {}
    if config is not None:
        add_pipeline(found, open_pipeline_store(config))
    return found


def load_models(names: Sequence[str], config: "PipelineConfig", *, weights: bool, say: Callable[[str], None]) -> "interp_assets.web.models.Models":
    """Load models onto this machine; the one that a pipeline harvests comes with the SAEs that are trained.

    Raises `InputError` for what cannot be loaded, and for two that would have one name.
    """
    from interp_assets.web.models import Models, Served

    served: dict[str, Served] = {}
    for name in names:
        short = re.split(r"[/:\\]", name.rstrip("/\\"))[-1]
        if short in served:
            raise InputError(f"Two models would be served as {short!r}. Serve one of them from another folder, or by another server.")
        say(f"Loading {name} ...")
        served[short] = _load(short, name, config)
    return Models(list(served.values()), weights=weights)


def _load(short: str, name: str, config: "PipelineConfig") -> "interp_assets.web.models.Served":
    from interp_assets import lab
    from interp_assets.garcon.remote.batch import ModelThread
    from interp_assets.web.models import Served

    llm, saes = _find_own(config) if name == config.model.name else (None, {})
    revision = config.model.revision if llm else "main"
    llm = llm or lab.load(name)
    return Served(short, llm.backend, ModelThread(llm.subject, llm.saes), {"model": name, "revision": revision, "saes": saes})


def _find_own(config: "PipelineConfig") -> "tuple[interp_assets.garcon.session.Model | None, dict[str, Any]]":
    """Return the pipeline's model and what was measured of its SAEs; nothing where no pipeline has been planned."""
    from interp_assets.errors import ArtifactMissingError
    from interp_assets.lab import Opened
    from interp_assets.planning.pipeline import load_pipeline, open_pipeline_store
    from interp_assets.train.refs import sae_ref

    try:
        store = open_pipeline_store(config)
        run = Opened(load_pipeline(config, store), store)
    except ArtifactMissingError:
        return None, {}
    llm = run.model()
    return llm, {name: {"artifact_id": sae_ref(run.pipeline, name).artifact_id, **_measured(run, name)} for name in llm.saes}


def _measured(run: Any, name: str) -> dict[str, Any]:
    try:
        facts = run.evaluation(name)
    except InterpError:
        return {}
    return {key: facts[key] for key in ("fvu", "l0") if key in facts}


def read_users(path: Path) -> dict[str, str]:
    """Read a file of users: name and SHA-256 of the token on a line. Raises `InputError` with the line that is wrong and how it is made."""
    how = "A line is `name: hash`, and the hash what `printf %s TOKEN | sha256sum` prints."
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"The users cannot be read from {path} ({error}). {how}") from error
    if not isinstance(content, dict) or not content:
        raise InputError(f"The file {path} names no users. {how}")
    for name, hashed in content.items():
        if not isinstance(name, str) or not name or not isinstance(hashed, str) or not _HASH.fullmatch(hashed):
            raise InputError(f"The user {name!r:.80} in {path} has no SHA-256 of 64 hexadecimal digits. {how}")
    return content
