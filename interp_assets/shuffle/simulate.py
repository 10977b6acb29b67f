"""The index arithmetic of a shuffle that is too large to run: sizes, count rows, ranges and requests of a 1-PB plan, checked on this machine.

No row exists here; only their numbers are drawn and added up. What is checked, by assertion:

1. in every pass the jobs' rows, and the output buckets' rows, add up to all rows; the last pass's buckets fit the planned memory;
2. a sampled job's count row, drawn as the job would, adds up to the job's rows and never exceeds a bucket;
3. a sampled job's order is a permutation, and its row ids are distinct and lead back to their shard;
4. the ranges of the sampled jobs are about as large, and cost as many requests, as the plan says.

Cost for 1 PB (10^12 rows of 1 KB, 10,000 jobs, fan-out 100): seconds for the sizes, 5 s for each sampled job.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from interp_assets.planning.machine import Prices
from interp_assets.planning.pipeline import SHARD_SHIFT
from interp_assets.shuffle.estimate import PassPlan
from interp_assets.shuffle.permutation import Draws
from interp_assets.shuffle.sizes import ShuffleSizes, shares


class PassSimulation(NamedTuple):
    """One pass: what was counted, and what the sampled jobs drew."""

    pass_index: int
    input_buckets: int
    jobs: int
    largest_job_rows: int
    n_rows: int
    """Rows of all jobs together."""
    range_bytes: tuple[int, int]
    """Smallest and largest range of the sampled jobs; (0, 0) when none was sampled or the pass is the last."""
    get_requests: int
    """Requests for reading the sampled jobs' ranges in the next pass, manifests included."""


class Simulation(NamedTuple):
    """A whole shuffle, counted."""

    sizes: ShuffleSizes
    steps: list[PassSimulation]
    bytes_moved: int


def simulate(plan: PassPlan, row_bytes: int, *, sampled_jobs: int = 1, sampled_orders: int = 0) -> Simulation:
    """Count a plan's shuffle: every size of every pass, and for `sampled_jobs` jobs of each distributing pass what they would draw.

    The first `sampled_orders` jobs of pass 1 also draw the order of their rows: 33 bytes a row, 3.3 GB for a job of 100 million rows.

    Raises `AssertionError` when anything does not add up, which would be a bug in the plan or in the shuffle.
    """
    n_rows = plan.data_bytes // row_bytes
    n_jobs = plan.steps[0].jobs
    sizes = ShuffleSizes(passes=plan.passes, fan_out=plan.fan_out, shard_rows=tuple(shares(n_rows, n_jobs)))
    assert sizes.n_buckets == plan.n_buckets, f"{sizes.n_buckets} mixed shards, {plan.n_buckets} planned"
    draws = Draws(0)
    steps = [_simulate_pass(plan, sizes, pass_index, row_bytes, draws, sampled_jobs) for pass_index in range(1, plan.passes + 1)]
    for job in range(min(sampled_orders, n_jobs)):
        check_order(draws.split_order(1, 0, job, sizes.shard_rows[job]), job)
    return Simulation(sizes, steps, sum(2 * step.n_rows * row_bytes for step in steps))


def check_order(order: NDArray[np.int64], shard_index: int) -> None:
    """Check that a job's order is a permutation, and that the row ids of its rows are distinct and name the shard."""
    met = np.zeros(len(order), bool)
    met[order] = True
    assert met.all(), "every row of a job is written once"
    del met
    assert len(order) <= 1 << SHARD_SHIFT, f"{len(order)} rows do not fit the row part of a row id"
    row_ids = order.astype(np.uint64) + np.uint64(shard_index << SHARD_SHIFT)
    assert ((row_ids >> np.uint64(SHARD_SHIFT)) == shard_index).all(), "a row id leads back to its shard"


def _simulate_pass(plan: PassPlan, sizes: ShuffleSizes, pass_index: int, row_bytes: int, draws: Draws, sampled_jobs: int) -> PassSimulation:
    is_last = pass_index == sizes.passes
    n_inputs = sizes.n_inputs(pass_index)
    n_rows, n_jobs, largest = 0, 0, 0
    for bucket in range(n_inputs):
        jobs = [sizes.input_rows(pass_index, bucket)] if is_last else sizes.job_rows(pass_index, bucket)
        n_rows, n_jobs, largest = n_rows + sum(jobs), n_jobs + len(jobs), max(largest, *jobs)
        if not is_last:
            assert sum(sizes.capacities(pass_index, bucket)) == sum(jobs), f"bucket {bucket} of pass {pass_index} does not add up"
    assert n_rows == sizes.n_rows, f"pass {pass_index} has {n_rows} rows of {sizes.n_rows}"
    assert largest * row_bytes <= plan.memory_bytes, f"a job of {largest} rows does not fit {plan.memory_bytes} bytes"
    found = [] if is_last else _sample_ranges(sizes, pass_index, draws, sampled_jobs)
    lengths = np.concatenate(found) * row_bytes if found else np.zeros(0, np.int64)
    gets = int((np.maximum(1, -(-lengths // Prices().get_bytes)) + 1).sum())
    spread = (int(lengths.min()), int(lengths.max())) if found else (0, 0)
    return PassSimulation(pass_index, n_inputs, n_jobs, largest, n_rows, spread, gets)


def _sample_ranges(sizes: ShuffleSizes, pass_index: int, draws: Draws, sampled_jobs: int) -> list[NDArray[np.int64]]:
    """Draw the count rows of a few jobs, spread over the input buckets and jobs of a pass."""
    found: list[NDArray[np.int64]] = []
    n_inputs = sizes.n_inputs(pass_index)
    for sample in range(sampled_jobs):
        bucket = sample * n_inputs // sampled_jobs
        jobs, capacities = sizes.job_rows(pass_index, bucket), sizes.capacities(pass_index, bucket)
        job = (2 * sample + 1) * len(jobs) // (2 * sampled_jobs)
        counts = draws.split_counts(pass_index, bucket, job, jobs, capacities)
        assert int(counts.sum()) == jobs[job], f"the ranges of job {job} are not its rows"
        assert ((counts >= 0) & (counts <= np.array(capacities))).all(), f"job {job} overflows a bucket"
        found.append(counts)
    return found
