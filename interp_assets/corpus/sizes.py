"""Shards become their rows: counted where their tokens are there, else estimated from the bytes of their text."""

from collections.abc import Sequence
from typing import Final, NamedTuple

from interp_assets.corpus.refs import token_shard_ref
from interp_assets.planning.pipeline import Pipeline
from interp_assets.storage.manifest import find_manifest
from interp_assets.storage.store import Store

TEXT_BYTES_PER_TOKEN: Final = 4
TOKEN_BYTES: Final = 1.5
"""A token in `tokens.parquet`, with its place in the text, compressed: 1.3 of Python text with 4,096 tokens, more of a larger vocabulary."""
TEXT_BYTES_PER_S: Final = 1e6
"""Tokenized by two cores, files included."""


TEXT_BYTES_PER_TOKEN_RANGE: Final = (1, 8)
"""What an estimate may be wrong by, before something is refused because of it: a token for every byte, or for every eight."""
DATASET_DOUBT: Final = 2
"""How much more or less text a dataset may have than its first rows let expect."""


class RowCount(NamedTuple):
    """Rows of a shard: all token positions, and those that are valid."""

    n_rows: int
    n_valid: int


class RowBounds(NamedTuple):
    """Rows that a shard has at least and at most: the same when its tokens are there."""

    fewest: RowCount
    most: RowCount


def count_shard(pipeline: Pipeline, store: Store, index: int) -> RowCount | None:
    """Return the rows of a shard whose tokens are there, or that are planted; None for any other."""

    def count() -> RowCount | None:
        if pipeline.config.corpus.is_planted:
            n_rows = pipeline.source(index).spec["n_rows"]
            return RowCount(n_rows, n_rows)
        manifest = find_manifest(store, token_shard_ref(pipeline, index))
        return RowCount(int(manifest.facts["n_rows"]), int(manifest.facts["n_valid"])) if manifest else None

    return pipeline.remember(("counted", index), count)


def are_counted(pipeline: Pipeline, store: Store) -> bool:
    """Tell whether the tokens of all shards are there."""
    return all(count_shard(pipeline, store, index) for index in pipeline.shard_indices)


def bound_rows(pipeline: Pipeline, store: Store, indices: Sequence[int]) -> list[RowBounds]:
    """Return what is certain of the rows of several shards, whether or not their tokens are there."""
    return [_bound(pipeline, store, index) for index in indices]


def rows_of(pipeline: Pipeline, store: Store, index: int) -> int:
    """Return the rows of a shard."""
    counted = count_shard(pipeline, store, index)
    return counted.n_rows if counted else pipeline.source(index).n_bytes // TEXT_BYTES_PER_TOKEN


def count_rows(pipeline: Pipeline, store: Store, indices: Sequence[int]) -> int:
    """Return the rows of several shards together."""
    return pipeline.remember(("rows of", tuple(indices)), lambda: sum(rows_of(pipeline, store, index) for index in indices))


def _bound(pipeline: Pipeline, store: Store, index: int) -> RowBounds:
    if counted := count_shard(pipeline, store, index):
        return RowBounds(counted, counted)
    source = pipeline.source(index)
    doubt = DATASET_DOUBT if pipeline.config.corpus.source == "huggingface" else 1
    smallest, largest = TEXT_BYTES_PER_TOKEN_RANGE
    fewest = source.n_bytes // doubt // largest
    special = pipeline.config.corpus.context_length  # with special tokens, at most one position more for each that is not
    most = 2 * source.n_bytes * doubt // smallest + source.n_documents * special if source.n_bytes else 1 << 62
    return RowBounds(RowCount(fewest, fewest), RowCount(most, most))
