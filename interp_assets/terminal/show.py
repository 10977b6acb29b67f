"""Artifacts in human form: a manifest, its facts and files, and the heads of its tables; or a count of what lies below a folder."""

import io
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

import polars as pl
from rich.console import Console

from interp_assets.errors import InputError
from interp_assets.planning.config import PipelineConfig
from interp_assets.planning.history import FOLDER as HISTORY
from interp_assets.planning.history import read_history
from interp_assets.planning.pipeline import load_pipeline, open_pipeline_store
from interp_assets.planning.progress import format_bytes, format_count
from interp_assets.storage.manifest import MANIFEST, FileEntry, Manifest, read_file, read_manifest
from interp_assets.storage.store import Store
from interp_assets.storage.verify import Tree, list_tree, locate
from interp_assets.terminal.console import print_table

_HEAD_ROWS: Final = 5
_MAX_TABLE_BYTES: Final = 256 << 20
_MAX_TEXT: Final = 2000
_MAX_CELL: Final = 32


def print_inspection(console: Console, address: str) -> None:
    """Print the artifact at `address`, or how many artifacts of which kind lie below it."""
    store, path = locate(address)
    tree = list_tree(store, path)
    if path in tree.artifacts:
        print_artifact(console, store, path)
    elif tree.artifacts:
        print_tree(console, store, tree)
    else:
        raise InputError(f"There is no artifact at or below {address}. Artifacts are folders with a {MANIFEST}.")


class Shown(NamedTuple):
    """Which SAEs are printed, and how."""

    sort: str = "fvu"
    as_csv: bool = False
    everything: bool = False
    """All of the folder, not only those of the configuration."""
    over: str = ""
    """`seed` folds those that differ in their seed alone, `none` shows each, empty folds where there are such."""


def print_sweep(console: Console, config: PipelineConfig, how: Shown) -> None:
    """Print the table of all SAEs of a pipeline, and where it lies. Raises `InputError` for a column that it has not."""
    from interp_assets.train.refs import sweep_ref  # noqa: PLC0415 - polars takes a second to import
    from interp_assets.train.results.arms import count_held_out, read_table  # noqa: PLC0415 - as above
    from interp_assets.train.results.replicas import has_replicas, over_seeds  # noqa: PLC0415 - as above
    from interp_assets.train.sweep import MAX_SHOWN, TABLE, shorten  # noqa: PLC0415 - as above

    if how.over not in ("", "seed", "none"):
        raise InputError(f"--over {how.over!r} is neither `seed` nor `none`.")
    store = open_pipeline_store(config)
    pipeline = load_pipeline(config, store)
    arms = read_table(pipeline, store, everything=how.everything)
    is_folded = how.over == "seed" or (not how.over and not how.as_csv and has_replicas(arms))
    table = over_seeds(arms) if is_folded else arms
    if how.sort not in table.columns:
        raise InputError(f"The table of SAEs has no column {how.sort!r}; it has {', '.join(table.columns)}.")
    table = table.sort(how.sort, nulls_last=True)
    if how.as_csv:
        console.print(table.write_csv().rstrip(), soft_wrap=True, markup=False)
        return
    own = [column for column in table.columns if "." in column]  # those of one's own metrics: `my.half_norm`
    shown = shorten(table).hstack(table.head(MAX_SHOWN).select(pl.col(own).round_sig_figs(4)))
    print_table(console, shown.columns, ([_cell("-" if value is None else value) for value in row] for row in shown.rows()))
    for sentence in _explain(arms, config, count_held_out(store, arms), is_folded=is_folded):
        console.print(sentence, soft_wrap=True, markup=False, highlight=False)
    console.print(f"{store.url}/{sweep_ref(pipeline).path}/{TABLE}", soft_wrap=True, markup=False, highlight=False)


def _explain(arms: pl.DataFrame, config: PipelineConfig, n_rows: int | None, *, is_folded: bool) -> Iterator[str]:
    """Yield what a table of SAEs does not say itself: who is missing and why, and on how much its numbers stand."""
    missing = [sae.name for sae in config.saes if sae.name not in set(arms["name"])]
    late = arms.filter(pl.col("status") == "trained")["name"].to_list()
    for names, what in ((missing, "not trained"), (late, "trained, not measured")):
        if names:
            yield f"{format_count(len(names), 'SAE')} {what}: {', '.join(names[:8])}"
    for name, status, why in arms.filter(pl.col("why").is_not_null()).select("name", "status", "why").head(8).rows():
        yield f"{name} {status}: {why}"
    if is_folded:
        yield "Means over n seeds, with deviations of single trainings; differences under two of them are within noise (--over none: each)."
    if n_rows:
        yield (
            f"L0, FVU and dead share on {n_rows:,} held-out rows; each row one training."
            if not is_folded
            else f"Measured on {n_rows:,} held-out rows."
        )


