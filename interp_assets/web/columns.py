"""Statistics of all features become files from which a list is read by range: values, orders and rows of fixed width.

    list/<column>.bin      the value of every latent, little-endian
    list/<column>.order    u32 latents: the dead ones by number, then the live ones by rising value (equal values by number)
    list/rows.bin          what a row of the list shows, `ROW.itemsize` bytes a latent; tokens are numbers of `words.json`
    words.json             every distinct token string among tops and logits, sorted: a word's number is its rank

Sorting is done here, once: a page of a sorted list is one range of an order file, and its rows are ranges of `rows.bin`. Neither server nor
page holds the table, so ten million features cost them no more than a thousand. A filter reads the whole column that it names (4 bytes a
latent) and the order, which takes 0.1 s at ten million from a local disk. `features.parquet` beside these files is for people and other tools.

Cost: 28 bytes a feature for the values, 28 for the orders, 76 for the row. Memory while it is written: the values and 32 bytes of words.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from interp_assets.errors import ArtifactCorruptError
from interp_assets.storage.foreign import parse_json
from interp_assets.storage.manifest import ArtifactWriter

WORDS: Final = "words.json"
ROWS: Final = "list/rows.bin"
NO_WORD: Final = 0xFFFFFFFF
SHOWN_WORDS: Final = 4
"""Tokens of each kind in a row; all of them are in the record, in the index and in `features.parquet`."""
ROW: Final = np.dtype(
    [
        ("count", "<f8"),
        ("frequency", "<f4"),
        ("mean", "<f4"),
        ("max", "<f4"),
        ("n_examples", "<u4"),
        ("decoder_norm", "<f4"),
        ("top_tokens", "<u4", (SHOWN_WORDS,)),
        ("top_logits", "<u4", (SHOWN_WORDS,)),
        ("bottom_logits", "<u4", (SHOWN_WORDS,)),
    ]
)
ROW_BLOCK: Final = 256 * ROW.itemsize
ORDER_BLOCK: Final = 64 << 10
WORD_COLUMNS: Final = ("top_tokens", "top_logits", "bottom_logits")
VALUES: Final = {"count": "<f8", "frequency": "<f4", "mean": "<f4", "max": "<f4", "n_examples": "<u4", "decoder_norm": "<f4"}
"""Columns that can be filtered, and how their values are stored."""
ORDERS: Final = {"latent": "latent", "count": "frequency", **{name: name for name in VALUES if name != "count"}, "top_token": "top_token"}
"""Columns that can be sorted by, and the order file of each: count and frequency stand in one order."""
_DISTRIBUTED: Final = ("frequency", "max", "mean")
_N_BINS: Final = 48


class WordIds(NamedTuple):
    """Tokens of consecutive latents as numbers of `words.json`: for each of `WORD_COLUMNS`, how many each latent has, and all of them in a row."""

    first: int
    counts: list[NDArray[np.int64]]
    ids: list[NDArray[np.uint32]]


class ListFacts(NamedTuple):
    """What the description of a bundle says about its list."""

    n_live: int
    columns: dict[str, Any]
    distributions: dict[str, dict[str, list[float]]]
    frequency: NDArray[np.float32]
    """For the map; not described."""
    words: NDArray[np.uint32]
    """Tokens that each latent fires on and raises, `[d_sae, 2, SHOWN_WORDS]`: for the map, too."""

    def described(self) -> dict[str, Any]:
        """Return what `bundle.json` holds."""
        return {"n_live": self.n_live, "columns": self.columns, "distributions": self.distributions}


def collect_words(tables: Iterable[pa.Table]) -> pa.Array:
    """Return every distinct token string of the tables, by code points."""
    found: set[str] = set()
    for table in tables:
        for name in WORD_COLUMNS:
            found.update(_flatten(table, name).unique().to_pylist())
    return pa.array(sorted(found), pa.string())


def encode_words(words: pa.Array) -> bytes:
    """Serialise the words as JSON."""
    content = {"format": "interp-assets/words", "version": 1, "words": words.to_pylist()}
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


def decode_words(data: bytes, where: str) -> list[str]:
    """Parse `words.json`. Raises `ArtifactCorruptError`."""
    try:
        words = parse_json(data)["words"]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactCorruptError(f"{where} holds no list of words ({error}). Materialize the bundle again.") from error
    return words


class ListWriter:
    """Writes the list's files of one bundle while its tables pass by."""

    def __init__(self, art: ArtifactWriter, words: pa.Array) -> None:
        """Write into `art`; `words` are those of all tables."""
        self._art = art
        self._numbers = {word: number for number, word in enumerate(words.to_pylist())}
        self._parts: dict[str, list[NDArray[Any]]] = {name: [] for name in (*VALUES, "top_token")}
        self._words: list[NDArray[np.uint32]] = []

    def write(self, tables: Iterable[pa.Table]) -> Iterator[WordIds]:
        """Write the rows of every table when its words are asked for."""
        first = 0
        with self._art.open(ROWS, block_bytes=ROW_BLOCK) as sink:
            for table in tables:
                found = WordIds(first, *self._encode(table))
                rows = np.zeros(table.num_rows, ROW)
                for name in VALUES:
                    rows[name] = table[name].to_numpy()
                    self._parts[name].append(rows[name].copy())
                for name, counts, ids in zip(WORD_COLUMNS, found.counts, found.ids, strict=True):
                    rows[name] = _first_words(counts, ids)
                self._parts["top_token"].append(rows["top_tokens"][:, 0].copy())
                self._words.append(np.stack([rows["top_tokens"], rows["top_logits"]], axis=1))
                sink.write(rows.tobytes())
                first += table.num_rows
                yield found

    def finish(self) -> ListFacts:
        """Write values and orders of all columns, after the last table."""
        values = {name: np.concatenate(parts) if parts else np.empty(0) for name, parts in self._parts.items()}
        self._parts.clear()
        live = values["count"] > 0
        dead, alive = np.flatnonzero(~live).astype("<u4"), np.flatnonzero(live).astype("<u4")
        for name in VALUES:
            self._art.put(f"list/{name}.bin", values[name].astype(VALUES[name]).tobytes(), n_rows=len(live))
        for name in dict.fromkeys(ORDERS.values()):
            ordered = alive if name == "latent" else alive[order_by(values[name][alive])]
            self._art.put(f"list/{name}.order", dead.tobytes() + ordered.tobytes(), n_rows=len(live), block_bytes=ORDER_BLOCK)
        words = np.concatenate([np.empty((0, 2, SHOWN_WORDS), np.uint32), *self._words])
        columns = {"sortable": ORDERS, "numeric": VALUES}
        shown = {name: found for name in _DISTRIBUTED if (found := _distribute(values[name][live]))}
        return ListFacts(len(alive), columns, shown, values["frequency"].astype(np.float32), words)

    def _encode(self, table: pa.Table) -> tuple[list[NDArray[np.int64]], list[NDArray[np.uint32]]]:
        counts, ids = [], []
        for name in WORD_COLUMNS:
            counts.append(table[name].combine_chunks().value_lengths().to_numpy().astype(np.int64))
            encoded = _flatten(table, name).dictionary_encode()
            numbers = np.array([self._numbers[word] for word in encoded.dictionary.to_pylist()], np.uint32)
            ids.append(numbers[encoded.indices.to_numpy()])
        return counts, ids


