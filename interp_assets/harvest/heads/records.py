"""Pass D: statistics, examples and patterns of one layer become the records that people look at, one gzip member of JSON a head.

A record holds the texts of its examples, so one range request opens one head. Beside every share stands what a head that looks at all visible
keys alike would have. The format is described in docs/formats/head_record.md.
"""

import base64
import gzip
import io
import json
from itertools import pairwise
from typing import Any, Final, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from interp_assets.corpus.tokens import TokenShard, load_documents, load_tokens
from interp_assets.errors import ArtifactCorruptError, ArtifactForeignError, InputError
from interp_assets.harvest.heads.examples import INTERVAL, TOP, bin_edge, load_head_examples
from interp_assets.harvest.heads.patterns import TOP_KEYS, read_patterns
from interp_assets.harvest.heads.refs import HEAD_RECORD_VERSION, head_counts, head_shards, layer_key, patterns_ref, records_lineage, records_ref
from interp_assets.harvest.heads.statistics import CHANCES, MEANS, HeadStatistics
from interp_assets.harvest.heads.tokens import load_chosen
from interp_assets.planning.pipeline import SHARD_SHIFT, Pipeline
from interp_assets.planning.progress import Advance, choose_word, unheard
from interp_assets.storage.foreign import parse_json, unpack_gzip
from interp_assets.storage.lineage import Digests, create_current, find_current, trace
from interp_assets.storage.manifest import Produced, load_manifest, read_file, read_range, timed
from interp_assets.storage.store import Store

RECORDS: Final = "records.bin"
INDEX: Final = "records.idx"
HEADS: Final = "heads.parquet"
MAX_RECORD_BYTES: Final = 16 << 20
SHOWN_TOKENS: Final = 20
LEAST_OCCURRENCES: Final = 10
"""A token that occurs less often says nothing of a head."""
_ROW_MASK: Final = (1 << SHARD_SHIFT) - 1
_DIGITS: Final = 5


@timed
def write_head_records(pipeline: Pipeline, store: Store, layer: int, progress: Advance = unheard) -> Produced:
    """Run pass D for one layer; `progress` is advanced by heads. Raises `ArtifactCorruptError` for an example without its pattern."""
    ref = records_ref(pipeline, layer)
    kept = trace(Digests(store), records_lineage(pipeline, layer))
    if current := find_current(store, ref, kept):
        return Produced(ref, current, is_cached=True)
    evidence = _load(pipeline, store, layer)
    statistics = evidence.statistics
    offsets = [0]
    with create_current(store, ref, kept) as art:
        with art.open(RECORDS, n_rows=statistics.n_heads) as sink:
            for head in range(statistics.n_heads):
                record = _make_record(evidence, layer, head)
                data = gzip.compress(json.dumps(record, separators=(",", ":"), allow_nan=False).encode(), 9, mtime=0)
                sink.write(data)
                offsets.append(offsets[-1] + len(data))
                progress(1)
        art.put(INDEX, np.array(offsets, "<u8").tobytes(), n_rows=len(offsets))
        buffer = io.BytesIO()
        tabulate(layer, statistics).write_parquet(buffer)
        art.put(HEADS, buffer.getvalue(), n_rows=statistics.n_heads)
        art.facts |= {**evidence.described, "bytes_per_head": round(offsets[-1] / max(1, statistics.n_heads), 1)}
    return art.produced


def read_tables(pipeline: Pipeline, store: Store) -> pl.DataFrame:
    """Read the statistics of all heads, one line each. Raises `ArtifactMissingError` for a layer without records."""
    tables = []
    for layer in head_counts(pipeline):
        ref = records_ref(pipeline, layer)
        tables.append(pl.read_parquet(io.BytesIO(read_file(store, ref.path, load_manifest(store, ref), HEADS))))
    return pl.concat(tables)


def read_head(pipeline: Pipeline, store: Store, name: str) -> dict[str, Any]:
    """Read the record of a head, named by layer and place in it (`5.3`). Raises `InputError` with what there is."""
    counts = head_counts(pipeline)
    layer, _, head = name.partition(".")
    if not (layer.isdigit() and head.isdigit() and int(head) < counts.get(int(layer), 0)):
        shown = ", ".join(f"{layer}.0 to {layer}.{n - 1}" for layer, n in list(counts.items())[:4])
        raise InputError(f"There is no head {name!r}; there are {shown}{' and more' if len(counts) > 4 else ''}.")
    ref = records_ref(pipeline, int(layer))
    manifest = load_manifest(store, ref)
    start, stop = np.frombuffer(read_range(store, ref.path, manifest, INDEX, 8 * int(head), 16), "<u8").tolist()
    return unpack_head_record(read_range(store, ref.path, manifest, RECORDS, start, stop - start), f"{store.url}/{ref.path}/{RECORDS}, head {name},")


