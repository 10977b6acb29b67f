"""What `interp plan` prints: what a pipeline will make, before anything is made; and `interp costs`: what it took, beside that."""

from collections.abc import Mapping
from typing import Any, Final

from rich.console import Console

from interp_assets.config import PipelineConfig
from interp_assets.console import format_bytes, format_count, print_table
from interp_assets.corpus.plan import describe_empty, plan_corpus
from interp_assets.costs import Cost, add_up
from interp_assets.errors import ArtifactMissingError
from interp_assets.pipeline import Pipeline, open_pipeline_store
from interp_assets.quote import print_plans
from interp_assets.road import Stop, find_version, make_road
from interp_assets.shuffle.estimate import compare_plans
from interp_assets.shuffle.plan import load_shard_rows
from interp_assets.shuffle.rows import RowFormat
from interp_assets.store import Store, open_store
from interp_assets.visualize.estimate import Machine, Workload, best_plan, estimate

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
    if sentence := describe_empty(pipeline.plan):
        console.print(f"  {sentence}", soft_wrap=True, markup=False)
    for hook_point, width in pipeline.plan.hook_widths.items():
        console.print(f"  {config.model.name} at {hook_point}: {width:,} values a row in {config.harvest.dtype}", soft_wrap=True, markup=False)
    _print_shuffle(console, pipeline, store)
    _print_evidence(console, pipeline, store)
    rows = [_plan_row(stop, pipeline, store) for stop in make_road(config)[1:]]
    print_table(console, ["asset", "partitioned by", "partitions", "there already"], rows)
    for name, _, n_partitions, _ in rows:
        if n_partitions > MAX_PARTITIONS:
            advice = "Dagster becomes slow. Raise corpus.shard_bytes or lower features.latent_slices."
            console.print(f"\n{name} has {n_partitions:,} partitions; above {MAX_PARTITIONS:,} {advice}", soft_wrap=True)


def print_costs(console: Console, config: PipelineConfig, tables: Mapping[str, list[list[dict[str, Any]]]]) -> None:
    """Print, for each asset, what its partitions were expected to take and what they took. `tables`: by asset, one for each partition."""
    sums = {name: add_up(found) for name, found in tables.items() if found}
    if not sums:
        console.print("Nothing was made under this history. `interp run` makes what is missing, and records it.", soft_wrap=True)
        return
    rows = [(name, len(tables[name]), *_beside(*both)) for name, both in sums.items()]
    total = [Cost(*(sum(values) for values in zip(*side, strict=True))) for side in zip(*sums.values(), strict=True)]
    rows.append(("together", sum(len(found) for found in tables.values()), *_beside(*total)))
    console.print(f"Pipeline {config.name}: expected / taken by the partitions that were made", soft_wrap=True, markup=False)
    print_table(console, ["asset", "made", "read", "written", "requests", "seconds", "USD"], rows)


def _beside(estimated: Cost, actual: Cost) -> tuple[str, ...]:
    """Return both columns of each unit as one cell."""
    shows = [_show_bytes, _show_bytes, "{:,.0f}".format, "{:,.1f}".format, "{:,.4f}".format]
    return tuple(f"{show(before)} / {show(after)}" for show, before, after in zip(shows, estimated, actual, strict=True))


def _show_bytes(n_bytes: float) -> str:
    return format_bytes(int(n_bytes))


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
        print_plans(console, plans)
    console.print()


def _print_evidence(console: Console, pipeline: Pipeline, store: Store) -> None:
    """Print what the feature passes will cost for each SAE that is shown, with the configured and the best number of latent slices."""
    features, machine = pipeline.config.features, Machine()
    n_rows = _count_rows(pipeline, store)
    for name in features.saes:
        sae = pipeline.config.sae(name)
        d_in = pipeline.d_in(sae.hook_point)
        work = Workload(
            n_rows=n_rows,
            n_shards=len(pipeline.shard_indices),
            d_in=d_in,
            d_sae=sae.d_sae,
            l0=float(sae.k),
            row_bytes=RowFormat(d_in, pipeline.config.harvest.dtype).row_bytes,
            vocabulary_size=pipeline.plan.vocabulary_size,
        )
        plan, best = estimate(work, features, features.latent_slices, machine), best_plan(work, features, machine)
        console.print(
            f"  features of {name}: {n_rows:,} rows x {sae.d_sae:,} latents, {sae.k} a row (assumed); {machine.workers} workers of 2 cores:",
            soft_wrap=True,
            markup=False,
        )
        rows = [
            (item.name, item.jobs, format_bytes(item.read_bytes), format_bytes(item.written_bytes), f"{item.wall_s:,.0f} s") for item in plan.passes
        ]
        print_table(console, ["  pass", "jobs", "reads", "writes", "time"], rows)
        slices = f"  {format_count(plan.latent_slices, 'latent slice')}: {plan.wall_s:,.0f} s, {format_bytes(plan.job_bytes)} a job"
        advice = f"; best {best.latent_slices}: {best.wall_s:,.0f} s, {format_bytes(best.job_bytes)} a job"
        gather = f". Gathering the rows around examples instead would write {format_bytes(plan.gather_bytes)}."
        console.print(slices + (advice if best.latent_slices != plan.latent_slices else ", which is best") + gather, soft_wrap=True)
        console.print()


def _count_rows(pipeline: Pipeline, store: Store) -> int:
    """Return the rows of all shards, counted where they are known, else estimated from the text."""
    held_out = sum(pipeline.source(index).n_bytes for index in pipeline.held_out_indices) // _BYTES_PER_TOKEN
    try:
        return max(1, held_out + sum(shard.n_valid for shard in load_shard_rows(pipeline, store)))
    except ArtifactMissingError:
        return max(1, sum(pipeline.source(index).n_bytes for index in pipeline.shard_indices) // _BYTES_PER_TOKEN)


def _plan_row(stop: Stop, pipeline: Pipeline, store: Store) -> tuple[str, str, int, int]:
    keys = stop.partition_keys(pipeline)
    n_there = sum(find_version(stop, pipeline, store, key) is not None for key in keys)
    axis = {"none": "-", "slice|shard": "latent slice x shard", "slice": "latent slice"}.get(stop.axis, stop.axis)
    return stop.name, axis, len(keys), n_there
