"""The documents of one shard become a table with one row per token position, cut into contexts, and a table of the documents.

1. Tokenize every document without special tokens, in batches, or render it by the tokenizer's chat template (`corpus.text_kind`). Documents
   that become no token, or that the template refuses, are left out, counted and named in the facts.
2. Lay the tokens into contexts (`packing.py`): whole numbers of arrays, no loop over tokens.
3. Mark special tokens, and what `harvest` excludes, as not valid: their activations are stored but neither trained on, measured nor shown.
4. Write `tokens.parquet` and `documents.parquet` (docs/formats/token_shard.md).

The place of a token in `tokens.parquet` is its `row_in_shard`, the identity that every later stage carries.
"""

import io
import json
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from interp_assets.corpus.packing import Layout, lay_out_each, pack
from interp_assets.corpus.refs import token_shard_ref
from interp_assets.corpus.sources import iter_documents
from interp_assets.errors import InputError
from interp_assets.garcon.chat import tokenize_chat
from interp_assets.garcon.tokenizer import Affixes, affixes, leading_token, separator_token, special_token_ids, tokenize_texts
from interp_assets.planning.config import HarvestConfig
from interp_assets.planning.pipeline import Pipeline
from interp_assets.planning.progress import format_count
from interp_assets.planning.sections import CorpusConfig
from interp_assets.storage.manifest import ArtifactWriter, Manifest, Produced, create_artifact, find_manifest, load_manifest, read_file, timed
from interp_assets.storage.store import Store

TOKENS: Final = "tokens.parquet"
DOCUMENTS: Final = "documents.parquet"
_ROWS_PER_GROUP: Final = 1 << 17
_DOCUMENTS_PER_STEP: Final = 64
_SHOWN_LEFT_OUT: Final = 5


class Roles(NamedTuple):
    """Whose words each token of a shard of conversations is of."""

    names: list[str]
    codes: NDArray[np.int64]
    """Place in `names`, for each token."""


class TokenShard(NamedTuple):
    """The token positions of one shard, in order of row: arrays of equal length, and the manifest they came with."""

    token_ids: NDArray[np.uint32]
    contexts: NDArray[np.uint32]
    """Index of the context in the shard; never falls."""
    documents: NDArray[np.uint32]
    """Index of the document in the shard; never falls."""
    valid: NDArray[np.bool_]
    """False for special tokens."""
    manifest: Manifest
    roles: Roles | None = None
    """None but where the text is messages."""

    @property
    def n_rows(self) -> int:
        """Number of token positions."""
        return len(self.token_ids)


class DocumentTable(NamedTuple):
    """The documents of one shard: where each came from and which rows it has."""

    sources: list[str]
    first_rows: NDArray[np.uint64]
    n_rows: NDArray[np.uint64]


class Tokenized(NamedTuple):
    """One document as tokens."""

    token_ids: NDArray[np.uint32]
    roles: list[str]
    """Of messages: whose words each token is of, or `template`; else nothing."""
    reason: str = ""
    """Why there is no token, where the chat template tells."""


@timed
def make_token_shard(
    pipeline: Pipeline, store: Store, tokenizer: PreTrainedTokenizerBase, index: int, progress: Callable[[int], None] | None = None
) -> Produced:
    """Tokenize corpus shard `index` and publish it; `progress` advances by documents.

    Documents that become no token are left out, counted and named in the facts. Raises `InputError` for text that has changed since it was
    planned, of which nothing is left, or whose token ids the subject model does not have.
    """
    ref = token_shard_ref(pipeline, index)
    if (manifest := find_manifest(store, ref)) is not None:
        return Produced(ref, manifest, is_cached=True)
    corpus = pipeline.config.corpus
    names, texts = _read_documents(pipeline, index)
    tokenized: list[Tokenized] = []
    for first in range(0, len(texts), _DOCUMENTS_PER_STEP):
        step = texts[first : first + _DOCUMENTS_PER_STEP]
        tokenized += tokenize_documents(corpus, tokenizer, step)
        if progress is not None:
            progress(len(step))
    kept = [i for i, document in enumerate(tokenized) if len(document.token_ids)]
    _check_documents(pipeline, index, names, tokenized)
    layout = lay_out(corpus, tokenizer, [tokenized[i].token_ids for i in kept])
    usual, valid = find_valid(layout, HarvestConfig(), tokenizer), find_valid(layout, pipeline.config.harvest, tokenizer)
    roles = [role for i in kept for role in tokenized[i].roles]
    with create_artifact(store, ref) as art:
        write_tables(art, layout, valid, [names[i] for i in kept], roles)
        art.facts = {
            "n_rows": len(valid),
            "n_valid": int(valid.sum()),
            **({"n_excluded": int(usual.sum() - valid.sum())} if not np.array_equal(usual, valid) else {}),
            "n_contexts": int(layout.contexts[-1]) + 1,
            "n_documents": len(kept),
            "n_bytes": sum(len(texts[i].encode()) for i in kept),
            **_count_left_out(names, tokenized),
        }
    return art.produced


