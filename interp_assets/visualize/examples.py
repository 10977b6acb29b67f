"""Pass B: the candidates of all dataset shards become the examples of one latent slice.

1. Refuse to begin while a shard's candidates are missing or come from an earlier training of the SAE.
2. Add up the statistics; integers, so the order of the shards does not matter.
3. Latent group by latent group: the strongest `top_k` candidates; the `n_random` of smallest priority; quantiles of the firings, and in each interval
   between two quantiles the `examples_per_interval` firings of smallest priority, that is, a uniform choice.

With `keep: all` quantiles and intervals come from all firings. With `keep: candidates` the quantiles are read off the histogram (exact where the
random sample holds all firings) and the intervals are filled from the random sample, so the rare upper ones may stay short. A latent with
fewer firings than asked for has fewer examples, a dead one has none: nothing is padded.

Cost: one read of the candidates (and firings), about 150 ns for each; memory for `GROUP_FIRINGS` of them. The format is described in
docs/formats/feature_examples.md.
"""

import time
from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from interp_assets.config import FeaturesConfig
from interp_assets.errors import ArtifactCorruptError
from interp_assets.manifest import ArtifactRef, Manifest, Produced, create_artifact
from interp_assets.pipeline import Pipeline
from interp_assets.store import Store
from interp_assets.tensors import load_tensors, save_tensors
from interp_assets.visualize.candidates import CANDIDATES, FIRINGS, STATISTICS
from interp_assets.visualize.firings import Firings, as_firings, merge_firings
from interp_assets.visualize.lineage import find_current, load_current, sae_digest
from interp_assets.visualize.priority import latent_keys, priorities, row_keys, sample_seed
from interp_assets.visualize.refs import candidates_ref, examples_ref, slice_bounds
from interp_assets.visualize.selection import INTERVAL, RANDOM, TOP, descending_keys, smallest_per_segment, smallest_priorities
from interp_assets.visualize.statistics import (
    LatentStatistics,
    as_statistics,
    exact_quantiles,
    histogram_quantiles,
    merge_statistics,
    statistics_tensors,
)
from interp_assets.visualize.tables import LatentTable, create_table

EXAMPLES: Final = "examples.parquet"
GROUP_FIRINGS: Final = 4 << 20
"""Firings of one latent group, of all shards together, unless one latent alone has more."""
EXAMPLE_SCHEMA: Final = pa.schema(
    [
        ("latent", pa.uint32()),
        ("row_id", pa.uint64()),
        ("activation", pa.float32()),
        ("kind", pa.uint8()),
        ("interval", pa.int16()),
        ("rank", pa.uint32()),
    ]
)


def select_examples(pipeline: Pipeline, store: Store, name: str, latent_slice: int) -> Produced:
    """Run pass B for one latent slice of the SAE called `name`.

    Raises `ArtifactMissingError` that names every missing (shard, slice), `ArtifactForeignError` for candidates of an earlier training.
    """
    begun = time.perf_counter()
    ref = examples_ref(pipeline, name, latent_slice)
    digest = sae_digest(pipeline, store, name)
    if current := find_current(store, ref, digest):
        return Produced(ref, current, is_cached=True, wall_s=time.perf_counter() - begun)
    refs = [candidates_ref(pipeline, name, index, latent_slice) for index in pipeline.shard_indices]
    inputs = list(zip(refs, load_current(store, refs, digest), strict=True))
    start, stop = slice_bounds(pipeline, name, latent_slice)
    origin = _origin(inputs)
    statistics = merge_statistics([as_statistics(start, load_tensors(store, item.path, manifest, STATISTICS)) for item, manifest in inputs])
    quantiles: list[NDArray[np.float32]] = []
    with create_artifact(store, ref) as art:
        with create_table(art, EXAMPLES, EXAMPLE_SCHEMA) as table:
            for group in _iter_groups(pipeline.config.features, store, inputs, statistics):
                table.append(_choose(group, pipeline, origin))
                quantiles.append(group.quantiles(pipeline.config.features, origin))
        tensors = statistics_tensors(statistics) | {"quantiles": torch.from_numpy(np.concatenate(quantiles))}
        save_tensors(art, STATISTICS, tensors, n_rows=stop - start)
        n_live = int((statistics.count > 0).sum())
        art.facts |= {
            "start": start,
            "stop": stop,
            "n_live": n_live,
            "n_dead": stop - start - n_live,
            "n_examples": table.n_rows,
            "n_firings": int(statistics.count.sum()),
            "n_valid": sum(manifest.facts["n_valid"] for _, manifest in inputs),
            "histogram_origin": origin,
            "sae_digest": digest,
        }
    assert art.manifest
    return Produced(ref, art.manifest, is_cached=False, wall_s=time.perf_counter() - begun)


class _Group(NamedTuple):
    """Some consecutive latents, with everything known about them."""

    statistics: LatentStatistics
    candidates: Firings
    kinds: NDArray[np.uint8]
    firings: Firings | None
    """All firings, with `keep: all`."""

    def quantiles(self, features: FeaturesConfig, origin: int) -> NDArray[np.float32]:
        """Return the edges of the intervals, NaN for dead latents."""
        if self.firings:
            return exact_quantiles(self.firings, features.n_intervals)
        sample = self.candidates.take((self.kinds & RANDOM) > 0)
        is_whole = self.statistics.count <= features.n_random
        estimated = histogram_quantiles(self.statistics, origin, features.n_intervals)
        return np.where(is_whole[:, None], exact_quantiles(sample, features.n_intervals), estimated)


