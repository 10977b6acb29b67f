"""Every family of tokenizers gives the text and the bytes that its own decoder would."""

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from interp_assets.errors import ArtifactCorruptError, ArtifactForeignError
from interp_assets.web.vocabulary import Vocabulary, decode_vocabulary, encode_vocabulary, make_vocabulary


def _tokenizer(pieces: list[str], decoder: Any) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token=pieces[0]))
    if decoder:
        backend.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


def test_byte_level_pieces_become_text_or_bytes() -> None:
    """GPT-2 writes a space as U+0120; half a character must keep its bytes."""
    vocabulary = make_vocabulary(_tokenizer(["\u0120def", "\u010a", "\u00e2\u0128", "\u00c3\u00a9"], decoders.ByteLevel()))
    assert vocabulary.tokens[:2] == [" def", "\n"]
    assert vocabulary.raw[2] == b"\xe2\x86"
    assert vocabulary.tokens[3] == "\u00e9"
    assert vocabulary.tokens[4] == "<s>"
    assert vocabulary.special == [4]


def test_byte_fallback_pieces_become_spaces_and_bytes() -> None:
    """Llama-2 and Gemma write a space as U+2581 and unknown characters byte by byte."""
    decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    vocabulary = make_vocabulary(_tokenizer(["\u2581the", "<0x0A>", "<0xE2>"], decoder))
    assert vocabulary.tokens[:2] == [" the", "\n"]
    assert vocabulary.raw == {2: b"\xe2"}


def test_word_pieces_show_where_a_word_goes_on() -> None:
    """BERT's `##ing` has no space before it, all other pieces do."""
    assert make_vocabulary(_tokenizer(["play", "##ing"], decoders.WordPiece())).tokens[:2] == [" play", "ing"]


def test_metaspace_and_plain_pieces() -> None:
    """T5 marks spaces, a tokenizer without a decoder shows its pieces as they are."""
    assert make_vocabulary(_tokenizer(["\u2581a", "b"], decoders.Metaspace())).tokens[:2] == [" a", "b"]
    assert make_vocabulary(_tokenizer(["\u2581a", "b"], None)).tokens[:2] == ["\u2581a", "b"]


def test_a_hole_in_the_ids_keeps_its_number() -> None:
    """Some vocabularies skip ids; the ids after a hole must not move."""

    class Gappy(SimpleNamespace):
        def __len__(self) -> int:
            return 3

    tokenizer = Gappy(convert_ids_to_tokens=lambda ids: ["a", None, "b"], all_special_ids=[], added_tokens_decoder={})
    assert make_vocabulary(tokenizer).tokens == ["a", "<1>", "b"]


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=5)), st.dictionaries(st.integers(0, 10), st.binary(min_size=1, max_size=4))
)
def test_a_vocabulary_survives_the_file(tokens: list[str], raw: dict[int, bytes]) -> None:
    """Any text and any bytes come back, quotes, control characters and surrogate pairs included."""
    vocabulary = Vocabulary(tokens, raw, [0], [2, 0, 1])
    assert decode_vocabulary(encode_vocabulary(vocabulary), "here") == vocabulary


def test_foreign_and_newer_files_are_refused() -> None:
    """The message names the file and the next step."""
    with pytest.raises(ArtifactCorruptError, match=r"here is no vocabulary.*Materialize the bundle again"):
        decode_vocabulary(b"[]", "here")
    newer = encode_vocabulary(Vocabulary([], {}, [], [])).replace(b'"version":2', b'"version":9')
    with pytest.raises(ArtifactForeignError, match=r"version 9.*Upgrade"):
        decode_vocabulary(newer, "here")


def test_ids_outside_the_vocabulary_have_a_text() -> None:
    """A model's embedding is often padded beyond its tokenizer."""
    assert Vocabulary(["a"], {}, [], []).text(7) == "<7>"
