"""A configured text becomes the whole pattern of every head over it, for who has no model at hand.

Up to 1,024 tokens a head is a triangle, above a pyramid of tiles (`garcon/patterns/codec.py`); members lie one after the other in
`patterns.bin`, their offsets in `patterns.idx`. Beside them lie what weights the keys, and a small picture of every head. The files are described
in docs/formats/prompt_patterns.md.
"""

import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from interp_assets.errors import ArtifactCorruptError, ConfigError, InputError
from interp_assets.garcon.patterns.codec import (
    GZIP_LEVEL,
    LONG,
    TILE,
    pack_tiles,
    pack_triangle,
    quantize,
    restore,
    shrink,
    tile_places,
    unpack_tile,
    unpack_triangle,
)
from interp_assets.garcon.patterns.targets import Terms
from interp_assets.garcon.patterns.view import Attention, read_attention
from interp_assets.garcon.subject import SubjectModel
from interp_assets.harvest.heads.refs import head_counts, heads_of, prompt_ref
from interp_assets.planning.pipeline import Pipeline
from interp_assets.storage.foreign import parse_json, unpack_gzip
from interp_assets.storage.manifest import Produced, create_artifact, find_manifest, load_manifest, read_file, timed
from interp_assets.storage.store import Store

PROMPT: Final = "prompt.json"
PATTERNS: Final = "patterns.bin"
INDEX: Final = "patterns.idx"
COLUMNS: Final = "columns.bin"
THUMBS: Final = "thumbs.bin"
FILES: Final = (PROMPT, PATTERNS, INDEX, COLUMNS, THUMBS)
TARGETS: Final = "targets.json"
SCALES: Final = "scales.bin"
TERMS: Final = "terms.bin"
THUMB: Final = 64
"""Places of a small picture on each side, at most."""