def tokenize_documents(corpus: CorpusConfig, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Tokenized]:
    """Tokenize texts in the configured way; what cannot be tokenized has no tokens."""
    if corpus.text_kind == "messages":
        return [Tokenized(*tokenize_chat(tokenizer, json.loads(text))) for text in texts]
    documents = tokenize_texts(tokenizer, texts, split_special=corpus.text_kind == "plain")
    if corpus.text_kind == "with_special_tokens" and corpus.contexts == "per_document":
        around = affixes(tokenizer)
        documents = [_without(tokens, around) for tokens in documents]
    return [Tokenized(tokens, []) for tokens in documents]


def tokenize_example(corpus: CorpusConfig, tokenizer: PreTrainedTokenizerBase, text: str) -> NDArray[np.uint32]:
    """Tokenize a text that a person has typed or pasted, to be laid out as the corpus is: of a corpus of messages, as the template renders them."""
    if corpus.text_kind == "messages":
        return tokenize_texts(tokenizer, [text], split_special=False)[0]
    return tokenize_documents(corpus, tokenizer, [text])[0].token_ids


def lay_out(corpus: CorpusConfig, tokenizer: PreTrainedTokenizerBase, documents: Sequence[NDArray[np.uint32]]) -> Layout:
    """Lay tokenized documents into contexts, in the configured way. A chat template puts around a conversation what belongs there."""
    if corpus.contexts == "packed":
        return pack(documents, corpus.context_length, leading=leading_token(tokenizer), separator=separator_token(tokenizer))
    around = Affixes([], []) if corpus.text_kind == "messages" else affixes(tokenizer)
    return lay_out_each(documents, corpus.context_length, before=around.before, after=around.after)


def describe_left_out(manifest: Manifest) -> str:
    """Say which documents of a shard are not in it, because they become no token; nothing when there are none."""
    n_documents = manifest.facts.get("n_left_out", 0)
    if not n_documents:
        return ""
    shown, rest = manifest.facts["left_out"], n_documents - len(manifest.facts["left_out"])
    noun = "document" if n_documents == 1 else "documents"
    return f"{n_documents:,} {noun} without a token left out: {', '.join(shown)}" + (f" and {rest:,} more" if rest else "")


def find_valid(layout: Layout, harvest: HarvestConfig, tokenizer: PreTrainedTokenizerBase) -> NDArray[np.bool_]:
    """Tell at which token positions rows count: not at special tokens, nor where the configuration excludes a position or a token."""
    left_out = np.array([*special_token_ids(tokenizer), *harvest.excluded_token_ids], np.uint32)
    starts = np.flatnonzero(np.diff(layout.contexts.astype(np.int64), prepend=-1))
    positions = np.arange(len(layout.contexts)) - np.repeat(starts, np.diff(starts, append=len(layout.contexts)))
    return ~np.isin(layout.token_ids, left_out) & (positions >= harvest.excluded_positions)


