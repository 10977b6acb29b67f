"""What many shards cost when nothing has to be made: planning, looking, Dagster's bookkeeping and its UI, at 1,000 and 10,000 planned shards.

    python benchmarks/bench_scale.py --quick                   200 and 800 shards, about 40 s on 2 cores
    python benchmarks/bench_scale.py                           1,000 and 10,000 shards: minutes, most of them for making up what is there
    python benchmarks/bench_scale.py --shards 10000 100000     an hour

A shard is a file of a few words. Its token shard and its activations are artifacts of some bytes with the manifests of real ones, and the history
has an event of each: made up, because nothing here is about making them. Sketch before code: all is linear in the shards; a shard's state is two
files in a listing and a row in SQLite, and reading 20,000 manifests of 1.5 kB should be seconds.

    plan                    `corpus_plan`, of files that were read before
    interp plan             the forecast of all assets
    nothing to do           `interp run --select token_shards --select activations`
    one shard               a materialization of one partition, whose artifact is found
    definitions             loading them, in a process that has imported everything
    sensor                  one tick of `landed_text`
    UI page                 the query of Dagster's UI for the partitions of an asset, in the webserver's process
    requests                of the store, while nothing is to be done: gets, and pages of listings

One JSON line a case and size: `value` is seconds (or requests), `cpu_s` those of this process's CPU, `ratio_to_floor` how much more of these (or
of requests) it is than at the size before, divided by how many more shards: 1 is linear, less is better.
"""

import argparse
import json
import os
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
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._core.workspace.load_target import ModuleTarget
from floors import describe_machine

from interp_assets.graph.assembly import assemble
from interp_assets.graph.definitions import build_defs
from interp_assets.graph.jobs import open_instance, run_asset, run_road
from interp_assets.graph.partitions import register
from interp_assets.graph.stages import make_road
from interp_assets.planning.config import PipelineConfig, make_config
from interp_assets.planning.pipeline import load_pipeline, open_pipeline_store, shard_key
from interp_assets.planning.progress import Progress
from interp_assets.planning.schedule import make_schedule
from interp_assets.shuffle.choice import foresee
from interp_assets.storage.listing import forget_parsed, list_store
from interp_assets.storage.manifest import Manifest, create_artifact, data_version
from interp_assets.storage.seen import open_seen
from interp_assets.storage.traffic import METER
from resources.world import World

SELECT = ["token_shards", "activations"]
PAGE = """query Page($assetKey: AssetKeyInput!) { assetNodeOrError(assetKey: $assetKey) { ... on AssetNode {
  id partitionKeysByDimension { name type partitionKeys }
  assetPartitionStatuses { ... on DefaultPartitionStatuses {
    materializedPartitions materializingPartitions unmaterializedPartitions failedPartitions } } } } }"""


