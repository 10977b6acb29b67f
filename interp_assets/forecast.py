"""What `interp plan` prints: what a pipeline will make, before anything is made."""

from typing import Final

from rich.console import Console

from interp_assets.config import PipelineConfig
from interp_assets.console import format_bytes, format_count, print_table
from interp_assets.corpus.plan import plan_corpus
from interp_assets.pipeline import Pipeline, open_pipeline_store
from interp_assets.road import Stop, find_version, make_road
from interp_assets.store import Store

MAX_PARTITIONS: Final = 5000
"""Above this an asset's page in Dagster becomes slow; larger shards are the remedy."""


def print_plan(console: Console, config: PipelineConfig) -> None:
    """Print shards, artifacts per asset, and the shuffle; plans the corpus, which writes nothing but the plan."""
    store = open_pipeline_store(config)
    pipeline = plan_corpus(config, store)
    shards = pipeline.plan.shards
    text = f"{format_count(sum(s.n_documents for s in shards), 'document')}, {format_bytes(sum(s.n_bytes for s in shards))} of text"
    held_out = format_count(len(pipeline.held_out_indices), "shard")
    console.print(f"Pipeline {config.name} in {config.root}", soft_wrap=True, markup=False)
    console.print(f"  {format_count(len(shards), 'corpus shard')}: {text}; {held_out} held out", soft_wrap=True)
    for hook_point, width in pipeline.plan.hook_widths.items():
        console.print(f"  {config.model.name} at {hook_point}: {width:,} values a row in {config.harvest.dtype}", soft_wrap=True, markup=False)
    shuffle = config.shuffle
    n_mixed = shuffle.fan_out ** (shuffle.passes - 1)
    memory = f"at most {format_bytes(shuffle.memory_bytes)} a job"
    console.print(f"  shuffle: {format_count(shuffle.passes, 'pass', 'passes')}, {format_count(n_mixed, 'mixed shard')}, {memory}\n", soft_wrap=True)
    rows = [_plan_row(stop, pipeline, store) for stop in make_road(config)[1:]]
    print_table(console, ["asset", "partitioned by", "partitions", "there already"], rows)
    for name, _, n_partitions, _ in rows:
        if n_partitions > MAX_PARTITIONS:
            advice = "Dagster becomes slow. Raise corpus.shard_bytes or lower features.latent_slices."
            console.print(f"\n{name} has {n_partitions:,} partitions; above {MAX_PARTITIONS:,} {advice}", soft_wrap=True)


def _plan_row(stop: Stop, pipeline: Pipeline, store: Store) -> tuple[str, str, int, int]:
    keys = stop.partition_keys(pipeline)
    n_there = sum(find_version(stop, pipeline, store, key) is not None for key in keys)
    axis = {"none": "-", "slice|shard": "latent slice x shard", "slice": "latent slice"}.get(stop.axis, stop.axis)
    return stop.name, axis, len(keys), n_there
