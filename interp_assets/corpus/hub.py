"""A Hugging Face dataset becomes shards by ranges of its rows, and a shard's documents are streamed from its range.

Nothing is downloaded to plan but a footer or a few rows, from which the size of the text is estimated. The number of rows comes from the
dataset's description, or, when it has none, from the footers of its Parquet files, or from counting the streamed rows up to `max_shards`. A
shard's fingerprint is its address: the dataset, the commit that the revision stands for (of a local folder: the hash of its files), subset,
split and range. Rows without text are skipped when they are read.
Of a dataset of Parquet files, which nearly all on the hub are, a shard reads the row groups that hold its range. Of any other kind it streams
on from where the shard before it ended in the same process, or passes over the rows before its range: better convert such a dataset to Parquet.
"""

import hashlib
import io
import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
from datasets import DatasetBuilder, IterableDataset, load_dataset, load_dataset_builder
from datasets.utils import disable_progress_bars, enable_progress_bars, is_progress_bar_enabled
from fsspec.compression import register_compression
from huggingface_hub import HfApi

from interp_assets.corpus.files import TextIn, text_of
from interp_assets.corpus.parquet import ColumnMissingError, count_rows, iter_column, mean_bytes
from interp_assets.errors import InputError, InterpError, first_line
from interp_assets.garcon.locate import digest_file, is_hub_id
from interp_assets.planning.pipeline import ShardSource
from interp_assets.planning.sections import CorpusConfig
from interp_assets.storage.foreign import mend_text

_SAMPLED_ROWS: Final = 100
_PATTERN: Final = "*?["
_STREAMS: Final[dict[str, tuple[int, Iterator[dict[str, Any]]]]] = {}
"""The dataset that was streamed from last, by its name and revision: the next row, and the rows from there on."""


def _unpack_zstd(file: Any, **_options: Any) -> io.BufferedReader:
    """Unpack zstd where fsspec would want a package of its own for it."""
    return io.BufferedReader(pa.input_stream(file, compression="zstd"))  # type: ignore[arg-type] - it is a raw stream in all but name


register_compression("zstd", _unpack_zstd, "zst", force=True)


