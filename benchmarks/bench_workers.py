"""What `interp run --workers` gives: two workers beside one on the demo's stages, and what handing out work costs where the work is a nap.

    python benchmarks/bench_workers.py --quick     naps alone, 4 workers: within a minute on 2 cores
    python benchmarks/bench_workers.py             16 workers that nap, then the demo's text by one worker and by two: minutes

Sketch before code: an order and its answer are two messages of some kB through one process, some 2 ms, beside half a second of nap; a second order
waits at each worker while enough are left, so none idles while an answer is recorded. Two workers with a core each beside one process with two
threads can at best be twice as fast where one process uses one core (tokens, gather, records), and hardly faster where its threads use both.

    naps        `value` is the share of the ideal: naps a second while all workers are up, by workers / nap
    an asset    `value` is how many times faster two workers made it than one, wall time of the asset's partitions, Dagster's bookkeeping included
"""

import argparse
import json
import os
import sys
import tempfile
import time
import warnings

import dagster as dg
from floors import describe_machine

from interp_assets.graph.fanout import Fanout, Load
from interp_assets.graph.jobs import run_road
from interp_assets.graph.local_ray import local_cluster
from interp_assets.graph.stages import make_road
from interp_assets.graph.workers import Answer, Order, Worker
from interp_assets.planning.config import ExecutionConfig
from interp_assets.planning.demo import demo_config
from interp_assets.planning.progress import Progress
from interp_assets.planning.sections import CorpusConfig
from interp_assets.storage.traffic import Traffic

NAP_S = 0.5


class Sleeper(Worker):
    """Naps instead of working."""

    def make(self, order: Order) -> Answer:  # noqa: ARG002 - a nap is a nap
        """Nap; say who did."""
        time.sleep(NAP_S)
        return Answer([], str(os.getpid()), Traffic(), NAP_S)


def nap(n_workers: int, naps_each: int) -> float:
    """Return the share of the ideal while all workers are up."""
    asset = make_road(demo_config()).find("activations")
    keys = [f"nap-{i:05d}" for i in range(n_workers * naps_each)]
    load = Load([Order("naps", "", asset.key, key) for key in keys], {"CPU": 1, "GPU": 0, "memory": 64 << 20}, "a nap")
    answers: list[tuple[float, str]] = []
    with local_cluster(ExecutionConfig(workers=n_workers, device="cpu")):
        fanout = Fanout(load, Sleeper, Progress())
        for key in keys:
            worker = fanout.take(asset, key).node
            answers.append((time.perf_counter(), worker))
    workers = [worker for _, worker in answers]
    seen = set(workers)
    first = max(workers.index(worker) for worker in seen)
    assert len(seen) == n_workers, f"only {len(seen)} of {n_workers} workers were up: more naps each"
    window = answers[first : len(answers) - n_workers]
    assert len(window) > 4 * n_workers, f"{len(window)} naps are too few after the last of {len(seen)} workers was up: more naps each"
    return (len(window) - 1) * NAP_S / n_workers / (window[-1][0] - window[0][0])


def make_demo(n_workers: int, n_shards: int) -> dict[str, float]:
    """Make the demo's text with so many workers; return the seconds of each asset that spreads."""
    with tempfile.TemporaryDirectory() as folder, dg.DagsterInstance.ephemeral() as instance:
        demo = demo_config()
        execution = demo.execution.model_copy(update={"workers": n_workers, "device": "cpu"})
        changed = {"root": folder, "corpus": CorpusConfig(max_shards=n_shards), "heads": None, "steering": None, "execution": execution}
        config = demo.model_copy(update=changed)
        spreads = {asset.name for asset in make_road(config).rest if asset.can_spread and asset.axis.name != "none"}
        return {report.name: report.wall_s for report in run_road(config, instance) if report.name in spreads}


def main() -> None:
    """Run the cases and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="naps of 4 workers alone")
    parser.add_argument("--naps", action="store_true", help="naps of 16 workers alone")
    args = parser.parse_args()
    warnings.simplefilter("ignore")

    def report(name: str, value: float, unit: str, config: dict[str, int]) -> None:
        line = {
            "name": f"workers {name}", "value": round(value, 3), "unit": unit, "ours": round(value, 3), "ratio_to_floor": round(value, 3),
            "ratio_to_best_peer": None, "config": config, **describe_machine(),
        }  # fmt: skip
        print(json.dumps(line), flush=True)

    n_workers = 4 if args.quick else 16
    report("naps", nap(n_workers, 40), "share of ideal", {"workers": n_workers})
    if args.quick or args.naps:
        return
    make_demo(1, 2)  # compiles the loops
    one, two = make_demo(1, 12), make_demo(2, 12)
    for name, seconds in one.items():
        print(f"{name}: {seconds:.1f} s by one, {two[name]:.1f} s by two", file=sys.stderr)
        report(name, seconds / two[name], "times as fast", {"workers": 2, "shards": 12})


if __name__ == "__main__":
    main()