def _iter_groups(
    features: FeaturesConfig, store: Store, inputs: list[tuple[ArtifactRef, Manifest]], statistics: LatentStatistics
) -> Iterator[_Group]:
    """Read the candidates and firings of all shards, latent group by latent group."""
    candidates = [LatentTable(store, ref.path, manifest, CANDIDATES) for ref, manifest in inputs]
    firings = [LatentTable(store, ref.path, manifest, FIRINGS) for ref, manifest in inputs] if features.keep == "all" else []
    bounds = np.concatenate([[0], np.cumsum(statistics.count)])
    n_latents, first = len(statistics.count), 0
    while first < n_latents:
        last = max(first + 1, int(np.searchsorted(bounds, bounds[first] + GROUP_FIRINGS, side="right")) - 1)
        start, stop = statistics.start + first, statistics.start + last
        tables = [table.read(start, stop) for table in candidates]
        parts = [as_firings(start, stop, table) for table in tables]
        yield _Group(
            statistics.narrow(first, last),
            merge_firings(parts),
            _merge_kinds(parts, [table["kind"] for table in tables]),
            merge_firings([as_firings(start, stop, table.read(start, stop)) for table in firings]) if firings else None,
        )
        first = last


def _merge_kinds(parts: list[Firings], kinds: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Bring the kinds into the order in which `merge_firings` puts the parts."""
    return merge_firings([part._replace(activations=kind.astype(np.float32)) for part, kind in zip(parts, kinds, strict=True)]).activations.astype(
        np.uint8
    )


def _choose(group: _Group, pipeline: Pipeline, origin: int) -> dict[str, NDArray[np.generic]]:
    """Return the columns of the examples of one group, sorted by latent and row."""
    features = pipeline.config.features
    pool = group.firings or group.candidates
    n_latents, latents = pool.n_latents, pool.relative_latents()
    seed = sample_seed(pipeline.config.seed, "examples")
    keys = latent_keys(np.arange(pool.start, pool.start + n_latents, dtype=np.uint64), seed)
    order = priorities(keys[latents], row_keys(pool.row_ids, seed))
    kinds = _candidate_kinds(pool, group)
    is_top, is_random = (kinds & TOP) > 0, (kinds & RANDOM) > 0
    chosen = np.zeros(len(latents), np.uint8)
    chosen[_smallest(is_top, latents, n_latents, features.top_k, descending_keys(pool.activations), order)] = TOP
    chosen[_smallest(is_random, latents, n_latents, features.n_random, None, order)] |= RANDOM
    interval = find_intervals(latents, pool.activations, group.quantiles(features, origin))
    segments = latents * features.n_intervals + interval
    drawn = np.ones(len(latents), np.bool_) if group.firings else is_random
    in_interval = _smallest(drawn, segments, n_latents * features.n_intervals, features.examples_per_interval, None, order)
    chosen[in_interval] |= INTERVAL
    kept = chosen > 0
    return {
        "latent": (latents[kept] + pool.start).astype(np.uint32),
        "row_id": pool.row_ids[kept],
        "activation": pool.activations[kept],
        "kind": chosen[kept],
        "interval": np.where(chosen & INTERVAL, interval, -1).astype(np.int16)[kept],
        "rank": _ranks(latents[kept], order[kept]),
    }


def find_intervals(latents: NDArray[np.int64], activations: NDArray[np.float32], quantiles: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return the interval of each firing: the last whose lower quantile it reaches (the maximum belongs to the last interval)."""
    n_intervals = quantiles.shape[1] - 1
    interval = np.zeros(len(latents), np.int64)
    for i in range(1, n_intervals):
        interval += activations >= quantiles[latents, i]
    return interval


def _candidate_kinds(pool: Firings, group: _Group) -> NDArray[np.uint8]:
    """Return the candidates' kinds at their places in the pool; 0 for other firings."""
    if pool is group.candidates:
        return group.kinds
    kinds = np.zeros(len(pool.row_ids), np.uint8)
    for i in range(pool.n_latents):
        mine = slice(pool.offsets[i], pool.offsets[i + 1])
        theirs = slice(group.candidates.offsets[i], group.candidates.offsets[i + 1])
        kinds[pool.offsets[i] + np.searchsorted(pool.row_ids[mine], group.candidates.row_ids[theirs])] = group.kinds[theirs]
    return kinds


def _smallest(
    eligible: NDArray[np.bool_],
    segments: NDArray[np.int64],
    n_segments: int,
    n: int,
    keys: NDArray[np.uint64] | None,
    order: NDArray[np.uint64],
) -> NDArray[np.int64]:
    """Return the places of the `n` smallest eligible elements of every segment, by key (none: by priority), then priority."""
    places = np.flatnonzero(eligible)
    if keys is None:
        return places[smallest_priorities(segments[places], n_segments, n, order[places])]
    return places[smallest_per_segment(segments[places], n_segments, n, keys[places], order[places])]


def _ranks(latents: NDArray[np.int64], order: NDArray[np.uint64]) -> NDArray[np.uint32]:
    """Return each example's place among the examples of its latent, by priority."""
    sequence = np.lexsort((order, latents))
    counts = np.bincount(latents)
    ranks = np.empty(len(latents), np.uint32)
    ranks[sequence] = np.arange(len(latents)) - np.repeat(np.cumsum(counts) - counts, counts)
    return ranks


def _origin(inputs: list[tuple[ArtifactRef, Manifest]]) -> int:
    origins = {manifest.facts["histogram_origin"] for _, manifest in inputs}
    if len(origins) > 1:
        raise ArtifactCorruptError(
            f"The candidates under {inputs[0][0].path.rsplit('/', 1)[0]} have histograms that start at different powers of two ({sorted(origins)}): "
            "the activation statistics changed between the jobs. Delete this folder and materialize it again."
        )
    return origins.pop()
