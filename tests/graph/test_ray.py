"""A local Ray cluster of two nodes makes a whole road, loses a node in the middle of every asset that spreads, and ends with the right digests."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from road_world import Finished, make_road_config

from interp_assets.graph.fanout import Load, find_unmet, make_request, side_by_side, start_fanout
from interp_assets.graph.jobs import recorded_versions, run_road
from interp_assets.graph.stages import make_road
from interp_assets.graph.workers import KeptWorld, Member, Order, Starts, Worker, count_room
from interp_assets.planning.asset import NONE, Asset, Job, whole
from interp_assets.planning.config import PipelineConfig
from interp_assets.planning.machine import PROCESS_BYTES
from interp_assets.planning.road import Road, group_siblings
from resources.world import World

CHANGES: dict[str, Any] = {
    "features": {
        "saes": ["demo", "other"],
        "latent_slices": 2,
        "top_k": 4,
        "n_random": 8,
        "window": 4,
        "n_intervals": 2,
        "examples_per_interval": 2,
    },
}
"""The features of two SAEs, so that their bundles spread."""
MIDDLE: dict[str, Any] = {"shuffle": {"passes": 3, "fan_out": 2}}
"""A middle pass, too."""
DRIVER = """
import json, os, sys, threading, time, warnings
from dataclasses import replace
from pathlib import Path
warnings.simplefilter("ignore")
folder = Path(sys.argv[1]).parent
groups = {tuple(key): folder / "watch" / name for key, name in json.loads(sys.argv[2])}
for place in groups.values():
    place.mkdir(parents=True, exist_ok=True)
import ray
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": 80_000_000})
def add_node():
    node = cluster.add_node(num_cpus=1, object_store_memory=80_000_000)
    (folder / "next").write_text(node.node_id)
    (folder / "next").rename(folder / "youngest")
    return node
add_node(), add_node()
os.environ["RAY_ADDRESS"] = cluster.address
import dagster as dg
from interp_assets.errors import ConfigError
from interp_assets.graph import fanout
from interp_assets.graph.jobs import recorded_versions, run_road
from interp_assets.graph.stages import make_road
from interp_assets.graph.workers import Worker
from interp_assets.planning.asset import Job, Load
from interp_assets.planning.config import load_config
from interp_assets.planning.progress import Progress
from interp_assets.storage.manifest import data_version
from resources.world import World
config = load_config(sys.argv[1])
def wait_for(path):
    while not path.exists():
        time.sleep(0.01)
class Held(Worker):
    def make(self, order):
        place = groups.get(order.asset_key)
        if place is None:
            return super().make(order)
        if (folder / "youngest").read_text() == ray.get_runtime_context().get_node_id() and not (place / "killed").exists():
            (place / "held").touch()
            threading.Event().wait()  # a worker may outlive its node for seconds, and would answer
        answer = super().make(order)
        (place / "finished").touch()
        wait_for(place / "held")
        return answer
class Counted(Worker):  # the first that is given a second shard dies of it
    def prepare(self, order):
        super().prepare(order)
        with (folder / "loads").open("a") as file:
            file.write(f"{os.getpid()}\\n")
    def make(self, order):
        with (folder / "orders").open("a") as file:
            file.write(f"{order.key} {os.getpid()}\\n")
        if self._held and not (folder / "dead").exists():
            (folder / "dead").write_text(order.key)
            os._exit(1)
        while self._held and len((folder / "loads").read_text().splitlines()) < 3:
            time.sleep(0.01)  # for the one that takes the dead one's place
        return super().make(order)
fanout.Worker = Held
victims = {}
def kill(place):
    wait_for(place / "finished")
    wait_for(place / "held")
    node = next(node for node in cluster.worker_nodes if node.node_id == (folder / "youngest").read_text())
    victims[place.name] = node.node_id
    cluster.remove_node(node, allow_graceful=False)
    (place / "killed").touch()
def kill_one_in_each():
    for place in dict.fromkeys(groups.values()):
        kill(place)
