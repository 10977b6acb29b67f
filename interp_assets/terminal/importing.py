"""A folder of SAELens, sparsify, dictionary_learning or Gemma Scope becomes an entry of a pipeline's configuration, checked and explained.

What the folder tells (architecture, sizes, hook point, model, data, quality) is shown beside what the pipeline has and measures. What would make the
SAE another function, or not fit, is an error; what only looks odd (another model's name, no hook point told) is a warning. The entry names the folder
and the digest of its files; the asset `sae` then reads it instead of training (`train/exchange/imported.py`).
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any, Final, NamedTuple

import yaml
from rich.console import Console

from interp_assets.errors import ArtifactMissingError, ConfigError, InputError
from interp_assets.garcon.points import MODULE, name_block_part, name_module, own_name
from interp_assets.garcon.subject import make_meta_model
from interp_assets.planning.config import PipelineConfig, SaeConfig, load_config, make_config
from interp_assets.planning.pipeline import load_pipeline, open_pipeline_store
from interp_assets.terminal.console import print_table
from interp_assets.train.evaluate import measure_fit
from interp_assets.train.exchange.fit import Fit, explain_misfit
from interp_assets.train.exchange.folders import BLOCK_PART, Foreign, Origin, translate_hook
from interp_assets.train.exchange.imported import NEAREST, check_sizes, open_foreign

_SHOWN: Final = ("name", "imported", "imported_digest", "hook_point", "architecture", "d_sae", "k")
_LIST: Final = re.compile(r"^saes:[ \t]*(?:#.*)?\r?\n(?P<items>(?:[ \t]*(?:#.*)?\r?\n|[ \t]*- .*\n|[ \t]+.*\n)*)", re.MULTILINE)
"""A list with one item a line, and what follows it that is no key: blank lines and comments."""
_TOOLS: Final = {"saelens": "SAELens", "sparsify": "sparsify", "dictionary_learning": "dictionary_learning", "gemma_scope": "Gemma Scope"}


class Place(NamedTuple):
    """Where an imported SAE belongs in a pipeline; empty names stand for what its folder tells."""

    folder: str
    name: str = ""
    hook_point: str = ""
    target_hook_point: str = ""


class Import(NamedTuple):
    """What was found in a folder, and what it would be here."""

    foreign: Foreign
    entry: SaeConfig
    fit: Fit | None
    """None where the pipeline has no held-out rows yet."""
    warnings: list[str]


def plan_import(config: PipelineConfig, place: Place, *, accept_misfit: bool = False) -> Import:
    """Read and check a folder against a pipeline. Raises `InputError` or `ConfigError` for what does not fit, with what does.

    `accept_misfit` makes a warning of a reconstruction or an L0 that is far off, and the entry remembers that it was meant.
    """
    folder = place.folder if "://" in place.folder else str(Path(place.folder).expanduser().resolve())
    foreign = open_foreign(folder)
    origin, sae = foreign.origin, foreign.sae
    told = _told_names(config, origin.hook_point, origin.hook, place.hook_point)
    hook_point = _choose(config, "--hook-point", place.hook_point, told, origin.hook)
    is_transcoder = sae.d_in != sae.d_out or "transcoder" in origin.architecture or bool(place.target_hook_point or origin.target_hook_point)
    told_target = _told_names(config, origin.target_hook_point, origin.target_hook, place.target_hook_point) if is_transcoder else []
    target = _choose(config, "--target-hook-point", place.target_hook_point, told_target, origin.target_hook) if is_transcoder else ""
    task = "skip_transcoder" if sae.W_skip is not None else "transcoder" if is_transcoder else "sae"
    name = place.name or _make_name(folder, hook_point, origin)
    if any(item.name == name for item in config.saes):
        raise InputError(f"The pipeline has an SAE {name!r} already. Give this one another name with --name.")
    fields: dict[str, Any] = {
        "name": name,
        "hook_point": hook_point,
        "architecture": NEAREST[sae.kind],
        "task": task,
        "target_hook_point": target,
        "d_sae": sae.d_sae,
        "k": min(sae.d_sae, sae.k or max(1, round(origin.l0 or 32))),
        "imported": folder,
        "imported_digest": foreign.digest,
        "accepts_misfit": accept_misfit,
    }
    entry = make_config({**config.model_dump(), "saes": [*(item.model_dump() for item in config.saes), fields]}).sae(name)
    warnings, fit = _compare(config, entry, foreign, told), None
    try:
        store = open_pipeline_store(config)
        pipeline = load_pipeline(config, store)
        check_sizes(pipeline, entry, sae)
        fit = measure_fit(pipeline, store, entry, sae)
    except ArtifactMissingError:
        warnings.append(f"the pipeline has no plan yet, so d_in {sae.d_in:,} was not compared with the width of {entry.hook_point}.")
    if misfit := explain_misfit(fit, foreign.claims) if fit else "":
        if not accept_misfit:
            raise InputError(f"The SAE in {folder} does not fit {hook_point}: {misfit} If it is meant so, take it in with --accept-misfit.")
        warnings.append(misfit)
    if fit is None:
        warnings.append(f"no held-out rows of {entry.hook_point} are there yet, so nothing was measured; `interp run` does, in sae_evaluation.")
    return Import(foreign, entry, fit, warnings)


def print_import(console: Console, found: Import) -> None:
    """Print what was found, what is odd about it, and the entry."""
    sae, origin, entry = found.foreign.sae, found.foreign.origin, found.entry
    norms = sae.W_dec.norm(dim=1)
    fires = {
        "relu": "> 0",
        "topk": f"among the {sae.k} largest",
        "jump_relu": f"> its threshold ({sae.threshold.min():.3g} to {sae.threshold.max():.3g})",
    }
    rows = [
        ("tool", _TOOLS[origin.tool]),
        ("architecture", f"{origin.architecture}; here {entry.architecture}{'' if entry.task == 'sae' else ', ' + entry.task}"),
        ("d_in x d_sae", f"{sae.d_in:,} x {sae.d_sae:,}" + ("" if sae.d_in == sae.d_out else f", reconstructs {sae.d_out:,}")),
        ("a latent fires", fires[sae.kind]),
        ("hook point", f"{entry.hook_point}; its folder says {origin.hook or origin.hook_point or 'nothing'}"),
        ("model", origin.model or "-"),
        ("data", origin.dataset or "-"),
        ("context length", str(origin.context_length or "-")),
        ("L0", _beside(found.fit and found.fit.l0, found.foreign.claims.l0, found.foreign.claims.l0_from)),
        ("FVU", _beside(found.fit and found.fit.fvu, found.foreign.claims.fvu, found.foreign.claims.fvu_from)),
        ("measured on", f"{found.fit.n_rows:,} held-out rows" if found.fit else "nothing: there are no held-out rows yet"),
        ("decoder norms", f"{norms.min():.3g} to {norms.max():.3g}"),
        ("weights", f"{origin.dtype}, read as float32; digest {found.foreign.digest}"),
    ]
    print_table(console, ["imported SAE", entry.name], rows)
    for warning in found.warnings:
        console.print(f"Note: {warning}", soft_wrap=True, markup=False, style="yellow")


def make_entry(entry: SaeConfig) -> str:
    """Write the entry as YAML, as an item of `saes`; fields that keep their defaults are left out."""
    extras = (*(("task", "target_hook_point") if entry.is_transcoder else ()), *(("accepts_misfit",) if entry.accepts_misfit else ()))
    shown = entry.model_dump(include={*_SHOWN, *extras})
    notes = {"k": "  # expected L0, for estimates of cost only"} if entry.architecture != "topk" else {}
    lines = [f"{name}: {_scalar(shown[name])}{notes.get(name, '')}" for name in (*_SHOWN, *extras)]
    return "- " + "\n  ".join(lines) + "\n"


def add_entry(path: Path, entry: SaeConfig) -> None:
    """Put the entry after the others of `saes` in a YAML file, and change nothing else. Raises `ConfigError`, with the file as it was.

    Comments and blank lines that follow the list stay below it, where they introduce what comes next.
    """
    target = path.resolve()
    text = target.read_bytes().decode("utf-8")
    newline = "\r\n" if "\r\n" in text else "\n"
    text = text if text.endswith("\n") else text + newline
    found = _LIST.search(text)
    first = re.search(r"^([ \t]*)- ", found["items"], re.MULTILINE) if found else None
    if found is None or first is None:
        raise ConfigError(f"{path} has no list `saes:` with one item a line; put the entry below into it yourself, beside those that there are.")
    *_, last = (line.end() for line in re.finditer(r"^[ \t]*[^\s#].*\n", found["items"], re.MULTILINE))
    end = found.start("items") + last
    added = "".join(first[1] + line + newline for line in make_entry(entry).splitlines())
    trial = target.with_name(f".{target.name}.new")
    try:
        trial.write_bytes((text[:end] + added + text[end:]).encode("utf-8"))
        if load_config(trial).saes != [*load_config(path).saes, entry]:
            raise ConfigError(f"{path} would not hold what it should with the entry added; put the entry below into `saes` yourself.")
        shutil.copymode(target, trial)
        trial.replace(target)
    finally:
        trial.unlink(missing_ok=True)


def _scalar(value: str | int) -> str:
    """Write a value in YAML; what could be taken for something else than text in quotes."""
    if isinstance(value, bool):
        return str(value).lower()
    is_plain = isinstance(value, int) or (re.fullmatch(r"[a-z][a-z0-9]*[_a-z][a-z0-9_.]*", value) and yaml.safe_load(value) == value)
    return str(value) if is_plain else json.dumps(value, ensure_ascii=False)


def _beside(measured: float | None, claimed: float | None, source: str) -> str:
    here = "not measured" if measured is None else f"{measured:.3g} here"
    return f"{here}; {f'{claimed:.3g} by {source}' if claimed is not None else 'its folder says nothing'}"


def _told_names(config: PipelineConfig, told: str, hook: str, chosen: str) -> list[str]:
    """Return our names of the place that the folder tells. Where the model must say and cannot be read, a person's choice is enough."""
    if told or not hook:
        return [told] if told else []
    try:
        return _find_names(config, hook)
    except InputError:
        if chosen:
            return []
        raise


