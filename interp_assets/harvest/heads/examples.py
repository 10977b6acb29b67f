"""Pass B: the candidates of all shards become the statistics and the examples of one layer's heads.

1. Add up the statistics: whole numbers, so the order of the shards does not matter.
2. Cut the histogram of row scores into `n_intervals` of about equally many rows, at edges of bins. In each, the `examples_per_interval` rows of
   smallest priority are a uniform choice, because every shard kept more than so many of each bin. Where one bin holds more rows than an
   interval should, there are fewer intervals.
3. The strongest `top_k` rows, one of a document, whose surroundings differ.

The files are described in docs/formats/head_examples.md.
"""

import io
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from interp_assets.compute.head_loops import N_SCORES, SCORE_ORIGIN
from interp_assets.corpus.contexts import first_of_each
from interp_assets.harvest.heads.candidates import SAMPLED, STRONGEST, load_candidates
from interp_assets.harvest.heads.refs import candidates_ref, examples_lineage, examples_ref, head_shards, heads_of
from interp_assets.harvest.heads.statistics import HeadStatistics, as_statistics, merge_statistics, statistics_arrays
from interp_assets.planning.pipeline import Pipeline
from interp_assets.planning.sections import HeadsConfig
from interp_assets.storage.lineage import Digests, create_current, find_current, trace
from interp_assets.storage.manifest import Manifest, Produced, load_manifest, read_file, timed
from interp_assets.storage.store import Store
from interp_assets.storage.tensors import load_tensors, save_tensors

EXAMPLES: Final = "examples.parquet"
STATISTICS: Final = "statistics.safetensors"
TOP, INTERVAL = 1, 2
"""Bits of `kind`."""
EXAMPLE_SCHEMA: Final = pa.schema(
    [("head", pa.uint16()), ("row_id", pa.uint64()), ("score", pa.float32()), ("kind", pa.uint8()), ("interval", pa.int16()), ("rank", pa.uint16())]
)
_BIN_SHIFT: Final = 21


@timed
def select_head_examples(pipeline: Pipeline, store: Store, layer: int) -> Produced:
    """Run pass B for one layer. Raises `ArtifactMissingError` for a shard without candidates."""
    ref = examples_ref(pipeline, layer)
    kept = trace(Digests(store), examples_lineage(pipeline, layer))
    if current := find_current(store, ref, kept):
        return Produced(ref, current, is_cached=True)
    refs = [candidates_ref(pipeline, index) for index in head_shards(pipeline)]
    manifests = [load_manifest(store, each) for each in refs]
    found = [load_candidates(store, each, manifest, layer) for each, manifest in zip(refs, manifests, strict=True)]
    statistics = merge_statistics([each for each, _ in found])
    edges = cut_intervals(statistics.score, heads_of(pipeline).n_intervals)
    table = _choose(pa.concat_tables([each for _, each in found]), edges, heads_of(pipeline))
    with create_current(store, ref, kept) as art:
        with art.open(EXAMPLES, n_rows=table.num_rows) as sink:
            buffer = io.BytesIO()
            pq.write_table(table, buffer, compression="zstd", use_dictionary=False)
            sink.write(buffer.getbuffer())
        save_tensors(art, STATISTICS, {**statistics_arrays(statistics), "edges": edges}, n_rows=statistics.n_heads)
        art.facts |= {
            "layer": layer,
            "n_heads": statistics.n_heads,
            "n_rows": int(statistics.sum_of("rows").max(initial=0)),
            "n_examples": table.num_rows,
            **manifests[0].facts["layers"][str(layer)],
        }
    return art.produced


def load_head_examples(pipeline: Pipeline, store: Store, layer: int) -> tuple[Manifest, HeadStatistics, NDArray[np.int64], pa.Table]:
    """Read and verify one layer's examples: manifest, statistics, edges of the intervals [heads, intervals + 1], table."""
    ref = examples_ref(pipeline, layer)
    manifest = load_manifest(store, ref)
    tensors = load_tensors(store, ref.path, manifest, STATISTICS)
    table = pq.read_table(io.BytesIO(read_file(store, ref.path, manifest, EXAMPLES)))
    return manifest, as_statistics(tensors), tensors["edges"].numpy(), table


def cut_intervals(counts: NDArray[np.int64], n_intervals: int) -> NDArray[np.int64]:
    """Return for each head the edges of its intervals, as numbers of bins [heads, intervals + 1]; one that begins where it ends has no rows."""
    before = np.concatenate([np.zeros((len(counts), 1), np.int64), np.cumsum(counts, axis=1)], axis=1)
    edges = np.empty((len(counts), n_intervals + 1), np.int64)
    for i in range(n_intervals + 1):
        edges[:, i] = np.abs(before * n_intervals - before[:, -1:] * i).argmin(axis=1)
    edges[:, -1] = counts.shape[1]
    return np.maximum.accumulate(edges, axis=1)


def bins_of(scores: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return the bin of each row score: quarter octaves from 2^-40."""
    return np.clip((scores.view(np.uint32) >> np.uint32(_BIN_SHIFT)).astype(np.int64) - SCORE_ORIGIN, 0, N_SCORES - 1)


def bin_edge(place: int) -> float:
    """Return the lower edge of a bin."""
    return float(np.array([place + SCORE_ORIGIN << _BIN_SHIFT], np.uint32).view(np.float32)[0])


def _choose(pool: pa.Table, edges: NDArray[np.int64], heads: HeadsConfig) -> pa.Table:
    columns = {name: pool.column(name).to_numpy() for name in pool.column_names}
    n = len(columns["head"])
    order = columns["priority"]
    chosen, interval, rank = np.zeros(n, np.uint8), np.full(n, -1, np.int16), np.zeros(n, np.uint16)
    top = np.flatnonzero(columns["kind"] & STRONGEST)
    top = top[np.lexsort((order[top], -columns["score"][top], columns["head"][top]))]
    top = top[_first(columns["head"][top], heads.n_kept_top)]  # what any division into shards keeps
    top = top[first_of_each(columns["head"][top], columns["text"][top], heads.top_k)]
    chosen[top] = TOP
    rank[top] = _ranks(columns["head"][top])
    bins = bins_of(columns["score"])
    places = np.zeros(n, np.int64)
    for i in range(1, edges.shape[1] - 1):
        places += bins >= edges[columns["head"], i]
    drawn = np.flatnonzero(columns["kind"] & SAMPLED)
    drawn = drawn[np.lexsort((order[drawn], places[drawn], columns["head"][drawn]))]
    segments = columns["head"][drawn].astype(np.int64) * heads.n_intervals + places[drawn]
    drawn = drawn[_first(segments, heads.examples_per_interval)]
    chosen[drawn] |= INTERVAL
    interval[drawn] = places[drawn]
    kept = np.flatnonzero(chosen)
    kept = kept[np.lexsort((columns["row_id"][kept], columns["head"][kept]))]
    made: dict[str, NDArray[Any]] = {name: columns[name][kept] for name in ("head", "row_id", "score")}
    made |= {"kind": chosen[kept], "interval": interval[kept], "rank": rank[kept]}
    return pa.table([pa.array(made[name]) for name in EXAMPLE_SCHEMA.names], schema=EXAMPLE_SCHEMA)


def _ranks(segments: NDArray[Any]) -> NDArray[np.int64]:
    """Return the place of each element in its segment; segments come sorted."""
    return np.arange(len(segments)) - np.searchsorted(segments, segments)


def _first(segments: NDArray[Any], n: int) -> NDArray[np.bool_]:
    return _ranks(segments) < n
