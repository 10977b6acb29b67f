"""What `interp plan` prints: what a pipeline will make, before anything is made; and `interp costs`: what it took, beside that."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from interp_assets.corpus.sizes import TEXT_BYTES_PER_S, TEXT_BYTES_PER_TOKEN, count_rows
from interp_assets.errors import ArtifactMissingError, PlanError, StoreMissingError
from interp_assets.graph.local_ray import count_workers
from interp_assets.graph.readiness import find_lacks, free_bytes
from interp_assets.graph.stages import make_road
from interp_assets.harvest.sizes import ROWS_PER_S
from interp_assets.planning.config import PipelineConfig
from interp_assets.planning.costs import Cost, add_up
from interp_assets.planning.machine import PROCESS_BYTES, Machine, Prices
from interp_assets.planning.pipeline import Pipeline, open_pipeline_store
from interp_assets.planning.progress import format_bytes
from interp_assets.planning.rates import load_rates, rates_path
from interp_assets.planning.schedule import Line, make_schedule
from interp_assets.shuffle.choice import foresee
from interp_assets.shuffle.estimate import compare_plans, estimate_passes
from interp_assets.shuffle.plan import load_shard_rows
from interp_assets.shuffle.refs import shape_of
from interp_assets.shuffle.rows import RowFormat
from interp_assets.storage.listing import list_store
from interp_assets.storage.seen import open_seen
from interp_assets.storage.store import Store, open_store
from interp_assets.terminal.console import format_count, print_table
from interp_assets.terminal.lines import format_duration
from interp_assets.terminal.quote import print_plans
from interp_assets.visualize.assets import workload
from interp_assets.visualize.estimate import best_plan, estimate

_COMPILED: Final = Path(__file__).parents[1] / "compute" / "__pycache__"
"""Where code of loops is kept that were compiled before."""
MAX_PARTITIONS: Final = 5000
"""Above this an asset's page in Dagster becomes slow; larger shards are the remedy."""


def print_plan(console: Console, config: PipelineConfig, workers: int | None = None) -> None:
    """Print what a pipeline will make: shards, a line for each asset, and the shuffle. `workers`: default `execution.workers`.

    Plans the corpus in memory: a running pipeline keeps its plan. Raises `PlanError` with what stands in the way, and, after the forecast, with what
    this machine lacks.
    """
    workers = workers or count_workers(config.execution)
    with open_seen() as notes:
        _print_plan(console, config, list_store(open_pipeline_store(config), notes), workers)


def _print_plan(console: Console, config: PipelineConfig, store: Store, workers: int) -> None:
    from interp_assets.corpus.plan import describe_empty  # noqa: PLC0415 - takes transformers, and `interp costs` does without

    road, planned = make_road(config), plan_aside(config, store)
    road.check(planned, store)
    pipeline = foresee(planned, store)
    shards = pipeline.plan.shards
    about = "about " if config.corpus.source == "huggingface" else ""  # a dataset is not read to plan
    text = f"{format_count(sum(s.n_documents for s in shards), 'document')}, {about}{format_bytes(sum(s.n_bytes for s in shards))} of text"
    held_out = format_count(len(pipeline.held_out_indices), "shard")
    console.print(f"Pipeline {config.name} in {config.root}", soft_wrap=True, markup=False)
    console.print(f"  {format_count(len(shards), 'corpus shard')}: {text}; {held_out} held out", soft_wrap=True)
    if sentence := describe_empty(pipeline):
        console.print(f"  {sentence}", soft_wrap=True, markup=False)
    for hook_point, width in pipeline.plan.hook_widths.items():
        console.print(f"  {config.model.name} at {hook_point}: {width:,} values a row in {config.harvest.dtype}", soft_wrap=True, markup=False)
    lines = make_schedule(road, pipeline, store, load_rates(rates_path()), workers)
    _print_schedule(console, pipeline, lines, workers)
    _print_shuffle(console, pipeline, store, workers)
    _print_slices(console, pipeline, store, workers)
    for line in lines:
        if line.n_partitions > MAX_PARTITIONS:
            advice = "Dagster becomes slow. Raise corpus.shard_bytes or lower features.latent_slices."
            console.print(f"\n{line.name} has {line.n_partitions:,} partitions; above {MAX_PARTITIONS:,} {advice}", soft_wrap=True)
    if workers == 1 and (lacks := find_lacks(road, pipeline, store, lines)):  # several jobs are planned for other machines than this
        raise PlanError("\n".join(lacks))


