"""A seed becomes a bundle of up to ten million invented features, to measure the browser at a size that no test model has.

    list, orders, index, features.parquet    really that long: every feature has numbers and tokens of its own
    records                                  `POOL` of them, of real size (70 examples of 65 tokens), which repeat: 80 GB would tell no more

`bundle.json` says so (`is_synthetic`, and `records.repeat`), and so do the pages: feature i shows the record of feature i modulo `POOL`, whose
numbers are not those of its row in the list. The text is drawn from 32,000 pseudo-words by Zipf's law, because a small vocabulary would pack
better than real text does. A few minutes for ten million on two cores, half a gigabyte of memory.
"""

import time
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from synthetic_bundle import (
    BOS,
    InventedText,
    Shown,
    describe_firings,
    describe_invented,
    make_invented_text,
    make_synthetic_vocabulary,
    rounded,
)

from interp_assets.compute.seeds import stream
from interp_assets.storage.manifest import Produced, create_artifact, find_manifest, make_ref
from interp_assets.storage.store import Store
from interp_assets.visualize.packing import RECORD_VERSION, TokenOrder, pack_record
from interp_assets.visualize.records import FEATURE_SCHEMA
from interp_assets.web.bundle import RECORDS_PER_FILE, BundleContent, write_bundle
from interp_assets.web.map import Layout
from interp_assets.web.refs import FOLDER
from interp_assets.web.vocabulary import Vocabulary

POOL: Final = RECORDS_PER_FILE
"""Records that are really made."""
SHOWN: Final = Shown(top=20, intervals=10, per_interval=3, random=20)
N_WORDS: Final = 32_000
_TABLE_ROWS: Final = 1 << 18
_SYLLABLES: Final = (
    "an",
    "ber",
    "co",
    "da",
    "el",
    "fi",
    "gor",
    "ha",
    "in",
    "ju",
    "ka",
    "lo",
    "mi",
    "ne",
    "or",
    "pa",
    "qui",
    "re",
    "st",
    "ti",
    "um",
    "ve",
)
_N_DOCUMENTS: Final = 128
_DOCUMENT: Final = 256
_DEAD: Final = 0.08
_TOKENS_SCANNED: Final = 100_000_000


