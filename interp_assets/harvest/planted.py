"""Seeds become features that are known, and rows that are made of them: activations with a ground truth, and nothing of a model.

    directions     unit vectors, drawn once
    which fire     by probability, falling with a power of the rank (`frequency`); trees, in which a child fires only where its parent does, one of
                   its siblings at most (`hierarchy`); a Gaussian copula of low rank (`correlation`)
    how strongly   normal around 5 for the most frequent to 4 for the least, with a deviation of its own for each, never negative
    row            sum of strength times direction, and noise

After SynthSAEBench (Chanin & Garriga-Alonso 2026, 2602.14687). A shard is drawn anew from its seeds whenever its truth is asked for: nothing but
directions is stored. A child's probability is that given its parent; frequencies are those of roots and of features that stand alone.
"""

import time
from typing import Final, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import normalize

from interp_assets.compute.products import multiply
from interp_assets.compute.seeds import stream
from interp_assets.corpus.refs import token_shard_ref
from interp_assets.harvest.refs import activation_shard_ref, truth_ref
from interp_assets.harvest.rows import ROWS
from interp_assets.harvest.statistics import StatisticsAccumulator, save_shard_statistics
from interp_assets.planning.pipeline import Pipeline
from interp_assets.planning.progress import Advance, unheard
from interp_assets.planning.sections import CorpusConfig
from interp_assets.storage.manifest import Produced, create_artifact, find_made_from, find_manifest, load_manifest
from interp_assets.storage.store import Store
from interp_assets.storage.tensors import save_tensors

TRUTH: Final = "truth.safetensors"
_BLOCK_ROWS: Final = 4096
"""Rows that are drawn at once: always as many, because their numbers depend on it."""
_STRONGEST, _WEAKEST = 5.0, 4.0
_ROOT: Final = -1


class Planting(NamedTuple):
    """Features that rows are made of."""

    directions: Float[Tensor, "features width"]
    probability: Float[Tensor, " features"]
    """That it fires; of a child where its parent does."""
    parent: Int64[Tensor, " features"]
    """Place of its parent; -1 for a root and for what stands alone."""
    strength: Float[Tensor, " features"]
    deviation: Float[Tensor, " features"]
    causes: Float[Tensor, "features rank"]
    """Its share of each common cause; of no cause where nothing is correlated."""


class PlantedRows(NamedTuple):
    """A block of rows and what they are made of."""

    rows: Float[Tensor, "n width"]
    strengths: Float[Tensor, "n features"]
    """0 where a feature does not fire."""


def make_planting(corpus: CorpusConfig, seed: int) -> Planting:
    """Draw the features of a corpus of planted rows."""
    n, draws = corpus.features, torch.Generator().manual_seed(stream(seed, "planted", "features").torch_seed())
    directions = normalize(torch.randn(n, corpus.width, generator=draws), dim=1)
    deviation = (0.5 + 0.5 * torch.randn(n, generator=draws)).abs()
    rank, frequency = torch.arange(1, n + 1, dtype=torch.float64), corpus.frequency
    fall = rank**-frequency.zipf
    span = (fall - fall[-1]) / (fall[0] - fall[-1]).clamp(min=1e-12)
    probability = frequency.least + (frequency.most - frequency.least) * span if frequency.zipf else torch.full_like(rank, frequency.most)
    parent = torch.full((n,), _ROOT, dtype=torch.int64)
    if tree := corpus.hierarchy:
        level = torch.arange(tree.roots)
        for _ in range(tree.depth):
            first = int(level[-1]) + 1
            children = torch.arange(first, first + len(level) * tree.branching)
            parent[children], probability[children] = level.repeat_interleave(tree.branching), tree.probability
            level = children
    causes = torch.zeros(n, 1)
    if corpus.correlation:
        causes = corpus.correlation.scale * torch.randn(n, corpus.correlation.rank, generator=draws).sign()
    strength = torch.linspace(_STRONGEST, _WEAKEST, n)
    return Planting(directions, probability.float(), parent, strength, deviation, causes)


def plant_rows(corpus: CorpusConfig, planting: Planting, seed: int, shard: int, n_rows: int) -> list[PlantedRows]:
    """Draw the rows of a shard, in blocks."""
    draws = torch.Generator().manual_seed(stream(seed, "planted", "rows", shard).torch_seed())
    return [_plant_block(corpus, planting, min(_BLOCK_ROWS, n_rows - first), draws) for first in range(0, n_rows, _BLOCK_ROWS)]


