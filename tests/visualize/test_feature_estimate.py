"""The forecast of the feature passes: its arithmetic, and the choice of latent slices."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from interp_assets.errors import PlanError
from interp_assets.planning.config import FeaturesConfig
from interp_assets.planning.machine import H200, Machine
from interp_assets.terminal.forecast import _print_slices
from interp_assets.visualize.estimate import Workload, best_plan, estimate

MILLION = Workload(n_rows=100_000_000, n_shards=8, d_in=4096, d_sae=1 << 20, l0=100.0, row_bytes=8192)


def test_the_numbers_are_those_of_the_obvious_arithmetic():
    """Jobs, bytes and products of a small case, by hand."""
    work = Workload(n_rows=1000, n_shards=4, d_in=16, d_sae=64, l0=2.0, row_bytes=32)
    plan = estimate(work, FeaturesConfig(window=1), 2, Machine(workers=1, job_s=0.0, overhead=1.0, firing_ns=0.0, read_gb_per_s=1e-6))
    assert [item.jobs for item in plan.passes] == [8, 2, 4, 2]
    candidates, firings = 64 * 4 * min(1000 * 2 / 64 / 4, 280) * 6, 2000 * 4.8
    assert plan.passes[0].read_bytes == 2 * 1000 * 32 + 4 * 64 * 16 * 4
    assert plan.passes[0].written_bytes == plan.passes[1].read_bytes == int(candidates + firings)
    assert plan.passes[0].wall_s == pytest.approx((plan.passes[0].read_bytes + plan.passes[0].written_bytes) / 1000)
    assert plan.gather_bytes == 2000 * 3 * 32


def test_compute_and_reading_bound_a_job_in_turn():
    """Reads hide behind products until there are too many slices for the store."""
    fast, slow = (replace(Machine(workers=8, job_s=0.0, overhead=1.1), read_gb_per_s=speed) for speed in (100.0, 0.00001))
    products = 2 * 4096 * MILLION.d_sae * MILLION.n_rows
    computed = estimate(MILLION, FeaturesConfig(), 1, fast).passes[0].wall_s
    assert computed == pytest.approx(products / 300e9 * 1.1 / 8 + MILLION.n_rows * 100 * 100e-9 / 8)
    assert estimate(MILLION, FeaturesConfig(), 1, slow).passes[0].wall_s > 10 * computed
    assert estimate(MILLION, FeaturesConfig(), 4, slow).passes[0].wall_s > 3 * estimate(MILLION, FeaturesConfig(), 1, slow).passes[0].wall_s


def test_the_best_number_of_slices_fits_the_memory_and_busies_every_worker():
    """A million latents do not fit a job of 8 GiB; eight shards do not busy 64 workers with one slice."""
    features = FeaturesConfig()
    plan = best_plan(MILLION, features, Machine())
    assert plan.fits
    assert plan.passes[0].jobs >= 64
    assert not estimate(MILLION, features, 1, Machine()).fits
    others = [estimate(MILLION, features, p, Machine()) for p in (4, 8, 12, 16, 64, 256)]
    assert all(plan.wall_s <= other.wall_s for other in others if other.fits)
    assert best_plan(MILLION, features, H200).latent_slices == 1


def test_a_million_latents_and_a_hundred_million_rows_take_an_hour_of_one_accelerator_by_this_arithmetic():
    """The goal is an hour; what is assumed about the machine stands in `H200`."""
    assert estimate(MILLION, FeaturesConfig(), 1, H200).passes[0].wall_s < 3600
    assert estimate(MILLION, FeaturesConfig(), 1).gather_bytes > 50e12


def test_a_job_that_never_fits_is_refused_with_what_to_change():
    """The message names the knobs."""
    with pytest.raises(PlanError, match=r"No number of latent slices fits 1,000 bytes a job: a shard of 12,500,000 rows .* make smaller shards"):
        best_plan(MILLION, FeaturesConfig(), Machine(memory_bytes=1000))


def test_the_forecast_names_passes_bytes_and_the_best_number_of_slices(make_world):
    """`interp plan` prints this before anything is made."""
    world = make_world()
    console = Console(record=True, width=160, file=io.StringIO())
    _print_slices(console, world.pipeline, world.store, 1)
    text = console.export_text()
    for word in (
        "Features of demo, in jobs of their own: 2 latent slices: ",
        "a job",
        "best",
        "Gathering the rows around examples instead would write",
    ):
        assert word in text, text
