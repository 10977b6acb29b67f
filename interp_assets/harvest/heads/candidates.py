"""Pass A: one corpus shard becomes, for every head, its statistics and the rows that any example can come from.

1. One forward a batch of contexts, up to the last layer that is shown (`reading.py`); the network keeps its own fast attention.
2. Layer by layer, context by context, 128 queries at a time: scores from queries and keys, one compiled sweep over them (`head_loops.py`).
3. A row's score is the largest A[q, k] |v_k W_O| of a key that is neither the first position nor the query: the maximum of A alone is near 1 in
   most rows of most heads. The length follows from v and W_O W_O' alone.
4. Of each head and bin of scores (quarter octaves) the 16 rows of smallest priority are kept: whatever bins an interval is cut from later, they
   hold a uniform sample of it. Of each document the row of highest score is kept, and of these the strongest `4 top_k`.

Nothing depends on batches, on blocks of queries, or on how contexts are divided over shards. Cost: scores [heads, 128, context] and a few ns an
element, beside the forward. The files are described in docs/formats/head_candidates.md.
"""

import io
from collections.abc import Sequence
from functools import partial
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from interp_assets.compute.head_loops import (
    MAX_CONTEXT,
    N_SCORES,
    SLOTS,
    count_chance,
    offer_rows,
    offer_strongest,
    sweep_rows,
)
from interp_assets.compute.priority import latent_keys, priorities, row_keys, sample_seed
from interp_assets.compute.products import run_each
from interp_assets.corpus.contexts import hash_contexts
from interp_assets.corpus.tokens import TokenShard, load_tokens
from interp_assets.errors import InputError
from interp_assets.garcon.attention import Attended, AttentionLayer, gram
from interp_assets.garcon.subject import SubjectModel
from interp_assets.harvest.heads.reading import QUERIES, Place, chosen_layers, hear_shard
from interp_assets.harvest.heads.refs import candidates_lineage, candidates_ref, head_counts, heads_of, layer_key
from interp_assets.harvest.heads.statistics import HeadStatistics, as_statistics, empty_statistics, statistics_arrays
from interp_assets.harvest.heads.tokens import classify, find_documents, find_earlier, load_chosen
from interp_assets.planning.pipeline import SHARD_SHIFT, Pipeline
from interp_assets.planning.progress import Advance, unheard
from interp_assets.storage.lineage import Digests, create_current, find_current, trace
from interp_assets.storage.manifest import ArtifactRef, Manifest, Produced, read_file, timed
from interp_assets.storage.store import Store
from interp_assets.storage.tensors import load_tensors, save_tensors

HEADS: Final = 4
"""Heads that one thread sweeps, at least: a query's share of Python is small beside them. More where they share keys."""
STRONGEST, SAMPLED = 1, 2
"""Bits of `kind`."""
TEXT_TOKENS: Final = 8
"""Tokens on both sides of a query by which repeated texts are known."""
_FREE: Final = np.uint64(0xFFFFFFFFFFFFFFFF)
CANDIDATE_SCHEMA: Final = pa.schema(
    [
        ("head", pa.uint16()),
        ("row_id", pa.uint64()),
        ("score", pa.float32()),
        ("kind", pa.uint8()),
        ("priority", pa.uint64()),
        ("text", pa.uint64()),
    ]
)


