"""Messages become tokens as the model's own chat template renders them, each with the role whose words it is of.

1. The template renders the conversation into one text, and the tokenizer takes that text apart, special tokens and all: the tokens that
   `apply_chat_template` gives.
2. Whose words stand where is found by rendering once more with a mark in place of each content: what stands between the marks is the template's
   own, and in the true text each content, trimmed or not, has to stand between the same pieces.
3. A token belongs to the role in whose content its first character lies that is no white space; all others are the template's (`TEMPLATE`).

A template may change what it is given (leave out an earlier answer's thoughts, for example). Then the pieces do not fit, and the roles of that
conversation are `UNKNOWN`, never guessed. Source: transformers, `chat_template_utils`.
"""

import re
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from jinja2.exceptions import TemplateError
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from interp_assets.errors import InputError, first_line

TEMPLATE: Final = "template"
UNKNOWN: Final = "unknown"
_MARK: Final = "\ue000{}\ue001"
_MARKS: Final = re.compile("\ue000(\\d+)\ue001")
_REFUSALS: Final = (TemplateError, ValueError, TypeError, LookupError, AttributeError)
"""What a template raises for messages that it does not take: roles that do not alternate, a system message, a missing key."""


class Chat(NamedTuple):
    """The tokens of one conversation, and the role of each; none, and the reason, where the template refuses it."""

    token_ids: NDArray[np.uint32]
    roles: list[str]
    refusal: str = ""


def check_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise `InputError` for a tokenizer that cannot tell the roles of a conversation."""
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(f"corpus.text_kind is messages, but the tokenizer of {name!r} has no chat template. Use the model's chat version.")
    if not tokenizer.is_fast:
        raise InputError(f"corpus.text_kind is messages, but the tokenizer of {name!r} does not tell where its tokens lie: it has no tokenizer.json.")


def tokenize_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], *, opens_answer: bool = False) -> Chat:
    """Render and tokenize one conversation; with `opens_answer` up to where the next answer begins."""
    try:
        text = _render(tokenizer, messages, opens_answer)
        encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=False, return_offsets_mapping=True, verbose=False)
    except _REFUSALS as error:
        return Chat(np.zeros(0, np.uint32), [], first_line(error))
    token_ids = np.asarray(encoded["input_ids"], np.uint32)
    owners = _find_owners(tokenizer, messages, text, opens_answer)
    if owners is None:
        return Chat(token_ids, [UNKNOWN] * len(token_ids))
    return Chat(token_ids, [_role_of(text[start:stop], owners[start:stop]) for start, stop in encoded["offset_mapping"]])


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], opens_answer: bool) -> str:  # noqa: FBT001 - own
    return str(tokenizer.apply_chat_template([dict(message) for message in messages], tokenize=False, add_generation_prompt=opens_answer))


def _find_owners(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], text: str, opens_answer: bool) -> list[str] | None:  # noqa: FBT001
    """Return the role of every character; None where the template has changed a content."""
    try:
        marked = _render(tokenizer, [{**message, "content": _MARK.format(i)} for i, message in enumerate(messages)], opens_answer)
    except _REFUSALS:
        return None
    pieces = _MARKS.split(marked)  # piece, number, piece, number, ..., piece
    if not text.startswith(pieces[0]):
        return None
    owners = [TEMPLATE] * len(pieces[0])
    for number, piece in zip(pieces[1::2], pieces[2::2], strict=True):
        message = messages[int(number)]
        start = len(owners)
        content = next((content for content in _written(str(message["content"])) if text.startswith(content + piece, start)), None)
        if content is None:
            return None
        owners += [str(message["role"])] * len(content) + [TEMPLATE] * len(piece)
    return owners if len(owners) == len(text) else None


def _written(content: str) -> list[str]:
    """List how templates write a content: as it is, or trimmed."""
    return list(dict.fromkeys((content, content.rstrip(), content.lstrip(), content.strip())))


def _role_of(characters: str, owners: Sequence[str]) -> str:
    """Return the role of a token by its characters."""
    first = len(characters) - len(characters.lstrip())
    return owners[first if first < len(owners) else 0] if owners else TEMPLATE