@timed
def keep_prompt(pipeline: Pipeline, store: Store, model: SubjectModel, tokenizer: PreTrainedTokenizerBase, name: str) -> Produced:
    """Publish the patterns of the prompt called `name`. Raises `InputError` for a text without tokens, or with more than the model takes."""
    ref = prompt_ref(pipeline, name)
    if current := find_manifest(store, ref):
        return Produced(ref, current, is_cached=True)
    row = [int(token) for token in tokenizer(heads_of(pipeline).prompt(name).text)["input_ids"]]  # pyright: ignore[reportArgumentType]
    if not 0 < len(row) <= model.max_context:
        raise InputError(f"The prompt {name!r} has {len(row):,} tokens; {model.name} takes 1 to {model.max_context:,}. Mend `heads.prompts`.")
    seen = read_attention(model, row, [str(tokenizer.decode([token])) for token in row], list(head_counts(pipeline)))
    files = pack_prompt(seen, row, both_ways=not model.is_causal)
    n_heads = len(seen.heads())
    with create_artifact(store, ref) as art:
        for file, n_rows in ((PATTERNS, n_heads), (COLUMNS, n_heads), (THUMBS, n_heads), (INDEX, len(files[INDEX]) // 8), (PROMPT, None)):
            art.put(file, files[file], n_rows=n_rows)
        art.facts |= {"n_tokens": len(row), "n_heads": n_heads, "bytes_per_head": round(len(files[PATTERNS]) / max(1, n_heads), 1)}
    return art.produced


def pack_prompt(
    seen: Attention, row: Sequence[int], *, both_ways: bool, more: Mapping[str, NDArray[np.floating]] = MappingProxyType({})
) -> dict[str, bytes]:
    """Return the files of a prompt; `more` are further columns [heads, keys] by name."""
    described = {
        "tokens": list(row),
        "texts": seen.tokens,
        "heads": seen.heads(),
        "both_ways": both_ways,
        "form": "triangle" if len(row) <= LONG else "tiles",
        "columns": ["value", "output", *more],
        "thumb": min(THUMB, len(row)),
    }
    offsets, thumbs, patterns = [0], [], []
    for head in seen.heads():
        values = quantize(seen.pattern(head))
        thumbs.append(shrink(values, THUMB).tobytes())
        for member in pack_prompt_pattern(values, both_ways=both_ways):
            patterns.append(member)
            offsets.append(offsets[-1] + len(member))
    columns = np.concatenate([seen.lengths[layer] for layer in seen.patterns])
    if more:
        columns = np.concatenate([columns, np.stack(list(more.values()), axis=1)], axis=1)
    return {
        PROMPT: json.dumps(described).encode(),
        PATTERNS: b"".join(patterns),
        INDEX: np.array(offsets, "<u8").tobytes(),
        COLUMNS: pack_columns(columns),
        THUMBS: gzip.compress(b"".join(thumbs), GZIP_LEVEL, mtime=0),
    }


def pack_columns(columns: NDArray[np.floating]) -> bytes:
    """Return columns [heads, columns, keys] as bytes; what is too large for a half becomes the largest."""
    most = np.finfo(np.float16).max
    return np.clip(columns, -most, most).astype("<f2").tobytes()


def target_columns(terms: Sequence[Terms], heads: Mapping[int, int]) -> dict[str, NDArray[np.floating]]:
    """Return a column [heads, keys] a target, of layers with so many heads; of a layer that comes after the target's, nothing."""
    found = {}
    for each in terms:
        n_keys = len(each.value)
        found[each.name] = np.concatenate([each.columns.get(layer, np.zeros((n, n_keys))) for layer, n in heads.items()])
    return found


def pack_targets(terms: Sequence[Terms], heads: Mapping[int, int], write: Callable[[int], str]) -> dict[str, bytes]:
    """Return the files beside the columns of targets, of layers with so many heads; nothing without targets.

    These are scales [targets, layers, queries] and terms [targets, heads and others, positions], float32. `write` tells how a token is written.
    """
    if not terms:
        return {}
    zeros = np.zeros_like(terms[0].value)
    described, scales, values = [], [], []
    for each in terms:
        token = int(each.name.partition(":")[2]) if each.name.startswith("logit:") else None
        text = {} if token is None else {"text": write(token)}
        described.append({"column": each.name, **text, "others": list(each.others), "note": each.note})
        scales += [each.scales.get(layer, zeros) for layer in heads]
        values += [row for layer, n in heads.items() for row in each.heads.get(layer, np.zeros((n, len(zeros))))]
        hidden = sum((found.sum(axis=0) for layer, found in each.heads.items() if layer not in heads), zeros)
        values += [each.value, hidden, *each.others.values()]
    return {
        TARGETS: json.dumps(described).encode(),
        SCALES: np.stack(scales).astype("<f4").tobytes(),
        TERMS: np.stack(values).astype("<f4").tobytes(),
    }


def join_targets(prompt: Mapping[str, bytes], targets: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return the files of a prompt with those of its targets, whose columns stand behind its own."""
    described, names = parse_json(prompt[PROMPT]), [each["column"] for each in parse_json(targets[TARGETS])]
    shape = (len(described["heads"]), -1, len(described["tokens"]))
    columns = np.concatenate([np.frombuffer(files[COLUMNS], "<f2").reshape(shape) for files in (prompt, targets)], axis=1)
    note = " ".join(filter(None, (each["note"] for each in parse_json(targets[TARGETS]))))
    described = {**described, "columns": [*described["columns"], *names], **({"note": note} if note else {})}
    return {**prompt, **targets, PROMPT: json.dumps(described).encode(), COLUMNS: columns.tobytes()}


def read_prompt(pipeline: Pipeline, store: Store, name: str) -> Attention:
    """Read the patterns of a configured prompt. Raises `ConfigError` with the names there are, `ArtifactCorruptError` for damaged ones."""
    prompts = heads_of(pipeline).prompts
    if name not in prompts:
        raise ConfigError(f"There is no prompt {name!r} in `heads.prompts`; there are {sorted(prompts)}.")
    ref = prompt_ref(pipeline, name)
    manifest = load_manifest(store, ref)
    where = f"{store.url}/{ref.path}"
    return unpack_prompt({file: read_file(store, ref.path, manifest, file) for file in FILES}, where)


def unpack_prompt(files: Mapping[str, bytes], where: str) -> Attention:
    """Return the patterns that the files of a prompt hold; `where` names them. Raises `ArtifactCorruptError` for damaged ones."""
    try:
        described = parse_json(files[PROMPT])
        texts, heads, both_ways, is_tiled = described["texts"], described["heads"], described["both_ways"], described["form"] == "tiles"
        n, size = len(texts), int(described["thumb"])
        offsets = np.frombuffer(files[INDEX], "<u8").tolist()
        places = list(tile_places(n, both_ways=both_ways)) if is_tiled else [None]
        lengths = np.frombuffer(files[COLUMNS], "<f2").reshape(len(heads), len(described["columns"]), n)[:, :2].astype(np.float32)
        thumbs = unpack_gzip(files[THUMBS], len(heads) * size * size)
    except (ValueError, LookupError, TypeError) as error:
        raise ArtifactCorruptError(f"{where} is no prompt ({error!r}). Materialize `prompt_patterns` again.") from error
    is_whole = len(offsets) == len(heads) * len(places) + 1 and offsets[-1] == len(files[PATTERNS]) and offsets == sorted(offsets)
    if not is_whole or len(thumbs) != len(heads) * size * size:
        raise ArtifactCorruptError(f"{where}/{INDEX} does not fit its patterns. Materialize `prompt_patterns` again.")
    members = [files[PATTERNS][start:stop] for start, stop in pairwise(offsets)]
    found: dict[int, list[NDArray[np.float32]]] = {}
    columns: dict[int, list[NDArray[np.float32]]] = {}
    for place, head in enumerate(heads):
        own, said = members[place * len(places) : (place + 1) * len(places)], f"{where}, head {head},"
        values = _join(own, n, said, both_ways=both_ways) if is_tiled else unpack_triangle(own[0], n, said, both_ways=both_ways)
        found.setdefault(int(head.partition(".")[0]), []).append(restore(values))
        columns.setdefault(int(head.partition(".")[0]), []).append(lengths[place])
    note = "Read from bytes: each number is right within 0.004."
    patterns = {layer: np.stack(each) for layer, each in found.items()}
    return Attention(patterns, texts, weights=True, note=note, lengths={layer: np.stack(each) for layer, each in columns.items()})


def _join(members: list[bytes], n_tokens: int, where: str, *, both_ways: bool) -> NDArray[np.uint8]:
    """Return one head's bytes [tokens, tokens] of the finest tiles of its pyramid."""
    side = -(-n_tokens // TILE) * TILE
    values = np.zeros((side, side), np.uint8)
    for member, (level, row, column) in zip(members, tile_places(n_tokens, both_ways=both_ways), strict=True):
        if level == 0:
            values[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE] = unpack_tile(member, where)
    return values[:n_tokens, :n_tokens]


def pack_prompt_pattern(values: NDArray[Any], *, both_ways: bool) -> list[bytes]:
    """Return the members of one head's bytes [tokens, tokens]: a triangle, or the tiles of a pyramid."""
    return [pack_triangle(values, both_ways=both_ways)] if len(values) <= LONG else pack_tiles(values, both_ways=both_ways)
