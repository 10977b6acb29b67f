"""What Dagster costs besides the work: seconds a partition, in one process, through `interp backfill`, and through the daemon.

    python benchmarks/bench_orchestration.py --quick     8 partitions, in one process, and one backfill by the daemon: within 45 s on 2 cores
    python benchmarks/bench_orchestration.py             all ways, 16 partitions: some minutes, most of them waiting for the daemon

The assets: `noop`, whose body does nothing, and `token_shards` of the demo pipeline, whose shards are there already, so that its body finds
16 manifests and records them with metadata, provenance and a check. All on SQLite on disk, as on a laptop. Sketch before code: a run
writes about 10 events and a partition one more, each an fsync of some milliseconds; a run of the daemon's is a process of its own, which
imports torch and the graph (about 4 s of CPU). So partitions should share runs, unless work of minutes makes runs side by side worth it.

    one run                all partitions as one range, in this process          (the floor)
    a run each             one run a partition, in this process
    interp backfill        `run_backfill` over all partitions
    daemon, one run        a backfill of Dagster's daemon, policy `single_run`
    daemon, a run each     the same, policy `multi_run` with one partition a run; two runs at once, as `dagster.yaml` allows

One JSON line a case: `value` is seconds a partition, from the first run's creation to the last one's end; `wait_s` what came before that,
from the start of the daemon (it looks for new backfills every 30 s); `ratio_to_floor` beside one run in this process.
`config`, `hardware` and `commit` say what was run, and on what.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dagster as dg
import yaml
from dagster._core.definitions.partitions.context import partition_loading_context
from dagster._core.execution.backfill import PartitionBackfill
from floors import describe_machine

from interp_assets.graph.backfill import run_backfill
from interp_assets.graph.definitions import build_defs
from interp_assets.graph.jobs import open_instance, run_asset, run_road
from interp_assets.graph.stages import make_road
from interp_assets.planning.config import ExecutionConfig, PipelineConfig
from interp_assets.planning.demo import demo_config
from interp_assets.planning.sections import CorpusConfig

NOOP = """
import dagster as dg
partitions = dg.StaticPartitionsDefinition([f"p{i:04d}" for i in range(%d)])
@dg.asset(partitions_def=partitions, backfill_policy=dg.BackfillPolicy.%s)
def noop() -> None: ...
defs = dg.Definitions(assets=[noop], executor=dg.in_process_executor)
"""
QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
KEY = {"noop": "noop", "demo": "token_shards"}


def make_config(root: Path, n: int, per_run: int) -> PipelineConfig:
    """Return the demo with `n` shards, `per_run` of which share a run of the daemon's."""
    demo, execution = demo_config(), ExecutionConfig(partitions_per_run=per_run)
    return demo.model_copy(update={"root": str(root), "corpus": CorpusConfig(max_shards=n, shard_bytes=32 << 10), "execution": execution})


class Bench:
    """The folder of one run of the benchmark, with the demo's shards made once."""

    def __init__(self, folder: Path, n: int) -> None:
        """Make the token shards of the demo."""
        self.folder, self.n = folder, n
        with dg.DagsterInstance.ephemeral() as instance:
            list(run_road(make_config(folder / "data", n, n), instance, select=["token_shards"]))
            self.keys = {"demo": instance.get_dynamic_partitions("shards"), "noop": [f"p{i:04d}" for i in range(n)]}

    def open(self, kind: str, way: str, per_run: int) -> tuple[PipelineConfig, dg.Definitions, dg.DagsterInstance]:
        """Return fresh definitions and a fresh instance on disk."""
        home = self.folder / f"home-{kind}-{way}-{per_run}".replace(" ", "-")
        os.environ["DAGSTER_HOME"] = str(home)
        config = make_config(self.folder / "data", self.n, per_run)
        instance = open_instance(config)
        policy = "single_run()" if per_run > 1 else "multi_run(1)"
        (home / "noop_assets.py").write_text(NOOP % (self.n, policy))
        (home / "p.yaml").write_text(yaml.safe_dump(config.model_dump()))
        if kind == "demo":
            list(run_road(config, instance, select=["corpus_plan"]))
            return config, build_defs(config), instance
        space: dict[str, Any] = {}
        exec((home / "noop_assets.py").read_text(), space)
        return config, space["defs"], instance

    def in_process(self, kind: str, per_run: int) -> tuple[float, float]:
        """Run all partitions in this process; return seconds a partition, and the wait (none)."""
        config, defs, instance = self.open(kind, "process", per_run)
        keys = self.keys[kind]
        with instance:
            job = defs.resolve_implicit_global_asset_job_def()
            begun = time.perf_counter()
            if kind == "demo":
                stop = next(stop for stop in make_road(config) if stop.name == KEY[kind])
                for piece in [keys] if per_run > 1 else [[key] for key in keys]:
                    assert run_asset(job, instance, stop, piece, keys).report.n_made == len(piece)
            else:
                for first, last in [(keys[0], keys[-1])] if per_run > 1 else [(key, key) for key in keys]:
                    tags = {"dagster/asset_partition_range_start": first, "dagster/asset_partition_range_end": last}
                    job.execute_in_process(instance=instance, tags=tags, asset_selection=[dg.AssetKey("noop")], run_config=QUIET)
            return (time.perf_counter() - begun) / self.n, 0.0

    def by_interp(self) -> tuple[float, float]:
        """Run `interp backfill` over all partitions."""
        config, _, instance = self.open("demo", "interp", self.n)
        with instance:
            begun = time.perf_counter()
            (report,) = run_backfill(config, instance, select=["token_shards"], partitions=self.keys["demo"])
            assert report.n_made == self.n
            return (time.perf_counter() - begun) / self.n, 0.0

    def by_daemon(self, kind: str, per_run: int) -> tuple[float, float]:
        """Submit a backfill, start the daemon, and wait for the runs."""
        _, defs, instance = self.open(kind, "daemon", per_run)
        home = Path(os.environ["DAGSTER_HOME"])
        with instance:
            submit(defs, instance, KEY[kind], self.keys[kind])
            n_runs = 1 if per_run > 1 else self.n
            begun = time.time()
            with daemon(["-f", str(home / "noop_assets.py")] if kind == "noop" else ["-m", "interp_assets.graph.definitions"], home):
                runs = dg.RunsFilter(tags={"dagster/backfill": "bench"})
                while sum(run.is_finished for run in instance.get_runs(runs)) < n_runs:
                    if time.time() - begun > 60 + 20 * n_runs:
                        sys.exit((home / "daemon.log").read_text()[-3000:])
                    time.sleep(0.1)
            records = instance.get_run_records(runs)
            assert all(record.dagster_run.is_success for record in records)
            first = min(record.create_timestamp.timestamp() for record in records)
            return (max(record.end_time or 0 for record in records) - first) / self.n, first - begun


