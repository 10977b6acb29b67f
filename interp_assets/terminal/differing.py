"""`interp diff A B`: what two SAEs, artifacts, runs or pipelines differ in, exactly, and then what came of it, side by side.

interp diff k-k16 k-k32                           two SAEs of a pipeline, by name
interp diff 20261130T214501Z 20261130T220107Z     two runs of its history, by their ids or beginnings of them
interp diff data/a data/b/4-sae/k-0123456789ab    folders: of pipelines as they are planned now, or of artifacts
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import polars as pl
from rich.console import Console

from interp_assets.errors import ArtifactMissingError, InputError, InterpError
from interp_assets.planning.config import ModelConfig, PipelineConfig, make_config
from interp_assets.planning.history import FOLDER as HISTORY
from interp_assets.planning.history import list_entries, read_entry
from interp_assets.planning.pipeline import load_configuration, load_pipeline, open_pipeline_store
from interp_assets.storage.manifest import CONFIGURATION, MANIFEST, read_manifest
from interp_assets.storage.store import Store, open_store
from interp_assets.terminal.console import print_table
from interp_assets.train.results.arms import MEASURED, read_table
from interp_assets.train.results.causes import WEIGHTS, Cause, Side, find_causes, say_causes
from interp_assets.train.results.replicas import are_told_apart, find_replicas
from interp_assets.train.results.states import State, compare_states, read_state
from interp_assets.train.results.weights import describe_weights

_MEASURES: Final = ("l0", "fvu", "ce_recovered", "kl", "dead_share", "train_loss", "train_fvu", "rows_per_s")
_MANY: Final = 12


class Compared(NamedTuple):
    """One of the two things that are compared."""

    said: str
    """As it was typed."""
    store: Store
    """The pipeline's folder that it lies in."""
    artifact: Side | None = None
    measured: Side | None = None
    """The evaluation of an SAE."""
    state: State | None = None


def print_diff(out: Console, a: str, b: str, config: PipelineConfig) -> bool:
    """Print why two things differ, and their numbers beside each other; answer whether they differ."""
    sides = find_compared(a, config), find_compared(b, config)
    for letter, side in zip("AB", sides, strict=True):
        where = f"{side.store.url}/{side.artifact.path}" if side.artifact else side.store.url
        out.print(f"{letter}  {side.said}   {where}", soft_wrap=True, markup=False, highlight=False)
    causes = name_causes(*sides)
    out.print("\nThey differ in" if causes else "\nThey are the same: no field, text, weight or version differs.", style="bold")
    for line in say_causes(causes):
        out.print(f"  {line}", soft_wrap=True, markup=False, highlight=False)
    tables = _read_all(sides[0].store), _read_all(sides[1].store)
    pairs = list(_pair(sides, tables))
    for names, ids in pairs[:_MANY]:
        _print_numbers(out, names, [_Numbers(side.store, table, id_) for side, table, id_ in zip(sides, tables, ids, strict=True)])
    if len(pairs) > _MANY:
        out.print(f"\n{len(pairs) - _MANY:,} more SAEs are in both; name two of them.", soft_wrap=True)
    return bool(causes)


def find_compared(text: str, config: PipelineConfig) -> Compared:
    """Find what a person names: a folder of an artifact or pipeline, a run, or an SAE. Raises `InputError` with what there is."""
    if "://" in text or "/" in text or Path(text).is_dir():
        return _find_place(text.rstrip("/"))
    store = open_pipeline_store(config)
    if any(name.startswith(text) for name in list_entries(store)) and text[:1].isdigit():
        return Compared(text, store, state=read_state(store, read_entry(store, text)))
    return _find_sae(text, config, store)


def name_causes(a: Compared, b: Compared) -> list[Cause]:
    """Return why two things of one sort differ, with the names of weights where both models are still there."""
    if a.artifact and b.artifact:
        if a.artifact.manifest.kind != b.artifact.manifest.kind:
            raise InputError(f"{a.said} is a {a.artifact.manifest.kind} and {b.said} a {b.artifact.manifest.kind}: compare two of one kind.")
        causes = find_causes(a.measured, b.measured) if a.measured and b.measured else find_causes(a.artifact, b.artifact)
    elif a.state and b.state:
        causes = compare_states(a.state, b.state)
    else:
        raise InputError(f"{a.said} and {b.said} are of two sorts: compare two SAEs or artifacts, or two runs or pipelines.")
    return [_name_weights(cause, a, b) for cause in causes]


def _find_place(text: str) -> Compared:
    above, _, last = text.rpartition("/")
    if above.endswith(HISTORY):
        store = open_store(above.removesuffix(HISTORY).rstrip("/") or ".")
        return Compared(text, store, state=read_state(store, read_entry(store, last.removesuffix(".json"))))
    store = open_store(text)
    if store.size(CONFIGURATION) is not None:
        return Compared(text, store, state=read_state(store))
    parent = open_store(above or "/") if "/" in text else open_store(".")
    if parent.size(f"{last}/{MANIFEST}") is None:
        raise InputError(
            f"There is neither an artifact nor a pipeline at {text}. Name a folder with {MANIFEST} or {CONFIGURATION}, an SAE, or a run."
        )
    folder, inside = above, last
    while folder and open_store(folder).size(CONFIGURATION) is None:  # the pipeline's folder is somewhere above
        folder, _, part = folder.rpartition("/")
        inside = f"{part}/{inside}"
    root = open_store(folder) if folder else parent
    path = inside if folder else last
    return Compared(text, root, artifact=Side(root, path, read_manifest(root, path)))


