"""A seed becomes a bundle in the real format with invented features, for tests and for work on the pages.

The text is a small invented program in a byte-level vocabulary of some eighty tokens; a feature fires on one or two of them, more strongly
in some contexts. All numbers of a record follow from those firings, so tables, records and index agree with each other. On purpose the
vocabulary holds what breaks pages: characters split over tokens, new lines, right-to-left text and tokens that look like markup.
`bundle.json` says `is_synthetic`, and the pages show it.
"""

import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from interp_assets.compute.seeds import stream
from interp_assets.storage.manifest import Produced, create_artifact, find_manifest, make_ref
from interp_assets.storage.store import Store
from interp_assets.visualize.packing import RECORD_VERSION, TokenOrder, order_tokens, pack_record
from interp_assets.visualize.records import FEATURE_SCHEMA
from interp_assets.web.bundle import RECORDS_PER_FILE, BundleContent, write_bundle
from interp_assets.web.doses import Curve, DoseCurve, WrittenText
from interp_assets.web.map import embed_directions
from interp_assets.web.refs import FOLDER
from interp_assets.web.vocabulary import Vocabulary

BOS: Final = 0
_WORDS: Final = (
    *("def", "class", "return", "import", "from", "for", "in", "if", "not", "else", "None", "True", "self", "cls", "name", "path", "value"),
    *("key", "items", "line", "text", "open", "read", "write", "join", "split", "append", "extend", "format", "lower", "strip", "count"),
    *("index", "error", "raise", "try", "except", "with", "as", "lambda", "yield"),
)
_PLAIN: Final = ["\n", "\n    ", "\n        ", "(", ")", "):", ":", ",", ".", " =", " ==", '"', "'", "[", "]", " #", "_", "0", "1", "\t", "  "]
_STRANGE: Final = ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>", " \u05e9\u05dc\u05d5\u05dd", "\u202e", " na\u00efve"]
_BROKEN: Final = [b"\xe2\x86", b"\x92", b"\xf0\x9f", b"\x8c\x8d", b"\xc3", b"\xa9", b"\xff"]
"""An arrow, a globe and an accented letter, each cut inside the character, and a byte that never joins."""
_WINDOW: Final = 32
GROUPED: Final = ("import", "yield")
"""Tokens that a tenth of the features raise each, and stand together on the map."""
_GROUP_OF: Final = 10
DOSED: Final = 1
"""The feature that has dose curves."""
_SINK: Final = 2
"""The feature that fires where contexts begin."""
_N_INTERVALS: Final = 5


class Shown(NamedTuple):
    """How many examples a record has."""

    top: int = 20
    intervals: int = _N_INTERVALS
    per_interval: int = 4
    random: int = 12


_SHOWN: Final = Shown()


class InventedText(NamedTuple):
    """The invented data set: token ids of documents of equal length, all beginning with BOS."""

    vocabulary: Vocabulary
    token_ids: NDArray[np.int64]
    document_length: int
    is_messages: bool = False


def build_synthetic_bundle(
    store: Store, *, n_features: int = 64, seed: int = 0, n_documents: int = 48, sae: str = "synthetic", has_sinks: bool = False
) -> Produced:
    """Write an invented bundle into `6-web` of `store`. Every 13th feature is dead; about 3 ms a feature.

    With `has_sinks` rows are left out and others are outliers, feature 2 fires where contexts begin, a map shows next to nothing, and the
    text is messages.
    """
    start = time.perf_counter()
    identity = {"synthetic": 9, "seed": seed, "n_features": n_features, "n_documents": n_documents, "sae": sae, "has_sinks": has_sinks}
    ref = make_ref("feature_bundle", FOLDER, identity=identity, inputs={}, label=sae)
    existing = find_manifest(store, ref)
    if existing:
        return Produced(ref, existing, is_cached=True, wall_s=time.perf_counter() - start)
    text = make_text(seed, n_documents)._replace(is_messages=has_sinks)
    records = [_make_record(text, seed, latent, n_features, is_sink=has_sinks and latent == _SINK) for latent in range(n_features)]
    tokens = TokenOrder(text.vocabulary.order)
    members = (pack_record(record, tokens) for record in records)
    W_dec = stream(seed, "synthetic", "decoder").generator().normal(0, 1, (n_features, 64 if has_sinks else 8)).astype(np.float32)
    if not has_sinks:
        W_dec[np.arange(n_features) % _GROUP_OF == 0, 0] += 5  # what raises one token points one way
        W_dec[np.arange(n_features) % _GROUP_OF == 1, 1] += 5
    content = BundleContent(
        describe_invented(n_features, text, sae, has_sinks=has_sinks),
        lambda: [make_synthetic_table(text.vocabulary, records)],
        members,
        text.vocabulary,
        embed_directions(W_dec),
        W_dec,
        {DOSED: [make_invented_curve(sae, recipe) for recipe in ("golden", "other")]},
    )
    with create_artifact(store, ref) as art:
        write_bundle(art, content)
    assert art.manifest
    return Produced(ref, art.manifest, is_cached=False, wall_s=time.perf_counter() - start)


