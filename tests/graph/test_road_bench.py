"""What a partition costs beside its work, and the arithmetic for shards of a gigabyte."""

import sys
from pathlib import Path

import pytest

from interp_assets.graph.stages import make_road
from interp_assets.planning.config import PipelineConfig
from interp_assets.planning.progress import AssetReport

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
sys.path.insert(0, BENCHMARKS)

import bench_road  # noqa: E402 # pyright: ignore[reportMissingImports]

sys.path.remove(BENCHMARKS)


def test_the_share_of_a_large_shard_is_that_of_its_bytes() -> None:
    """Four partitions of 10 MB with 8 s of work and 2 s beside it: half a second beside 200 s for 1 GB."""
    asset = make_road(PipelineConfig()).find("activations")
    line = bench_road.describe(asset, AssetReport("activations", 4, 4, 40_000_000, 10.0, []), 8.0)
    assert line["overhead"] == 0.2
    assert line["overhead_s"] == 0.5
    assert line["share_at_1_gb"] == pytest.approx(0.5 / (0.5 + 200), rel=1e-2)
    whole = bench_road.sum_up([line], 12.0, is_quick=True)
    assert whole["overhead"] == pytest.approx(1 - 8 / 12, abs=1e-3)
    assert whole["share_at_1_gb"] == pytest.approx(line["share_at_1_gb"], rel=1e-2)


def test_what_is_no_shard_has_no_share() -> None:
    """A plan of a kilobyte does not become one of a gigabyte, and said shares of it would hide those that count."""
    road = make_road(PipelineConfig())
    small = bench_road.describe(road.plan, AssetReport("corpus_plan", 1, 1, 1000, 1.0, []), 0.5)
    assert small["share_at_1_gb"] is None
    assert bench_road.sum_up([small], 1.0, is_quick=True)["share_at_1_gb"] is None