def plan_aside(config: PipelineConfig, store: Store) -> Pipeline:
    """Plan a pipeline as a run would now, and leave the plan in its folder as it is."""
    from interp_assets.corpus.plan import plan_corpus  # noqa: PLC0415 - as above

    aside = open_store("memory://plan")
    with suppress(StoreMissingError):  # what it remembers: generations, and the shuffle that was chosen
        aside.put(config.execution.plan, store.get(config.execution.plan))
    return plan_corpus(config, aside)


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
    columns = ["asset", "made", "read", "written", "requests", "seconds", "USD"]
    n_shown = len(columns) if any(cost.usd for cost in total) else len(columns) - 1  # nothing has a price: no column of zeros
    print_table(console, columns[:n_shown], [row[:n_shown] for row in rows])


def _beside(estimated: Cost, actual: Cost) -> tuple[str, ...]:
    """Return both columns of each unit as one cell."""
    shows = [_show_bytes, _show_bytes, "{:,.0f}".format, "{:,.1f}".format, "{:,.4f}".format]
    return tuple(f"{show(before)} / {show(after)}" for show, before, after in zip(shows, estimated, actual, strict=True))


def _show_bytes(n_bytes: float) -> str:
    return format_bytes(int(n_bytes))


def _print_schedule(console: Console, pipeline: Pipeline, lines: Sequence[Line], workers: int) -> None:
    """Print a line for each asset, the sum, what is assumed, and that the disk has room where it has."""
    rows = [
        (
            line.name if len(line.key) == 1 else "  ".join(line.key[1:]),
            f"{line.n_missing:,} of {line.n_partitions:,}",
            _show_rows(line.n_rows),
            *(_or_dash(n_bytes) for n_bytes in (line.read_bytes, line.written_bytes, line.job_bytes)),
            format_duration(line.wall_s) + (" *" if line.rate else "  ") if line.n_missing else "-  ",
        )
        for line in lines
    ]
    read_bytes, written_bytes = sum(line.read_bytes for line in lines), sum(line.written_bytes for line in lines)
    job_bytes = max(line.job_bytes for line in lines)
    n_missing, wall_s = sum(line.n_missing for line in lines), sum(line.wall_s for line in lines)
    n_partitions = sum(line.n_partitions for line in lines)
    total = (
        "together",
        f"{n_missing:,} of {n_partitions:,}",
        "",
        *map(_or_dash, (read_bytes, written_bytes, job_bytes)),
        format_duration(wall_s) + "  ",
    )
    console.print()
    print_table(console, ["asset", "to make", "rows", "reads", "writes", "memory", "time  "], [*rows, total], right_from=1)
    machine, how = Machine(), "one job at a time" if workers == 1 else f"{workers:,} jobs at once"
    known = [line for line in lines if line.rate and line.n_missing]
    rates = f"{machine.flops / 1e9:,.0f} GFLOP/s, {machine.read_gb_per_s:g} GB/s of files, {TEXT_BYTES_PER_S / 1e6:g} MB/s of text"
    notes = [
        f"Time with {how} (--workers), each of two cores; assumed:",
        f"  {rates}, at most {ROWS_PER_S:,} rows/s through the model",
        *(["  * instead as fast as such partitions were on this machine before"] if known else []),
        f"Memory: what the largest job holds, beside {format_bytes(PROCESS_BYTES)} for the process. Writes stay on the disk.",
    ]
    if not any(_COMPILED.glob("loops.*.nbi")):
        notes.append("Loops are compiled at first use, once on this machine: one or two minutes more.")
    for note in notes:
        console.print(note, soft_wrap=True, markup=False)
    if (free := free_bytes(pipeline.config.root)) is not None and free >= written_bytes:
        console.print(f"{pipeline.config.root} has {format_bytes(free)} free, which is enough.", soft_wrap=True, markup=False)


