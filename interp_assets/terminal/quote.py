"""Rows, row size and memory become a printed quotation of the shuffle: passes, jobs, requests, money and time, for `interp plan`.

The arithmetic is `shuffle/estimate.py`'s and the proof that it adds up `shuffle/simulate.py`'s; this is only their words.
"""

import re
import time
from collections.abc import Sequence

from rich.console import Console

from interp_assets.errors import InputError
from interp_assets.planning.machine import Prices
from interp_assets.planning.progress import format_bytes, format_count
from interp_assets.shuffle.estimate import PassPlan, compare_plans
from interp_assets.shuffle.rows import SORT_BYTES
from interp_assets.shuffle.simulate import simulate
from interp_assets.terminal.console import print_table
from interp_assets.terminal.lines import format_duration

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "pb": 10**15}
_UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}


def parse_size(text: str) -> int:
    """Read a size such as `100GB`, `8 MiB`, `1.5e9` or `1_000`. Raises `InputError` for anything else."""
    match = re.fullmatch(r"([0-9_]*\.?[0-9_]+(?:e\+?[0-9]+)?)\s*([a-z]*)", text.strip().lower().replace(",", ""))
    if match is None or match[2] not in _UNITS:
        raise InputError(f"{text!r} is not a size: write a number with or without a unit ({', '.join(unit for unit in _UNITS if len(unit) > 1)}).")
    return round(float(match[1].replace("_", "")) * _UNITS[match[2]])


def print_quote(console: Console, n_rows: int, row_bytes: int, memory_bytes: int, range_bytes: int, prices: Prices) -> PassPlan:
    """Print what shuffling `n_rows` rows of `row_bytes` (row id included) costs when a job holds `memory_bytes` of rows; returns the cheapest plan.

    What a job needs for sorting comes on top, and is printed. Raises like `compare_plans`.
    """
    plans = compare_plans(n_rows, row_bytes, memory_bytes, range_bytes, sort_bytes=0, prices=prices)
    best = plans[0]
    size = f"{format_count(n_rows, 'row')} of {row_bytes:,} bytes, {format_bytes(best.data_bytes)}"
    console.print(f"{size}; {format_bytes(memory_bytes)} of rows a job, ranges of {format_bytes(range_bytes)} or more", soft_wrap=True)
    print_plans(console, plans)
    console.print(f"\nThe cheapest, {format_count(best.passes, 'pass', 'passes')}:", soft_wrap=True)
    steps = [
        (n, step.jobs, step.ranges, step.get_requests, step.put_requests, format_duration(step.wall_s)) for n, step in enumerate(best.steps, start=1)
    ]
    print_table(console, ["  pass", "jobs", "ranges read", "GETs", "PUTs", "time"], steps)
    needed = best.memory_bytes // row_bytes * (row_bytes + SORT_BYTES)
    parts = [
        f"largest job {format_bytes(best.memory_bytes)} of rows, {format_bytes(needed)} with sorting",
        f"ranges of {format_bytes(best.range_bytes)}" if best.passes > 1 else "no ranges",
        f"requests {best.request_usd:,.2f} USD, {prices.workers} workers {best.worker_usd:,.2f} USD",
        f"jobs that read all and keep one bucket each would read {format_bytes(best.data_bytes * best.n_buckets)}",
    ]
    console.print("  " + "; ".join(parts), soft_wrap=True)
    console.print(f"  shuffle: {{passes: {best.passes}, fan_out: {best.fan_out}, memory_bytes: {needed}}}", soft_wrap=True, markup=False)
    return best


def print_plans(console: Console, plans: Sequence[PassPlan], configured: PassPlan | None = None) -> None:
    """Print one line for every number of passes that fits; that of the configuration first, with a mark."""
    plans = [plan for plan in plans if configured is None or (plan.passes, plan.fan_out) != (configured.passes, configured.fan_out)]
    rows = [
        (
            "  as configured" if plan is configured else "  instead" if configured else " ",
            plan.passes,
            plan.fan_out,
            plan.n_buckets,
            format_bytes(plan.bytes_moved),
            plan.get_requests + plan.put_requests,
            f"{plan.usd:,.2f}",
            format_duration(plan.wall_s),
        )
        for plan in ([configured, *plans] if configured else plans)
    ]
    print_table(console, ["", "passes", "fan-out", "mixed shards", "bytes moved", "requests", "USD", "time"], rows, right_from=1)


def print_simulation(console: Console, plan: PassPlan, row_bytes: int) -> None:
    """Run a plan's index arithmetic without a row, and print that it adds up. Raises `AssertionError` when it does not, which is a bug."""
    started = time.monotonic()
    result = simulate(plan, row_bytes, sampled_jobs=1, sampled_orders=1)
    console.print(f"\nSimulated in {time.monotonic() - started:.1f} s, row numbers only; every sum agrees with the plan:", soft_wrap=True)
    rows = [
        (step.pass_index, step.input_buckets, step.jobs, step.n_rows, step.largest_job_rows, _spread(step.range_bytes), step.get_requests)
        for step in result.steps
    ]
    print_table(console, ["  pass", "input buckets", "jobs", "rows of all jobs", "largest job", "ranges drawn", "GETs of a sampled job"], rows)


def _spread(range_bytes: tuple[int, int]) -> str:
    return "" if range_bytes == (0, 0) else f"{format_bytes(range_bytes[0])} to {format_bytes(range_bytes[1])}"
