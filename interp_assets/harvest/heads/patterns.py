"""Pass C: the examples that lie in one corpus shard get their rows of the pattern: each query's strongest keys, around the example's query.

Only contexts that hold an example are run again. A row keeps its `TOP_KEYS` strongest keys, ties by place, as bytes (`codec.py`); what that leaves
out is told by the sum of what it keeps. The file is described in docs/formats/example_patterns.md.
"""

import io
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from interp_assets.corpus.tokens import context_offsets, load_tokens
from interp_assets.garcon.attention import Attended, AttentionLayer
from interp_assets.garcon.patterns.codec import quantize
from interp_assets.garcon.subject import SubjectModel
from interp_assets.harvest.heads.examples import load_head_examples
from interp_assets.harvest.heads.reading import QUERIES, Place, chosen_layers, hear_shard
from interp_assets.harvest.heads.refs import head_counts, patterns_lineage, patterns_ref
from interp_assets.planning.pipeline import SHARD_SHIFT, Pipeline
from interp_assets.planning.progress import Advance, unheard
from interp_assets.storage.lineage import Digests, create_current, find_current, trace
from interp_assets.storage.manifest import ArtifactRef, Manifest, Produced, read_file, timed
from interp_assets.storage.store import Store

PATTERNS: Final = "patterns.parquet"
TOP_KEYS: Final = 8
AROUND: Final = 32
"""Queries on each side of the example's, inside its context."""
PATTERN_SCHEMA: Final = pa.schema(
    [
        ("layer", pa.uint16()),
        ("head", pa.uint16()),
        ("row_id", pa.uint64()),
        ("first_row", pa.uint64()),
        ("length", pa.uint32()),
        ("first_query", pa.uint32()),
        ("keys", pa.list_(pa.uint32())),
        ("masses", pa.list_(pa.uint8())),
    ]
)


@timed
def keep_patterns(pipeline: Pipeline, store: Store, model: SubjectModel, index: int, progress: Advance = unheard) -> Produced:
    """Run pass C for corpus shard `index`; `progress` is advanced by rows."""
    ref = patterns_ref(pipeline, index)
    kept = trace(Digests(store), patterns_lineage(pipeline, index))
    if current := find_current(store, ref, kept):
        return Produced(ref, current, is_cached=True)
    tokens, layers = load_tokens(pipeline, store, index), chosen_layers(model, list(head_counts(pipeline)))
    wanted = {layer.layer: _examples_here(pipeline, store, layer.layer, index) for layer in layers}
    offsets = context_offsets(tokens.contexts)
    rows = np.unique(np.concatenate([rows for _, rows in wanted.values()]))
    contexts = np.unique(np.searchsorted(offsets, rows, side="right") - 1)
    made: list[dict[str, Any]] = []

    def hear(layer: AttentionLayer, heard: Attended, places: Sequence[Place]) -> None:
        heads, asked = wanted[layer.layer]
        for place in places:
            inside = np.flatnonzero((asked >= place.first_row) & (asked < place.first_row + place.length))
            for i, query in sorted((int(i), int(asked[i]) - place.first_row) for i in inside):
                made.append({"layer": layer.layer, "head": int(heads[i]), **_keep(heard, place, int(heads[i]), query, index)})

    for n_rows in hear_shard(model, layers, tokens, index, hear, contexts):
        progress(n_rows)
    made.sort(key=lambda row: (row["layer"], row["head"], row["row_id"]))
    with create_current(store, ref, kept) as art:
        with art.open(PATTERNS, n_rows=len(made)) as sink:
            buffer = io.BytesIO()
            pq.write_table(pa.Table.from_pylist(made, schema=PATTERN_SCHEMA), buffer, compression="zstd")
            sink.write(buffer.getbuffer())
        art.facts |= {"n_examples": len(made), "n_contexts": len(contexts)}
    return art.produced


def read_patterns(store: Store, ref: ArtifactRef, manifest: Manifest, layer: int) -> pa.Table:
    """Read and verify the patterns of one layer's examples in one shard."""
    data = io.BytesIO(read_file(store, ref.path, manifest, PATTERNS))
    return pq.read_table(data, filters=[("layer", "=", layer)])


def strongest_keys(rows: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Return the places and bytes of the strongest keys of each row, [rows, TOP_KEYS]; of equal bytes the first. A key of no mass has byte 0."""
    values = quantize(rows)
    n = min(TOP_KEYS, values.shape[1])
    keys = np.argsort(-values.astype(np.int16), axis=1, kind="stable")[:, :n]
    masses = np.take_along_axis(values, keys, axis=1)
    if n < TOP_KEYS:
        missing = ((0, 0), (0, TOP_KEYS - n))
        keys, masses = np.pad(keys, missing), np.pad(masses, missing)
    return keys, masses


def _examples_here(pipeline: Pipeline, store: Store, layer: int, index: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return heads and rows in the shard of a layer's examples that lie there."""
    table = load_head_examples(pipeline, store, layer)[-1]
    ids = table.column("row_id").to_numpy()
    mine = np.flatnonzero(ids >> np.uint64(SHARD_SHIFT) == np.uint64(index))
    rows = (ids[mine] & np.uint64((1 << SHARD_SHIFT) - 1)).astype(np.int64)
    return table.column("head").to_numpy()[mine].astype(np.int64), rows


def _keep(heard: Attended, place: Place, head: int, query: int, index: int) -> dict[str, Any]:
    first, stop = max(0, query - AROUND), min(place.length, query + AROUND + 1)
    start, parts = first // QUERIES * QUERIES, []
    for block in range(start, stop, QUERIES):  # blocks as pass A makes them, so that a row has the same bits
        rows = heard.pattern(place.place, slice(block, block + QUERIES))[head].cpu().numpy()
        parts.append(rows[max(0, first - block) : stop - block, : place.length])
    keys, masses = strongest_keys(np.concatenate(parts))
    base = index << SHARD_SHIFT
    return {
        "row_id": base + place.first_row + query,
        "first_row": base + place.first_row,
        "length": place.length,
        "first_query": first,
        "keys": keys.reshape(-1).tolist(),
        "masses": masses.reshape(-1).tolist(),
    }