def order_by(values: NDArray[Any]) -> NDArray[np.uint32]:
    """Return the places of `values` by rising value, equal values by place. Numbers of 4 bytes or fewer, or f8 that fit an f4 exactly enough."""
    if values.dtype.kind == "f":
        bits = values.astype("<f4").view("<u4")
        keys = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))  # IEEE numbers, so flipped, compare like integers
    else:
        keys = values.astype("<u4")
    packed = keys.astype(np.uint64) << np.uint64(32) | np.arange(len(values), dtype=np.uint64)
    packed.sort()
    return (packed & np.uint64(0xFFFFFFFF)).astype(np.uint32)


def _flatten(table: pa.Table, name: str) -> pa.Array:
    return table[name].combine_chunks().flatten()


def _first_words(counts: NDArray[np.int64], ids: NDArray[np.uint32]) -> NDArray[np.uint32]:
    shown = np.full((len(counts), SHOWN_WORDS), NO_WORD, np.uint32)
    starts = np.cumsum(counts) - counts
    for place in range(SHOWN_WORDS):
        has = counts > place
        shown[has, place] = ids[starts[has] + place]
    return shown


def _distribute(values: NDArray[Any]) -> dict[str, list[float]] | None:
    """Return a logarithmic histogram: `edges` (n + 1) and `counts` (n)."""
    positive = values[values > 0].astype(np.float64)
    if not len(positive):
        return None
    low, high = np.log10(positive.min()), np.log10(positive.max())
    edges = np.logspace(low, high if high > low else low + 1e-6, _N_BINS + 1)
    counts = np.histogram(np.clip(positive, edges[0], edges[-1]), edges)[0]
    return {"edges": [float(f"{edge:.6g}") for edge in edges], "counts": counts.tolist()}
