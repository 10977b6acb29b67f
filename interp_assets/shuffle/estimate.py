"""Rows, row size and memory become the cheapest number of passes: jobs, buckets, bytes moved, requests, money and time. Pure arithmetic.

With memory for M bytes of rows a job and K buckets a pass, P passes mix M * K^(P-1) bytes. What bounds K is not a number of files but the
size of a range, M / K: every gather reads one range from every job's file, and ranges of a few MiB cost requests and seeks. So:

    1-GB ranges of 100-GB jobs     K = 100     1 pass 100 GB, 2 passes 10 TB, 3 passes 1 PB, 4 passes 100 PB
    100-MB ranges                  K = 1000    100 TB in two passes instead of three: a third of the bytes is never moved

`compare_plans` lists what fits for 1, 2, 3, ... passes, cheapest first. For each number of passes it takes the smallest fan-out that is
enough, because larger ranges mean fewer requests. Jobs that read all data and keep one bucket each, the scheme everyone outgrows, would
read `n_buckets` times the data.
"""

import math
from typing import Final, NamedTuple

from interp_assets.errors import PlanError
from interp_assets.planning.machine import Prices
from interp_assets.shuffle.rows import SORT_BYTES

MAX_PASSES: Final = 8


class PassEstimate(NamedTuple):
    """One pass: its jobs, and the requests they make. Every pass reads all data and writes all data."""

    jobs: int
    ranges: int
    """Contiguous pieces that are read: one a job in pass 1, then one for each bucket and job of the pass before."""
    get_requests: int
    put_requests: int
    wall_s: float


class PassPlan(NamedTuple):
    """A shuffle that fits: how often the data are read and written, and what that costs."""

    passes: int
    fan_out: int
    n_buckets: int
    """Mixed shards."""
    range_bytes: int
    """Bytes of one job's file for one bucket; 0 for one pass."""
    memory_bytes: int
    """What the largest job holds."""
    data_bytes: int
    bytes_moved: int
    get_requests: int
    put_requests: int
    request_usd: float
    worker_usd: float
    wall_s: float
    steps: list[PassEstimate]

    @property
    def usd(self) -> float:
        """Requests and workers together."""
        return self.request_usd + self.worker_usd


def compare_plans(
    n_rows: int, row_bytes: int, memory_bytes: int, range_bytes: int = 8 << 20, *, sort_bytes: int = SORT_BYTES, prices: Prices | None = None
) -> list[PassPlan]:
    """Plan the shuffle of `n_rows` records of `row_bytes` (row and id) in jobs that fit `memory_bytes`, in every number of passes that fits.

    Cheapest first. `range_bytes`: the smallest range that a bucket may have in a job's file; `sort_bytes`: memory a row beside the row.
    Raises `PlanError` when nothing fits, naming the knob.
    """
    prices = Prices() if prices is None else prices
    job_rows = memory_bytes // (row_bytes + sort_bytes)
    if job_rows < 1:
        raise PlanError(f"A job of {memory_bytes:,} bytes holds no row of {row_bytes + sort_bytes:,} bytes: raise the memory a job may use.")
    largest = job_rows * row_bytes // range_bytes  # the fan-out at which ranges become too small
    plans = [_estimate(n_rows, row_bytes, job_rows, (1, 1), sort_bytes, prices)] if n_rows <= job_rows else []
    for passes in range(2, MAX_PASSES + 1) if n_rows > job_rows else ():
        fan_out = _smallest_fan_out(n_rows, job_rows, passes)
        if fan_out <= largest:
            plans.append(_estimate(n_rows, row_bytes, job_rows, (passes, fan_out), sort_bytes, prices))
        if fan_out == 2:
            break
    if not plans:
        raise PlanError(
            f"{n_rows:,} rows of {row_bytes:,} bytes do not fit {MAX_PASSES} passes: a job of {memory_bytes:,} bytes can feed {largest} buckets with "
            f"ranges of {range_bytes:,} bytes. Raise the memory a job may use, or allow smaller ranges."
        )
    return sorted(plans, key=lambda plan: plan.usd)