def _show_rows(n_rows: int) -> str:
    return "-" if not n_rows else f"{n_rows:,}" if n_rows < 10**9 else f"{n_rows:.3g}"


def _or_dash(n_bytes: int) -> str:
    return format_bytes(n_bytes) if n_bytes else "-"


def _print_shuffle(console: Console, pipeline: Pipeline, store: Store, workers: int) -> None:
    """Print what the configured shuffle moves, and what other numbers of passes would cost with the same memory."""
    shuffle, harvest = pipeline.config.shuffle, pipeline.config.harvest
    passes, fan_out = shape_of(pipeline)
    try:
        n_rows, how = sum(shard.n_valid for shard in load_shard_rows(pipeline, store)), "counted"
    except ArtifactMissingError:
        n_rows, how = count_rows(pipeline, store, pipeline.train_indices), f"estimated from the text, {TEXT_BYTES_PER_TOKEN} bytes of text a row"
    counted = f"{format_count(passes, 'pass', 'passes')}, {format_count(fan_out ** (passes - 1), 'mixed shard')}"
    chosen = "" if shuffle.stated else f", as `shuffle.passes: auto` {'chose' if how == 'counted' else 'will choose for so many'}"
    console.print(f"\nShuffle of {n_rows:,} rows ({how}): {counted}{chosen}", soft_wrap=True, markup=False)
    prices, n_rows = Prices(workers=workers), max(1, n_rows)
    for row_bytes in dict.fromkeys(RowFormat(pipeline.d_in(hook_point), harvest.dtype).record_bytes for hook_point in harvest.hook_points):
        plan = estimate_passes(n_rows, row_bytes, shuffle.memory_bytes, (passes, fan_out), prices)
        jobs = f"{format_bytes(shuffle.memory_bytes)} a job, {format_count(workers, 'job')} at once, {format_bytes(row_bytes)} a row"
        console.print(f"  with {jobs}; S3's list prices, {prices.worker_usd_per_hour:g} USD an hour of a worker:", soft_wrap=True, markup=False)
        print_plans(console, compare_plans(n_rows, row_bytes, shuffle.memory_bytes, prices=prices), plan)
        if plan.memory_bytes > shuffle.memory_bytes:
            need = f"a job may need {format_bytes(plan.memory_bytes)}, shuffle.memory_bytes is {shuffle.memory_bytes:,}"
            console.print(f"  As configured {need}: raise it, or take one of the others.", style="yellow", soft_wrap=True, markup=False)


def _print_slices(console: Console, pipeline: Pipeline, store: Store, workers: int) -> None:
    """Print the memory and time of the feature passes with the configured and with the best number of latent slices."""
    features, machine = pipeline.config.features, Machine(workers=workers)
    for name in features.saes:
        work = workload(pipeline, store, name)
        plan, best = estimate(work, features, features.latent_slices, machine), best_plan(work, features, machine)
        slices = f"{format_count(plan.latent_slices, 'latent slice')}: {format_duration(plan.wall_s)}, {format_bytes(plan.job_bytes)} a job"
        advice = f"best {best.latent_slices}: {format_duration(best.wall_s)}, {format_bytes(best.job_bytes)} a job"
        gather = f"Gathering the rows around examples instead would write {format_bytes(plan.gather_bytes)}."
        is_best = best.latent_slices == plan.latent_slices
        console.print(f"\nFeatures of {name}, in jobs of their own: {slices}{', which is best' if is_best else ''}", soft_wrap=True, markup=False)
        console.print(f"  {gather}" if is_best else f"  {advice}. {gather}", soft_wrap=True)
