"""What `interp plan` and `interp inspect` print: a pipeline before it runs, and artifacts in human form."""

import io
import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import polars as pl
from rich.console import Console

from interp_assets.config import PipelineConfig
from interp_assets.console import format_bytes, format_count, print_table
from interp_assets.corpus.plan import plan_corpus
from interp_assets.errors import InputError
from interp_assets.manifest import MANIFEST, FileEntry, Manifest, read_file, read_manifest
from interp_assets.pipeline import Pipeline, open_pipeline_store
from interp_assets.road import Stop, find_version, make_road
from interp_assets.store import Store, open_store
from interp_assets.tensors import read_spans
from interp_assets.verify import Tree, list_tree

MAX_PARTITIONS: Final = 5000
"""Above this an asset's page in Dagster becomes slow; larger shards are the remedy."""
_HEAD_ROWS: Final = 5
_MAX_TABLE_BYTES: Final = 256 << 20
_MAX_TEXT: Final = 2000
_MAX_CELL: Final = 32


class Place(NamedTuple):
    """Something in a store: the store, and the path in it."""

    store: Store
    path: str


def locate(address: str) -> Place:
    """Find what a person points at: a folder, or an s3:// address. Raises `InputError` when there is nothing."""
    address = address.rstrip("/")
    if "://" in address:
        parent, _, name = address.rpartition("/")
        bucket_is_whole = parent.endswith(":/")
        return Place(open_store(address), "") if bucket_is_whole else Place(open_store(parent), name)
    path = Path(address).expanduser().resolve()
    if path.is_file() and path.name == MANIFEST:
        path = path.parent
    if not path.is_dir():
        raise InputError(f"There is no folder {path}. Name an artifact's folder, or any folder above artifacts.")
    return Place(open_store(str(path.parent)), path.name)


def print_plan(console: Console, config: PipelineConfig) -> None:
    """Print shards, artifacts per asset, and the shuffle; plans the corpus, which writes nothing but the plan."""
    store = open_pipeline_store(config)
    pipeline = plan_corpus(config, store)
    shards = pipeline.plan.shards
    text = f"{format_count(sum(s.n_documents for s in shards), 'document')}, {format_bytes(sum(s.n_bytes for s in shards))} of text"
    held_out = format_count(len(pipeline.held_out_indices), "shard")
    console.print(f"Pipeline {config.name} in {config.root}", soft_wrap=True, markup=False)
    console.print(f"  {format_count(len(shards), 'corpus shard')}: {text}; {held_out} held out", soft_wrap=True)
    for hook_point, width in pipeline.plan.hook_widths.items():
        console.print(f"  {config.model.name} at {hook_point}: {width:,} values a row in {config.harvest.dtype}", soft_wrap=True, markup=False)
    shuffle = config.shuffle
    n_mixed = shuffle.fan_out ** (shuffle.passes - 1)
    memory = f"at most {format_bytes(shuffle.memory_bytes)} a job"
    console.print(f"  shuffle: {format_count(shuffle.passes, 'pass', 'passes')}, {format_count(n_mixed, 'mixed shard')}, {memory}\n", soft_wrap=True)
    rows = [_plan_row(stop, pipeline, store) for stop in make_road(config)[1:]]
    print_table(console, ["asset", "partitioned by", "partitions", "there already"], rows)
    for name, _, n_partitions, _ in rows:
        if n_partitions > MAX_PARTITIONS:
            advice = "Dagster becomes slow. Raise corpus.shard_bytes or lower features.latent_slices."
            console.print(f"\n{name} has {n_partitions:,} partitions; above {MAX_PARTITIONS:,} {advice}", soft_wrap=True)


def _plan_row(stop: Stop, pipeline: Pipeline, store: Store) -> tuple[str, str, int, int]:
    keys = stop.partition_keys(pipeline)
    n_there = sum(find_version(stop, pipeline, store, key) is not None for key in keys)
    axis = {"none": "-", "slice|shard": "latent slice x shard", "slice": "latent slice"}.get(stop.axis, stop.axis)
    return stop.name, axis, len(keys), n_there


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
    return "" if entry.n_rows is None else f"{entry.n_rows:,} rows"