def _plant_block(corpus: CorpusConfig, planting: Planting, n_rows: int, draws: torch.Generator) -> PlantedRows:
    n = len(planting.directions)
    own = torch.randn(n_rows, n, generator=draws)
    if corpus.correlation:
        common = torch.randn(n_rows, planting.causes.shape[1], generator=draws)
        rest = (1 - planting.causes.square().sum(1)).clamp(min=0).sqrt()
        own = multiply(common, planting.causes.T, torch.empty(n_rows, n)).addcmul_(own, rest)
    fires = own < torch.special.ndtri(planting.probability)
    if tree := corpus.hierarchy:
        fires = _grow(fires, planting.parent, tree.branching, draws, is_exclusive=tree.exclusive)
    strengths = (planting.strength + planting.deviation * torch.randn(n_rows, n, generator=draws)).clamp_(min=0) * fires
    rows = multiply(strengths, planting.directions, torch.empty(n_rows, corpus.width))
    if corpus.noise:
        rows += corpus.noise * torch.randn(rows.shape, generator=draws)
    return PlantedRows(rows, strengths)


def _grow(fires: Tensor, parent: Tensor, branching: int, draws: torch.Generator, *, is_exclusive: bool) -> Tensor:
    """Silence children whose parents are silent, from the roots down, and all but one of siblings."""
    children = (parent != _ROOT).nonzero().view(-1).view(-1, branching)  # siblings lie side by side, and below their parents
    lots = torch.rand(len(fires), children.numel(), generator=draws).view(len(fires), *children.shape)
    for place, siblings in enumerate(children):
        own = fires[:, siblings] & fires[:, parent[siblings[0]], None]
        if is_exclusive:
            lot = torch.where(own, lots[:, place], -1.0)
            own &= lot == lot.amax(1, keepdim=True)
        fires[:, siblings] = own
    return fires


def make_planted_shard(pipeline: Pipeline, store: Store, index: int, progress: Advance = unheard) -> Produced:
    """Publish the planted rows of a shard as activations."""
    started_s, (name,) = time.monotonic(), pipeline.config.harvest.hook_points
    ref, source = activation_shard_ref(pipeline, name, index), load_manifest(store, token_shard_ref(pipeline, index))
    if (manifest := find_made_from(store, ref, [source])) is not None:
        return Produced(ref, manifest, is_cached=True)
    statistics = StatisticsAccumulator(pipeline.d_in(name))
    rows = torch.cat([block.rows for block in truth_of(pipeline, index)]).to(getattr(torch, pipeline.config.harvest.dtype))
    statistics.add(rows)
    with create_artifact(store, ref, made_from=[source]) as art:
        save_tensors(art, ROWS, {"rows": rows}, n_rows=len(rows))
        save_shard_statistics(art, statistics.finish(), len(rows), pipeline.config.harvest.dtype)
    progress(len(rows))
    return art.produced._replace(wall_s=time.monotonic() - started_s)


def truth_of(pipeline: Pipeline, index: int) -> list[PlantedRows]:
    """Draw again what the rows of a shard are made of."""
    corpus, seed = pipeline.config.corpus, pipeline.config.seed
    return plant_rows(corpus, planting_of(pipeline), seed, index, pipeline.source(index).spec["n_rows"])


def planting_of(pipeline: Pipeline) -> Planting:
    """Return the features of a pipeline's planted rows."""
    return pipeline.remember("planting", lambda: make_planting(pipeline.config.corpus, pipeline.config.seed))


def make_truth(pipeline: Pipeline, store: Store) -> Produced:
    """Publish the features, for who wants to compare: directions, probabilities, parents."""
    ref, planting = truth_ref(pipeline), planting_of(pipeline)
    if (manifest := find_manifest(store, ref)) is not None:
        return Produced(ref, manifest, is_cached=True)
    blocks = truth_of(pipeline, pipeline.held_out_indices[0])
    fired = torch.cat([(block.strengths > 0).double() for block in blocks])
    with create_artifact(store, ref) as art:
        named = {"directions": planting.directions, "probability": planting.probability, "parent": planting.parent}
        save_tensors(art, TRUTH, {**named, "firing_frequency": fired.mean(0)})
        art.facts |= {"n_features": len(planting.directions), "n_rows": len(fired), "l0": float(fired.sum(1).mean())}
    return art.produced
