"""Patterns over configured texts: what a notebook without a model reads is what the model has, within a byte."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import make_tokenizer

from interp_assets.errors import ConfigError, InputError
from interp_assets.garcon.patterns.view import read_attention
from interp_assets.harvest.heads.prompts import INDEX, PATTERNS, PROMPT, keep_prompt, read_prompt
from interp_assets.storage.manifest import read_file

PAGE = Path(__file__).parents[3] / "docs" / "formats" / "prompt_patterns.md"
PROMPTS = {"short": "ab cd ab cd", "long": "x" * 100, "empty": ""}


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_prompt_comes_back_within_a_byte(kind: str, make_world: Callable[..., Any]) -> None:
    """Hosts without a model show these; encoders look both ways. The page names every file and key."""
    world, tokenizer = make_world(kind, heads={"prompts": PROMPTS}), make_tokenizer(is_encoder=kind == "bert")
    made = keep_prompt(world.pipeline, world.store, world.subject, tokenizer, "short")
    assert keep_prompt(world.pipeline, world.store, world.subject, tokenizer, "short").is_cached
    row = tokenizer(PROMPTS["short"])["input_ids"]
    expected = read_attention(world.subject, row, [tokenizer.decode([token]) for token in row])
    found = read_prompt(world.pipeline, world.store, "short")
    assert (found.tokens, found.heads()) == (expected.tokens, expected.heads())
    for head in found.heads():
        assert np.abs(found.pattern(head) - expected.pattern(head)).max() <= 0.0039
    files, keys = PAGE.read_text(encoding="utf-8").split("| key of")
    assert re.findall(r"^\| `([\w.]+)` \|", files, re.MULTILINE) == [PROMPT, PATTERNS, INDEX]
    described = json.loads(read_file(world.store, made.ref.path, made.manifest, PROMPT))
    assert re.findall(r"^\| `(\w+)` \|", keys, re.MULTILINE) == list(described)


def test_a_prompt_that_cannot_be_kept_says_why(make_world: Callable[..., Any]) -> None:
    """Cutting a configured text in silence would show another one."""
    world, tokenizer = make_world("llama", heads={"prompts": PROMPTS}), make_tokenizer()
    with pytest.raises(InputError, match=r"The prompt 'long' has 100 tokens; .* takes 1 to 48\. Mend `heads.prompts`"):
        keep_prompt(world.pipeline, world.store, world.subject, tokenizer, "long")
    with pytest.raises(InputError, match="The prompt 'empty' has 0 tokens"):
        keep_prompt(world.pipeline, world.store, world.subject, tokenizer, "empty")
    with pytest.raises(ConfigError, match=r"no prompt 'other' in `heads.prompts`; there are \['empty', 'long', 'short'\]"):
        read_prompt(world.pipeline, world.store, "other")