def build_scale_bundle(store: Store, *, n_features: int, seed: int = 0, pool: int = POOL) -> Produced:
    """Write a bundle of `n_features` invented features into `6-web` of `store`; at most `pool` records are made, then they repeat."""
    start = time.perf_counter()
    n_records = min(pool, n_features)
    identity = {"synthetic": 6, "seed": seed, "n_features": n_features, "pool": n_records}
    ref = make_ref("feature_bundle", FOLDER, identity=identity, inputs={}, label=f"synthetic-{n_features}")
    existing = find_manifest(store, ref)
    if existing:
        return Produced(ref, existing, is_cached=True, wall_s=time.perf_counter() - start)
    text = _make_text(seed)
    described = describe_invented(n_features, text)
    description = {
        **described,
        "tokens_scanned": _TOKENS_SCANNED,
        "features": {**described["features"], "top_k": SHOWN.top, "n_intervals": SHOWN.intervals, "examples_per_interval": SHOWN.per_interval},
        "records": {
            "version": RECORD_VERSION,
            "per_file": RECORDS_PER_FILE,
            "n_files": -(-n_records // RECORDS_PER_FILE),
            "repeat": n_records if n_records < n_features else None,
        },
    }
    tokens = TokenOrder(text.vocabulary.order)
    words = pa.array(text.vocabulary.tokens, pa.string())
    members = (_make_member(text, tokens, seed, latent, n_features) for latent in range(n_records))
    content = BundleContent(description, lambda: _make_tables(words, seed, n_features), members, text.vocabulary, _invent_layout(seed, n_features))
    with create_artifact(store, ref) as art:
        write_bundle(art, content)
    assert art.manifest
    return Produced(ref, art.manifest, is_cached=False, wall_s=time.perf_counter() - start)


def _invent_layout(seed: int, n_features: int) -> Layout:
    """Draw a map of blobs; features of neighbouring numbers are no neighbours."""
    generator = stream(seed, "scale", "map").generator()
    centres, sizes = generator.normal(0, 1, (60, 2)), generator.uniform(0.03, 0.3, 60)
    blob = generator.integers(60, size=n_features)
    return Layout((centres[blob] + generator.normal(0, 1, (n_features, 2)) * sizes[blob, None]).astype(np.float32), "invented", None)


def _make_text(seed: int) -> InventedText:
    generator = stream(seed, "scale", "text").generator()
    small = make_synthetic_vocabulary()
    parts = generator.integers(len(_SYLLABLES), size=(N_WORDS, 4))
    lengths, spaced = generator.integers(1, 5, N_WORDS), generator.random(N_WORDS) < 0.6
    words = [" " * bool(spaced[i]) + "".join(_SYLLABLES[part] for part in parts[i, : lengths[i]]) for i in range(N_WORDS)]
    vocabulary = Vocabulary([*small.tokens, *dict.fromkeys(words)], small.raw, small.special, [])
    ids = _draw_words(generator, len(vocabulary.tokens), _N_DOCUMENTS * _DOCUMENT).reshape(_N_DOCUMENTS, _DOCUMENT)
    ids[:, 0] = BOS
    return make_invented_text(vocabulary, ids.reshape(-1).astype(np.int64), _DOCUMENT)


def _draw_words(generator: np.random.Generator, n_words: int, n: int) -> NDArray[np.uint32]:
    """Draw word numbers with a frequency about 1 / rank, special tokens excepted."""
    return (np.exp(generator.random(n) * np.log(n_words - 1)).astype(np.uint32)).clip(1, n_words - 1)


def _make_member(text: InventedText, tokens: TokenOrder, seed: int, latent: int, n_features: int) -> bytes:
    generator = stream(seed, "scale", "record", latent).generator()
    activations = np.zeros(len(text.token_ids))
    if generator.random() >= _DEAD:
        rows = generator.integers(0, len(text.token_ids), int(generator.integers(200, 800)))
        rows = np.unique(np.concatenate([rows, rows[::8] + 1, rows[::16] + 3]) % len(text.token_ids))
        rows = rows[text.token_ids[rows] != BOS]
        activations[rows] = np.maximum(rounded(generator.lognormal(0, 0.7, len(rows))), 1e-3)
    record = describe_firings(text, activations, latent, n_features, generator, SHOWN)
    return pack_record(record, tokens)


def _make_tables(words: pa.Array, seed: int, n_features: int) -> Iterator[pa.Table]:
    """Yield the table of all features, some hundred thousand rows at a time; the same every time."""
    for first in range(0, n_features, _TABLE_ROWS):
        generator = stream(seed, "scale", "table", first).generator()
        n = min(_TABLE_ROWS, n_features - first)
        live = generator.random(n) >= _DEAD
        count = np.where(live, np.maximum(1, generator.lognormal(8, 2, n)).astype(np.int64).clip(1, _TOKENS_SCANNED // 2), 0)
        maximum = np.where(live, generator.lognormal(1.2, 0.7, n), 0).astype(np.float32)
        peaks = _make_lists(generator, words, np.where(live, generator.integers(1, 7, n), 0))
        columns: dict[str, Any] = {
            "latent": np.arange(first, first + n, dtype=np.uint32),
            "is_dead": ~live,
            "count": count,
            "frequency": count / _TOKENS_SCANNED,
            "mean": (maximum * generator.uniform(0.1, 0.6, n)).astype(np.float32),
            "max": maximum,
            "top_token": _first_of(peaks),
            "top_tokens": peaks,
            "top_logits": _make_lists(generator, words, np.full(n, 10)),
            "bottom_logits": _make_lists(generator, words, np.full(n, 10)),
            "n_examples": np.where(live, 70, 0).astype(np.uint32),
            "decoder_norm": generator.normal(1, 0.02, n).astype(np.float32),
        }
        yield pa.table(columns, schema=FEATURE_SCHEMA)


def _make_lists(generator: np.random.Generator, words: pa.Array, counts: NDArray[np.int64]) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    ids = _draw_words(generator, len(words), int(offsets[-1]))
    return pa.ListArray.from_arrays(pa.array(offsets), words.take(pa.array(ids)))


def _first_of(lists: pa.ListArray) -> pa.Array:
    """Return the first string of every list, or the empty string."""
    starts = pa.array(lists.offsets.to_numpy()[:-1], mask=lists.value_lengths().to_numpy() == 0)
    return lists.values.take(starts).fill_null("")
