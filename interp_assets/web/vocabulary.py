"""A tokenizer becomes `vocabulary.json`: how every token id is written on a page, sent to the browser once per bundle.

Records hold token ids, never strings. A token of a byte-level tokenizer may be half a character: such tokens carry their bytes, and the
page joins neighbours back into the character. What the decoder of a tokenizer does to its pieces is read from the tokenizer's own
description (`tokenizer.backend_tokenizer`), not guessed from the model's name:

    ByteLevel (GPT-2, Llama-3, Qwen)          each character of a piece stands for one byte
    ByteFallback (Llama-2, Gemma, Mistral)    U+2581 is a space, `<0xE2>` is one byte
    Metaspace (T5, ALBERT)                    U+2581 is a space
    WordPiece (BERT)                          `##ing` continues a word, any other piece starts one
    none of these                             the piece as it is
"""

import json
import re
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from interp_assets.errors import ArtifactCorruptError, ArtifactForeignError
from interp_assets.storage.foreign import parse_json

FORMAT: Final = "interp-assets/vocabulary"
VERSION: Final = 2
_SPACE: Final = "\u2581"
_BYTE_PIECE: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Vocabulary(NamedTuple):
    """The text of every token id; `raw` has the bytes of those that are not whole characters; `special` are the ids without text.

    `order` has the ids by falling frequency in the data set: records name a token by its place there.
    """

    tokens: list[str]
    raw: dict[int, bytes]
    special: list[int]
    order: list[int]

    def text(self, token_id: int) -> str:
        """Return the text of a token, or its number in angle brackets when the vocabulary has no such id."""
        return self.tokens[token_id] if token_id < len(self.tokens) else f"<{token_id}>"


def make_vocabulary(tokenizer: Any, order: Sequence[int] = ()) -> Vocabulary:
    """Read the text and the bytes of every token of a Hugging Face tokenizer; `order` are the ids by frequency."""
    pieces: list[str] = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    literal = {int(token_id) for token_id in getattr(tokenizer, "added_tokens_decoder", {})}
    steps = _decoder_steps(tokenizer)
    tokens: list[str] = []
    raw: dict[int, bytes] = {}
    for token_id, piece in enumerate(pieces):
        if piece is None:  # a hole in the ids
            tokens.append(f"<{token_id}>")
            continue
        data = piece.encode() if token_id in literal else _piece_bytes(piece, steps)
        try:
            tokens.append(data.decode())
        except UnicodeDecodeError:
            tokens.append(data.decode(errors="replace"))
            raw[token_id] = data
    special = sorted({int(token_id) for token_id in tokenizer.all_special_ids})
    return Vocabulary(tokens, raw, special, list(order))


def encode_vocabulary(vocabulary: Vocabulary) -> bytes:
    """Serialise a vocabulary as JSON; bytes are hexadecimal."""
    content = {
        "format": FORMAT,
        "version": VERSION,
        "n_tokens": len(vocabulary.tokens),
        "tokens": vocabulary.tokens,
        "bytes": {str(token_id): data.hex() for token_id, data in sorted(vocabulary.raw.items())},
        "special": vocabulary.special,
        "order": vocabulary.order,
    }
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


def decode_vocabulary(data: bytes, where: str) -> Vocabulary:
    """Parse `vocabulary.json`; `where` names it in messages. Raises `ArtifactCorruptError` or `ArtifactForeignError`."""
    try:
        content = parse_json(data)
        if (content["format"], content["version"]) != (FORMAT, VERSION):
            do = "Upgrade interp-assets." if content["version"] > VERSION else "Materialize `feature_browser` again."
            raise ArtifactForeignError(f"{where} is {content['format']!r} version {content['version']}; this release reads version {VERSION}. {do}")
        raw = {int(token_id): bytes.fromhex(text) for token_id, text in content["bytes"].items()}
        return Vocabulary(content["tokens"], raw, content["special"], content["order"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactCorruptError(f"{where} is no vocabulary ({error}). Materialize the bundle again.") from error


def _decoder_steps(tokenizer: Any) -> set[str]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return {"Metaspace"}
    decoder = json.loads(backend.to_str()).get("decoder") or {}
    steps = {step["type"] for step in decoder.get("decoders", [])} | {decoder.get("type", "")}
    has_space_rule = any(_SPACE in json.dumps(step, ensure_ascii=False) for step in decoder.get("decoders", []))
    return steps | {"Metaspace"} if has_space_rule else steps


def _piece_bytes(piece: str, steps: set[str]) -> bytes:
    if "ByteLevel" in steps:
        try:
            return bytes(_BYTE_OF[char] for char in piece)
        except KeyError:
            return piece.encode()
    found = _BYTE_PIECE.fullmatch(piece) if "ByteFallback" in steps else None
    if found:
        return bytes([int(found[1], 16)])
    if "WordPiece" in steps:
        return (piece.removeprefix("##") if piece.startswith("##") else f" {piece}").encode()
    if "Metaspace" in steps or "ByteFallback" in steps:
        return piece.replace(_SPACE, " ").encode()
    return piece.encode()


def _byte_level_alphabet() -> dict[str, int]:
    """Return the byte that each character of a byte-level piece stands for (Radford et al. 2019, `bytes_to_unicode`)."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + place): byte for place, byte in enumerate(hidden)}


_BYTE_OF: Final = _byte_level_alphabet()
