"""A seed becomes a bundle of invented attention heads in the real format, for tests and for work on the pages.

Six heads in two layers, over the text of `synthetic_bundle.py`: one looks at itself, one at the token before, one at the first, one at what followed
the same token before (else at the first), one at all keys alike, and one at what a seed draws. All numbers of a record follow from the patterns.
"""

import base64
import gzip
import json
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from synthetic_bundle import InventedText, make_text

from interp_assets.compute.seeds import stream
from interp_assets.garcon.patterns.codec import LONG, quantize, shrink
from interp_assets.garcon.patterns.targets import Terms
from interp_assets.garcon.patterns.view import Attention
from interp_assets.harvest.heads.patterns import TOP_KEYS
from interp_assets.harvest.heads.prompts import (
    COLUMNS,
    FILES,
    THUMB,
    join_targets,
    pack_columns,
    pack_prompt,
    pack_prompt_pattern,
    pack_targets,
    target_columns,
)
from interp_assets.harvest.heads.refs import HEAD_RECORD_VERSION
from interp_assets.harvest.heads.statistics import CHANCES, MEANS
from interp_assets.storage.manifest import Produced, create_artifact, find_manifest, make_ref
from interp_assets.storage.store import Store
from interp_assets.web.attention import KIND, AttentionContent, write_attention_bundle
from interp_assets.web.refs import FOLDER

KINDS: Final = ("self", "previous", "first", "induction", "uniform", "drawn")
"""What the heads 0.0 to 1.2 do, in order."""
PROMPTS: Final = {"short": 24, "other": 24, "long": 1100}
"""Tokens of each prompt: `other` is `short` with another token in the middle."""
N_HEADS: Final = 3
_CONTEXT: Final = 64
_N_CONTEXTS: Final = 6
_AROUND: Final = 8
_TOP: Final = 4