def _find_names(config: PipelineConfig, hook: str) -> list[str]:
    """Return our names of what another tool calls `hook`: of a module's output, several may name the same tensor."""
    if translated := translate_hook(hook):
        return [translated]
    net = make_meta_model(config.model).net
    if (ours := own_name(net, hook)) != hook:
        return [ours]
    if part := BLOCK_PART.search(hook):
        return name_block_part(net, "mlp" if part["part"] == "mlp" else "attn", int(part["layer"]))
    return name_module(net, hook)


def _choose(config: PipelineConfig, option: str, chosen: str, told: list[str], hook: str) -> str:
    """Return the hook point that was chosen, or the one that the folder tells; `module:` paths are taken as they are."""
    harvested = config.harvest.hook_points
    names = told
    if chosen:
        names = [chosen] if chosen in harvested or chosen.startswith(MODULE) else _find_names(config, chosen) or [chosen]
    if not names:
        what = f"calls its hook point {hook!r}, which has no name here" if hook else "does not tell its hook point"
        raise InputError(f"The folder {what}. Name one of harvest.hook_points with {option}: {', '.join(harvested)}.")
    name = next((name for name in names if name in harvested), names[0])
    if name not in harvested:
        source = f"chosen with {option}" if chosen else f"its folder says {hook or told[0]!r}"
        raise InputError(
            f"The SAE belongs to {name} ({source}), but harvest.hook_points are {', '.join(harvested)}. Add {name} to them, or name another "
            f"with {option}."
        )
    return name