def estimate_passes(n_rows: int, row_bytes: int, memory_bytes: int, shape: tuple[int, int], prices: Prices | None = None) -> PassPlan:
    """Return what a given number of passes with a given fan-out costs, whether or not its jobs fit `memory_bytes` (`memory_bytes` tells)."""
    job_rows = max(1, memory_bytes // (row_bytes + SORT_BYTES))
    return _estimate(n_rows, row_bytes, job_rows, shape, SORT_BYTES, prices or Prices())


def _smallest_fan_out(n_rows: int, job_rows: int, passes: int) -> int:
    """Return the smallest fan-out with which `passes` passes end in buckets of at most `job_rows`."""
    n_buckets = -(-n_rows // job_rows)
    fan_out = max(2, math.ceil(n_buckets ** (1 / (passes - 1))) - 1)
    while fan_out ** (passes - 1) < n_buckets:
        fan_out += 1
    return fan_out


def _estimate(n_rows: int, row_bytes: int, job_rows: int, shape: tuple[int, int], sort_bytes: int, prices: Prices) -> PassPlan:
    passes, fan_out = shape
    data_bytes = n_rows * row_bytes
    n_jobs, n_buckets = max(1, -(-n_rows // job_rows)), fan_out ** (passes - 1)
    steps = [_estimate_pass(data_bytes, n_jobs if passes > 1 else 1, n_jobs, prices)]
    for pass_index in range(2, passes + 1):
        # each of the fan_out^(p-1) buckets is read from the jobs of its parent, and middle buckets are cut into jobs again
        inputs = fan_out ** (pass_index - 1)
        parents = fan_out ** (pass_index - 2)
        jobs_before = steps[-1].jobs
        ranges = max(inputs, jobs_before // parents * inputs)
        jobs = n_buckets if pass_index == passes else inputs * max(1, -(-n_jobs // inputs))
        steps.append(_estimate_pass(data_bytes, jobs, ranges, prices))
    gets, puts = sum(step.get_requests for step in steps), sum(step.put_requests for step in steps)
    wall_s = sum(step.wall_s for step in steps)
    largest_rows = max(-(-n_rows // n_jobs) if passes > 1 else 0, -(-n_rows // n_buckets))
    return PassPlan(
        passes=passes,
        fan_out=fan_out,
        n_buckets=n_buckets,
        range_bytes=0 if passes == 1 else data_bytes // n_jobs // fan_out,
        memory_bytes=largest_rows * (row_bytes + sort_bytes),
        data_bytes=data_bytes,
        bytes_moved=2 * passes * data_bytes,
        get_requests=gets,
        put_requests=puts,
        request_usd=gets * prices.get_usd + puts * prices.put_usd,
        worker_usd=2 * passes * data_bytes / (prices.worker_gb_per_s * 1e9) / 3600 * prices.worker_usd_per_hour,
        wall_s=wall_s,
        steps=steps,
    )


def _estimate_pass(data_bytes: int, jobs: int, ranges: int, prices: Prices) -> PassEstimate:
    """Count a pass's requests: each range is read in GETs of at most `get_bytes` besides its job's manifest; each file is written in parts."""
    per_range = max(1, -(-data_bytes // ranges // prices.get_bytes)) if ranges else 0
    gets = ranges * (per_range + 1)
    puts = jobs * (max(1, -(-data_bytes // jobs // prices.put_bytes)) + 3)  # parts; opening and completing them; the manifest
    busy = max(1, min(jobs, prices.workers))
    wall_s = max(2 * data_bytes / (busy * prices.worker_gb_per_s * 1e9), (gets + puts) / prices.requests_per_s)
    return PassEstimate(jobs, ranges, gets, puts, wall_s)
