"""Shards become their rows: counted where their tokens are there, else estimated from the bytes of their text."""

from collections.abc import Sequence
from typing import Final

from interp_assets.corpus.refs import token_shard_ref
from interp_assets.planning.pipeline import Pipeline
from interp_assets.storage.manifest import find_manifest
from interp_assets.storage.store import Store

TEXT_BYTES_PER_TOKEN: Final = 4
TOKEN_BYTES: Final = 7.0
"""A token in `tokens.parquet`, with its place in the text."""
TEXT_BYTES_PER_S: Final = 1e6
"""Tokenized by two cores, files included."""


def rows_of(pipeline: Pipeline, store: Store, index: int) -> int:
    """Return the rows of a shard."""

    def count() -> int:
        manifest = find_manifest(store, token_shard_ref(pipeline, index))
        return int(manifest.facts["n_rows"]) if manifest else pipeline.source(index).n_bytes // TEXT_BYTES_PER_TOKEN

    return pipeline.remember(("rows", index), count)


def count_rows(pipeline: Pipeline, store: Store, indices: Sequence[int]) -> int:
    """Return the rows of several shards together."""
    return pipeline.remember(("rows of", tuple(indices)), lambda: sum(rows_of(pipeline, store, index) for index in indices))
