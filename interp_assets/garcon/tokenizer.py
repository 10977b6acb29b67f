"""A model's name becomes its tokenizer, and a tokenizer tells which of its tokens are special."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from interp_assets.errors import InputError
from interp_assets.garcon.locate import first_line, locate_model, next_step
from interp_assets.planning.config import ModelConfig

DOCUMENTS_PER_CALL = 256


class Affixes(NamedTuple):
    """The special tokens that a tokenizer puts around one text, for example [CLS] and [SEP]."""

    before: list[int]
    after: list[int]


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer that comes with a model. Raises `InputError` when there is none."""
    place = locate_model(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place.name, **place.options)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise InputError(f"Cannot load the tokenizer of {model.name!r}: {first_line(error)}. {next_step(model)}") from error
    if not tokenizer or not len(tokenizer):
        raise InputError(f"The tokenizer of {model.name!r} has no vocabulary: its files are missing. {next_step(model)}")
    return tokenizer


def tokenize_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, split_special: bool = True) -> list[NDArray[np.uint32]]:
    """Tokenize texts: one array of token ids for each text, to which no special token is added.

    A text that holds the name of a special token, such as `<|endoftext|>` in the source of a tokenizer, becomes the tokens of these characters:
    else the model would see the text end there. Without `split_special` it becomes that token, as in text that a chat template has rendered.
    """
    arrays: list[NDArray[np.uint32]] = []
    for first in range(0, len(texts), DOCUMENTS_PER_CALL):
        encoded = tokenizer(
            list(texts[first : first + DOCUMENTS_PER_CALL]),
            add_special_tokens=False,
            split_special_tokens=split_special,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        arrays += [np.asarray(ids, dtype=np.uint32) for ids in encoded["input_ids"]]
    return arrays


def special_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """List the ids that stand for no text: BOS, EOS, [CLS], padding and the like. A pure unknown-word token stands for text."""
    names = [name for name in tokenizer.SPECIAL_TOKENS_ATTRIBUTES if name not in ("unk_token", "additional_special_tokens")]
    chosen = {_id_of(tokenizer, name) for name in names}
    unknown = _id_of(tokenizer, "unk_token")
    others = {int(token_id) for token_id in tokenizer.all_special_ids if token_id != unknown}
    return sorted(others.union(token_id for token_id in chosen if token_id is not None))


def affixes(tokenizer: PreTrainedTokenizerBase) -> Affixes:
    """Find the special tokens that the tokenizer itself puts around a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a", add_special_tokens=True)["input_ids"]
    for n_before in range(len(full) - len(bare) + 1):
        if full[n_before : n_before + len(bare)] == bare:
            return Affixes(full[:n_before], full[n_before + len(bare) :])
    return Affixes([], [])


def leading_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token that opens a packed context: BOS, else EOS, else none."""
    bos = _id_of(tokenizer, "bos_token")
    return separator_token(tokenizer) if bos is None else bos


def separator_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token that stands between packed documents: EOS, or none."""
    return _id_of(tokenizer, "eos_token")


def _id_of(tokenizer: PreTrainedTokenizerBase, attribute: str) -> int | None:
    token = getattr(tokenizer, attribute, None)
    if token is None:
        return None
    token_id = tokenizer.convert_tokens_to_ids(str(token))
    return token_id if isinstance(token_id, int) else None
