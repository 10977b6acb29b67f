"""A configured text becomes the whole pattern of every head over it, for who has no model at hand.

Up to 1,024 tokens a head is a triangle, above a pyramid of tiles (`garcon/patterns/codec.py`); members lie one after the other in
`patterns.bin`, their offsets in `patterns.idx`. The files are described in docs/formats/prompt_patterns.md.
"""

import json
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from interp_assets.errors import ArtifactCorruptError, ConfigError, InputError
from interp_assets.garcon.patterns.codec import LONG, pack_tiles, pack_triangle, quantize, restore, unpack_triangle
from interp_assets.garcon.patterns.view import Attention, read_attention
from interp_assets.garcon.subject import SubjectModel
from interp_assets.harvest.heads.refs import head_counts, heads_of, prompt_ref
from interp_assets.planning.pipeline import Pipeline
from interp_assets.storage.foreign import parse_json
from interp_assets.storage.manifest import Produced, create_artifact, find_manifest, load_manifest, read_file, timed
from interp_assets.storage.store import Store

PROMPT: Final = "prompt.json"
PATTERNS: Final = "patterns.bin"
INDEX: Final = "patterns.idx"


@timed
def keep_prompt(pipeline: Pipeline, store: Store, model: SubjectModel, tokenizer: PreTrainedTokenizerBase, name: str) -> Produced:
    """Publish the patterns of the prompt called `name`. Raises `InputError` for a text without tokens, or with more than the model takes."""
    ref = prompt_ref(pipeline, name)
    if current := find_manifest(store, ref):
        return Produced(ref, current, is_cached=True)
    row = [int(token) for token in tokenizer(heads_of(pipeline).prompts[name])["input_ids"]]  # pyright: ignore[reportArgumentType]
    if not 0 < len(row) <= model.max_context:
        raise InputError(f"The prompt {name!r} has {len(row):,} tokens; {model.name} takes 1 to {model.max_context:,}. Mend `heads.prompts`.")
    seen = read_attention(model, row, [str(tokenizer.decode([token])) for token in row], list(head_counts(pipeline)))
    described = {
        "tokens": row,
        "texts": seen.tokens,
        "heads": seen.heads(),
        "both_ways": not model.is_causal,
        "form": "triangle" if len(row) <= LONG else "tiles",
    }
    offsets = [0]
    with create_artifact(store, ref) as art:
        with art.open(PATTERNS, n_rows=len(seen.heads())) as sink:
            for head in seen.heads():
                for member in _pack(quantize(seen.pattern(head)), both_ways=described["both_ways"]):
                    sink.write(member)
                    offsets.append(offsets[-1] + len(member))
        art.put(INDEX, np.array(offsets, "<u8").tobytes(), n_rows=len(offsets))
        art.put(PROMPT, json.dumps(described).encode())
        art.facts |= {"n_tokens": len(row), "n_heads": len(seen.heads()), "bytes_per_head": round(offsets[-1] / max(1, len(seen.heads())), 1)}
    return art.produced


def read_prompt(pipeline: Pipeline, store: Store, name: str) -> Attention:
    """Read the patterns of a configured prompt. Raises `ConfigError` with the names there are, `ArtifactCorruptError` for damaged ones."""
    prompts = heads_of(pipeline).prompts
    if name not in prompts:
        raise ConfigError(f"There is no prompt {name!r} in `heads.prompts`; there are {sorted(prompts)}.")
    ref = prompt_ref(pipeline, name)
    manifest = load_manifest(store, ref)
    where = f"{store.url}/{ref.path}"
    described = parse_json(read_file(store, ref.path, manifest, PROMPT))
    if described["form"] != "triangle":
        raise InputError(f"The prompt {name!r} is a pyramid of tiles: it has {len(described['tokens']):,} tokens. Read {where}/{PATTERNS} by tiles.")
    offsets = np.frombuffer(read_file(store, ref.path, manifest, INDEX), "<u8").tolist()
    data = read_file(store, ref.path, manifest, PATTERNS)
    if len(offsets) != len(described["heads"]) + 1 or offsets[-1] != len(data):
        raise ArtifactCorruptError(f"{where}/{INDEX} does not fit its patterns. Materialize `prompt_patterns` again.")
    found: dict[int, list[NDArray[np.float32]]] = {}
    for place, head in enumerate(described["heads"]):
        member = data[offsets[place] : offsets[place + 1]]
        values = unpack_triangle(member, len(described["tokens"]), f"{where}, head {head},", both_ways=described["both_ways"])
        found.setdefault(int(head.partition(".")[0]), []).append(restore(values))
    note = "Read from bytes: each number is right within 0.004."
    return Attention({layer: np.stack(patterns) for layer, patterns in found.items()}, described["texts"], weights=True, note=note)


def _pack(values: NDArray[Any], *, both_ways: bool) -> list[bytes]:
    return [pack_triangle(values, both_ways=both_ways)] if len(values) <= LONG else pack_tiles(values, both_ways=both_ways)