def plan_hub(config: CorpusConfig) -> list[ShardSource]:
    """Divide a dataset into ranges of `documents_per_shard` rows. Raises `InputError` when it cannot be opened or lacks the text column."""
    revision = _resolve_revision(config)
    dataset = _open(config, revision)
    _check_column(config, dataset)
    n_rows = _count_rows(config, revision, dataset)
    n_shards = min(config.max_shards, -(-n_rows // config.documents_per_shard))
    text_bytes = estimate_text_bytes(config, revision, dataset)
    shards: list[ShardSource] = []
    for index in range(n_shards):
        first = index * config.documents_per_shard
        stop = min(n_rows, first + config.documents_per_shard)
        spec = {"dataset": _name(config), "revision": revision, "subset": config.subset, "split": config.split, "first": first, "stop": stop}
        fingerprint = hashlib.blake2b(json.dumps(spec, sort_keys=True).encode(), digest_size=16).hexdigest()
        shards.append(
            ShardSource(index=index, fingerprint=fingerprint, n_documents=stop - first, n_bytes=round(text_bytes * (stop - first)), spec=spec)
        )
    return shards


def estimate_text_bytes(config: CorpusConfig, revision: str, dataset: IterableDataset) -> float:
    """Return the bytes of text of an average row, for forecasts: as the first Parquet file says, else as the first rows do; 0 if neither can."""
    try:
        with _explained("The size of the text is not known", "Reading the rows says what is wrong."):
            if files := _list_parquet(config, revision):
                return mean_bytes(files[0], config.text_field)
            values = [row.get(config.text_field) for row in dataset.take(_SAMPLED_ROWS)]
    except (InputError, ColumnMissingError):
        return 0.0
    return sum(len(str(value or "").encode()) for value in values) / max(1, len(values))


def iter_hub_documents(config: CorpusConfig, source: ShardSource) -> Iterator[tuple[str, str]]:
    """Yield `(name, text)` of the rows of a shard that hold text. Raises `InputError` for a local dataset that has changed."""
    spec = source.spec
    if _local(config) is not None and _resolve_revision(config) != spec["revision"]:
        raise InputError(f"The dataset in {config.path} has changed since it was planned. Plan again: materialize `corpus_plan`.")
    text_in = TextIn(config.text_kind, config.text_field)
    with _explained(f"Reading {config.path!r} ({source.key}) failed", "Try again; finished shards are kept."):
        for row, value in enumerate(_iter_values(config, spec), spec["first"]):
            problems: list[str] = []
            text = mend_text(text_of(value, f"{config.path}, row {row:,}", text_in, problems))
            if problems:
                raise InputError(f"{problems[0]}.")
            if text.strip():
                yield f"{_name(config)}{config.split}:{row}", text


@contextmanager
def _explained(what: str, next_step: str) -> Iterator[None]:
    """Turn whatever is raised into an `InputError`."""
    try:
        yield
    except InterpError:
        raise
    except Exception as error:  # each of a dozen formats, file systems and HTTP clients has exceptions of its own
        raise InputError(f"{what}: {first_line(error)}. {next_step}") from error


def _iter_values(config: CorpusConfig, spec: dict[str, Any]) -> Iterator[object]:
    """Yield what the text column holds in the rows of a shard."""
    try:
        if files := _list_parquet(config, spec["revision"]):
            yield from iter_column(files, spec["revision"], config.text_field, spec["first"], spec["stop"])
            return
    except ColumnMissingError as error:
        raise InputError(_no_column(config, error.columns)) from error
    for values in _stream(config, spec):
        if config.text_field not in values:
            raise InputError(_no_column(config, sorted(values)))
        yield values[config.text_field]


def _stream(config: CorpusConfig, spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a shard: on from where the shard before it ended, else after passing over all that lie before."""
    name = json.dumps([config.path, spec["revision"], config.subset, config.split])
    next_row, rows = _STREAMS.pop(name, (-1, iter(())))
    if next_row != spec["first"]:
        rows = iter(_open(config, spec["revision"]).skip(spec["first"]))
    yield from itertools.islice(rows, spec["stop"] - spec["first"])
    _STREAMS.clear()
    _STREAMS[name] = (spec["stop"], rows)


def _list_parquet(config: CorpusConfig, revision: str) -> list[str]:
    """List the addresses of a split's Parquet files, in the order of their rows; nothing when the dataset is of another kind."""
    builder = _describe(config, revision)
    options = builder.config
    if builder.name != "parquet" or getattr(options, "filters", None) is not None or not options.data_files:
        return []
    return {str(split): list(files) for split, files in options.data_files.items()}.get(config.split, [])


def _describe(config: CorpusConfig, revision: str) -> DatasetBuilder:
    options: dict[str, Any] = {} if _local(config) is not None else {"revision": revision}
    return load_dataset_builder(config.path, None if config.subset == "default" else config.subset, **options)


def _local(config: CorpusConfig) -> Path | None:
    folder = Path(config.path).expanduser()
    return folder if folder.is_dir() else None


def _name(config: CorpusConfig) -> str:
    """Return what stands before split and row in the names of documents: nothing for a folder, whose own name is no content."""
    return f"{config.path}/" if _local(config) is None else ""


def _open(config: CorpusConfig, revision: str) -> IterableDataset:
    if not config.path:
        raise InputError("corpus.source is 'huggingface', but corpus.path names no dataset: give its id, for example 'roneneldan/TinyStories'.")
    subset = None if config.subset == "default" else config.subset
    folder = _local(config)
    if folder is not None and any(char in str(folder.resolve()) for char in _PATTERN):
        raise InputError(
            f"The path {folder} has one of the characters {_PATTERN}, which the library for datasets takes for a pattern. Rename that folder, "
            "or read its Parquet or JSON lines with corpus.source: files."
        )
    options: dict[str, Any] = {"revision": revision} if folder is None else {}
    what = f"Cannot open the dataset {config.path!r} (subset {config.subset!r}, split {config.split!r})"
    next_step = "Check the id, subset, split and network; HF_TOKEN opens gated ones; a downloaded folder works without a network."
    shows_bars = is_progress_bar_enabled()
    disable_progress_bars()
    try:
        with _explained(what, next_step):
            dataset = load_dataset(config.path, subset, split=config.split, streaming=True, **options)
    finally:
        if shows_bars:
            enable_progress_bars()
    assert isinstance(dataset, IterableDataset)
    return dataset


def _resolve_revision(config: CorpusConfig) -> str:
    folder = _local(config)
    if folder is None:
        if not is_hub_id(config.path):
            raise InputError(f"There is no folder of a dataset {config.path!r}{config.looked_in}, and it is no id on the Hugging Face hub.")
        next_step = f"It is no folder{config.looked_in}. Check the id and the network; without one, give the folder of a downloaded copy."
        with _explained(f"Cannot look up the dataset {config.path!r} at revision {config.revision!r}", next_step):
            return str(HfApi().dataset_info(config.path, revision=config.revision).sha)
    total = hashlib.blake2b(digest_size=16)
    for path in sorted(found for found in folder.rglob("*") if found.is_file()):
        total.update(f"{path.relative_to(folder).as_posix()}\0{digest_file(path).hex()}\n".encode())
    return total.hexdigest()


def _check_column(config: CorpusConfig, dataset: IterableDataset) -> None:
    with _explained(f"The first row of {config.path!r} cannot be read", "Fetch it again, or read its JSON lines with corpus.source: files."):
        columns = dataset.column_names
        if columns is None:
            columns = sorted(next(iter(dataset), {}))
    if columns and config.text_field not in columns:
        raise InputError(_no_column(config, columns))


def _no_column(config: CorpusConfig, columns: list[str]) -> str:
    return f"The dataset {config.path!r} has no column {config.text_field!r}; it has {columns}. Set `corpus.text_field`."


def _count_rows(config: CorpusConfig, revision: str, dataset: IterableDataset) -> int:
    limit = config.max_shards * config.documents_per_shard
    with _explained(f"Counting the rows of {config.path!r} failed", "Try again."):
        splits = _describe(config, revision).info.splits or {}
        if _local(config) is None and config.split in splits and splits[config.split].num_examples:
            return int(splits[config.split].num_examples)
        if files := _list_parquet(config, revision):
            return count_rows(files, revision, limit)
        return sum(1 for _ in itertools.islice(dataset, limit))