def load_tokens(pipeline: Pipeline, store: Store, index: int) -> TokenShard:
    """Read and verify the token positions of corpus shard `index`."""
    ref = token_shard_ref(pipeline, index)
    manifest = load_manifest(store, ref)
    table = pq.read_table(io.BytesIO(read_file(store, ref.path, manifest, TOKENS)))
    token_ids, contexts, documents, valid = (table.column(name).to_numpy() for name in ("token_id", "context", "document", "valid"))
    return TokenShard(token_ids, contexts, documents, valid, manifest, _read_roles(table) if "role" in table.column_names else None)


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


def _read_documents(pipeline: Pipeline, index: int) -> tuple[list[str], list[str]]:
    """Read the names and texts of a shard's documents."""
    names: list[str] = []
    texts: list[str] = []
    for name, text in iter_documents(pipeline.config.corpus, pipeline.source(index)):
        names.append(name)
        texts.append(text)
    if not names:
        raise InputError(
            f"{pipeline.source(index).key} has no text: all its documents are blank. Raise corpus.documents_per_shard, or mend the data."
        )
    return names, texts


def _check_documents(pipeline: Pipeline, index: int, names: Sequence[str], documents: Sequence[Tokenized]) -> None:
    if not any(len(document.token_ids) for document in documents):
        raise InputError(
            f"None of {format_count(len(names), 'document')} of {pipeline.source(index).key} becomes a token, the first is "
            f"{_name_left_out(names, documents)[0]}. Are the tokenizer, the column and `corpus.text_kind` the right ones?"
        )
    highest = max(int(document.token_ids.max(initial=0)) for document in documents)
    if highest >= pipeline.plan.vocabulary_size:
        raise InputError(
            f"The tokenizer of {pipeline.config.model.name!r} gives token id {highest:,}, but the model has only "
            f"{pipeline.plan.vocabulary_size:,} embeddings: they do not belong together. Use the tokenizer that the model was trained with."
        )


def _without(tokens: NDArray[np.uint32], around: Affixes) -> NDArray[np.uint32]:
    """Take off what the text has around it already, because the layout puts it there."""
    n_before, n_after = len(around.before), len(around.after)
    if n_before and tokens[:n_before].tolist() == around.before:
        tokens = tokens[n_before:]
    return tokens[:-n_after] if n_after and tokens[-n_after:].tolist() == around.after else tokens


def _count_left_out(names: Sequence[str], documents: Sequence[Tokenized]) -> dict[str, Any]:
    """Return the facts of what is left out; none where nothing is."""
    left_out = _name_left_out(names, documents)
    return {"n_left_out": len(left_out), "left_out": left_out[:_SHOWN_LEFT_OUT]} if left_out else {}


def _name_left_out(names: Sequence[str], documents: Sequence[Tokenized]) -> list[str]:
    pairs = [(name, document.reason) for name, document in zip(names, documents, strict=True) if not len(document.token_ids)]
    return [f"{name} ({reason})" if reason else name for name, reason in pairs]


def _read_roles(table: pa.Table) -> Roles:
    roles = table.column("role").cast(pa.string()).combine_chunks().dictionary_encode()
    return Roles(roles.dictionary.to_pylist(), roles.indices.to_numpy().astype(np.int64))


def write_tables(art: ArtifactWriter, layout: Layout, valid: NDArray[np.bool_], names: Sequence[str], roles: Sequence[str]) -> None:
    """Write the two tables of a token shard."""
    rows_of = np.bincount(layout.documents, minlength=len(names)).astype(np.uint64)
    tokens: dict[str, Any] = {"token_id": layout.token_ids, "context": layout.contexts, "document": layout.documents, "valid": valid}
    if roles:
        tokens["role"] = pa.array(roles).dictionary_encode()
    documents = {
        "document": np.arange(len(names), dtype=np.uint32),
        "source": list(names),
        "first_row": np.cumsum(rows_of) - rows_of,
        "n_rows": rows_of,
    }
    for name, columns in ((TOKENS, tokens), (DOCUMENTS, documents)):
        table = pa.table(columns)
        with art.open(name, n_rows=table.num_rows) as sink:
            buffer = io.BytesIO()
            pq.write_table(table, buffer, compression="zstd", row_group_size=_ROWS_PER_GROUP)
            sink.write(buffer.getbuffer())
