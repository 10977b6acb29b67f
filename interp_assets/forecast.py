"""What `interp plan` prints: what a pipeline will make, before anything is made."""

from typing import Final

from rich.console import Console

from interp_assets.config import PipelineConfig
from interp_assets.console import format_bytes, format_count, print_table
from interp_assets.corpus.plan import plan_corpus
from interp_assets.errors import ArtifactMissingError
from interp_assets.pipeline import Pipeline, open_pipeline_store
from interp_assets.road import Stop, find_version, make_road
from interp_assets.shuffle.estimate import compare_plans
from interp_assets.shuffle.plan import load_shard_rows
from interp_assets.shuffle.rows import RowFormat
from interp_assets.store import Store, open_store

MAX_PARTITIONS: Final = 5000
"""Above this an asset's page in Dagster becomes slow; larger shards are the remedy."""
_BYTES_PER_TOKEN: Final = 4
"""Text bytes per token, for an estimate before anything is tokenized."""


def print_plan(console: Console, config: PipelineConfig) -> None:
    """Print shards, artifacts per asset, and the shuffle. Plans the corpus in memory: a running pipeline keeps its plan."""
    store = open_pipeline_store(config)
    pipeline = plan_corpus(config, open_store("memory://plan"))
    shards = pipeline.plan.shards
    text = f"{format_count(sum(s.n_documents for s in shards), 'document')}, {format_bytes(sum(s.n_bytes for s in shards))} of text"
    held_out = format_count(len(pipeline.held_out_indices), "shard")
    console.print(f"Pipeline {config.name} in {config.root}", soft_wrap=True, markup=False)
    console.print(f"  {format_count(len(shards), 'corpus shard')}: {text}; {held_out} held out", soft_wrap=True)
    for hook_point, width in pipeline.plan.hook_widths.items():
        console.print(f"  {config.model.name} at {hook_point}: {width:,} values a row in {config.harvest.dtype}", soft_wrap=True, markup=False)
    _print_shuffle(console, pipeline, store)
    rows = [_plan_row(stop, pipeline, store) for stop in make_road(config)[1:]]
    print_table(console, ["asset", "partitioned by", "partitions", "there already"], rows)
    for name, _, n_partitions, _ in rows:
        if n_partitions > MAX_PARTITIONS:
            advice = "Dagster becomes slow. Raise corpus.shard_bytes or lower features.latent_slices."
            console.print(f"\n{name} has {n_partitions:,} partitions; above {MAX_PARTITIONS:,} {advice}", soft_wrap=True)


def _print_shuffle(console: Console, pipeline: Pipeline, store: Store) -> None:
    """Print what the shuffle will move, and what other numbers of passes would cost with the same memory."""
    shuffle, harvest = pipeline.config.shuffle, pipeline.config.harvest
    try:
        n_rows, how = sum(shard.n_valid for shard in load_shard_rows(pipeline, store)), "counted"
    except ArtifactMissingError:
        n_rows, how = sum(pipeline.source(index).n_bytes for index in pipeline.train_indices) // _BYTES_PER_TOKEN, "estimated from the text"
    n_mixed = format_count(shuffle.fan_out ** (shuffle.passes - 1), "mixed shard")
    console.print(f"  shuffle of {n_rows:,} rows ({how}): {format_count(shuffle.passes, 'pass', 'passes')}, {n_mixed}", soft_wrap=True)
    for hook_point in harvest.hook_points:
        row_bytes = RowFormat(pipeline.d_in(hook_point), harvest.dtype).record_bytes
        plans = compare_plans(max(1, n_rows), row_bytes, shuffle.memory_bytes)
        memory = format_bytes(shuffle.memory_bytes)
        console.print(f"\n  {hook_point}, with {memory} a job, cheapest first (S3 list prices, 64 workers):", soft_wrap=True, markup=False)
        rows = [
            (
                plan.passes,
                plan.fan_out,
                plan.n_buckets,
                format_bytes(plan.bytes_moved),
                plan.get_requests + plan.put_requests,
                f"{plan.usd:,.2f}",
                f"{plan.wall_s:,.0f} s",
            )
            for plan in plans
        ]
        print_table(console, ["  passes", "fan-out", "mixed shards", "bytes moved", "requests", "USD", "time"], rows)
    console.print()


def _plan_row(stop: Stop, pipeline: Pipeline, store: Store) -> tuple[str, str, int, int]:
    keys = stop.partition_keys(pipeline)
    n_there = sum(find_version(stop, pipeline, store, key) is not None for key in keys)
    axis = {"none": "-", "slice|shard": "latent slice x shard", "slice": "latent slice"}.get(stop.axis, stop.axis)
    return stop.name, axis, len(keys), n_there
