"""The planner counts what a shuffle costs, and chooses the cheapest that fits."""

import pytest

from interp_assets.errors import PlanError
from interp_assets.planning.machine import Prices
from interp_assets.shuffle.estimate import compare_plans
from interp_assets.shuffle.rows import SORT_BYTES

GB = 10**9
TB = 10**12


@pytest.mark.parametrize(
    ("data_bytes", "passes", "fan_out", "n_buckets"),
    [(100 * GB, 1, 1, 1), (10 * TB, 2, 100, 100), (1000 * TB, 3, 100, 10**4), (10**17, 4, 100, 10**6)],
)
def test_the_examples_of_the_blueprint_come_out(data_bytes: int, passes: int, fan_out: int, n_buckets: int) -> None:
    """100 GB of memory a job and 1-GB ranges: 100 GB, 10 TB, 1 PB and 100 PB take 1, 2, 3 and 4 passes (rows alone counted)."""
    plan = compare_plans(data_bytes // 1000, 1000, 100 * GB, GB, sort_bytes=0)[0]
    assert (plan.passes, plan.fan_out, plan.n_buckets) == (passes, fan_out, n_buckets)
    assert plan.bytes_moved == 2 * passes * data_bytes
    assert plan.memory_bytes <= 100 * GB


def test_one_row_more_than_fits_takes_one_pass_more() -> None:
    """The border is exact."""
    for data_bytes, passes in ((100 * GB, 2), (10 * TB, 3), (1000 * TB, 4)):
        assert compare_plans(data_bytes // 1000 + 1, 1000, 100 * GB, GB, sort_bytes=0)[0].passes == passes


@pytest.mark.parametrize(("range_bytes", "passes"), [(GB, 3), (100_000_000, 2), (16_000_000, 2)])
def test_smaller_ranges_save_a_pass(range_bytes: int, passes: int) -> None:
    """100 TB in two passes instead of three: 400 TB moved instead of 600."""
    plan = compare_plans(100 * TB // 1000, 1000, 100 * GB, range_bytes, sort_bytes=0)[0]
    assert plan.passes == passes
    assert plan.range_bytes >= range_bytes
    assert plan.bytes_moved == 2 * passes * 100 * TB


def test_625_terabytes_fit_two_passes_of_16_megabyte_ranges() -> None:
    """The largest two-pass shuffle of 100-GB jobs: K = 6,250."""
    assert compare_plans(625 * TB // 1000, 1000, 100 * GB, 16_000_000, sort_bytes=0)[0].passes == 2
    assert compare_plans(626 * TB // 1000, 1000, 100 * GB, 16_000_000, sort_bytes=0)[0].passes == 3


def test_the_cheapest_plan_is_not_always_the_one_with_the_fewest_passes() -> None:
    """1 TB with 1 GB a job: a million 1-MB ranges cost more requests than a third pass costs bytes; dear machines turn that round."""
    plans = compare_plans(TB // 1000, 1000, GB, 100_000, sort_bytes=0)
    assert [plan.usd for plan in plans] == sorted(plan.usd for plan in plans)
    assert plans[0].passes == 3
    assert {plan.passes for plan in plans} > {2, 3, 4}
    assert compare_plans(TB // 1000, 1000, GB, 100_000, sort_bytes=0, prices=Prices(worker_usd_per_hour=10.0))[0].passes == 2


def test_requests_are_counted_one_by_one() -> None:
    """10 jobs of 10 MB, 10 buckets: every number by hand."""
    prices = Prices(put_bytes=4_000_000, get_bytes=6_000_000)
    plan = compare_plans(100_000, 1000, 10_000_000, 1_000_000, sort_bytes=0, prices=prices)[0]
    first, last = plan.steps
    assert (plan.passes, plan.fan_out, plan.range_bytes) == (2, 10, 1_000_000)
    assert (first.jobs, first.ranges, first.get_requests, first.put_requests) == (10, 10, 10 * (2 + 1), 10 * (3 + 3))
    assert (last.jobs, last.ranges, last.get_requests, last.put_requests) == (10, 100, 100 * (1 + 1), 10 * (3 + 3))
    assert plan.request_usd == pytest.approx(230 * 4e-7 + 120 * 5e-6)


def test_two_passes_cost_a_fifth_of_a_dollar_of_requests_a_terabyte() -> None:
    """The anchor of the design: 64-MB parts, 16-MB reads."""
    plan = compare_plans(100 * TB // 1000, 1000, 100 * GB, 100_000_000, sort_bytes=0)[0]
    assert plan.request_usd / 100 == pytest.approx(0.2, abs=0.02)


def test_the_sort_is_counted_in_memory() -> None:
    """What is planned must be what a job's memory check allows."""
    assert compare_plans(10_000, 1000, 10_000 * (1000 + SORT_BYTES), 1000)[0].passes == 1
    assert compare_plans(10_000, 1000, 10_000 * (1000 + SORT_BYTES) - 1, 1000)[0].passes == 2


def test_what_cannot_fit_names_the_knob() -> None:
    """A plan that does not exist must say why."""
    with pytest.raises(PlanError, match=r"holds no row of 1,032 bytes: raise the memory"):
        compare_plans(10, 1000, 100)[0]
    with pytest.raises(
        PlanError, match=r"can feed 1 buckets with ranges of 8,388,608 bytes. Raise the memory a job may use, or allow smaller ranges"
    ):
        compare_plans(10**9, 1000, 10_000_000)[0]
