"""Walk through a pipeline whose package has the toy stage, and print as JSON what became of its assets. Run with that package first on the path."""

import importlib.util
import json
import os
import sys
import warnings
from pathlib import Path

import dagster as dg

import interp_assets
from interp_assets.graph.backfill import run_backfill
from interp_assets.graph.definitions import build_defs
from interp_assets.graph.jobs import recorded_costs, recorded_versions, run_road
from interp_assets.graph.stages import make_road
from interp_assets.planning.config import load_config
from interp_assets.planning.pipeline import load_pipeline, open_pipeline_store
from interp_assets.planning.schedule import make_schedule
from interp_assets.storage.verify import verify_tree

NAMES = ["document_lengths", "length_summary"]
SELECT = ["token_shards", *NAMES]
SHARD = "shard-000001"


def spread(config_path: str) -> dict[str, object]:
    """Make the shards as tasks on a cluster of one node; return which made them, and the bytes' digests."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80_000_000})
    os.environ["RAY_ADDRESS"] = cluster.address
    config = load_config(config_path)
    config = config.model_copy(update={"root": f"{config.root}-spread"})
    with dg.DagsterInstance.ephemeral() as instance:
        list(run_road(config, instance, select=SELECT))
        events = instance.fetch_materializations(dg.AssetKey(NAMES[0]), limit=100).records
        nodes = [event.asset_materialization.metadata["node"].value for event in events]
        return {"nodes": nodes, "versions": {name: recorded_versions(instance, make_road(config).find(name)) for name in NAMES}}


def walk(config_path: str, texts: Path, checkout: Path) -> dict[str, object]:
    """Do with the toy stage what people do with any."""
    config = load_config(config_path)
    road, found = make_road(config), {"package": interp_assets.__file__}
    with dg.DagsterInstance.ephemeral() as instance:
        list(run_road(config, instance, select=["token_shards"]))
        store = open_pipeline_store(config)
        pipeline = load_pipeline(config, store)
        found["plan"] = {line.name: line._asdict() for line in make_schedule(road, pipeline, store, {}, 1) if line.name in NAMES}
        found["made"] = {report.name: report.n_made for report in run_road(config, instance, select=SELECT)}
        found["again"] = {report.name: report.n_made for report in run_road(config, instance, select=SELECT)}
        found["costs"] = {name: len(recorded_costs(instance, road.find(name))) for name in NAMES}
        found["versions"] = {name: recorded_versions(instance, road.find(name)) for name in NAMES}
        found["metadata"] = {
            name: sorted(instance.get_latest_materialization_event(dg.AssetKey(name)).asset_materialization.metadata) for name in NAMES
        }
        (ref,) = road.find(NAMES[0]).artifacts(pipeline, store, SHARD)
        path = Path(config.root) / config.name / ref.path / "lengths.json"
        path.write_bytes(path.read_bytes().replace(b"[", b"{"))
        found["faults"] = [fault.path for fault in verify_tree(store)]
        done = list(run_backfill(config, instance, select=[NAMES[0]], partitions=[SHARD]))
        found["backfilled"] = {item.name: item.n_made for item in done}
        found["faults after"] = [fault.path for fault in verify_tree(store)]
        changed = max(texts.iterdir())
        changed.write_text(changed.read_text() + "\nAnd one more sentence of text.\n")
        found["after a change"] = {report.name: report.n_made for report in run_road(config, instance, select=SELECT)}
        found["check"] = _check(instance)
    graph = build_defs(config).resolve_asset_graph()
    found["graph"] = {name: sorted(key.to_user_string() for key in graph.get(dg.AssetKey(name)).parent_keys) for name in NAMES}
    spec = importlib.util.spec_from_file_location("docs_build", checkout / "docs" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    found["documents"] = [line for line in build.make_assets().splitlines() if any(f"| `{name}`" in line for name in NAMES)]
    return found


def _check(instance: dg.DagsterInstance) -> str:
    key = dg.AssetCheckKey(dg.AssetKey(NAMES[0]), "has_documents")
    (record,) = instance.event_log_storage.get_asset_check_execution_history(key, limit=1)
    return record.status.name


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    result = walk(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
    result["spread"] = spread(sys.argv[1])
    sys.stdout.write("\nRESULT " + json.dumps(result) + "\n")
    sys.stdout.flush()
    os._exit(0)  # Ray's cluster would wait for its processes
