"""A local Ray cluster of two nodes: shards are made on both, one node is killed in the middle, and the run ends with the right digests."""

import os
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest
import yaml
from road_world import Finished, make_road_config

from interp_assets.graph.fanout import make_partition, start_fanout
from interp_assets.graph.jobs import run_road
from interp_assets.graph.stages import make_road
from interp_assets.planning.asset import Job
from interp_assets.planning.config import PipelineConfig
from interp_assets.planning.pipeline import load_pipeline, open_pipeline_store
from resources.world import World

pytestmark = [pytest.mark.slow]
N_SHARDS = 12
DRIVER = """
import sys, time, threading, os, warnings
from pathlib import Path
warnings.simplefilter("ignore")
folder, n_shards = Path(sys.argv[1]).parent, int(sys.argv[2])
import ray
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": 80_000_000})
nodes = [cluster.add_node(num_cpus=1, object_store_memory=80_000_000) for _ in range(2)]
os.environ["RAY_ADDRESS"] = cluster.address
print("nodes 2", flush=True)
import dagster as dg
from interp_assets.planning.config import load_config
from interp_assets.graph import fanout
from interp_assets.graph.jobs import run_road
config = load_config(sys.argv[1])
attempt = fanout._attempt
def wait_and_attempt(*arguments):
    if len(list(folder.glob("data/*/1-corpus/*/manifest.json"))) == n_shards:
        first = folder / f"first-{os.getpid()}"
        is_first = not first.exists()
        (first if is_first else folder / f"second-{os.getpid()}").touch()
        while not (folder / "killed").exists() and not (is_first and len(list(folder.glob("first-*"))) == 2):
            time.sleep(0.01)
    return attempt(*arguments)
fanout._attempt = wait_and_attempt
def kill() -> None:
    while len(list(folder.glob("second-*"))) < 2:
        time.sleep(0.01)
    cluster.remove_node(nodes[0], allow_graceful=False)
    (folder / "killed").touch()
    print("killed", flush=True)
killer = threading.Thread(target=kill)
killer.start()
with dg.DagsterInstance.ephemeral() as instance:
    for report in run_road(config, instance, select=["token_shards", "activations", "shuffle_plan", "shuffle_pass_1"]):
        print("made", report.name, report.n_made, flush=True)
    events = instance.fetch_materializations(dg.AssetKey("activations"), limit=100).records
    killer.join()
    print("nodes used", len({event.asset_materialization.metadata["node"].value for event in events}), flush=True)
while sum(node["Alive"] for node in ray.nodes()) > 2:
    time.sleep(0.2)
print("alive 2", flush=True)
os._exit(0)
"""
"""A node makes one shard at a time. When all texts are tokenized, each waits with its first until the other has begun one, and with its second
until a node is dead: whatever their speed, both have made one and hold another when the first of them is killed."""


def test_shards_on_two_nodes_survive_the_loss_of_one(tiny_world: Path, tmp_path: Path) -> None:
    """Twelve shards, two nodes; one dies at its second activation shard: Ray runs its tasks again on the other, and no digest changes."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(N_SHARDS):
        (texts / f"{i:02d}.txt").write_text(" ".join(f"word{(i * 37 + j * j) % 101}" for j in range(40 + i)))
    config = make_road_config(tiny_world, tmp_path / "data", corpus={"path": str(texts), "shard_bytes": 1})
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(config.model_dump()))
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "t" * 32,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DISABLE_IMPORT_WARNING": "1",
    }
    run = subprocess.run(
        [sys.executable, "-c", DRIVER, str(tmp_path / "p.yaml"), str(N_SHARDS)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
    )
    assert run.returncode == 0, run.stdout + run.stderr[-4000:]
    lines = run.stdout.splitlines()
    assert "killed" in run.stdout
    for name in ("token_shards", "activations", "shuffle_pass_1"):
        assert f"made {name} {N_SHARDS}" in lines
    assert "nodes used 2" in lines
    assert "alive 2" in lines  # the head and one worker
    alone = make_road_config(tiny_world, tmp_path / "alone", corpus={"path": str(texts), "shard_bytes": 1})
    assert versions(config) == versions(made_alone(alone))


def made_alone(config: PipelineConfig) -> PipelineConfig:
    """Make the same shards in this process."""
    with dg.DagsterInstance.ephemeral() as instance:
        list(run_road(config, instance, select=["token_shards", "activations", "shuffle_plan", "shuffle_pass_1"]))
    return config


def versions(config: PipelineConfig) -> dict[str, list[str | None]]:
    """Return the data version of every shard."""
    store = open_pipeline_store(config)
    pipeline = load_pipeline(config, store)
    stops = [stop for stop in make_road(config) if stop.name in ("token_shards", "activations", "shuffle_pass_1")]
    return {
        stop.name: [make_road(pipeline.config).find_version(stop, pipeline, store, key) for key in stop.partition_keys(pipeline)] for stop in stops
    }


def test_without_a_cluster_nothing_is_sent(finished: Finished) -> None:
    """Ray is used where it is: elsewhere nothing is imported, started or asked for."""
    world = World(finished.config)
    job = Job(world, *world.open(), keys=("shard-000000", "shard-000001"))
    assert start_fanout(make_road(finished.config).find("activations"), job) is None
    (item,) = make_partition(finished.config.model_dump_json(), ("activations",), "shard-000001")
    assert item.is_cached