begun = time.monotonic()
killer = threading.Thread(target=kill_one_in_each, daemon=True)
killer.start()
with dg.DagsterInstance.ephemeral() as instance:
    for report in run_road(config, instance):
        print(f"{time.monotonic() - begun:6.1f} s {report.name} {report.n_made}", flush=True)
        if len(cluster.worker_nodes) < 2:
            add_node()
    versions = {asset.name: recorded_versions(instance, asset) for asset in make_road(config).rest}
    nodes = {}
    for asset in make_road(config).rest:
        events = [record.asset_materialization for record in instance.fetch_materializations(dg.AssetKey(list(asset.key)), limit=100).records]
        nodes[asset.name] = {event.partition or "": event.metadata["node"].value for event in events if "node" in event.metadata}
killer.join()
asset = make_road(config).find("activations")
world = World(config)
pipeline, store = world.open()
job = Job(world, pipeline, store, keys=tuple(asset.partition_keys(pipeline)))
class Watching(Progress):
    seen = set()
    def watch(self, doing):
        self.seen |= {each.key for each in doing}
counted = fanout.Fanout(fanout.make_load([asset], job, job.keys), Counted, Watching())
again = {key: data_version([item.manifest for item in counted.take(asset, key).made]) for key in job.keys}
print(f"{time.monotonic() - begun:6.1f} s counted", flush=True)
huge = replace(asset, takes=lambda *_: Load(memory_bytes=1 << 45))
heard = []
impatient = fanout.Fanout(fanout.make_load([huge], job, ["shard-000001"]), Worker, Progress(), heard.append, patience_s=0)
try:
    impatient.take(huge, "shard-000001")
    message = ""
except ConfigError as error:
    message = str(error)