def build_synthetic_heads(store: Store, *, seed: int = 0, label: str = "attention") -> Produced:
    """Write the invented bundle into `6-web` of `store`."""
    ref = make_ref(KIND, FOLDER, identity={"synthetic": 1, "seed": seed}, inputs={}, label=label)
    if existing := find_manifest(store, ref):
        return Produced(ref, existing, is_cached=True)
    text = make_text(seed, 24)
    records = [_make_record(text, seed, place) for place in range(len(KINDS))]
    columns: dict[str, list[Any]] = {"layer": [each["layer"] for each in records], "head": [each["head"] for each in records]}
    columns["rows"] = [each["rows"] for each in records]
    columns["induction_rows"] = [each["rows"] // 2 for each in records]
    columns |= {name: [each["statistics"][name] for each in records] for name in MEANS}
    columns |= {name: [each["chance"][name.removeprefix("uniform_")] for each in records] for name in CHANCES}
    prompts = [(name, make_prompt_files(_prompt_tokens(text, name), text, seed)) for name in PROMPTS]
    prompts[0] = ("short", join_targets(prompts[0][1], make_target_files(_prompt_tokens(text, "short"), text, seed)))
    limits = {"n_heads": N_HEADS, "n_key_heads": N_HEADS, "window": None, "softcap": None, "has_sinks": False}
    described = {
        "is_synthetic": True,
        "pipeline": "synthetic",
        "model": {"name": "invented", "revision": "main", "fingerprint": "00"},
        "corpus": {"source": "invented", "n_shards": 1, "context_length": _CONTEXT},
        "evidence": {"top_k": _TOP, "n_intervals": 2, "examples_per_interval": 2, "key_tokens": 80},
        "records": {"version": HEAD_RECORD_VERSION},
        "layers": [{"layer": 0, **limits}, {"layer": 1, **limits, "window": 32}],
        "other_layers": [{"layer": 2, "kind": "mamba"}],
        "heads": columns,
        "prompts": [{"name": name, **_describe_prompt(files)} for name, files in prompts],
    }
    packed = (gzip.compress(json.dumps(record).encode(), 9, mtime=0) for record in records)
    with create_artifact(store, ref) as art:
        write_attention_bundle(art, AttentionContent(described, packed, prompts, text.vocabulary))
    assert art.manifest
    return Produced(ref, art.manifest, is_cached=False)


def build_many_heads(store: Store, *, side: int, prompts: dict[str, int], seed: int = 0) -> Produced:
    """Write a bundle of `side` layers of as many heads, the six kinds again and again, over prompts of so many tokens: for measurements."""
    ref = make_ref(KIND, FOLDER, identity={"many": side, "seed": seed, "prompts": prompts}, inputs={}, label=f"heads-{side}")
    if existing := find_manifest(store, ref):
        return Produced(ref, existing, is_cached=True)
    text = make_text(seed, 24)
    kinds = KINDS if side * side >= len(KINDS) else ("uniform",)
    base = [_make_record(text, seed, KINDS.index(kind)) for kind in kinds]
    records = [{**base[place % len(kinds)], "layer": place // side, "head": place % side} for place in range(side * side)]
    columns: dict[str, list[Any]] = {name: [each[name] for each in records] for name in ("layer", "head", "rows")}
    columns |= {name: [each["statistics"][name] for each in records] for name in MEANS}
    columns |= {name: [each["chance"][name.removeprefix("uniform_")] for each in records] for name in CHANCES}
    files = []
    for name, n_tokens in prompts.items():
        row = np.resize(text.token_ids, n_tokens)
        patterns = np.stack([make_pattern(kind, row, seed).astype(np.float32) for kind in kinds])
        layers = {layer: patterns[(layer * side + np.arange(side)) % len(kinds)] for layer in range(side)}
        lengths = {layer: np.ones((side, 2, n_tokens), np.float32) for layer in layers}
        files.append((name, pack_prompt(Attention(layers, [""] * n_tokens, weights=True, lengths=lengths), row.tolist(), both_ways=False)))
    limits = {"n_heads": side, "n_key_heads": side, "window": None, "softcap": None, "has_sinks": False}
    described = {
        "is_synthetic": True,
        "pipeline": "synthetic",
        "model": {"name": "invented", "revision": "main", "fingerprint": "00"},
        "corpus": {"source": "invented", "n_shards": 1, "context_length": _CONTEXT},
        "evidence": {"top_k": _TOP, "n_intervals": 2, "examples_per_interval": 2, "key_tokens": 80},
        "records": {"version": HEAD_RECORD_VERSION},
        "layers": [{"layer": layer, **limits} for layer in range(side)],
        "heads": columns,
        "prompts": [{"name": name, **_describe_prompt(found)} for name, found in files],
    }
    packed = (gzip.compress(json.dumps(record).encode(), 1, mtime=0) for record in records)
    with create_artifact(store, ref) as art:
        write_attention_bundle(art, AttentionContent(described, packed, files, text.vocabulary))
    return art.produced


def make_pattern(kind: str, tokens: NDArray[np.int64], seed: int = 0) -> NDArray[np.float64]:
    """Return what a head of a kind looks at, [queries, keys]."""
    n = len(tokens)
    if kind == "uniform":
        return np.tril(np.ones((n, n))) / np.arange(1, n + 1)[:, None]
    if kind == "drawn":
        drawn = np.tril(stream(seed, "heads", n).generator().random((n, n)) ** 8 + 1e-6)
        return drawn / drawn.sum(axis=1, keepdims=True)
    places = np.arange(n)
    if kind == "self":
        keys = places
    elif kind == "previous":
        keys = np.maximum(places - 1, 0)
    elif kind == "first":
        keys = np.zeros(n, np.int64)
    else:
        keys = np.array([max((j + 1 for j in range(q) if tokens[j] == tokens[q] and j + 1 < q), default=0) for q in range(n)])
    pattern = np.zeros((n, n))
    pattern[places, 0] += 0.08
    pattern[places, keys] += 0.92
    return pattern


def make_prompt_files(tokens: NDArray[np.int64], text: InventedText, seed: int = 0) -> dict[str, bytes]:
    """Return the files of a prompt."""
    values = [quantize(make_pattern(kind, tokens, seed)) for kind in KINDS]
    members = [member for each in values for member in pack_prompt_pattern(each, both_ways=False)]
    described = {
        "tokens": tokens.tolist(),
        "texts": [text.vocabulary.text(token) for token in tokens.tolist()],
        "heads": [f"{place // N_HEADS}.{place % N_HEADS}" for place in range(len(KINDS))],
        "both_ways": False,
        "form": "triangle" if len(tokens) <= LONG else "tiles",
        "columns": ["value", "output"],
        "thumb": min(THUMB, len(tokens)),
    }
    lengths = 0.5 + stream(seed, "heads", "lengths").generator().random((len(KINDS), 2, len(tokens)))
    thumbs = gzip.compress(b"".join(shrink(each, THUMB).tobytes() for each in values), mtime=0)
    offsets = np.cumsum([0, *map(len, members)]).astype("<u8").tobytes()
    packed = (json.dumps(described).encode(), b"".join(members), offsets, lengths.astype("<f2").tobytes(), thumbs)
    return dict(zip(FILES, packed, strict=True))


def make_target_files(tokens: NDArray[np.int64], text: InventedText, seed: int = 0) -> dict[str, bytes]:
    """Return what adds to the logit of a prompt's last token: edges of invented weight, which with the rest sum to the target."""
    generator, n = stream(seed, "heads", "targets").generator(), len(tokens)
    columns, scales, heads = {}, {}, {}
    for layer in range(len(KINDS) // N_HEADS):
        columns[layer], scales[layer] = generator.normal(size=(N_HEADS, n)), 0.5 + generator.random(n)
        patterns = [make_pattern(kind, tokens, seed) for kind in KINDS[layer * N_HEADS : (layer + 1) * N_HEADS]]
        heads[layer] = np.stack([pattern @ column * scales[layer] for pattern, column in zip(patterns, columns[layer], strict=True)])
    others = {name: generator.normal(size=n) for name in ("embedding", "mlp.0", "mlp.1", "bias")} | {"rounding": np.zeros(n)}
    value = sum(others.values()) + sum(found.sum(axis=0) for found in heads.values())
    terms = [Terms(f"logit:{int(tokens[-1])}", value, columns, scales, {}, heads, others, "The logit before it is bounded by 30.")]
    layers = dict.fromkeys(columns, N_HEADS)
    own = pack_columns(np.stack(list(target_columns(terms, layers).values()), axis=1))
    return {COLUMNS: own, **pack_targets(terms, layers, text.vocabulary.text)}


def _describe_prompt(files: dict[str, bytes]) -> dict[str, Any]:
    described = json.loads(files["prompt.json"])
    return {"n_tokens": len(described["tokens"]), **{key: described[key] for key in ("both_ways", "form", "columns", "thumb")}}


def _prompt_tokens(text: InventedText, name: str) -> NDArray[np.int64]:
    half = text.token_ids[: PROMPTS[name] // 2]
    tokens = np.concatenate([half, half])
    if name == "other":
        tokens[len(tokens) // 2] = 7
    return tokens


def _make_record(text: InventedText, seed: int, place: int) -> dict[str, Any]:
    contexts = [text.token_ids[first : first + _CONTEXT] for first in range(0, _N_CONTEXTS * _CONTEXT, _CONTEXT)]
    patterns = [make_pattern(KINDS[place], tokens, seed) for tokens in contexts]
    layer, head = divmod(place, N_HEADS)
    uniform = [make_pattern("uniform", tokens) for tokens in contexts]
    rows = [(context, 5 + 7 * i) for context in range(_N_CONTEXTS) for i in range(3)]
    examples = [_make_example(patterns[context], context, query) for context, query in rows]
    top = sorted(range(len(rows)), key=lambda i: (-examples[i]["score"], i))[:_TOP]
    counts = np.bincount(np.concatenate(contexts), minlength=80)
    tokens = [[int(token), 3.0 - 0.1 * i, 0.5, int(counts[token])] for i, token in enumerate(np.argsort(-counts, kind="stable")[:20])]
    limits = {"n_key_heads": N_HEADS, "window": 32 if layer else None, "softcap": None, "has_sinks": False}
    return {
        "version": HEAD_RECORD_VERSION,
        "layer": layer,
        "head": head,
        **limits,
        "rows": _N_CONTEXTS * _CONTEXT,
        "statistics": dict(_measure(patterns, contexts, MEANS)),
        "chance": dict(_measure(uniform, contexts, [name.removeprefix("uniform_") for name in CHANCES])),
        "distance": _distances(patterns),
        "distance_chance": _distances(uniform),
        "score": {"edges": [0.0, 0.25, 0.5, 1.0], "counts": [10, 20, 5]},
        "keys": tokens,
        "queries": tokens,
        "top": top,
        "intervals": [{"low": 0.0, "high": 0.5, "rows": 30, "examples": [0, 1]}, {"low": 0.5, "high": 1.0, "rows": 5, "examples": [2, 3]}],
        "examples": examples,
        "contexts": [
            {"row": [0, i * _CONTEXT], "tokens": tokens.tolist(), "documents": [[0, f"invented/module_{i:03d}.py"]]}
            for i, tokens in enumerate(contexts)
        ],
    }


def _make_example(pattern: NDArray[np.float64], context: int, query: int) -> dict[str, Any]:
    first, stop = max(0, query - _AROUND), min(_CONTEXT, query + _AROUND + 1)
    keys = np.argsort(-pattern[first:stop], axis=1, kind="stable")[:, :TOP_KEYS]
    masses = np.take_along_axis(quantize(pattern[first:stop]), keys, axis=1)
    return {
        "context": context,
        "query": query,
        "score": float(f"{np.delete(pattern[query], [0, query]).max():.4g}"),
        "first_query": first,
        "keys": base64.b64encode(keys.astype("<u4").tobytes()).decode(),
        "masses": base64.b64encode(masses.astype("u1").tobytes()).decode(),
    }


def _measure(patterns: list[NDArray[np.float64]], contexts: list[NDArray[np.int64]], names: Any) -> Iterator[tuple[str, float | None]]:
    found: dict[str, float | None] = dict.fromkeys(names)
    n = len(contexts[0])
    distance = np.maximum(0, np.arange(n)[:, None] - np.arange(n)[None, :])
    for name, value in (
        ("self", np.mean([pattern.diagonal().mean() for pattern in patterns])),
        ("previous", np.mean([pattern.diagonal(-1).mean() for pattern in patterns])),
        ("first", np.mean([pattern[1:, 0].mean() for pattern in patterns])),
        ("distance", np.mean([(pattern * distance).sum(axis=1).mean() for pattern in patterns])),
        ("entropy", np.mean([-(pattern * np.log(np.maximum(pattern, 1e-12))).sum(axis=1).mean() for pattern in patterns])),
        ("induction", np.mean([_induction(pattern, tokens) for pattern, tokens in zip(patterns, contexts, strict=True)])),
    ):
        if name in found:
            found[name] = float(f"{value:.5g}")
    yield from found.items()


def _induction(pattern: NDArray[np.float64], tokens: NDArray[np.int64]) -> float:
    masses = []
    for query in range(len(tokens)):
        earlier = [j + 1 for j in range(query) if tokens[j] == tokens[query] and j + 1 < query]
        if earlier:
            masses.append(pattern[query, earlier].sum())
    return float(np.mean(masses))


def _distances(patterns: list[NDArray[np.float64]]) -> list[float]:
    n = len(patterns[0])
    steps = np.maximum(0, np.arange(n)[:, None] - np.arange(n)[None, :])
    bins = np.where(steps == 0, 0, 1 + np.log2(np.maximum(steps, 1)).astype(int))
    sums = np.sum([np.bincount(bins.ravel(), pattern.ravel()) for pattern in patterns], axis=0)
    return [float(f"{value:.5g}") for value in sums / sums.sum()]
