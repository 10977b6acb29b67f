"""Held-out rows become columns of labels: what the parser says of their token, which planted features fire, or what a file of somebody's own says.

A column has the classes of its values and the class of each row; -1 where nothing is said of it. Rows are the valid ones in the order in which
`evaluate.iter_held_out_rows` yields them, and each has its group, which stays together when rows are divided: its document, or its context where
there are few documents.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from interp_assets.corpus.python_labels import KINDS, label_python
from interp_assets.corpus.sources import iter_documents
from interp_assets.corpus.tokens import TokenShard, load_documents, load_tokens
from interp_assets.errors import InputError
from interp_assets.garcon.tokenizer import load_tokenizer, special_token_ids
from interp_assets.harvest.planted import truth_of
from interp_assets.planning.pipeline import SHARD_SHIFT, Pipeline
from interp_assets.planning.probes import PLANTED, PYTHON, hash_labels
from interp_assets.storage.store import Store

_FEW_GROUPS: Final = 20
_MAX_DEPTH: Final = 8
_MAX_CLASSES: Final = 64
_MAX_COLUMNS: Final = 256
_ROW_ID: Final = "row_id"


class Column(NamedTuple):
    """One label of each row."""

    name: str
    classes: list[str]
    codes: NDArray[np.int64]
    """Place in `classes`; -1 where nothing is said."""


class Labelled(NamedTuple):
    """The labels of the held-out rows that are probed."""

    columns: list[Column]
    groups: NDArray[np.int64]
    n_unlabelled: int
    """Rows of which no column says anything."""


class _Shard(NamedTuple):
    number: int
    tokens: TokenShard
    columns: list[Column]
    """Of all its rows, valid or not."""


def load_labels(pipeline: Pipeline, store: Store, n_rows: int) -> Labelled:
    """Label the first `n_rows` valid held-out rows. Raises `InputError` where the corpus has no such labels, or a file other bytes."""
    shards: list[_Shard] = []
    n_left = n_rows
    for index in pipeline.held_out_indices:
        if n_left <= 0:
            break
        tokens = load_tokens(pipeline, store, index)
        shards.append(_Shard(index, tokens, list(_label_shard(pipeline, store, index, tokens))))
        n_left -= int(tokens.valid.sum())
    columns = [
        Column(parts[0].name, parts[0].classes, _join(shards, [part.codes for part in parts])[:n_rows])
        for parts in zip(*(shard.columns for shard in shards), strict=True)
    ]
    silent = np.all([column.codes < 0 for column in columns], axis=0) if columns else np.zeros(0, np.bool_)
    return Labelled(columns, _group(shards)[:n_rows], int(silent.sum()))


def _join(shards: list[_Shard], parts: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.concatenate([part[shard.tokens.valid] for shard, part in zip(shards, parts, strict=True)])


def _group(shards: list[_Shard]) -> NDArray[np.int64]:
    """Number the documents, or where there are few the contexts, over all shards."""
    for which in ("documents", "contexts"):
        groups = _join(shards, [(np.int64(shard.number) << 32) + getattr(shard.tokens, which).astype(np.int64) for shard in shards])
        if len(np.unique(groups)) >= _FEW_GROUPS:
            break
    return np.unique(groups, return_inverse=True)[1].astype(np.int64)


def _label_shard(pipeline: Pipeline, store: Store, index: int, tokens: TokenShard) -> Iterator[Column]:
    probes = pipeline.config.probes
    assert probes
    if probes.labels == PYTHON:
        return _label_text(pipeline, store, index, tokens)
    return _label_planted(pipeline, index) if probes.labels == PLANTED else _label_by_file(pipeline, index, tokens.n_rows)


def _label_planted(pipeline: Pipeline, index: int) -> Iterator[Column]:
    fires = torch.cat([block.strengths > 0 for block in truth_of(pipeline, index)]).numpy()
    for feature in range(min(_MAX_COLUMNS, fires.shape[1])):
        yield Column(f"feature {feature}", ["silent", "fires"], fires[:, feature].astype(np.int64))


def _label_text(pipeline: Pipeline, store: Store, index: int, tokens: TokenShard) -> Iterator[Column]:
    """Find each token in its text, which has to become the same tokens again."""
    if pipeline.config.corpus.text_kind != "plain":
        raise InputError("probes.labels python reads plain text; corpus.text_kind is another one. Name a file of labels instead.")
    tokenizer = load_tokenizer(pipeline.config.model)
    if not tokenizer.is_fast:
        raise InputError(f"The tokenizer of {pipeline.config.model.name!r} does not tell where tokens lie in a text. Name a file of labels instead.")
    is_text = ~np.isin(tokens.token_ids, np.array(special_token_ids(tokenizer), np.uint32))
    documents, codes = load_documents(pipeline, store, index), np.full((3, tokens.n_rows), -1, np.int64)
    texts = (text for _, text in iter_documents(pipeline.config.corpus, pipeline.source(index)))
    place = 0
    for text in texts:
        found = tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False)
        if not found["input_ids"]:
            continue
        if place == len(documents.sources):
            raise _changed(pipeline, index)
        rows = np.arange(int(documents.n_rows[place])) + int(documents.first_rows[place])
        rows = rows[is_text[rows]]
        if tokens.token_ids[rows].tolist() != found["input_ids"]:
            raise _changed(pipeline, index)
        if labels := label_python(text):
            shown = [_first_shown(text, *span) for span in found["offset_mapping"]]
            codes[:, rows] = labels.kind[shown], np.minimum(labels.depth[shown], _MAX_DEPTH), labels.is_docstring[shown]
        place += 1
    yield Column("kind", list(KINDS), codes[0])
    yield Column("depth", [*map(str, range(_MAX_DEPTH)), f"{_MAX_DEPTH} or more"], codes[1])
    yield Column("docstring", ["no", "yes"], codes[2])


def _first_shown(text: str, start: int, stop: int) -> int:
    """Return the first character of a token that is no space; its first one where it is all space."""
    return next((place for place in range(start, stop) if not text[place].isspace()), start)


def _changed(pipeline: Pipeline, index: int) -> InputError:
    return InputError(
        f"The text of {pipeline.source(index).key} does not become the tokens that were harvested: it has changed, or the tokenizer has."
    )


def _label_by_file(pipeline: Pipeline, index: int, n_rows: int) -> Iterator[Column]:
    probes = pipeline.config.probes
    assert probes
    path = Path(probes.labels)
    table = pipeline.remember(("labels", probes.labels_digest), lambda: _read_file(path, probes.labels_digest))
    here = table.filter(pl.col(_ROW_ID) // (1 << SHARD_SHIFT) == index)
    rows = (here[_ROW_ID] % (1 << SHARD_SHIFT)).to_numpy().astype(np.int64)
    if len(rows) and rows.max() >= n_rows:
        raise InputError(f"{path} names row {rows.max():,} of shard {index}, which has {n_rows:,} rows. Take row ids from lab.open(...).activations.")
    for name in table.columns:
        if name == _ROW_ID:
            continue
        classes = table[name].drop_nulls().cast(pl.String()).unique().sort().to_list()
        if not 2 <= len(classes) <= _MAX_CLASSES:
            raise InputError(f"{path}: the column {name!r} has {len(classes):,} values, and probes tell 2 to {_MAX_CLASSES} apart.")
        codes = np.full(n_rows, -1, np.int64)
        order = {value: code for code, value in enumerate(classes)}
        codes[rows] = here[name].cast(pl.String()).replace_strict(order, default=-1, return_dtype=pl.Int64()).fill_null(-1).to_numpy()
        yield Column(name, classes, codes)


def _read_file(path: Path, digest: str) -> pl.DataFrame:
    """Read a file of labels. Raises `InputError` for other bytes than the configuration names, and for what is no table of labels."""
    try:
        found = hash_labels(path)
        table = pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise InputError(f"Labels cannot be read from {path}: {error}.") from error
    if found != digest:
        raise InputError(
            f"{path} has other bytes (SHA-256 {found[:12]}) than when the configuration was read ({digest[:12]}): run the command again."
        )
    if _ROW_ID not in table.columns or not table.schema[_ROW_ID].is_integer() or not 2 <= len(table.columns) <= _MAX_COLUMNS:
        raise InputError(f"{path} has the columns {table.columns[:8]}: labels are whole numbers row_id, and one or more columns beside them.")
    if table[_ROW_ID].null_count() or not table[_ROW_ID].is_unique().all():
        raise InputError(f"{path} names a row twice, or none: each row_id stands once.")
    return table