def make_invented_curve(sae: str, recipe: str) -> DoseCurve:
    """Invent a dose curve of feature `DOSED`: it moves predictions more than its controls do, and one point could not be measured."""
    strengths = ["-10 max", "0 max", "10 max"]
    curves = {
        arm: Curve(mean=[5 * scale, 0.0, 8 * scale], low=[4 * scale, 0.0, 6 * scale], high=[6 * scale, 0.1, 9 * scale])
        for arm, scale in (("feature", 1.0), ("other", 0.25), ("random", 0.5), ("flip", 0.5), ("zero", 0.0), ("feature - controls", 0.625))
    }
    curves["other"] = Curve(mean=[None, 0.0, 2.0], low=[None, 0.0, 1.5], high=[None, 0.1, 2.5])
    texts = [WrittenText(strength=i, prompt=0, text=f" {recipe} text {i}\n<b>") for i in range(3)]
    return DoseCurve(
        recipe=recipe,
        edits=[{"sae": sae, "latent": DOSED, "clamp": "10 max"}],
        strengths=strengths,
        prompts=["def main("],
        n_texts=1,
        new_tokens=8,
        temperature=0.0,
        outcomes={"kl": curves, "perplexity": {"feature": curves["feature"]}},
        texts=texts,
    )


def make_synthetic_records(*, n_features: int, seed: int = 0, n_documents: int = 48) -> Iterator[dict[str, Any]]:
    """Yield the invented records, as they are before they are packed."""
    text = make_text(seed, n_documents)
    return (_make_record(text, seed, latent, n_features) for latent in range(n_features))


def make_synthetic_vocabulary() -> Vocabulary:
    """Return the invented vocabulary: BOS, words with and without a leading space, punctuation, strange and broken tokens."""
    tokens = ["<|bos|>", *_WORDS, *(f" {word}" for word in _WORDS), *_PLAIN, *_STRANGE]
    raw = {len(tokens) + place: data for place, data in enumerate(_BROKEN)}
    return Vocabulary([*tokens, *(data.decode(errors="replace") for data in _BROKEN)], raw, [BOS], [])


def make_synthetic_table(vocabulary: Vocabulary, records: list[dict[str, Any]]) -> pa.Table:
    """Return the rows of `features.parquet` that belong to `records`."""
    rows = []
    for record in records:
        top = record["examples"]["top"]
        peaks = list(dict.fromkeys(vocabulary.text(window["tokens"][window["peak"]]) for window in top))
        raised, lowered = ([vocabulary.text(token) for token, _ in record["logits"][end]] for end in ("top", "bottom"))
        n_examples = len(top) + len(record["examples"]["random"]) + sum(len(part["examples"]) for part in record["examples"]["intervals"])
        statistics = {key: record["statistics"][key] for key in ("count", "frequency", "mean", "max")}
        rows.append(
            {
                "latent": record["latent"],
                "is_dead": record["is_dead"],
                **statistics,
                "top_token": peaks[0] if peaks else "",
                "top_tokens": peaks,
                "top_logits": raised,
                "bottom_logits": lowered,
                "n_examples": n_examples,
                "decoder_norm": 1.0,
            }
        )
    return pa.Table.from_pylist(rows, schema=FEATURE_SCHEMA)


def make_text(seed: int, n_documents: int, length: int = 256) -> InventedText:
    """Draw documents from the small invented vocabulary."""
    vocabulary = make_synthetic_vocabulary()
    generator = stream(seed, "synthetic", "text").generator()
    n_words, n_plain = 2 * len(_WORDS), len(_PLAIN)
    weights = np.full(len(vocabulary.tokens), 0.02)
    weights[1 : 1 + n_words] = 1 / (1 + np.arange(n_words) % len(_WORDS)) ** 0.4
    weights[1 + n_words : 1 + n_words + n_plain] = 1.2
    weights[BOS] = 0
    ids = generator.choice(len(weights), size=(n_documents, length), p=weights / weights.sum())
    ids[:, 0] = BOS
    joined = [[len(vocabulary.tokens) - len(_BROKEN) + place for place in places] for places in ((0, 1), (2, 3), (4, 5))]
    for document in range(n_documents):  # characters that span two tokens
        place = int(generator.integers(1, length - 2))
        ids[document, place : place + 2] = joined[document % len(joined)]
    return make_invented_text(vocabulary, ids.reshape(-1), length)


