"""Patterns over configured texts: what a notebook without a model reads is what the model has, within a byte."""

import gzip
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import make_tokenizer

from interp_assets.errors import ArtifactCorruptError, ConfigError, InputError
from interp_assets.garcon.attention import Attended, attention_heard, list_attention
from interp_assets.garcon.patterns.codec import LONG, quantize, shrink
from interp_assets.garcon.patterns.view import read_attention
from interp_assets.garcon.subject import SubjectModel
from interp_assets.harvest.heads.prompts import FILES, keep_prompt, pack_prompt_pattern, read_prompt, unpack_prompt
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
    weights = {layer.layer: layer for layer in list_attention(world.subject.net)}
    values = _values_of(world.subject, row)
    for layer, lengths in found.lengths.items():
        outputs = torch.einsum("hkv,hvd->hkd", values[layer], weights[layer].W_O())
        wanted = torch.stack([values[layer].norm(dim=2), outputs.norm(dim=2)], dim=1)
        np.testing.assert_allclose(lengths, wanted.detach().numpy(), rtol=2e-3, atol=1e-4)
    files, keys = PAGE.read_text(encoding="utf-8").split("| key of")
    assert re.findall(r"^\| `([\w.]+)` \|", files, re.MULTILINE) == list(FILES)
    described = json.loads(read_file(world.store, made.ref.path, made.manifest, FILES[0]))
    assert re.findall(r"^\| `(\w+)` \|", keys, re.MULTILINE) == list(described)


def _values_of(subject: SubjectModel, row: list[int]) -> dict[int, torch.Tensor]:
    """Return what each head's keys carry, [heads, keys, d_value] by layer, from the plain definition."""
    found: dict[int, torch.Tensor] = {}

    def keep(layer: int, heard: Attended) -> None:
        found[layer] = heard.value[0].repeat_interleave(heard.query.shape[1] // heard.value.shape[1], dim=0)

    layers = list_attention(subject.net)
    with attention_heard({layer.module: partial(keep, layer.layer) for layer in layers}), torch.no_grad():
        subject.net.base_model(**subject.arguments(torch.tensor([row]), None))
    return found


def _pack_invented(n: int, seed: int, *, both_ways: bool) -> tuple[dict[str, bytes], np.ndarray]:
    """Return the files of a prompt of `n` tokens and two heads, and their bytes [heads, n, n]."""
    generator = np.random.default_rng(seed)
    values = generator.integers(0, 256, (2, n, n)).astype(np.uint8)
    values = values if both_ways else np.tril(values)
    members = [member for each in values for member in pack_prompt_pattern(each, both_ways=both_ways)]
    described = {"tokens": list(range(n)), "texts": ["x"] * n, "heads": ["0.0", "3.0"], "both_ways": both_ways}
    described |= {"form": "triangle" if n <= LONG else "tiles", "columns": ["value", "output"], "thumb": min(64, n)}
    thumbs = b"".join(shrink(each, 64).tobytes() for each in values)
    columns = generator.random((2, 2, n)).astype("<f2").tobytes()
    offsets = np.cumsum([0, *map(len, members)]).astype("<u8").tobytes()
    packed = (json.dumps(described).encode(), b"".join(members), offsets, columns, gzip.compress(thumbs, mtime=0))
    return dict(zip(FILES, packed, strict=True)), values


@pytest.mark.parametrize("both_ways", [False, True])
def test_a_pyramid_of_tiles_is_read_whole(both_ways: bool) -> None:
    """Above 1,024 tokens a pattern is tiles: a notebook gets the same arrays as of a short text."""
    files, values = _pack_invented(1100, 0, both_ways=both_ways)
    found = unpack_prompt(files, "here")
    assert found.heads() == ["0.0", "3.0"]
    assert np.array_equal(quantize(np.stack([found.pattern(head) for head in found.heads()])), values)


@pytest.mark.parametrize("file", FILES)
def test_damaged_files_of_a_prompt_are_named(file: str) -> None:
    """Files come from elsewhere: a short one is no reason to show another pattern."""
    files, _ = _pack_invented(12, 1, both_ways=False)
    unpack_prompt(files, "here")
    with pytest.raises(ArtifactCorruptError, match=r"here.*Materialize"):
        unpack_prompt({**files, file: files[file][:-9]}, "here")


def test_a_prompt_that_cannot_be_kept_says_why(make_world: Callable[..., Any]) -> None:
    """Cutting a configured text in silence would show another one."""
    world, tokenizer = make_world("llama", heads={"prompts": PROMPTS}), make_tokenizer()
    with pytest.raises(InputError, match=r"The prompt 'long' has 100 tokens; .* takes 1 to 48\. Mend `heads.prompts`"):
        keep_prompt(world.pipeline, world.store, world.subject, tokenizer, "long")
    with pytest.raises(InputError, match="The prompt 'empty' has 0 tokens"):
        keep_prompt(world.pipeline, world.store, world.subject, tokenizer, "empty")
    with pytest.raises(ConfigError, match=r"no prompt 'other' in `heads.prompts`; there are \['empty', 'long', 'short'\]"):
        read_prompt(world.pipeline, world.store, "other")