def _make_name(folder: str, hook_point: str, origin: Origin) -> str:
    """Make a name of the folder's own, which tools often call after their layers; with the hook point where it does not say it."""
    last = re.sub(r"[^A-Za-z0-9_.-]+", "-", folder.rstrip("/").rpartition("/")[2]).strip("-.") or "imported"
    point = hook_point.removeprefix(MODULE)
    is_said = translate_hook(last) == hook_point or point in last or last in (origin.hook, origin.target_hook)
    return last if is_said else f"{last}-{point}"


def _compare(config: PipelineConfig, entry: SaeConfig, foreign: Foreign, told: list[str]) -> list[str]:
    """List what looks odd."""
    origin, notes = foreign.origin, []
    if told and entry.hook_point not in told:
        notes.append(f"the folder says hook point {origin.hook or told[0]} ({told[0]}); here it becomes one of {entry.hook_point}.")
    if origin.model and _last(origin.model) != _last(config.model.name):
        notes.append(f"the folder says model {origin.model!r}, the pipeline's is {config.model.name!r}.")
    if origin.context_length and origin.context_length != config.corpus.context_length:
        notes.append(f"it was trained on contexts of {origin.context_length:,} tokens, the pipeline's have {config.corpus.context_length:,}.")
    return notes


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()
