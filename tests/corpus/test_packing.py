"""Contexts: no token lost, doubled or moved, whatever the documents."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from interp_assets.corpus.packing import Layout, lay_out_each, pack
from interp_assets.corpus.tokens import context_offsets
from interp_assets.errors import ConfigError

BOS, EOS, CLS, SEP = 900, 901, 902, 903
Documents = list[NDArray[np.uint32]]


def _documents(lengths: list[int]) -> Documents:
    starts = np.cumsum([0, *lengths])
    return [np.arange(start, start + length, dtype=np.uint32) for start, length in zip(starts, lengths, strict=False)]


def _pack_slowly(documents: Documents, context_length: int, leading: int | None, separator: int | None) -> list[tuple[int, int, int]]:
    """Pack token by token: the obvious way."""
    rows: list[tuple[int, int, int]] = []
    stream = [
        (token, index)
        for index, tokens in enumerate(documents)
        for token in [*tokens.tolist(), *([separator] if separator is not None and index < len(documents) - 1 else [])]
    ]
    for token, document in stream:
        if leading is not None and len(rows) % context_length == 0:
            rows.append((leading, len(rows) // context_length, document))
        rows.append((token, len(rows) // context_length, document))
    return rows


def _rows(layout: Layout) -> list[tuple[int, int, int]]:
    return list(zip(layout.token_ids.tolist(), layout.contexts.tolist(), layout.documents.tolist(), strict=True))


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=8),
    context_length=st.integers(2, 9),
    leading=st.sampled_from([None, BOS]),
    separator=st.sampled_from([None, EOS]),
)
def test_packing_is_what_a_loop_over_tokens_does(lengths: list[int], context_length: int, leading: int | None, separator: int | None) -> None:
    """The vectorised layout against the obvious one."""
    documents = _documents(lengths)
    assert _rows(pack(documents, context_length, leading=leading, separator=separator)) == _pack_slowly(documents, context_length, leading, separator)


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=8), context_length=st.integers(3, 9))
def test_no_token_is_lost_and_order_is_kept(lengths: list[int], context_length: int) -> None:
    """A lost token would shift every row id behind it."""
    documents = _documents(lengths)
    text = np.concatenate(documents).tolist()
    for layout in (
        pack(documents, context_length, leading=BOS, separator=EOS),
        lay_out_each(documents, context_length, before=[CLS], after=[SEP]),
    ):
        is_text = ~np.isin(layout.token_ids, [BOS, EOS, CLS, SEP])
        assert layout.token_ids[is_text].tolist() == text
        sizes = np.diff(context_offsets(layout.contexts))
        assert sizes.max() <= context_length
        assert (np.diff(layout.contexts.astype(np.int64)) >= 0).all()
        assert (np.diff(layout.documents.astype(np.int64)) >= 0).all(), "the rows of a document must be one range"


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=8), context_length=st.integers(3, 9))
def test_each_context_of_an_encoder_holds_one_document_between_its_special_tokens(lengths: list[int], context_length: int) -> None:
    """Encoders were trained on [CLS] text [SEP]."""
    layout = lay_out_each(_documents(lengths), context_length, before=[CLS], after=[SEP])
    offsets = context_offsets(layout.contexts)
    for first, stop in itertools.pairwise(offsets):
        assert (layout.token_ids[first], layout.token_ids[stop - 1]) == (CLS, SEP)
        assert len(set(layout.documents[first:stop].tolist())) == 1
        assert stop - first > 2, "a context without text"


def test_packed_contexts_look_like_this() -> None:
    """The picture in the module's docstring."""
    layout = pack(_documents([5, 2, 4]), 5, leading=BOS, separator=EOS)
    assert np.split(layout.token_ids, context_offsets(layout.contexts)[1:-1])[1].tolist() == [BOS, 4, EOS, 5, 6]
    assert layout.documents.tolist()[5:10] == [0, 0, 0, 1, 1]


def test_special_tokens_that_fill_the_context_are_refused() -> None:
    """There would be no room for text."""
    with pytest.raises(ConfigError, match="context_length is 2, but the tokenizer's special tokens take 2"):
        lay_out_each(_documents([3]), 2, before=[CLS], after=[SEP])
