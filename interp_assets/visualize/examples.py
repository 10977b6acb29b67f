"""Pass B: the candidates of all dataset shards become the examples of one latent slice.

1. Refuse to begin while a shard's candidates are missing or come from an earlier training of the SAE.
2. Add up the statistics; integers, so the order of the shards does not matter.
3. Latent group by latent group: the strongest `top_k` candidates, less those that repeat the tokens around a stronger one (`distinct_tokens`;
   chosen from the 4 `top_k` strongest, so that any cut over rows gives the same list); the `n_random` of smallest priority; quantiles of the
   firings, and in each interval between two quantiles the `examples_per_interval` firings of smallest priority, that is, a uniform choice.
   Where the random sample holds so many of an interval, these are they; only for the few latents where it does not, all firings are read.

With `keep: all` quantiles and intervals come from all firings. With `keep: candidates` the quantiles are read off the histogram (exact where the
random sample holds all firings) and the intervals are filled from the random sample, so the rare upper ones may stay short. A latent with
fewer firings than asked for has fewer examples, a dead one has none: nothing is padded.

Cost: one read of the candidates and of the firings' activations, about 50 ns for each; memory for `GROUP_FIRINGS` of them and, with
`distinct_tokens`, the token shards (13 bytes a token). The format is described in docs/formats/feature_examples.md.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Final, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from interp_assets.compute.priority import latent_keys, priorities, row_keys, sample_seed
from interp_assets.corpus.contexts import first_of_each, hash_contexts
from interp_assets.corpus.tokens import TokenShard, load_tokens
from interp_assets.errors import ArtifactCorruptError
from interp_assets.planning.config import FeaturesConfig
from interp_assets.planning.pipeline import Pipeline
from interp_assets.storage.lineage import Digests, create_current, find_current, trace
from interp_assets.storage.manifest import ArtifactRef, Manifest, Produced, timed
from interp_assets.storage.store import Store
from interp_assets.storage.tensors import load_tensors, save_tensors
from interp_assets.visualize.candidates import CANDIDATES, FIRINGS, STATISTICS
from interp_assets.visualize.firings import ROW_BITS, Firings, as_firings, expand_ranges, merge_firings
from interp_assets.visualize.lineage import candidates_lineage, examples_lineage, load_current
from interp_assets.visualize.refs import examples_ref, slice_bounds
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


@timed
def select_examples(pipeline: Pipeline, store: Store, name: str, latent_slice: int) -> Produced:
    """Run pass B for one latent slice of the SAE called `name`.

    Raises `ArtifactMissingError` that names every missing (shard, slice), `ArtifactForeignError` for candidates of an earlier training.
    """
    ref = examples_ref(pipeline, name, latent_slice)
    known = Digests(store)
    kept = trace(known, examples_lineage(pipeline, name, latent_slice))
    if current := find_current(store, ref, kept):
        return Produced(ref, current, is_cached=True)
    candidates = [candidates_lineage(pipeline, name, index, latent_slice) for index in pipeline.shard_indices]
    inputs = list(zip([lineages[0].ref for lineages in candidates], load_current(store, candidates, known), strict=True))
    start, stop = slice_bounds(pipeline, name, latent_slice)
    origin = _origin(inputs)
    parts = [as_statistics(start, load_tensors(store, item.path, manifest, STATISTICS)) for item, manifest in inputs]
    statistics = merge_statistics(parts)
    quantiles = [np.empty((0, pipeline.config.features.n_intervals + 1), np.float32)]
    shards = _load_shards(pipeline, store)
    with create_current(store, ref, kept) as art:
        with create_table(art, EXAMPLES, EXAMPLE_SCHEMA) as table:
            for group in _iter_groups(pipeline.config.features, store, inputs, parts, origin):
                table.append(_choose(group, pipeline, shards))
                quantiles.append(group.quantiles)
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
        }
    return art.produced


class _Group(NamedTuple):
    """Some consecutive latents, with everything known about them."""

    counts: NDArray[np.int64]
    """Firings of each latent."""
    candidates: Firings
    kinds: NDArray[np.uint8]
    quantiles: NDArray[np.float32]
    """Edges of the intervals; NaN for dead latents."""
    read_firings: Callable[[int, int], Firings] | None
    """Reads all firings of a range of latents, with `keep: all`."""


class _Shard(NamedTuple):
    """The candidates of one dataset shard."""

    candidates: LatentTable
    firings: LatentTable | None
    ends: NDArray[np.int64]
    """Firings up to and including each latent: where its rows of `firings.parquet` end."""


def _iter_groups(
    features: FeaturesConfig, store: Store, inputs: list[tuple[ArtifactRef, Manifest]], parts: list[LatentStatistics], origin: int
) -> Iterator[_Group]:
    """Read the candidates and firings of all shards, latent group by latent group."""
    shards = [
        _Shard(
            LatentTable(store, ref.path, manifest, CANDIDATES),
            LatentTable(store, ref.path, manifest, FIRINGS) if features.keep == "all" else None,
            np.concatenate([[0], np.cumsum(part.count)]),
        )
        for (ref, manifest), part in zip(inputs, parts, strict=True)
    ]
    statistics = merge_statistics(parts)
    bounds = np.concatenate([[0], np.cumsum(statistics.count)])
    n_latents, first = len(statistics.count), 0
    while first < n_latents:
        last = max(first + 1, int(np.searchsorted(bounds, bounds[first] + GROUP_FIRINGS, side="right")) - 1)
        start, stop = statistics.start + first, statistics.start + last
        tables = [shard.candidates.read(start, stop) for shard in shards]
        found = [as_firings(start, stop, table) for table in tables]
        candidates, kinds = merge_firings(found), _merge_kinds(found, [table["kind"] for table in tables])
        mine = statistics.narrow(first, last)
        if features.keep == "all":
            quantiles = _quantiles_of_all(shards, parts, first, last, features.n_intervals)
        else:
            quantiles = _quantiles_of_sample(mine, candidates.take((kinds & RANDOM) > 0), features, origin)
        yield _Group(mine.count, candidates, kinds, quantiles, partial(_read_firings, shards) if features.keep == "all" else None)
        first = last


def _quantiles_of_all(shards: list[_Shard], parts: list[LatentStatistics], first: int, last: int, n_intervals: int) -> NDArray[np.float32]:
    """Return the quantiles of all firings; of the store of firings only the activations are read."""
    counts = np.stack([part.count[first:last] for part in parts])
    total = counts.sum(axis=0)
    activations = np.empty(int(total.sum()), np.float32)
    starts = np.cumsum(total) - total
    for shard, own, before in zip(shards, counts, np.cumsum(counts, axis=0) - counts, strict=True):
        assert shard.firings
        values = shard.firings.read_rows(int(shard.ends[first]), int(shard.ends[last]), "activation")
        activations[expand_ranges(starts + before, own)] = values
    return exact_quantiles(total, activations, n_intervals)


def _quantiles_of_sample(statistics: LatentStatistics, sample: Firings, features: FeaturesConfig, origin: int) -> NDArray[np.float32]:
    """Return the quantiles: exact where the sample holds all firings, else from the histogram."""
    exact = exact_quantiles(np.diff(sample.offsets), sample.activations, features.n_intervals)
    is_whole = statistics.count <= features.n_random
    return np.where(is_whole[:, None], exact, histogram_quantiles(statistics, origin, features.n_intervals))


def _read_firings(shards: list[_Shard], start: int, stop: int) -> Firings:
    return merge_firings([as_firings(start, stop, shard.firings.read(start, stop)) for shard in shards if shard.firings])


def _merge_kinds(parts: list[Firings], kinds: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Bring the kinds into the order in which `merge_firings` puts the parts."""
    carriers = [part._replace(activations=kind.astype(np.float32)) for part, kind in zip(parts, kinds, strict=True)]
    return merge_firings(carriers).activations.astype(np.uint8)


