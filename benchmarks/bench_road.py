"""The whole road of the demo, stage by stage: how much of each asset's time is its work, and what that share becomes with shards of a gigabyte.

    make bench-road QUICK=1      3 small shards, a small SAE: within 45 s on 2 cores
    make bench-road              what `make demo` builds: minutes

Sketch before code: Dagster's run costs about a second of bookkeeping on SQLite, a partition in it 20 to 60 ms (`bench_orchestration.py`). The demo's
shards take a second or less, so that a fifth or more of its time is bookkeeping. A shard of 1 GB takes what its bytes take, a hundred times as long
and more, and the bookkeeping stays: 60 ms beside a minute are a thousandth.

One JSON line an asset, and one of the whole:

    value          seconds of the asset as `interp run` waits for them: runs, events, checks, plots, loading of models, and the work
    work_s         of these, seconds in which artifacts were made, as each partition recorded them
    overhead       (value - work_s) / value
    overhead_s     (value - work_s) / partitions; what is loaded once for all partitions and what checks read is in it
    rate           bytes that were written / work_s
    share_at_1_gb  overhead_s / (overhead_s + 1e9 / rate): one partition that writes 1 GB at the measured rate. Goal: <= 0.05

The last is arithmetic, not a measurement. It is too small where checks and plots take longer with more bytes, and too large where loading is shared
by more partitions, or where the rate of small shards is held down by what each costs. Assets that write less than `LEAST_BYTES` a partition,
whatever the shards have (plans, statistics, trainings), have none. The line of the whole divides the sums of those that have one.
"""

import argparse
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, Final

import dagster as dg
from floors import report

from interp_assets.graph.jobs import open_instance, run_road
from interp_assets.graph.stages import make_road
from interp_assets.planning.asset import NONE, Asset
from interp_assets.planning.config import PipelineConfig, SaeConfig, ShuffleConfig
from interp_assets.planning.demo import demo_config
from interp_assets.planning.progress import AssetReport
from interp_assets.planning.sections import CorpusConfig

LEAST_BYTES: Final = 100_000
"""A partition that writes less is no shard."""
SHARD_BYTES: Final = 1e9


def make_config(folder: Path, *, is_quick: bool) -> PipelineConfig:
    """Return the demo in a folder of its own, or a small pipeline of the same stages but heads and steering."""
    if not is_quick:
        return demo_config().model_copy(update={"root": str(folder)})
    sae = SaeConfig(d_sae=256, batch_rows=512, n_rows=50_000)
    shuffle = ShuffleConfig(passes=2, fan_out=2)
    return PipelineConfig(root=str(folder), corpus=CorpusConfig(max_shards=3, shard_bytes=64 << 10), shuffle=shuffle, saes=[sae])


def find_work(instance: dg.DagsterInstance, asset: Asset) -> float:
    """Return the seconds in which the artifacts of all partitions were made."""
    records = instance.fetch_materializations(dg.AssetKey(list(asset.key)), limit=1000).records
    seconds = 0.0
    for record in records:
        event = record.asset_materialization
        value = event.metadata.get("seconds") if event else None
        seconds += float(value.value) if isinstance(value, dg.FloatMetadataValue) else 0.0
    return seconds


def describe(asset: Asset, done: AssetReport, work_s: float) -> dict[str, Any]:
    """Turn what an asset took into a line."""
    n, overhead_s = max(1, done.n_partitions), max(0.0, done.wall_s - work_s)
    rate = done.n_bytes / work_s if work_s else 0.0
    is_shard = asset.axis is not NONE and asset.stage != "train" and done.n_bytes / n >= LEAST_BYTES and rate > 0
    share = overhead_s / n / (overhead_s / n + SHARD_BYTES / rate) if is_shard else None
    return {
        "name": f"road {done.name}",
        "value": round(done.wall_s, 3),
        "unit": "s",
        "ours": round(done.wall_s, 3),
        "ratio_to_floor": round(done.wall_s / work_s, 3) if work_s else None,
        "ratio_to_best_peer": None,
        "stage": asset.stage,
        "partitions": done.n_partitions,
        "bytes": done.n_bytes,
        "work_s": round(work_s, 3),
        "overhead": round(overhead_s / done.wall_s, 3) if done.wall_s else None,
        "overhead_s": round(overhead_s / n, 4),
        "rate": round(rate / 1e6, 3),
        "rate_unit": "MB/s",
        "share_at_1_gb": None if share is None else float(f"{share:.3g}"),
    }


def main() -> None:
    """Build the road once and print its lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 small shards, a small SAE")
    parser.add_argument("--append", default="", help="also append the lines to this file")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        config = make_config(Path(folder), is_quick=chosen.quick)
        assets = {asset.name: asset for asset in make_road(config)}
        lines, begun = [], time.perf_counter()
        with open_instance(config) as instance:
            for done in run_road(config, instance):
                lines.append(describe(assets[done.name], done, find_work(instance, assets[done.name])))
                report(lines[-1], chosen.append)
        wall_s = time.perf_counter() - begun
    report(sum_up(lines, wall_s, is_quick=chosen.quick), chosen.append)


def sum_up(lines: list[dict[str, Any]], wall_s: float, *, is_quick: bool) -> dict[str, Any]:
    """Return the line of the whole road; with shards of 1 GB, that of the assets that have such."""
    work_s, shards = sum(line["work_s"] for line in lines), [line for line in lines if line["share_at_1_gb"] is not None]
    overhead_s = sum(line["overhead_s"] for line in shards)
    busy_s = sum(SHARD_BYTES / 1e6 / line["rate"] for line in shards)
    return {
        "name": "road, whole",
        "value": round(wall_s, 2),
        "unit": "s",
        "ours": round(wall_s, 2),
        "ratio_to_floor": round(wall_s / work_s, 3),
        "ratio_to_best_peer": None,
        "work_s": round(work_s, 2),
        "overhead": round(1 - work_s / wall_s, 3),
        "share_at_1_gb": float(f"{overhead_s / (overhead_s + busy_s):.3g}") if shards else None,
        "worst_at_1_gb": max((line["share_at_1_gb"], line["name"]) for line in shards) if shards else None,
        "config": {"pipeline": "small" if is_quick else "demo", "storage": "SQLite", "dagster": dg.__version__},
    }


if __name__ == "__main__":
    main()