@timed
def find_head_candidates(pipeline: Pipeline, store: Store, model: SubjectModel, index: int, progress: Advance = unheard) -> Produced:
    """Run pass A for corpus shard `index`; `progress` is advanced by rows.

    Raises `NonFiniteError` for queries, keys or values that are not finite, and `InputError` for a mask that is no range of keys.
    """
    ref = candidates_ref(pipeline, index)
    kept = trace(Digests(store), candidates_lineage(pipeline, index))
    if current := find_current(store, ref, kept):
        return Produced(ref, current, is_cached=True)
    tokens = load_tokens(pipeline, store, index)
    layers = chosen_layers(model, list(head_counts(pipeline)))
    rows = ShardRows(tokens, load_chosen(pipeline, store), index, pipeline.config.seed)
    sums = {layer.layer: LayerSums(layer, rows) for layer in layers}
    for n_rows in hear_shard(model, layers, tokens, index, lambda layer, heard, places: sums[layer.layer].add(heard, places)):
        progress(n_rows)
    with create_current(store, ref, kept) as art:
        n_candidates = 0
        for layer, found in sums.items():
            table = found.candidates(heads_of(pipeline).n_kept_top)
            with art.open(f"{layer_key(layer)}.parquet", n_rows=table.num_rows) as sink:
                buffer = io.BytesIO()
                pq.write_table(table, buffer, compression="zstd", use_dictionary=False)
                sink.write(buffer.getbuffer())
            save_tensors(art, f"{layer_key(layer)}.safetensors", statistics_arrays(found.statistics))
            n_candidates += table.num_rows
        art.facts |= {
            "n_rows": tokens.n_rows,
            "n_valid": int(tokens.valid.sum()),
            "n_heads": sum(layer.n_heads for layer in layers),
            "n_candidates": n_candidates,
            "layers": {str(layer.layer): _describe(layer) for layer in layers},
        }
    return art.produced


def load_candidates(store: Store, ref: ArtifactRef, manifest: Manifest, layer: int) -> tuple[HeadStatistics, pa.Table]:
    """Read and verify what a shard holds of one layer."""
    table = pq.read_table(io.BytesIO(read_file(store, ref.path, manifest, f"{layer_key(layer)}.parquet")))
    return load_statistics(store, ref, manifest, layer), table


def load_statistics(store: Store, ref: ArtifactRef, manifest: Manifest, layer: int) -> HeadStatistics:
    """Read and verify the statistics that a shard holds of one layer."""
    return as_statistics(load_tensors(store, ref.path, manifest, f"{layer_key(layer)}.safetensors"))


class ShardRows:
    """What is known of the rows of a shard before the model runs."""

    def __init__(self, tokens: TokenShard, chosen: NDArray[np.uint32], index: int, root_seed: int) -> None:
        self.tokens, self.index, self.n_classes = tokens, index, len(chosen) + 1
        self.classes, self.earlier = classify(tokens.token_ids, chosen), find_earlier(tokens)
        self.firsts, self.stops = find_documents(tokens)
        self.ids = np.uint64(index << SHARD_SHIFT) + np.arange(tokens.n_rows, dtype=np.uint64)
        self.seed = sample_seed(root_seed, "heads", "examples")
        self.keys = row_keys(self.ids, self.seed)
        self.n_documents = int(tokens.documents.max(initial=0)) + 1