def unpack_head_record(member: bytes, where: str) -> dict[str, Any]:
    """Return the record of a gzip member, its keys and masses as lists.

    Raises `ArtifactForeignError` for another version, `ArtifactCorruptError` for what is no record.
    """
    try:
        record = parse_json(unpack_gzip(member, MAX_RECORD_BYTES))
        if record["version"] != HEAD_RECORD_VERSION:
            raise ArtifactForeignError(
                f"{where} has version {record['version']}; this release reads version {HEAD_RECORD_VERSION}. Upgrade interp-assets, or materialize "
                "`head_records` again."
            )
        for example in record["examples"]:
            _unpack_rows(example, len(record["contexts"][example["context"]]["tokens"]))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ArtifactCorruptError(f"{where} is no head record ({error!r}). Materialize it again.") from error
    return record


def _unpack_rows(example: dict[str, Any], n_tokens: int) -> None:
    keys, masses = (np.frombuffer(base64.b64decode(example[name]), kind) for name, kind in (("keys", "<u4"), ("masses", "u1")))
    if len(keys) != len(masses) or len(keys) % TOP_KEYS or (len(keys) and int(keys.max()) >= n_tokens):
        raise ValueError(f"{len(keys)} keys and {len(masses)} masses for a context of {n_tokens} tokens")
    example["keys"], example["masses"] = keys.reshape(-1, TOP_KEYS).tolist(), masses.reshape(-1, TOP_KEYS).tolist()


def tabulate(layer: int, statistics: HeadStatistics) -> pl.DataFrame:
    """Return one line a head: all means and chances; null where no row has what is measured."""
    columns = {name: statistics.mean_of(name) for name in (*MEANS, *CHANCES)}
    heads = np.arange(statistics.n_heads, dtype=np.uint16)
    table = pl.DataFrame({"layer": np.full(statistics.n_heads, layer, np.uint16), "head": heads, "rows": statistics.sum_of("rows"), **columns})
    return table.with_columns(pl.col(*columns).fill_nan(None))


class _Shard(NamedTuple):
    tokens: TokenShard
    sources: list[str]


class _Evidence(NamedTuple):
    described: dict[str, Any]
    statistics: HeadStatistics
    edges: NDArray[np.int64]
    examples: list[dict[str, Any]]
    chosen: NDArray[np.uint32]
    shards: dict[int, _Shard]


def _load(pipeline: Pipeline, store: Store, layer: int) -> _Evidence:
    manifest, statistics, edges, table = load_head_examples(pipeline, store, layer)
    patterns: dict[tuple[int, int], dict[str, Any]] = {}
    for index in head_shards(pipeline):
        ref = patterns_ref(pipeline, index)
        found = read_patterns(store, ref, load_manifest(store, ref), layer)
        patterns |= {(row["head"], row["row_id"]): row for row in found.to_pylist()}
    examples = table.to_pylist()
    lost = sorted({row["row_id"] >> SHARD_SHIFT for row in examples if (row["head"], row["row_id"]) not in patterns})
    if lost:
        named = f"{choose_word(len(lost), 'shard')} {', '.join(map(str, lost))}"
        raise ArtifactCorruptError(f"Examples of {layer_key(layer)} in {named} have no pattern. Materialize example_patterns there again.")
    needed = sorted({row["row_id"] >> SHARD_SHIFT for row in examples})
    shards = {index: _Shard(load_tokens(pipeline, store, index), load_documents(pipeline, store, index).sources) for index in needed}
    described = {name: value for name, value in manifest.facts.items() if name != "made_from"}
    joined = [{**row, **patterns[row["head"], row["row_id"]]} for row in examples]
    return _Evidence(described, statistics, edges, joined, load_chosen(pipeline, store), shards)