def _choose(group: _Group, pipeline: Pipeline, shards: dict[int, TokenShard]) -> dict[str, NDArray[np.generic]]:
    """Return the columns of the examples of one group, sorted by latent and row."""
    features, pool = pipeline.config.features, group.candidates
    latents = pool.relative_latents()
    order = _priorities(pool, pipeline.config.seed)
    strength = descending_keys(pool.activations)
    chosen = np.zeros(len(latents), np.uint8)
    top = np.flatnonzero(group.kinds & TOP)
    top = top[smallest_per_segment(latents[top], pool.n_latents, features.n_kept_top, strength[top], order[top])]
    if features.distinct_tokens:
        top = top[np.lexsort((order[top], strength[top], latents[top]))]
        top = top[first_of_each(latents[top], _hash_contexts(pool.row_ids[top], shards, features.distinct_tokens), features.top_k)]
    chosen[top] = TOP
    random = np.flatnonzero(group.kinds & RANDOM)
    random = random[smallest_priorities(latents[random], pool.n_latents, features.n_random, order[random])]
    chosen[random] |= RANDOM
    interval = find_intervals(latents, pool.activations, group.quantiles)
    drawn, is_short = _draw_intervals(pool.n_latents, latents[random], interval[random], order[random], features)
    chosen[random[drawn]] |= INTERVAL
    kept = chosen > 0
    columns = {
        "latent": (latents[kept] + pool.start).astype(np.uint32),
        "row_id": pool.row_ids[kept],
        "activation": pool.activations[kept],
        "kind": chosen[kept],
        "interval": np.where(chosen & INTERVAL, interval, -1).astype(np.int16)[kept],
        "priority": order[kept],
    }
    is_filled = group.quantiles[:, :-1] < group.quantiles[:, 1:]
    is_filled[:, -1] = True
    is_short = (is_short & is_filled).any(axis=1) & (group.counts > features.n_random)
    return _ranked([columns, _draw_from_all(group, is_short, pipeline)] if group.read_firings and is_short.any() else [columns])