class LayerSums:
    """What one layer's heads have of the contexts so far."""

    def __init__(self, layer: AttentionLayer, rows: ShardRows, queries: int = QUERIES) -> None:
        """`queries` are swept at once."""
        self._layer, self._rows, self._queries = layer, rows, queries
        self._gram = gram(layer)
        n_heads, d_value = self._gram.shape[:2]
        self.statistics = empty_statistics(n_heads, d_value, rows.n_classes)
        self._head_keys = latent_keys(np.arange(n_heads, dtype=np.uint64) + np.uint64(layer.layer << 20), rows.seed)
        free = np.full((n_heads, N_SCORES, SLOTS), _FREE)
        self._slots = (free, np.zeros(free.shape, np.int64), np.zeros(free.shape, np.float32))
        best = np.full((n_heads, rows.n_documents), _FREE)
        self._best = (best, np.zeros(best.shape, np.int64), np.full(best.shape, -1, np.float32))
        self._seen: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    def add(self, heard: Attended, places: Sequence[Place]) -> None:
        """Sweep the contexts of one batch: some heads by each thread, the same ones for any number of threads."""
        seen = [(place, self._context(heard, place)) for place in places]
        n_keys = heard.key.shape[1]
        step = max(1, HEADS * n_keys // heard.query.shape[1])
        run_each([partial(self._sweep, heard, seen, slice(i, min(i + step, n_keys))) for i in range(0, n_keys, step)], "heads::sweep")
        for _, context in seen:
            self._add_chance(context)

    def _context(self, heard: Attended, place: Place) -> tuple[NDArray[Any], ...]:
        rows, own = self._rows, slice(place.first_row, place.first_row + place.length)
        visible = self._visible(heard, place)
        return (*visible, rows.tokens.valid[own], rows.earlier[own], rows.firsts[own], rows.stops[own], rows.classes[own])

    @torch.no_grad()
    def _sweep(self, heard: Attended, seen: Sequence[tuple[Place, tuple[NDArray[Any], ...]]], keys: slice) -> None:
        """Sweep the heads that share some key heads."""
        shared = heard.query.shape[1] // heard.key.shape[1]
        heads = slice(keys.start * shared, keys.stop * shared)
        sinks = None if heard.sinks is None else heard.sinks[heads]
        heard = heard._replace(
            query=heard.query[:, heads], key=heard.key[:, keys], value=heard.value[:, keys], mixed=heard.mixed[:, :, heads], sinks=sinks
        )
        for place, context in seen:
            self._add(heard, place, context, heads)

    def _add(self, heard: Attended, place: Place, context: tuple[NDArray[Any], ...], heads: slice) -> None:
        length, high, valid, classes = place.length, context[1], context[2], context[6]
        mixed = heard.mixed[place.place].float().transpose(0, 1)
        value = heard.value[place.place].float().repeat_interleave(len(mixed) // heard.value.shape[1], dim=0)
        value_norms, output_norms = (_lengths(state, self._gram[heads]) for state in (value, mixed))
        sinks = np.full(len(mixed), -np.inf, np.float32) if heard.sinks is None else heard.sinks.detach().float().cpu().numpy()
        statistics = self.statistics
        key_columns = np.zeros((len(mixed), place.padded), np.int64)
        sums = (statistics.fields[heads], statistics.distance_mass[heads], key_columns, statistics.query_mass[heads], statistics.score[heads])
        scratch = (np.empty(place.padded, np.int32), np.empty(place.padded, np.int32))
        for first in range(0, length, self._queries):
            queries = slice(first, first + self._queries)
            scores = heard.products(place.place, queries, int(high[queries].max())).cpu().numpy()
            row_scores = np.empty(scores.shape[:2], np.float32)
            sweep_rows((scores, sinks, value_norms, output_norms[:, queries], first), context, scratch, sums, row_scores)
            self._offer(row_scores[:, : length - first], place.first_row + first, heads)
        statistics.mean_output[heads] += mixed[:, :length].double().cpu()[:, torch.from_numpy(valid)].mul_(65536.0).round_().long().sum(dim=1).numpy()
        _add_columns(statistics.key_mass[heads], key_columns[:, :length], classes)

    def _offer(self, row_scores: NDArray[np.float32], first_row: int, heads: slice) -> None:
        keys = self._rows.keys[first_row : first_row + row_scores.shape[1]]
        order = priorities(self._head_keys[heads, None], keys[None, :])
        scores = np.ascontiguousarray(row_scores)
        offer_rows(scores, order, first_row, tuple(kept[heads] for kept in self._slots))
        offer_strongest(scores, order, self._rows.tokens.documents, first_row, tuple(kept[heads] for kept in self._best))

    def _add_chance(self, context: tuple[NDArray[Any], ...]) -> None:
        statistics, length = self.statistics, len(context[0])
        fields, slopes = np.zeros(statistics.fields.shape[1], np.int64), np.zeros(length + 1, np.int64)
        count_chance(context, fields, statistics.uniform_distance_mass[0], slopes, statistics.uniform_query_mass[0])
        statistics.fields[...] += fields
        _add_columns(statistics.uniform_key_mass, np.cumsum(slopes)[None, :length], context[6])
        np.add.at(statistics.token_counts[0], context[6][1:], 1)
        np.add.at(statistics.token_counts[1], context[6][context[2]], 1)

    def _visible(self, heard: Attended, place: Place) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the first key that each query sees, and the one behind the last. Raises `InputError` where these are no range, or leave it out."""
        is_shared = heard.visible is None or len(heard.visible) == 1
        if not is_shared or place.padded not in self._seen:
            seen = heard.sees(place.place, slice(0, place.padded))
            self._seen[place.padded] = _ranges(seen, place.padded, place.padded if is_shared else place.length, self._layer.layer)
        low, high = self._seen[place.padded]
        return low[: place.length], np.minimum(high[: place.length], place.length)

    def candidates(self, n_kept_top: int) -> pa.Table:
        """Return the rows that examples can come from, by head and row."""
        found: dict[tuple[int, int], _Candidate] = {}
        kept, rows, scores = self._slots
        for h, b, slot in np.argwhere(kept != _FREE).tolist():
            found[h, int(rows[h, b, slot])] = _Candidate(float(scores[h, b, slot]), int(kept[h, b, slot]), SAMPLED)
        kept, rows, scores = self._best
        for h in range(len(kept)):
            for document in np.lexsort((kept[h], -scores[h]))[:n_kept_top].tolist():
                if scores[h, document] >= 0:
                    key = h, int(rows[h, document])
                    before = found.get(key)
                    kind = STRONGEST | (before.kind if before else 0)
                    found[key] = _Candidate(float(scores[h, document]), int(kept[h, document]), kind)
        keys = sorted(found)
        heads, places = (np.array([key[i] for key in keys], np.int64) for i in (0, 1))
        columns = {
            "head": heads.astype(np.uint16),
            "row_id": self._rows.ids[places],
            "score": np.array([found[key].score for key in keys], np.float32),
            "kind": np.array([found[key].kind for key in keys], np.uint8),
            "priority": np.array([found[key].priority for key in keys], np.uint64),
            "text": hash_contexts(self._rows.tokens, places, TEXT_TOKENS),
        }
        return pa.table([pa.array(columns[name]) for name in CANDIDATE_SCHEMA.names], schema=CANDIDATE_SCHEMA)


class _Candidate(NamedTuple):
    score: float
    priority: int
    kind: int


def _describe(layer: AttentionLayer) -> dict[str, Any]:
    """Return what limits a layer's heads."""
    return {
        "n_key_heads": layer.n_key_heads,
        "window": layer.window,
        "softcap": getattr(layer.module, "attn_logit_softcapping", None),
        "has_sinks": getattr(layer.module, "sinks", None) is not None,
    }


def _lengths(states: torch.Tensor, matrices: torch.Tensor) -> NDArray[np.float32]:
    """Return the length of states times W_O, [heads, places], by W_O W_O'."""
    squared = (torch.bmm(states, matrices) * states).sum(dim=2)
    return squared.clamp(min=0).sqrt().cpu().numpy()


def _add_columns(sums: NDArray[np.int64], columns: NDArray[np.int64], classes: NDArray[np.int32]) -> None:
    """Add masses by place to masses by class."""
    order = np.argsort(classes, kind="stable")
    found, starts = np.unique(classes[order], return_index=True)
    sums[:, found] += np.add.reduceat(columns[:, order], starts, axis=1)


def _ranges(seen: torch.Tensor | None, n: int, n_queries: int, layer: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    if n > MAX_CONTEXT:
        raise InputError(f"A context of {n:,} tokens is longer than the {MAX_CONTEXT:,} that statistics of heads take. Lower corpus.context_length.")
    if seen is None:
        return np.zeros(n, np.int64), np.full(n, n, np.int64)
    mask = seen.cpu().numpy()
    low = mask.argmax(axis=1)
    high = n - mask[:, ::-1].argmax(axis=1)
    is_range = (mask.sum(axis=1) == high - low) & mask[np.arange(n), np.arange(n)]
    if not is_range[:n_queries].all():
        raise InputError(f"Queries of layer {layer} see keys that are no range around them: statistics of heads are not told of such a mask.")
    return low.astype(np.int64), high.astype(np.int64)
