"""A shuffle of a petabyte adds up, without a row being moved."""

import numpy as np
import pytest
from shuffle_orders import draw_whole_table

from interp_assets.compute.seeds import stream
from interp_assets.shuffle.estimate import compare_plans
from interp_assets.shuffle.simulate import check_order, simulate

GB = 10**9


def test_a_petabyte_adds_up_in_every_pass() -> None:
    """10^12 rows of 1 KB: 10,000 jobs, 100 buckets of 100 jobs, 10,000 mixed shards; every size is counted."""
    plan = compare_plans(10**12, 1000, 100 * GB, GB, sort_bytes=0)[0]
    result = simulate(plan, 1000, sampled_jobs=0)
    assert [(step.input_buckets, step.jobs) for step in result.steps] == [(1, 10_000), (100, 10_000), (10_000, 10_000)]
    assert all(step.n_rows == 10**12 for step in result.steps)
    assert [step.jobs for step in result.steps] == [step.jobs for step in plan.steps]
    assert result.bytes_moved == plan.bytes_moved == 6 * 10**15
    assert max(step.largest_job_rows for step in result.steps) == 10**8


def test_sampled_jobs_draw_ranges_of_the_planned_size_and_requests() -> None:
    """10 GB in two passes of 100-MB jobs: what a job draws is what the plan paid for."""
    plan = compare_plans(10**7, 1000, GB // 10, GB // 1000, sort_bytes=0)[0]
    first = simulate(plan, 1000, sampled_jobs=5, sampled_orders=2).steps[0]
    assert 0.5 * plan.range_bytes < first.range_bytes[0] <= first.range_bytes[1] < 1.5 * plan.range_bytes
    assert first.get_requests == pytest.approx(plan.steps[1].get_requests * 5 // first.jobs, rel=0.02)


def test_the_whole_table_fills_every_bucket() -> None:
    """300 jobs, 30 buckets, 3 * 10^8 rows."""
    plan = compare_plans(3 * 10**8, 1000, 10 * GB, GB // 100, sort_bytes=0)[0]
    sizes = simulate(plan, 1000, sampled_jobs=1).sizes
    table = draw_whole_table(sizes)
    assert table.shape == (30, 30)
    assert int(table.sum()) == 3 * 10**8


def test_an_order_that_is_no_permutation_is_noticed() -> None:
    """The check can fail."""
    order = stream(0, "order").permutation(1000)
    check_order(order, 17)
    with pytest.raises(AssertionError, match="every row of a job is written once"):
        check_order(np.where(order == 3, 4, order), 17)


def test_a_plan_that_does_not_add_up_is_noticed() -> None:
    """A plan with another number of buckets, or less memory than its jobs need."""
    plan = compare_plans(10**7, 1000, GB // 10, GB // 1000, sort_bytes=0)[0]
    with pytest.raises(AssertionError, match="100 mixed shards, 101 planned"):
        simulate(plan._replace(n_buckets=101), 1000, sampled_jobs=0)
    with pytest.raises(AssertionError, match="does not fit"):
        simulate(plan._replace(memory_bytes=1000), 1000, sampled_jobs=0)
