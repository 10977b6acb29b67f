"""Pass A: the activations of one dataset shard become, for one latent slice, what any later pass may need of them.

1. Stream the shard in blocks of rows; encode and scan each block (`encoder.py`). Only valid rows fire.
2. Per tile of latents, collect firings; when a collection is full, sort it by latent, add it to the statistics, and reduce it with what was
   kept before to the strongest and the random sample (`selection.py`).
3. Write `candidates.parquet`, `statistics.safetensors`, `sample.parquet` (which latents fire together on a uniform sample of rows) and, with
   `keep: all`, `firings.parquet`: every firing, which makes later passes a lookup.

Memory: the slice's encoder, a tile of pre-activations a thread, `FULL_FIRINGS` collected firings, 13 bytes for each candidate that is kept,
and with `keep: all` 8 bytes for each firing of the job, at most `SPILL_BYTES`: what is more waits on the local disk (spill.py). The
candidates of disjoint rows merge exactly (examples.py), so shards may be cut anywhere. The format is described in
docs/formats/feature_candidates.md.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Final, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from interp_assets.compute.priority import latent_keys, row_keys, sample_seed
from interp_assets.corpus.tokens import TokenShard, load_tokens
from interp_assets.errors import InputError
from interp_assets.garcon.device import choose_device
from interp_assets.harvest.refs import activation_shard_ref
from interp_assets.harvest.rows import ROWS
from interp_assets.harvest.statistics import load_statistics
from interp_assets.planning.pipeline import Pipeline
from interp_assets.storage.lineage import Digests, create_current, find_current, trace
from interp_assets.storage.manifest import ArtifactWriter, Produced, load_manifest, timed
from interp_assets.storage.store import Store
from interp_assets.storage.tensors import read_spans, save_tensors
from interp_assets.train.checkpoint import check_sae
from interp_assets.train.sae import Sae
from interp_assets.visualize.encoder import Encoder, Scan
from interp_assets.visualize.firings import FIRING_SCHEMA, ROW_BITS, Firings, empty_firings, merge_firings, sort_firings
from interp_assets.visualize.kernels import rank_firings
from interp_assets.visualize.lineage import candidates_lineage
from interp_assets.visualize.refs import candidates_ref, slice_bounds
from interp_assets.visualize.selection import Limits, select_firings
from interp_assets.visualize.spill import SPILL_BYTES, RunStore
from interp_assets.visualize.statistics import (
    add_firings,
    empty_statistics,
    histogram_origin,
    join_statistics,
    statistics_tensors,
)
from interp_assets.visualize.tables import create_table
from interp_assets.visualize.thresholds import Dataset, iter_firings

CANDIDATES: Final = "candidates.parquet"
FIRINGS: Final = "firings.parquet"
SAMPLE: Final = "sample.parquet"
STATISTICS: Final = "statistics.safetensors"
FULL_FIRINGS: Final = 8 << 20
"""Firings that a job collects, over all tiles, before it reduces them."""
SAMPLE_ROWS: Final = 16384
"""Rows of a shard that are sampled for co-activation, in the mean."""
CANDIDATE_SCHEMA: Final = pa.schema([*FIRING_SCHEMA, ("kind", pa.uint8())])
SAMPLE_SCHEMA: Final = pa.schema([("latent", pa.uint32()), ("row_id", pa.uint64())])


@timed
def find_candidates(
    pipeline: Pipeline, store: Store, sae: Sae, name: str, index: int, latent_slice: int, progress: Callable[[int], None] | None = None
) -> Produced:
    """Run pass A for dataset shard `index` and one latent slice of the SAE called `name`; `progress` is advanced by rows.

    Raises `InputError` when the SAE, the activations and the tokens do not fit each other, `NonFiniteError` for damaged rows or weights.
    """
    ref = candidates_ref(pipeline, name, index, latent_slice)
    lineage = candidates_lineage(pipeline, name, index, latent_slice)
    kept = trace(Digests(store), lineage)
    if current := find_current(store, ref, kept):
        return Produced(ref, current, is_cached=True)
    hook_point = pipeline.config.sae(name).hook_point
    tokens = load_tokens(pipeline, store, index)
    _check_inputs(pipeline, store, sae, name, index, tokens)
    origin = histogram_origin(load_statistics(pipeline, store, hook_point).mean_norm, sae.W_enc)
    dtype = pipeline.config.features.encode_dtype
    encoder = Encoder(sae, *slice_bounds(pipeline, name, latent_slice), choose_device(pipeline.config.execution.device), dtype=dtype)
    job = Job(pipeline, encoder, tokens, index, origin)
    for block in iter_firings(pipeline, store, sae, Dataset(name, index, tokens.valid), encoder):
        for scan in block.scans:
            job.add(scan, block.first_row)
        if progress:
            progress(block.n_rows)
    with create_current(store, ref, kept | trace(Digests(store), lineage[-1:])) as art:  # thresholds may have been found just now
        job.write(art)
        art.facts |= {"start": encoder.start, "stop": encoder.stop}
    return art.produced


class _Kept(NamedTuple):
    """Candidates of one tile, with the kind of each."""

    firings: Firings
    kinds: NDArray[np.uint8]


class Job:
    """Everything that one job of pass A keeps, tile by tile."""

    def __init__(
        self,
        pipeline: Pipeline,
        encoder: Encoder,
        tokens: TokenShard,
        index: int,
        origin: int,
        n_full: int = FULL_FIRINGS,
        spill_bytes: int = SPILL_BYTES,
    ) -> None:
        """Keep nothing yet; `n_full` firings are collected, over all tiles, before they are reduced; for `spill_bytes` see `RunStore`."""
        features, seed = pipeline.config.features, pipeline.config.seed
        self._encoder, self._tokens, self._origin = encoder, tokens, origin
        self._limits = Limits(features.n_kept_top, features.n_random)
        self._one_per_document, self._keep_all = features.one_per_document, features.keep == "all"
        self._first_id = index << ROW_BITS
        row_ids = self._first_id + np.arange(tokens.n_rows, dtype=np.uint64)
        self._seed = sample_seed(seed, "visualize", "examples")
        self._row_keys = row_keys(row_ids, self._seed)
        self._sample_rate = min(1.0, SAMPLE_ROWS / max(1, int(tokens.valid.sum())))
        self._is_sampled = tokens.valid & in_sample(row_ids, self._sample_rate, seed)
        self._collected: list[list[Scan]] = [[] for _ in range(encoder.n_tiles)]
        self._n_collected = [0] * encoder.n_tiles
        self._n_full = max(min(n_full, 1 << 16), n_full // max(1, encoder.n_tiles))
        bounds = [encoder.tile_bounds(i) for i in range(encoder.n_tiles)]
        self._statistics = [empty_statistics(first, last - first) for first, last in bounds]
        self._kept = [_Kept(empty_firings(first, last - first), np.empty(0, np.uint8)) for first, last in bounds]
        self._runs, self._lock = RunStore(len(bounds), spill_bytes), Lock()
        self._samples: list[list[Firings]] = [[] for _ in bounds]

    def add(self, scan: Scan, first_row: int) -> None:
        """Collect the firings of one tile on one block that starts at `first_row`; all of them on valid rows."""
        self._collected[scan.tile].append(scan._replace(rows=scan.rows + np.uint32(first_row)))
        self._n_collected[scan.tile] += len(scan.rows)
        if self._n_collected[scan.tile] > self._n_full:
            self._reduce(scan.tile)

    def write(self, art: ArtifactWriter) -> None:
        """Reduce what is left, several tiles at a time, and write the files of the artifact."""
        with ThreadPoolExecutor(torch.get_num_threads()) as pool, create_table(art, CANDIDATES, CANDIDATE_SCHEMA) as candidates:
            for tile in pool.map(self._reduce, range(self._encoder.n_tiles)):
                kept, self._kept[tile] = self._kept[tile], _Kept(empty_firings(0, 0), np.empty(0, np.uint8))
                candidates.append({**kept.firings.columns(self._first_id), "kind": kept.kinds})
        with create_table(art, SAMPLE, SAMPLE_SCHEMA) as sample:
            for runs in self._samples:
                sample.append(merge_firings(runs).columns(self._first_id))
        if self._keep_all:
            with create_table(art, FIRINGS, FIRING_SCHEMA) as firings:
                for tile in range(self._encoder.n_tiles):
                    firings.append(merge_firings(self._runs.take(tile)).columns(self._first_id))
        statistics = join_statistics(self._statistics)
        save_tensors(art, STATISTICS, statistics_tensors(statistics), n_rows=len(statistics.count))
        art.facts |= {
            "n_rows": self._tokens.n_rows,
            "n_valid": int(self._tokens.valid.sum()),
            "n_firings": int(statistics.count.sum()),
            "n_candidates": candidates.n_rows,
            "n_live": int((statistics.count > 0).sum()),
            "histogram_origin": self._origin,
            "sample_rate": self._sample_rate,
            "n_sampled": int(self._is_sampled.sum()),
        }

    def _reduce(self, tile: int) -> int:
        """Turn the tile's collection into one sorted run and fold it into statistics, candidates and sample; return the tile. Rows count from 0."""
        first, last = self._encoder.tile_bounds(tile)
        collected, self._collected[tile], self._n_collected[tile] = self._collected[tile], [], 0
        latents = np.concatenate([scan.latents for scan in collected]) if collected else np.empty(0, np.uint16)
        rows = np.concatenate([scan.rows for scan in collected]) if collected else np.empty(0, np.uint32)
        activations = np.concatenate([scan.activations for scan in collected]) if collected else np.empty(0, np.float32)
        run = sort_firings(first, last - first, latents, rows, activations)
        add_firings(self._statistics[tile], run, self._origin)
        self._samples[tile].append(run.take(self._is_sampled[run.row_ids]))
        if self._keep_all:
            with self._lock:
                self._runs.add(tile, run)
        merged = merge_firings([self._kept[tile].firings, run]) if len(self._kept[tile].kinds) else run
        keys, priorities = latent_keys(np.arange(first, last, dtype=np.uint64), self._seed), np.empty(len(merged.row_ids), np.uint64)
        rank_firings(merged.offsets, merged.row_ids, keys, self._row_keys, priorities)
        documents = self._tokens.documents[merged.row_ids] if self._one_per_document else None
        kinds = select_firings(merged, priorities, documents, self._limits)
        is_kept = kinds > 0
        self._kept[tile] = _Kept(merged.take(is_kept), kinds[is_kept])
        return tile