def _load_shards(pipeline: Pipeline, store: Store) -> dict[int, TokenShard]:
    """Read the token shards, which only the comparison of texts needs."""
    return {index: load_tokens(pipeline, store, index) for index in pipeline.shard_indices if pipeline.config.features.distinct_tokens}


def _hash_contexts(row_ids: NDArray[np.uint64], shards: dict[int, TokenShard], n_tokens: int) -> NDArray[np.uint64]:
    found, owner = np.empty(len(row_ids), np.uint64), row_ids >> np.uint64(ROW_BITS)
    for index, tokens in shards.items():
        mine = np.flatnonzero(owner == np.uint64(index))
        found[mine] = hash_contexts(tokens, (row_ids[mine] & np.uint64((1 << ROW_BITS) - 1)).astype(np.int64), n_tokens)
    return found


def find_intervals(latents: NDArray[np.int32], activations: NDArray[np.float32], quantiles: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return the interval of each firing: the last whose lower quantile it reaches (the maximum belongs to the last interval)."""
    interval = np.zeros(len(latents), np.int64)
    for i in range(1, quantiles.shape[1] - 1):
        interval += activations >= quantiles[latents, i]
    return interval


def _draw_intervals(
    n_latents: int, latents: NDArray[np.int32], interval: NDArray[np.int64], order: NDArray[np.uint64], features: FeaturesConfig
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Draw from the random sample the firings of smallest priority in each interval; tell where there are fewer than wanted.

    The sample holds the smallest priorities of the latent, so where it fills an interval, it does so with the smallest of all firings.
    """
    n_segments = n_latents * features.n_intervals
    segments = latents * features.n_intervals + interval
    drawn = smallest_priorities(segments, n_segments, features.examples_per_interval, order)
    held = np.bincount(segments, minlength=n_segments).reshape(n_latents, features.n_intervals)
    return drawn, held < features.examples_per_interval


def _draw_from_all(group: _Group, is_short: NDArray[np.bool_], pipeline: Pipeline) -> dict[str, NDArray[np.generic]]:
    """Return the interval examples of the latents that are short of them, drawn from all of their firings."""
    assert group.read_firings
    firings = group.read_firings(group.candidates.start, group.candidates.start + group.candidates.n_latents)
    firings = firings.take(is_short[firings.relative_latents()])
    latents, order = firings.relative_latents(), _priorities(firings, pipeline.config.seed)
    interval = find_intervals(latents, firings.activations, group.quantiles)
    drawn, _ = _draw_intervals(firings.n_latents, latents, interval, order, pipeline.config.features)
    return {
        "latent": (latents[drawn] + firings.start).astype(np.uint32),
        "row_id": firings.row_ids[drawn],
        "activation": firings.activations[drawn],
        "kind": np.full(int(drawn.sum()), INTERVAL, np.uint8),
        "interval": interval[drawn].astype(np.int16),
        "priority": order[drawn],
    }


def _priorities(firings: Firings, root_seed: int) -> NDArray[np.uint64]:
    seed = sample_seed(root_seed, "visualize", "examples")
    keys = latent_keys(np.arange(firings.start, firings.start + firings.n_latents, dtype=np.uint64), seed)
    return priorities(np.repeat(keys, np.diff(firings.offsets)), row_keys(firings.row_ids, seed))


def _ranked(parts: list[dict[str, NDArray[np.generic]]]) -> dict[str, NDArray[np.generic]]:
    """Join examples, each firing once with all its kinds, sorted by latent and row; `rank` is its place in its latent by priority."""
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    if len(parts) > 1:
        order = np.lexsort((columns["row_id"], columns["latent"]))
        columns = {name: column[order] for name, column in columns.items()}
        same = (columns["latent"][1:] == columns["latent"][:-1]) & (columns["row_id"][1:] == columns["row_id"][:-1])
        firsts = np.flatnonzero(np.concatenate([[True], ~same]))
        columns["kind"] = np.bitwise_or.reduceat(columns["kind"], firsts)
        columns["interval"] = np.maximum.reduceat(columns["interval"], firsts)
        columns = {name: column if name in ("kind", "interval") else column[firsts] for name, column in columns.items()}
    sequence = np.lexsort((columns.pop("priority"), columns["latent"]))
    counts = np.unique(columns["latent"], return_counts=True)[1]
    ranks = np.empty(len(sequence), np.uint32)
    ranks[sequence] = np.arange(len(sequence)) - np.repeat(np.cumsum(counts) - counts, counts)
    return {**columns, "rank": ranks}


def _origin(inputs: list[tuple[ArtifactRef, Manifest]]) -> int:
    origins = {manifest.facts["histogram_origin"] for _, manifest in inputs}
    if len(origins) > 1:
        raise ArtifactCorruptError(
            f"The candidates under {inputs[0][0].path.rsplit('/', 1)[0]} have histograms that start at different powers of two ({sorted(origins)}): "
            "the activation statistics changed between the jobs. Delete this folder and materialize it again."
        )
    return origins.pop()
