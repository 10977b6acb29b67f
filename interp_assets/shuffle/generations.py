"""A pipeline that has grown becomes the pipelines of its generations: the shards that were shuffled together, and those that came later.

`plan.generations` lists, for every generation, the first shard index that is not in it any more; empty means that all shards are one. Two pure
functions lead from a pipeline to its parts:

    before(pipeline)   the pipeline as it was before its newest generation
    newest(pipeline)   the newest generation alone: its own training shards, with a seed of its own

Generation 0 is shuffled as ever. Each later one is shuffled alone and merged into the mixed shards before it (`append.py`). A generation's
seed is drawn from the root seed and its shards' indices, so no random stream serves two generations.
"""

from collections.abc import Sequence
from dataclasses import replace

from interp_assets.planning.pipeline import Pipeline
from interp_assets.shuffle.permutation import Draws


def has_grown(pipeline: Pipeline) -> bool:
    """Say whether the mixed shards are those of an older generation with newer rows merged in."""
    return len(pipeline.plan.generations) > 1


def before(pipeline: Pipeline) -> Pipeline:
    """Return the pipeline as it was before its newest generation; it must have grown."""
    assert has_grown(pipeline)
    plan = replace(pipeline.plan, generations=pipeline.plan.generations[:-1])
    return pipeline.remember("before", lambda: Pipeline(pipeline.config, plan))


def newest(pipeline: Pipeline) -> Pipeline:
    """Return the newest generation as a pipeline of its own; the pipeline itself while there is only one."""
    if not has_grown(pipeline):
        return pipeline
    older = before(pipeline)
    return pipeline.remember("newest", lambda: make_own(pipeline, [index for index in pipeline.train_indices if not older.trains_on(index)]))


def generation_of(pipeline: Pipeline, index: int) -> Pipeline:
    """Return the generation that shuffles training shard `index`."""
    while has_grown(pipeline) and before(pipeline).trains_on(index):
        pipeline = before(pipeline)
    return newest(pipeline)


def make_own(pipeline: Pipeline, added: Sequence[int]) -> Pipeline:
    """Return the pipeline whose training shards are `added`, with a seed of its own."""
    seed = Draws(pipeline.config.seed).stream("generation", *added).torch_seed()
    kept = {*added, *pipeline.held_out_indices}
    shards = [shard for shard in pipeline.plan.shards if shard.index in kept]
    return Pipeline(pipeline.config.model_copy(update={"seed": seed}), replace(pipeline.plan, shards=shards, generations=[]))