def _make_record(evidence: _Evidence, layer: int, head: int) -> dict[str, Any]:
    statistics = evidence.statistics
    contexts: dict[int, int] = {}
    rows = [row for row in evidence.examples if row["head"] == head]
    examples = [_make_example(row, contexts) for row in rows]
    counts, edges = statistics.score[head], evidence.edges[head]
    occupied = np.flatnonzero(counts)
    first, stop = (int(occupied[0]), int(occupied[-1]) + 1) if len(occupied) else (0, 0)
    n_rows = int(statistics.sum_of("rows")[head])
    return {
        "version": HEAD_RECORD_VERSION,
        "layer": layer,
        "head": head,
        **{name: evidence.described[name] for name in ("n_key_heads", "window", "softcap", "has_sinks")},
        "rows": n_rows,
        "statistics": {name: _shown(float(statistics.mean_of(name)[head])) for name in MEANS},
        "chance": {name: _shown(float(statistics.mean_of(f"uniform_{name}")[head])) for name in (each.removeprefix("uniform_") for each in CHANCES)},
        "distance": _shares(statistics.distance_mass[head], n_rows),
        "distance_chance": _shares(statistics.uniform_distance_mass[0], n_rows),
        "score": {"edges": [_shown(bin_edge(place)) for place in range(first, stop + 1)] if stop else [], "counts": counts[first:stop].tolist()},
        "keys": _list_tokens(evidence, statistics.key_mass[head], statistics.uniform_key_mass[0], 0),
        "queries": _list_tokens(evidence, statistics.query_mass[head], statistics.uniform_query_mass[0], 1),
        "top": [i for _, i in sorted((row["rank"], i) for i, row in enumerate(rows) if row["kind"] & TOP)],
        "intervals": [
            _make_interval(counts, place, int(low), int(high), rows) for place, (low, high) in enumerate(pairwise(edges)) if counts[low:high].sum()
        ],
        "examples": examples,
        "contexts": [_make_context(evidence, row_id, rows) for row_id in contexts],
    }


def _make_interval(counts: NDArray[np.int64], place: int, low: int, high: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return an interval's range, as far as there are rows in it, and its examples."""
    occupied = np.flatnonzero(counts[low:high]) + low
    return {
        "low": _shown(bin_edge(int(occupied[0]))),
        "high": _shown(bin_edge(int(occupied[-1]) + 1)),
        "rows": int(counts[low:high].sum()),
        "examples": [i for i, row in enumerate(rows) if row["kind"] & INTERVAL and row["interval"] == place],
    }


def _make_example(row: dict[str, Any], contexts: dict[int, int]) -> dict[str, Any]:
    return {
        "context": contexts.setdefault(row["first_row"], len(contexts)),
        "query": (row["row_id"] & _ROW_MASK) - (row["first_row"] & _ROW_MASK),
        "score": _shown(row["score"]),
        "first_query": row["first_query"],
        "keys": base64.b64encode(np.array(row["keys"], "<u4").tobytes()).decode(),
        "masses": base64.b64encode(np.array(row["masses"], "u1").tobytes()).decode(),
    }


def _make_context(evidence: _Evidence, first_row: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    shard, first = first_row >> SHARD_SHIFT, first_row & _ROW_MASK
    length = next(row["length"] for row in rows if row["first_row"] == first_row)
    tokens, sources = evidence.shards[shard]
    documents = tokens.documents[first : first + length]
    starts = np.flatnonzero(np.diff(documents.astype(np.int64), prepend=-1)).tolist()
    return {
        "row": [shard, first],
        "tokens": tokens.token_ids[first : first + length].tolist(),
        "documents": [[start, sources[int(documents[start])]] for start in starts],
    }


def _list_tokens(evidence: _Evidence, masses: NDArray[np.int64], chance: NDArray[np.int64], which: int) -> list[list[Any]]:
    """Return the tokens of most lift over chance: id, lift, mass for each occurrence, occurrences."""
    counts = evidence.statistics.token_counts[which]
    known = np.flatnonzero((counts >= LEAST_OCCURRENCES) & (chance > 0))
    known = known[known < len(evidence.chosen)]
    lift = masses[known] / chance[known]
    best = known[np.lexsort((known, -lift))][:SHOWN_TOKENS]
    return [
        [int(evidence.chosen[i]), _shown(float(masses[i] / chance[i])), _shown(float(masses[i] / 2.0**24 / counts[i])), int(counts[i])]
        for i in best.tolist()
        if masses[i] > 0
    ]


def _shares(masses: NDArray[np.int64], n_rows: int) -> list[float | None]:
    used = int(np.flatnonzero(masses)[-1]) + 1 if masses.any() else 0
    return [_shown(mass / 2.0**24 / max(1, n_rows)) for mass in masses[:used].tolist()]


def _shown(value: float) -> float | None:
    """Return a number of a few digits; None for one that is not there."""
    return float(f"{value:.{_DIGITS}g}") if np.isfinite(value) else None