def make_invented_text(vocabulary: Vocabulary, token_ids: NDArray[np.int64], document_length: int) -> InventedText:
    """Return a text whose vocabulary knows how often each token occurs in it."""
    order = order_tokens([token_ids], len(vocabulary.tokens)).tolist()
    return InventedText(vocabulary._replace(order=order), token_ids, document_length)


def _make_record(text: InventedText, seed: int, latent: int, n_features: int, *, is_sink: bool = False) -> dict[str, Any]:
    generator = stream(seed, "synthetic", latent).generator()
    n_tokens = len(text.vocabulary.tokens)
    is_dead = latent % 13 == 12
    activations = np.zeros(len(text.token_ids))
    if not is_dead:
        targets = [1 + latent % (n_tokens - 1), 1 + int(generator.integers(n_tokens - 1))]
        strength = generator.lognormal(0, 0.5, len(text.token_ids)) * np.where(np.roll(text.token_ids, 1) % 3 == latent % 3, 2.0, 0.8)
        activations = np.where(text.token_ids == targets[0], strength, np.where(text.token_ids == targets[1], 0.4 * strength, 0))
        activations = np.where(generator.random(len(activations)) < 0.01, 0.1 * strength, activations)
        activations[text.token_ids == BOS] = 0
    if is_sink:
        activations = np.where(np.arange(len(text.token_ids)) % text.document_length == 1, 5.0 + latent, 0.1 * activations)
    activations = np.where(activations > 0, np.maximum(rounded(activations), 1e-3), 0)
    return describe_firings(text, activations, latent, n_features, generator)


def describe_firings(
    text: InventedText,
    activations: NDArray[np.float64],
    latent: int,
    n_features: int,
    generator: np.random.Generator,
    shown: Shown = _SHOWN,
) -> dict[str, Any]:
    """Return the record of a latent that fires as `activations` say, one number a token."""
    n_tokens = len(text.vocabulary.tokens)
    rows = np.flatnonzero(activations)
    best = rows[np.argsort(-activations[rows], kind="stable")][: shown.top]
    drawn = np.sort(generator.permutation(rows)[: shown.random]) if len(rows) else rows
    quantiles = np.quantile(activations[rows], np.linspace(0, 1, shown.intervals + 1)).tolist() if len(rows) else []
    effects = generator.normal(0, 1, n_tokens)
    effects[1 + latent % (n_tokens - 1)] = 4.5 + generator.random()
    if latent % _GROUP_OF < len(GROUPED):
        effects[1 + _WORDS.index(GROUPED[latent % _GROUP_OF])] = 6.0
    others = [other for other in dict.fromkeys(generator.integers(n_features, size=24).tolist()) if other != latent][:8]
    cosines = sorted(np.round(generator.random(len(others)) ** 2, 3).tolist(), reverse=True)
    return {
        "version": RECORD_VERSION,
        "latent": latent,
        "is_dead": bool(not len(rows)),
        "statistics": {
            "count": len(rows),
            "frequency": float(f"{len(rows) / int((text.token_ids != BOS).sum()):.4g}"),
            "mean": float(f"{activations[rows].mean():.4g}") if len(rows) else 0,
            "max": float(activations.max()),
            "quantiles": [float(f"{value:.4g}") for value in quantiles],
            "histogram": _histogram(activations[rows]),
        },
        "examples": {
            "top": [_window(text, activations, int(row)) for row in best],
            "intervals": _intervals(text, activations, rows, quantiles, generator, shown.per_interval),
            "random": [_window(text, activations, int(row)) for row in drawn],
        },
        "logits": _logits(effects),
        "logits_reason": None,
        "neighbours": [list(pair) for pair in zip(others, cosines, strict=True)],
        "coactivations": [[other, cosine, 1 + int(300 * cosine)] for other, cosine in zip(reversed(others), cosines, strict=True)],
    }