@contextmanager
def daemon(target: list[str], home: Path) -> Iterator[None]:
    """Run the daemon on an instance."""
    environment = {**os.environ, "DAGSTER_HOME": str(home), "INTERP_CONFIG": str(home / "p.yaml"), "PYTHONWARNINGS": "ignore"}
    with (home / "daemon.log").open("wb") as log:
        command = [sys.executable, "-m", "dagster._daemon", "run", *target]
        process = subprocess.Popen(command, env=environment, cwd=home, stdout=log, stderr=log, start_new_session=True)
        try:
            yield
        finally:
            os.killpg(process.pid, 9)
            process.wait()


def submit(defs: dg.Definitions, instance: dg.DagsterInstance, name: str, keys: list[str]) -> None:
    """Ask for a backfill as Dagster's UI does."""
    with partition_loading_context(dynamic_partitions_store=instance):
        backfill = PartitionBackfill.from_asset_partitions(
            backfill_id="bench", asset_graph=defs.resolve_asset_graph(), partition_names=keys, asset_selection=[dg.AssetKey(name)],
            backfill_timestamp=time.time(), tags={}, dynamic_partitions_store=instance, all_partitions=False, title=None, description=None,
            run_config=None,
        )  # fmt: skip
    instance.add_backfill(backfill)


def main() -> None:
    """Run the cases and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8 partitions, and of the daemon's cases one")
    parser.add_argument("--partitions", type=int, default=0, help="default: 16, or 8 with --quick")
    args = parser.parse_args()
    args.partitions = args.partitions or (8 if args.quick else 16)
    warnings.simplefilter("ignore")
    where = {
        "config": {"partitions": args.partitions, "storage": "SQLite", "dagster": dg.__version__},
    }  # fmt: skip

    def report(name: str, measure: Callable[[], tuple[float, float]], floor: float | None, peer: float | None = None) -> float:
        value, wait_s = measure()
        line = {
            "name": f"orchestration {name}", "value": round(value, 4), "unit": "s/partition", "ours": round(value, 4),
            "ratio_to_floor": round(value / floor, 2) if floor else 1.0, "ratio_to_best_peer": round(value / peer, 3) if peer else None,
            "wait_s": round(wait_s, 1), **where, **describe_machine(),
        }  # fmt: skip
        print(json.dumps(line), flush=True)
        return value

    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), args.partitions)
        for kind in ("noop", "demo"):
            floor = report(f"{kind}, one run", lambda kind=kind: bench.in_process(kind, bench.n), None)
            report(f"{kind}, a run each", lambda kind=kind: bench.in_process(kind, 1), floor)
            peer = None
            if not args.quick or kind == "noop":
                peer = report(f"{kind}, daemon, one run", lambda kind=kind: bench.by_daemon(kind, bench.n), floor)
            if not args.quick:
                report(f"{kind}, daemon, a run each", lambda kind=kind: bench.by_daemon(kind, 1), floor)
            if kind == "demo":
                report("demo, interp backfill", bench.by_interp, floor, peer)


if __name__ == "__main__":
    main()