def in_sample(row_ids: NDArray[np.uint64], rate: float, root_seed: int) -> NDArray[np.bool_]:
    """Tell which rows belong to the co-activation sample of `rate`: samples of lower rates lie inside those of higher ones."""
    if rate >= 1.0:
        return np.ones(len(row_ids), np.bool_)
    return row_keys(row_ids, sample_seed(root_seed, "visualize", "coactivation")) < np.uint64(int(rate * 2.0**64))


def _check_inputs(pipeline: Pipeline, store: Store, sae: Sae, name: str, index: int, tokens: TokenShard) -> None:
    """Raise `InputError` when SAE, activation shard and token shard do not fit each other."""
    check_sae(pipeline, sae, name)
    hook_point = pipeline.config.sae(name).hook_point
    ref = activation_shard_ref(pipeline, hook_point, index)
    n_rows, d_in = read_spans(store, ref.path, load_manifest(store, ref), ROWS)["rows"].shape
    if d_in != sae.d_in:
        raise InputError(
            f"SAE {name!r} reads {sae.d_in} dimensions, activation shard {index} at {hook_point} has {d_in}. Train it on this hook point."
        )
    if n_rows != tokens.n_rows:
        raise InputError(
            f"Activation shard {index} at {hook_point} has {n_rows:,} rows, its token shard {tokens.n_rows:,} ({store.url}/{ref.path}). "
            "Re-materialize this partition of the activations."
        )