class Bench:
    """A pipeline of many shards, all of which are there."""

    def __init__(self, folder: Path, n: int) -> None:
        """Write the text, and make up the rest."""
        (folder / "texts").mkdir(parents=True)
        for i in range(n):
            (folder / "texts" / f"{i:06d}.txt").write_text(f"Text {i} of many.")
        content = {
            "name": "many", "root": str(folder / "data"), "corpus": {"source": "files", "path": str(folder / "texts"), "shard_bytes": 1},
            "saes": [{"name": "demo", "hook_point": "resid_post.2", "batch_rows": 64}], "execution": {"device": "cpu"},
        }  # fmt: skip
        self.folder, self.n, self.config = folder, n, make_config(content)
        (folder / "p.yaml").write_text(yaml.safe_dump(content))
        os.environ["DAGSTER_HOME"], os.environ["INTERP_CONFIG"] = str(folder / "home"), str(folder / "p.yaml")
        self.instance = open_instance(self.config)
        self.first_plan_s = self.time(self.plan)
        self._make_up(self.config)

    def time(self, work: Callable[[], object]) -> tuple[float, float]:
        """Return the seconds of some work: of the wall, and of this process's CPU."""
        begun, used = time.perf_counter(), time.process_time()
        work()
        return time.perf_counter() - begun, time.process_time() - used

    def plan(self) -> None:
        """Plan."""
        list(run_road(self.config, self.instance, select=["corpus_plan"]))

    def forecast(self) -> None:
        """Do what `interp plan` does."""
        config, road = self.config, make_road(self.config)
        assert road.plan.plan is not None
        store = open_pipeline_store(config)
        planned = road.plan.plan(config, store, lambda _sentence: None)
        with open_seen() as notes:
            store = list_store(store, notes)
            pipeline = foresee(planned, store)
            (line,) = [line for line in make_schedule(road, pipeline, store, {}, 1) if line.name == "activations"]
        assert line.n_missing == 0, line

    def run(self, n_made: int) -> None:
        """Run what is missing of the shards."""
        reports = list(run_road(self.config, self.instance, select=SELECT))
        assert sum(report.n_made + report.n_found for report in reports if report.name in SELECT) == n_made, reports

    def run_one(self) -> None:
        """Run one shard that is there: what a materialization costs besides its work."""
        road, keys = make_road(self.config), World(self.config).open()[0].shard_indices
        job = assemble(self.config, Progress()).resolve_implicit_global_asset_job_def()
        every = [shard_key(index) for index in keys]
        assert run_asset(job, self.instance, road.find("token_shards"), [every[self.n // 2]], every).report.n_found == 1

    def tick(self) -> None:
        """Evaluate the sensor."""
        (sensor,) = [sensor for sensor in build_defs(self.config).sensors or () if sensor.name == "landed_text"]
        with dg.build_sensor_context(self.instance, resources={"world": World(self.config)}) as context:
            asked: Any = sensor(context)
            assert not [item for item in asked if isinstance(item, dg.RunRequest) and item.partition_key], "a shard was asked for"

    @contextmanager
    def ui(self) -> Iterator[Callable[[], None]]:
        """Load the definitions as the webserver does; the value asks for the partitions of an asset."""
        from dagster_webserver.app import create_app_from_workspace_process_context  # noqa: PLC0415 - seconds, that --help does without
        from starlette.testclient import TestClient  # noqa: PLC0415 - as above

        target = ModuleTarget("interp_assets.graph.definitions", attribute=None, working_directory=str(Path.cwd()), location_name=None)
        with WorkspaceProcessContext(self.instance, target, dg.__version__, read_only=False) as context:
            client = TestClient(create_app_from_workspace_process_context(context))

            def ask() -> None:
                answer = client.post("/graphql", json={"query": PAGE, "variables": {"assetKey": {"path": ["activations"]}}}).json()
                found = answer["data"]["assetNodeOrError"]["assetPartitionStatuses"]
                assert len(found["materializedPartitions"]) == self.n, {name: len(keys) for name, keys in found.items()}

            ask()
            yield ask

    def _make_up(self, config: PipelineConfig) -> None:
        store = open_pipeline_store(config)
        pipeline, road = load_pipeline(config, store), make_road(config)
        register(self.instance, road, pipeline)
        before: dict[str, Manifest] = {}
        for name in SELECT:
            asset = road.find(name)
            for key in asset.partition_keys(pipeline):
                (ref,) = asset.artifacts(pipeline, store, key)
                with create_artifact(store, ref, made_from=[before[key]] if key in before else ()) as art:
                    art.facts |= {"n_rows": 8, "n_valid": 8}
                    art.put("rows", key.encode(), n_rows=8)
                assert art.manifest is not None
                before[key] = art.manifest
                tags = {"dagster/data_version": data_version([art.manifest])}
                self.instance.report_runless_asset_event(dg.AssetMaterialization(dg.AssetKey(name), partition=key, tags=tags))


def measure(n: int, place: str | None) -> Iterator[tuple[str, float, float | None]]:
    """Yield of every case its name, its value, and the seconds of CPU where that is seconds."""
    with tempfile.TemporaryDirectory(dir=place) as name:
        begun = time.perf_counter()
        bench = Bench(Path(name), n)
        print(f"{n} shards made up in {time.perf_counter() - begun:.0f} s", file=sys.stderr)
        with bench.instance:
            yield "plan, files never read", *bench.first_plan_s
            yield "plan", *bench.time(bench.plan)
            forget_parsed()  # each command has a process of its own
            yield "interp plan", *bench.time(bench.forecast)
            forget_parsed()
            before = METER.total()
            yield "nothing to do", *bench.time(lambda: bench.run(0))
            took = METER.total().since(before)
            forget_parsed()
            yield "requests for reading", took.gets, None
            yield "requests for writing and listing", took.puts, None
            yield "one shard", *bench.time(bench.run_one)
            yield "definitions", *bench.time(lambda: build_defs(bench.config))
            yield "sensor", *bench.time(bench.tick)
            with bench.ui() as ask:
                yield "UI page", *bench.time(ask)


def main() -> None:
    """Run the cases and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="200 and 800 shards")
    parser.add_argument("--shards", type=int, nargs="+", help="default: 1000 10000, or 200 800 with --quick")
    parser.add_argument("--folder", help="where the pipeline lies meanwhile; on /dev/shm it is made up in a tenth of the time")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    sizes = args.shards or ([200, 800] if args.quick else [1000, 10_000])
    last: dict[str, tuple[int, float]] = {}
    for n in sizes:
        for name, value, cpu_s in measure(n, args.folder):
            former = last.get(name)
            grows = value if cpu_s is None else cpu_s  # the wall says what else the machine did
            growth = round(grows / former[1] / (n / former[0]), 3) if former and former[1] else None
            line: dict[str, Any] = {
                "name": f"scale {name}", "value": round(value, 3), "unit": "requests" if cpu_s is None else "s", "ours": round(value, 3),
                "ratio_to_floor": growth, "ratio_to_best_peer": None, "config": {"shards": n, "storage": "SQLite, local files"},
                "cpu_s": cpu_s if cpu_s is None else round(cpu_s, 3), **describe_machine(),
            }  # fmt: skip
            print(json.dumps(line), flush=True)
            last[name] = n, grows


if __name__ == "__main__":
    main()
