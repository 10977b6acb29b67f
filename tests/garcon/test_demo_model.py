"""The subject model that ships with the project: it loads, its tokenizer loses nothing, and it has learned Python."""

from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from interp_assets.corpus.stdlib import is_held_out, is_test_source, iter_stdlib_documents

FOLDER = Path(__file__).parents[2] / "interp_assets" / "garcon" / "pystdlib_gpt2"
LOSS_BOUND = 3.2  # measured 2.74 on CPython 3.11.7; other versions hold other files out


class Subject(NamedTuple):
    """The loaded model and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def subject() -> Subject:
    """Load the folder as any user would: from disk, by the Auto classes, in the dtype it was saved in."""
    model = AutoModelForCausalLM.from_pretrained(FOLDER, local_files_only=True)
    return Subject(model.eval(), AutoTokenizer.from_pretrained(FOLDER, local_files_only=True))


def test_the_model_has_the_documented_shape(subject: Subject) -> None:
    """Hook points, SAE sizes and every demo number depend on these six."""
    config = subject.model.config
    assert (config.model_type, config.n_layer, config.n_embd, config.n_positions, config.vocab_size) == ("gpt2", 4, 256, 256, 4096)
    assert len(subject.tokenizer) == config.vocab_size
    assert config.bos_token_id == config.eos_token_id == subject.tokenizer.eos_token_id == subject.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    token_ids = torch.arange(2 * 256).reshape(2, 256)
    with torch.no_grad():
        output = subject.model(token_ids, output_hidden_states=True)
    assert output.logits.shape == (2, 256, 4096)
    assert [tuple(hidden.shape) for hidden in output.hidden_states] == [(2, 256, 256)] * 5
    assert subject.model.dtype == torch.bfloat16


def test_source_text_survives_the_tokenizer(subject: Subject) -> None:
    """A feature's example is shown as decoded tokens: a tokenizer that tidies spaces would show code that was never there."""
    texts = [text for _, text in islice(iter_stdlib_documents(), 40)]
    texts += ["", "  two\tspaces \n\n\n\tand a tab\r\n", "naïve \u2603 \U0001f40d 日本語\n", "x = 1234567 ;y=[ ]  \n    ", "a , b . c ' s n't\n"]
    for text in texts:
        assert subject.tokenizer.decode(subject.tokenizer(text)["input_ids"]) == text


def test_indentation_is_one_token_and_digits_are_single(subject: Subject) -> None:
    """Features of structure and of numbers are readable because the tokenizer was made for code."""
    token_ids = subject.tokenizer("def __init__(self):\n        return 42\n")["input_ids"]
    expected = ["def", " __init", "__(", "self", "):", "\n        ", "return", " ", "4", "2", "\n"]
    assert [subject.tokenizer.decode([token_id]) for token_id in token_ids] == expected


def test_held_out_library_code_is_predicted_well(subject: Subject) -> None:
    """A damaged or mis-saved weight file shows here first; untrained, the loss is 8.3 nats per token."""
    held_out = (text for source, text in iter_stdlib_documents(with_tests=False) if is_held_out(source) and not is_test_source(source))
    contexts = [subject.tokenizer("<|endoftext|>" + text)["input_ids"][:257] for text in islice((t for t in held_out if len(t) > 4000), 8)]
    token_ids = torch.tensor(contexts)
    with torch.no_grad():
        logits = subject.model(token_ids[:, :-1]).logits
    loss = functional.cross_entropy(logits.flatten(0, 1).float(), token_ids[:, 1:].flatten()).item()
    assert loss < LOSS_BOUND