def _find_sae(name: str, config: PipelineConfig, store: Store) -> Compared:
    """Return an SAE by its name, measured or not: of the configuration, else the only one of the folder that is called so."""
    try:
        pipeline = load_pipeline(config, store)
        own = read_table(pipeline, store).filter((pl.col("name") == name) & pl.col("sae_path").is_not_null())
        found = own if own.height else read_table(pipeline, store, everything=True).filter(pl.col("name") == name)
    except ArtifactMissingError:
        found = pl.DataFrame()
    if not found.height:
        runs = ", ".join(list_entries(store)[-3:]) or "none"
        raise InputError(
            f"{name!r} is no SAE of {store.url} that is trained (configured are {_list_names(config)}), no run (the last: {runs}), and no folder."
        )
    if found.height > 1:
        raise InputError(f"Several SAEs are called {name!r}: name one by its folder, {', '.join(found['sae_path'].head(4))}.")
    row = found.row(0, named=True)
    sae, evaluation = (Side(store, path, read_manifest(store, path)) if path else None for path in (row["sae_path"], _evaluation_of(row)))
    return Compared(name, store, sae, evaluation)


def _evaluation_of(row: dict[str, Any]) -> str | None:
    return row["evaluation_path"] if row["status"] == MEASURED else None


def _list_names(config: PipelineConfig) -> str:
    names = [sae.name for sae in config.saes]
    return ", ".join(names[:8]) + (" and more" if len(names) > 8 else "")


def _name_weights(cause: Cause, a: Compared, b: Compared) -> Cause:
    if cause.kind != WEIGHTS or cause.what != "model":
        return cause
    models = [_model_of(side) for side in (a, b)]
    return cause._replace(detail=describe_weights(models[0], models[1], (cause.before, cause.after))) if models[0] and models[1] else cause


def _model_of(side: Compared) -> ModelConfig | None:
    try:
        return (make_config(side.state.config) if side.state else load_configuration(side.store)).model
    except InterpError:
        return None


class _Numbers:
    """What was measured of one SAE, and of those that differ from it in their seed alone."""

    def __init__(self, store: Store, table: pl.DataFrame, sae_id: str) -> None:
        self.row = table.row(by_predicate=pl.col("sae_id") == sae_id, named=True)
        is_measured = self.row["status"] == MEASURED
        self.n_rows = int(read_manifest(store, self.row["evaluation_path"]).facts["n_rows"]) if is_measured else 0
        self.replicas = find_replicas(table.filter(pl.col("status") == MEASURED), self.row) if is_measured else None


def _pair(sides: tuple[Compared, Compared], tables: tuple[pl.DataFrame, pl.DataFrame]) -> Iterator[tuple[tuple[str, str], tuple[str, str]]]:
    """Yield names and ids of SAEs that belong beside each other: the two that were named, or those that two runs share."""
    known = [set(table["sae_id"]) if table.height else set() for table in tables]
    a, b = sides
    if a.artifact and b.artifact:
        ids = [(manifest := side.artifact.manifest).inputs.get("sae", manifest.artifact_id) for side in sides if side.artifact]
        if ids[0] in known[0] and ids[1] in known[1]:
            yield (a.said, b.said), (ids[0], ids[1])
    elif a.state and b.state:
        before, after = _ids_of(a.state, tables[0]), _ids_of(b.state, tables[1])
        for name in before:
            if before[name] in known[0] and after.get(name) in known[1]:
                yield (name, name), (before[name], after[name])


def _ids_of(state: State, table: pl.DataFrame) -> dict[str, str]:
    """Return the SAEs of a run by name; of a folder as it is now the only ones that are called so."""
    if state.sae_ids or not table.height:
        return state.sae_ids
    return dict(table.filter(pl.col("name").is_unique()).select("name", "sae_id").rows())


def _read_all(store: Store) -> pl.DataFrame:
    try:
        return read_table(load_pipeline(load_configuration(store), store), store, everything=True)
    except InterpError:
        return pl.DataFrame()


def _print_numbers(out: Console, names: Sequence[str], sides: Sequence[_Numbers]) -> None:
    title = names[0] if names[0] == names[1] else f"{names[0]}, {names[1]}"
    on = " and ".join(f"{n:,}" if n else "no" for n in dict.fromkeys(side.n_rows for side in sides))
    out.print(f"\n{title}: one training each (n = 1), measured on {on} held-out rows", style="bold", soft_wrap=True, markup=False)
    rows = []
    for name in _MEASURES:
        x, y = (side.row.get(name) for side in sides)
        if x is not None or y is not None:
            rows.append((name, *("-" if value is None else f"{value:.5g}" for value in (x, y)), "-" if x is None or y is None else f"{y - x:+.3g}"))
    print_table(out, ["", "A", "B", "B - A"], rows, right_from=1)
    if sides[0].replicas and sides[1].replicas:
        out.print(_judge(sides[0].replicas, sides[1].replicas), soft_wrap=True, markup=False, highlight=False)


def _judge(a: dict[str, Any], b: dict[str, Any]) -> str:
    """Say whether a difference of FVU is more than noise, where both recipes were trained with several seeds."""
    if a["n"] < 2 or b["n"] < 2:
        return f"Whether that is noise is not known (seeds: n = {a['n']} and {b['n']}); `each: {{seed: {{count: 3}}}}` tells."
    shown = [f"{side['fvu']:.5g} with deviation {side['fvu_deviation']:.2g} (n = {side['n']})" for side in (a, b)]
    return f"FVU over seeds: {shown[0]} and {shown[1]}: {'more than noise' if are_told_apart(a, b) else 'within noise'}"
