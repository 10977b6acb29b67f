"""Tokens of documents become contexts: whole arrays are laid out at once, and no token is lost, doubled or moved.

`pack`: documents follow each other, separated by EOS, and every context opens with BOS:

    documents  aaaaa bb cccc        contexts of 5   ^aaaa  ^a.bb  ^.ccc  ^c

`lay_out_each`: a context holds one document between the tokenizer's own special tokens; a long document goes on in further contexts.

The last context of a shard (of a document) may be short: there is no padding. A BOS or EOS counts to the document beside it (BOS: the one
that follows, EOS: the one that it ends), so the rows of a document are one range.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from interp_assets.errors import ConfigError


class Layout(NamedTuple):
    """One entry per token position: token id, index of its context and index of its document."""

    token_ids: NDArray[np.uint32]
    contexts: NDArray[np.uint32]
    documents: NDArray[np.uint32]


def pack(documents: Sequence[NDArray[np.uint32]], context_length: int, *, leading: int | None, separator: int | None) -> Layout:
    """Lay documents one after the other into contexts of `context_length`, the leading token included."""
    stream, owners = _join(documents, separator)
    n_leading = 0 if leading is None else 1
    body = context_length - n_leading
    positions = np.arange(len(stream))
    rows = positions + n_leading * (positions // body + 1)
    n_contexts = -(-len(stream) // body)
    n_rows = len(stream) + n_leading * n_contexts
    token_ids = np.full(n_rows, leading or 0, np.uint32)
    token_ids[rows] = stream
    of_document = np.empty(n_rows, np.uint32)
    of_document[rows] = owners
    if n_leading:
        of_document[::context_length] = owners[::body]
    return Layout(token_ids, (np.arange(n_rows) // context_length).astype(np.uint32), of_document)


def check_room(context_length: int, before: Sequence[int], after: Sequence[int]) -> None:
    """Raise `ConfigError` when special tokens leave no room for text in a context."""
    if context_length <= len(before) + len(after):
        raise ConfigError(f"corpus.context_length is {context_length}, but the tokenizer's special tokens take {len(before) + len(after)}: raise it.")


def lay_out_each(documents: Sequence[NDArray[np.uint32]], context_length: int, *, before: Sequence[int], after: Sequence[int]) -> Layout:
    """Lay each document into contexts of its own, between `before` and `after`. Raises `ConfigError` when these leave no room."""
    check_room(context_length, before, after)
    body = context_length - len(before) - len(after)
    stream, _ = _join(documents, None)
    lengths = np.array([len(tokens) for tokens in documents], np.int64)
    per_document = -(-lengths // body)
    owners = np.repeat(np.arange(len(documents)), per_document)
    places = np.arange(len(owners)) - np.repeat(np.cumsum(per_document) - per_document, per_document)
    sizes = np.minimum(body, lengths[owners] - places * body) + len(before) + len(after)
    starts = np.cumsum(sizes) - sizes
    token_ids = np.zeros(int(sizes.sum()), np.uint32)
    is_text = np.ones(len(token_ids), np.bool_)
    for i, token in enumerate(before):
        token_ids[starts + i] = token
        is_text[starts + i] = False
    for i, token in enumerate(after):
        token_ids[starts + sizes - len(after) + i] = token
        is_text[starts + sizes - len(after) + i] = False
    token_ids[is_text] = stream
    contexts = np.repeat(np.arange(len(sizes)), sizes)
    return Layout(token_ids, contexts.astype(np.uint32), owners[contexts].astype(np.uint32))


def _join(documents: Sequence[NDArray[np.uint32]], separator: int | None) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Concatenate documents, with the separator between them, and the index of the document that each token belongs to."""
    pieces = list(documents)
    if separator is not None:
        end = np.array([separator], np.uint32)
        pieces = [*(np.concatenate([tokens, end]) for tokens in documents[:-1]), *documents[-1:]]
    stream = np.concatenate([np.zeros(0, np.uint32), *pieces])
    owners = np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])
    return stream, owners.astype(np.uint32)
