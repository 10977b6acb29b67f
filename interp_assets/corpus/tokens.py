"""The documents of one shard become a table with one row per token position, cut into contexts, and a table of the documents.

1. Tokenize every document without special tokens, in batches.
2. Lay the tokens into contexts (`packing.py`): whole numbers of arrays, no loop over tokens.
3. Mark special tokens as not valid: their activations are stored but never trained on.
4. Write `tokens.parquet` and `documents.parquet` (docs/formats/token_shard.md).

The place of a token in `tokens.parquet` is its `row_in_shard`, the identity that every later stage carries.
"""

import io
from typing import Final, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from interp_assets.corpus.refs import token_shard_ref
from interp_assets.manifest import Manifest, load_manifest, read_file
from interp_assets.pipeline import Pipeline
from interp_assets.store import Store

TOKENS: Final = "tokens.parquet"
DOCUMENTS: Final = "documents.parquet"


class TokenShard(NamedTuple):
    """The token positions of one shard, in order of row: four arrays of equal length, and the manifest they came with."""

    token_ids: NDArray[np.uint32]
    contexts: NDArray[np.uint32]
    """Index of the context in the shard; never falls."""
    documents: NDArray[np.uint32]
    """Index of the document in the shard; never falls."""
    valid: NDArray[np.bool_]
    """False for special tokens."""
    manifest: Manifest

    @property
    def n_rows(self) -> int:
        """Number of token positions."""
        return len(self.token_ids)


class DocumentTable(NamedTuple):
    """The documents of one shard: where each came from and which rows it has."""

    sources: list[str]
    first_rows: NDArray[np.uint64]
    n_rows: NDArray[np.uint64]


def load_tokens(pipeline: Pipeline, store: Store, index: int) -> TokenShard:
    """Read and verify the token positions of corpus shard `index`."""
    ref = token_shard_ref(pipeline, index)
    manifest = load_manifest(store, ref)
    table = pq.read_table(io.BytesIO(read_file(store, ref.path, manifest, TOKENS)))
    token_ids, contexts, documents, valid = (table.column(name).to_numpy() for name in ("token_id", "context", "document", "valid"))
    return TokenShard(token_ids, contexts, documents, valid, manifest)


def load_documents(pipeline: Pipeline, store: Store, index: int) -> DocumentTable:
    """Read and verify the document table of corpus shard `index`."""
    ref = token_shard_ref(pipeline, index)
    table = pq.read_table(io.BytesIO(read_file(store, ref.path, load_manifest(store, ref), DOCUMENTS)))
    return DocumentTable(table.column("source").to_pylist(), table.column("first_row").to_numpy(), table.column("n_rows").to_numpy())


def context_offsets(contexts: NDArray[np.uint32]) -> NDArray[np.int64]:
    """Return the first row of every context, and the number of rows at the end: context c is rows [offsets[c], offsets[c + 1])."""
    if len(contexts) == 0:
        return np.zeros(1, np.int64)
    return np.concatenate([[0], np.flatnonzero(contexts[1:] != contexts[:-1]) + 1, [len(contexts)]]).astype(np.int64)