def print_history(console: Console, config: PipelineConfig) -> None:
    """Print what commands did to a pipeline, a line each, the newest last."""
    store = open_pipeline_store(config)
    found = read_history(store)
    if not found.height:
        console.print(f"Nothing was run on pipeline {config.name!r} yet ({store.url}/{HISTORY}).", soft_wrap=True, markup=False, highlight=False)
        return
    columns = ["id", "status", "seconds", "forecast_s", "n_made", "n_reused", "n_failed", "commit", "note", "command"]
    rows = (
        ["-" if value is None else str(value)[:9] if name == "commit" else value for name, value in zip(columns, row, strict=True)]
        for row in found.select(columns).rows()
    )
    print_table(console, columns, rows)
    console.print(f"{store.url}/{HISTORY}", soft_wrap=True, markup=False, highlight=False)


def print_tree(console: Console, store: Store, tree: Tree) -> None:
    """Print a table of the artifacts below a folder, by kind."""
    kinds: defaultdict[str, list[int]] = defaultdict(list)
    for path, items in tree.artifacts.items():
        kinds[read_manifest(store, path).kind].append(sum(item.n_bytes for item in items))
    rows = [(kind, len(sizes), format_bytes(sum(sizes))) for kind, sizes in sorted(kinds.items())]
    print_table(console, ["kind", "artifacts", "size"], rows)
    if tree.strays:
        console.print(f"{format_count(len(tree.strays), 'file')} of interrupted writes; `interp verify` names them.")


def print_artifact(console: Console, store: Store, path: str) -> None:
    """Print one artifact: what it is, what it was made from, its facts, its files and their heads."""
    manifest = read_manifest(store, path)
    console.print(f"{manifest.kind} {manifest.artifact_id}", style="bold", markup=False)
    console.print(f"  at      {store.url}/{path}\n  made    {manifest.created}\n  digest  {manifest.digest}", soft_wrap=True, markup=False)
    for title, content in (("identity", manifest.identity), ("inputs", manifest.inputs), ("facts", manifest.facts)):
        if content:
            console.print(f"\n{title}", style="bold")
            _print_mapping(console, content)
    console.print()
    rows = [(entry.name, format_bytes(entry.n_bytes), len(entry.checksums), _shape(entry)) for entry in manifest.files]
    print_table(console, ["file", "size", "blocks", "shape"], rows)
    for entry in manifest.files:
        _print_head(console, store, path, manifest, entry)


def _print_mapping(console: Console, content: Mapping[str, Any]) -> None:
    width = max(len(key) for key in content)
    for key, value in content.items():
        text = json.dumps(value) if isinstance(value, dict | list | bool) or value is None else str(value)
        shown = text if len(text) <= _MAX_TEXT else text[:_MAX_TEXT] + " ..."
        console.print(f"  {key:<{width}}  {shown}", soft_wrap=True, markup=False)


def _print_head(console: Console, store: Store, path: str, manifest: Manifest, entry: FileEntry) -> None:
    """Print what can be seen of one file at a glance: rows of a table, tensors of a safetensors file, the start of JSON."""
    suffix = entry.name.rpartition(".")[2]
    if suffix == "parquet" and entry.n_bytes <= _MAX_TABLE_BYTES:
        frame = pl.read_parquet(io.BytesIO(read_file(store, path, manifest, entry.name)))
        console.print(f"\n{entry.name}: {frame.height:,} rows", style="bold", markup=False)
        print_table(console, frame.columns, ([_cell(value) for value in row] for row in frame.head(_HEAD_ROWS).iter_rows()))
    elif suffix == "safetensors":
        from interp_assets.storage.tensors import read_spans  # noqa: PLC0415 - torch takes seconds to import, and most artifacts do without

        console.print(f"\n{entry.name}", style="bold", markup=False)
        for name, span in read_spans(store, path, manifest, entry.name).items():
            console.print(f"  {name}: {span.dtype} {list(span.shape)}", markup=False)
    elif suffix == "json":
        text = read_file(store, path, manifest, entry.name).decode(errors="replace")
        console.print(f"\n{entry.name}", style="bold", markup=False)
        console.print(text if len(text) <= _MAX_TEXT else text[:_MAX_TEXT] + " ...", soft_wrap=True, markup=False)


def _cell(value: object) -> object:
    """Shorten a value for one line of a table."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    text = str(value)
    return text[: _MAX_CELL - 3] + "..." if len(text) > _MAX_CELL else value


def _shape(entry: FileEntry) -> str:
    if entry.shape is not None:
        return f"{entry.dtype or ''} {entry.shape}".strip()
    return "" if entry.n_rows is None else f"{format_count(entry.n_rows, 'row')}"