report = {"versions": versions, "nodes": nodes, "victims": victims, "message": message, "heard": heard, "again": again}
report |= {"dead": (folder / "dead").read_text()} | {name: (folder / name).read_text().split("\\n")[:-1] for name in ("loads", "orders")}
(folder / "report.json").write_text(json.dumps(report))
print(f"{time.monotonic() - begun:6.1f} s in all", flush=True)
ray.shutdown()
cluster.shutdown()
os._exit(0)
"""
"""Of every asset that is to lose a node (of one SAE where there is one for each, and of all bundles together) the younger node holds the partition
that it is given, the older one returns none before that, and when it has finished one the younger node is killed; a fresh one joins after the asset.
So each of them loses a node that holds one of its partitions, whatever their speed, and the older node, which has imported everything, stays.
Then one asset is asked for again by workers that write down what they load, one of which dies."""
QUICK = {"activations", "feature_browser"}
"""What loses a node in every test run: an asset whose partitions hold a model, and siblings. By `make faults` all others too."""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.faults)])
def test_every_asset_that_can_spread_survives_the_loss_of_a_node(tiny_world: Path, tmp_path: Path, every: bool) -> None:
    """Whatever a cluster loses, and wherever the road is at that moment: no digest differs from those of one undisturbed process.

    Nor does a worker load anything twice: what it has loaded for one shard serves for all, and only who takes a dead one's place loads again.
    """
    changes = {**CHANGES, **MIDDLE} if every else CHANGES
    config = make_road_config(tiny_world, tmp_path / "data", **changes)
    groups = [(key, name) for key, name in groups_of(make_road(config)) if every or name in QUICK]
    assert {name for _, name in groups} >= QUICK
    with start_driver(config, tmp_path, groups) as driver:
        try:
            alone = made_alone(make_road_config(tiny_world, tmp_path / "alone", **changes))
            said = driver.communicate(timeout=500)[0]
        finally:
            driver.terminate()
    assert driver.returncode == 0, said[-4000:]
    report = json.loads((tmp_path / "report.json").read_text())
    road = make_road(config)
    for asset in road.rest:
        assert report["versions"][asset.name] == alone[asset.name], asset.name
    assert {name for name, nodes in report["nodes"].items() if nodes} == {asset.name for asset in spreading(road)}
    for asset in spreading(road):
        nodes = report["nodes"][asset.name]
        assert set(nodes) == set(alone[asset.name]), asset.name
    losing = {name: "/".join(key) for key, name in reversed(groups)}
    for name, lost in report["victims"].items():
        assert lost not in report["nodes"][losing[name]].values(), name  # what the dead node held was made again
    assert set(report["victims"]) == set(losing)
    assert len(set(report["victims"].values())) == len(report["victims"])  # a node dies once
    assert report["again"] == alone["activations"]
    assert len(report["loads"]) == len(set(report["loads"])) == 3  # two workers, and the one that took the dead one's place
    asked = [order.split()[0] for order in report["orders"]]
    assert set(asked) == set(alone["activations"])
    assert {key for key in asked if asked.count(key) > 1} >= {report["dead"]}  # what the worker died of, another made
    assert "activations shard-000001 asks for 1 CPU, 0 GPU and 32768.7 GiB" in report["message"]
    assert report["heard"] == [f"{report['message']} Waiting for one."]


def spreading(road: Road) -> list[Asset]:
    """List what can be sent as tasks, from what the records say of partitions: all that divide but `sae`, and bundles of several SAEs."""
    siblings = [asset for group in group_siblings(road.rest) for asset in group if len(group) > 1]
    return [asset for asset in road.rest if asset.axis is not NONE and asset.name != "sae"] + siblings


def groups_of(road: Road) -> list[tuple[Sequence[str], str]]:
    """Pair the key of every asset that spreads with the name of what loses a node once: a feature pass of all SAEs, as it is one record."""
    return [(asset.key, asset.key[-1]) for asset in spreading(road)]


def start_driver(config: PipelineConfig, folder: Path, groups: list[tuple[Sequence[str], str]]) -> subprocess.Popen[str]:
    """Start the process that has a cluster, in which these groups lose a node each."""
    (folder / "p.yaml").write_text(yaml.safe_dump(config.model_dump()))
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "t" * 32,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DISABLE_IMPORT_WARNING": "1",
    }
    command = [sys.executable, "-c", DRIVER, str(folder / "p.yaml"), json.dumps(groups)]
    return subprocess.Popen(command, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def made_alone(config: PipelineConfig) -> dict[str, dict[str, str]]:
    """Make the same road in this process, and return the data version of every partition."""
    with dg.DagsterInstance.ephemeral() as instance:
        list(run_road(config, instance))
        return {asset.name: recorded_versions(instance, asset) for asset in make_road(config).rest}


def test_all_that_divides_can_spread_except_trainings(finished: Finished) -> None:
    """Who adds an asset has to do nothing for it; trainings share their rows, so they are one piece of work."""
    road = make_road(finished.config)
    assert {asset.name for asset in road.rest if asset.axis is not NONE and not asset.can_spread} == {"sae"}


@pytest.mark.parametrize(
    ("device", "n_gpus", "is_asked_for"), [("cuda", 0, True), ("cuda", 8, True), ("auto", 8, True), ("auto", 0, False), ("cpu", 8, False)]
)
def test_a_task_asks_for_what_its_record_says(finished: Finished, device: str, n_gpus: int, *, is_asked_for: bool) -> None:
    """A node that is given more than it holds kills its tasks; one that is given a model without a GPU makes other bytes, slowly."""
    execution = finished.config.execution.model_copy(update={"device": device})
    config = finished.config.model_copy(update={"execution": execution})
    pipeline, store = World(config).open()
    for asset in make_road(config).rest:
        for key in asset.partition_keys(pipeline):
            request = make_request(asset, Job(World(config), pipeline, store), key, n_gpus)
            assert request["memory"] == PROCESS_BYTES + int(asset.takes(pipeline, store, key).memory_bytes)
            assert request["GPU"] == (asset.needs.accelerator and is_asked_for)
            assert request["CPU"] == 1


def test_a_request_that_no_living_node_can_satisfy_is_told() -> None:
    """Ray lets such a task wait for ever without a word. A node that is busy is large enough; a dead one is not, nor two that are so together."""
    task = Load([], {"CPU": 1, "GPU": 0, "memory": 8 << 30}, "mixed_shards bucket-3")
    small = {"Alive": True, "Resources": {"CPU": 4.0, "memory": float(5 << 30)}}
    large = {"Alive": True, "Resources": {"CPU": 1.0, "memory": float(9 << 30)}}
    assert find_unmet(task, [small, large]) == ""
    told = find_unmet(task, [small, small, {**large, "Alive": False}])
    assert "mixed_shards bucket-3 asks for 1 CPU, 0 GPU and 8.0 GiB of memory" in told
    assert "the nearest has 4 CPU, 0 GPU and 5.0 GiB" in told
    assert "0 CPU, 0 GPU and 0.0 GiB" in find_unmet(task, [])
    assert "1 GPU" in find_unmet(task._replace(request={"CPU": 1, "GPU": 1, "memory": 1}), [large])


def test_siblings_are_those_of_one_name_that_follow_each_other_and_do_not_read_each_other() -> None:
    """Bundles of several SAEs can be made side by side; whoever waits for another cannot, nor can two things that only look alike."""
    browser = replace(Asset(key=("a", "browser"), group="", kinds=(), description=""), make=lambda _job: lambda _key: [])
    first, second, reader, other = (
        browser,
        replace(browser, key=("b", "browser")),
        replace(browser, key=("c", "browser"), reads=(whole("b", "browser"),)),
        replace(browser, key=("d", "table")),
    )
    together = replace(browser, key=("e", "browser"), is_made_together=True)
    assert group_siblings([first, second]) == [[first, second]]
    assert group_siblings([first, second, reader]) == [[first, second], [reader]]
    assert group_siblings([first, other, second]) == [[first], [other], [second]]
    assert group_siblings([first, together]) == [[first], [together]]


def test_without_a_cluster_nothing_is_sent(finished: Finished) -> None:
    """Ray is used where it is: elsewhere nothing is imported, started or asked for."""
    world = World(finished.config)
    job = Job(world, *world.open(), keys=("shard-000000", "shard-000001"))
    assert start_fanout(make_road(finished.config).find("activations"), job) is None
    bundle = make_road(finished.config).find("features/demo/feature_browser")
    with side_by_side([bundle, replace(bundle, key=("features", "other", "feature_browser"))], finished.config):
        assert start_fanout(bundle, Job(world, *world.open())) is None


def test_a_worker_loads_once_what_its_partitions_need(finished: Finished) -> None:
    """A model of 7B parameters is not read again for every shard, nor for every SAE whose evaluation shares nothing else with the one before."""
    world = KeptWorld(finished.config)
    assert world.model() is world.model()
    assert world.tokenizer() is world.tokenizer()
    assert world.open() is world.open()
    worker = Worker()
    root = Path(finished.config.root)
    here = finished.config.model_copy(update={"root": root.name})  # relative to where the run was begun, and workers begin elsewhere
    order = Order("a run", here.model_dump_json(), str(root.parent), ("activations",), "shard-000001")
    worker.prepare(order)
    (item,) = worker.make_here(order.key)
    assert item.is_cached
    worker.prepare(order._replace(folder=str(root / "not here")))  # as on a node that reaches the root otherwise


def test_workers_are_as_many_as_fit_side_by_side() -> None:
    """What they hold adds up to what a node has, and no node lends what it has to two."""
    nodes = [{"Alive": alive, "Resources": {"CPU": 8.0, "GPU": 2.0, "memory": float(10 << 30)}} for alive in (True, True, False)]
    assert count_room({"CPU": 1, "GPU": 0, "memory": 1 << 30}, nodes) == 16
    assert count_room({"CPU": 1, "GPU": 0, "memory": 3 << 30}, nodes) == 6
    assert count_room({"CPU": 1, "GPU": 1, "memory": 3 << 30}, nodes) == 4
    assert count_room({"CPU": 1, "GPU": 0, "memory": 11 << 30}, nodes) == 0


class _Unanswered:
    """An actor that says nothing."""

    def __getattr__(self, name: str) -> "_Unanswered":
        return self

    def __call__(self, **_options: str) -> "_Unanswered":
        return self

    options = remote = __call__


def test_workers_that_are_lost_together_are_one_failed_start() -> None:
    """A node that dies takes all its workers, and is replaced; where the package is missing those that follow die too, for ever if nobody counts."""
    starts, first, second = Starts(), *([Member(_Unanswered()) for _ in range(3)] for _ in range(2))
    for lost in first:
        starts.fail(lost, [member for member in first if member is not lost])
    assert starts.n_failed == 1
    starts.fail(second[0], second[1:])
    assert starts.n_failed == 2
    starts.succeed()
    starts.fail(second[1], second[2:])
    assert starts.n_failed == 1