def _window(text: InventedText, activations: NDArray[np.float64], row: int) -> dict[str, Any]:
    document, place = divmod(row, text.document_length)
    first = max(0, place - _WINDOW) + document * text.document_length
    last = min(text.document_length, place + _WINDOW + 1) + document * text.document_length
    inside = activations[first:last]
    return {
        "row": [document % 4, document // 4 * text.document_length + place],
        "document": f"invented/module_{document:03d}.py",
        "tokens": text.token_ids[first:last].tolist(),
        "peak": row - first,
        "position": place,
        "activation": float(activations[row]),
        "activations": [[int(offset), float(inside[offset])] for offset in np.flatnonzero(inside)],
        "masked": np.flatnonzero(text.token_ids[first:last] == BOS).tolist(),
        **({"roles": _invent_roles(first, last)} if text.is_messages else {}),
    }


def _invent_roles(first: int, last: int) -> list[list[Any]]:
    """Let user and assistant take turns, with words of a chat template between them."""
    names = [("template", "user", "template", "assistant")[row // 8 % 4] for row in range(first, last)]
    return [[i, name] for i, name in enumerate(names) if i == 0 or names[i - 1] != name]


def _intervals(
    text: InventedText,
    activations: NDArray[np.float64],
    rows: NDArray[np.int64],
    quantiles: list[float],
    generator: np.random.Generator,
    per_interval: int,
) -> list[dict[str, Any]]:
    shown = []
    for i, (low, high) in enumerate(pairwise(quantiles)):
        is_last = i == len(quantiles) - 2
        inside = rows[(activations[rows] >= low) & ((activations[rows] < high) | is_last)]
        if len(inside):
            drawn = np.sort(generator.permutation(inside)[:per_interval])
            examples = [_window(text, activations, int(row)) for row in drawn]
            shown.append({"low": float(f"{low:.4g}"), "high": float(f"{high:.4g}"), "examples": examples})
    return shown


def _histogram(values: NDArray[np.float64]) -> dict[str, list[Any]]:
    if not len(values):
        return {"edges": [], "counts": []}
    bins = values.astype("<f4").view("<u4") >> 21
    numbers = np.arange(bins.min(), bins.max() + 2, dtype="<u4")
    return {"edges": (numbers << 21).view("<f4").tolist(), "counts": np.bincount(bins - bins.min()).tolist()}


def _logits(effects: NDArray[np.float64]) -> dict[str, Any]:
    order = np.argsort(-effects, kind="stable")
    effects = rounded(effects)
    counts, edges = np.histogram(effects, 40)
    return {
        "top": [[int(token), float(effects[token])] for token in order[:10]],
        "bottom": [[int(token), float(effects[token])] for token in order[::-1][:10]],
        "histogram": {"low": float(f"{edges[0]:.4g}"), "high": float(f"{edges[-1]:.4g}"), "counts": counts.tolist()},
    }


def describe_invented(n_features: int, text: InventedText, sae: str = "synthetic", *, has_sinks: bool = False) -> dict[str, Any]:
    """Return the description of an invented bundle."""
    n_documents = len(text.token_ids) // text.document_length
    ordinary, outliers = {"fvu": 0.386, "l0": 8.1, "ce_recovered": 0.92}, {"fvu": 0.004, "l0": 2.5, "ce_recovered": 0.71}
    apart = (ordinary, outliers) if has_sinks else ({"fvu": 0.21, "l0": 8.0, "ce_recovered": 0.93}, dict.fromkeys(outliers))
    return {
        "is_synthetic": True,
        "pipeline": "synthetic",
        "model": {"name": "synthetic", "revision": "none", "fingerprint": "none"},
        "hook_point": "resid_post.2",
        "d_in": 64,
        "d_sae": n_features,
        "sae": {"name": sae, "artifact_id": "0" * 32, "config": {"architecture": "batch_topk", "d_sae": n_features, "k": 8}},
        "evaluation": {
            "n_rows": 4096,
            "l0": 8.0,
            "fvu": 0.21,
            "ce_recovered": 0.93,
            "kl": 0.04,
            "dead_share": round(1 / 13, 4),
            "norm_multiple": 10.0,
            "outlier_share": 12 / 4096 if has_sinks else 0.0,
            **{f"{key}_{group}": value for group, found in zip(("ordinary", "outliers"), apart, strict=True) for key, value in found.items()},
        },
        "corpus": {"source": "invented", "n_shards": 4, **({"excluded_positions": 2, "n_excluded": n_documents} if has_sinks else {})},
        "tokens_scanned": int((text.token_ids != BOS).sum()),
        "coactivation_rows": 4096,
        "logits_reason": None,
        "features": {"top_k": 20, "n_random": 200, "window": _WINDOW, "n_intervals": _N_INTERVALS, "examples_per_interval": 4},
        "records": {"version": RECORD_VERSION, "per_file": RECORDS_PER_FILE, "n_files": -(-n_features // RECORDS_PER_FILE), "repeat": None},
    }


def rounded(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Round to four significant digits, as records are."""
    exponent = np.floor(np.log10(np.where(values == 0, 1, np.abs(values))))
    return np.round(values * 10.0 ** (3 - exponent)) / 10.0 ** (3 - exponent)
