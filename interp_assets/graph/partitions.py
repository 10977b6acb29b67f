"""How work divides, in Dagster's terms: the partitions of every asset, and which upstream partitions each one reads.

Dagster guesses a mapping where none is written, and two different definitions without one become "identity, no upstream partitions"
in silence. So every dependency has one, made from what the record reads; a test compares them with what the road says of each partition.
"""

from collections.abc import Sequence
from typing import Any, Final

import dagster as dg

from interp_assets.errors import ConfigError
from interp_assets.planning.asset import NONE, Asset, Axis, Needs, Reads
from interp_assets.planning.config import PipelineConfig
from interp_assets.planning.pipeline import Pipeline
from interp_assets.planning.road import Road

PIPELINE: Final = "pipeline"
"""Set of one key: the name of the pipeline that a history belongs to."""
SHARD_DIMENSION: Final = "shard"
SLICE_DIMENSION: Final = "latent_slice"
_GPU_CPUS, _GPU_MEMORY = "4", "32Gi"


def partitions_of(axis: Axis) -> dg.PartitionsDefinition | None:
    """Return how an asset divides; None without partitions."""
    if axis is NONE:
        return None
    if axis.dimensions:
        names = (SLICE_DIMENSION, SHARD_DIMENSION)
        parts = {name: partitions for name, item in zip(names, axis.dimensions, strict=True) if (partitions := partitions_of(item))}
        return dg.MultiPartitionsDefinition(parts)
    return dg.DynamicPartitionsDefinition(name=axis.registered) if axis.registered else dg.StaticPartitionsDefinition(list(axis.fixed))


def dependency(road: Road, asset: Asset, item: Reads) -> dg.AssetDep:
    """Return what an asset reads of another as Dagster's dependency."""
    parent = road.get(item.key)
    return dg.AssetDep(dg.AssetKey(list(item.key)), partition_mapping=_mapping(parent.axis, asset.axis, item))


def _mapping(parent: Axis, own: Axis, item: Reads) -> dg.PartitionMapping | None:
    match item.how:
        case "whole":
            return None
        case "same":
            return dg.IdentityPartitionMapping()
        case "only":
            return dg.SpecificPartitionsPartitionMapping(list(item.partitions))
        case "same_shard":
            return dg.MultiToSingleDimensionPartitionMapping(SHARD_DIMENSION)
        case "same_slice":
            return dg.MultiToSingleDimensionPartitionMapping(SLICE_DIMENSION)
        case "parent_bucket" if own.fixed:  # buckets that the plan chooses have no mapping of Dagster's; the road knows theirs
            n = len(own.fixed) // len(parent.fixed)
            return dg.StaticPartitionMapping({key: list(own.fixed[i * n : (i + 1) * n]) for i, key in enumerate(parent.fixed)})
        case _:
            return dg.AllPartitionMapping()


def backfill_policy(asset: Asset, config: PipelineConfig) -> dg.BackfillPolicy | None:
    """Return how a backfill divides an asset into runs: some partitions each, side by side, where work wants many machines.

    That is everything by shard, bucket or slice, where a partition is minutes of work at scale and starting a run costs seconds. SAEs are
    `single_run`: a sweep shares one read of the data, its evaluation one subject model. So are grids: Dagster makes of them one run for
    each latent slice anyway, and would read a piece of a grid as a rectangle, and run cells that nobody asked for. In either kind a crash
    keeps every finished partition, because each is recorded when it is done.
    """
    if asset.axis is NONE:
        return None
    if asset.is_one_run:
        return dg.BackfillPolicy.single_run()
    return dg.BackfillPolicy.multi_run(max_partitions_per_run=config.execution.partitions_per_run)


def tags_of(needs: Needs, config: PipelineConfig) -> dict[str, Any]:
    """Return the tags by which a step's pod or Ray job asks for what it needs. Without a GPU when it is told to use the CPU."""
    if not needs.accelerator and not needs.memory_bytes:
        return {}
    takes_gpu = needs.accelerator and config.execution.device != "cpu"
    cpu, memory = (_GPU_CPUS, _GPU_MEMORY) if needs.accelerator else ("1", f"{needs.memory_bytes >> 20}Mi")
    limits = {"memory": memory, **({"nvidia.com/gpu": "1"} if takes_gpu else {})}
    pod: dict[str, Any] = {"container_config": {"resources": {"requests": {"cpu": cpu, "memory": memory}, "limits": limits}}}
    if takes_gpu:
        tolerations = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
        pod["pod_spec_config"] = {"node_selector": {"interp-assets/accelerator": "gpu"}, "tolerations": tolerations}
    elif not needs.accelerator:
        pod["pod_spec_config"] = {"node_selector": {"interp-assets/accelerator": "none"}}
    return {"dagster-k8s/config": pod, **({"dagster-ray/config": {"num_gpus": 1}} if takes_gpu else {})}


def claim_history(instance: dg.DagsterInstance, pipeline: str) -> None:
    """Note whose history this is, the first time; raise `ConfigError` when it is another pipeline's.

    Asset keys and partition sets are the same in all pipelines, so two of them in one database would take each other's partitions for
    their own. The note lies in the database itself, because machines share it and folders are each machine's own.
    """
    owners = instance.get_dynamic_partitions(PIPELINE)
    if owners and pipeline not in owners:
        raise ConfigError(
            f"This Dagster history is that of the pipeline {owners[0]!r}, and {pipeline!r} would mix its partitions with it. Give each pipeline a "
            "history of its own: another folder in DAGSTER_HOME (unset, each has one), or another database in INTERP_POSTGRES_URL."
        )
    if not owners:
        instance.add_dynamic_partitions(PIPELINE, [pipeline])


def register(instance: dg.DagsterInstance, road: Road, pipeline: Pipeline) -> None:
    """Make the registered partitions of all assets those of the plan."""
    axes = [axis for asset in (*road.outside, *road) for axis in (asset.axis.dimensions or (asset.axis,))]
    for name, axis in {axis.registered: axis for axis in axes if axis.registered}.items():
        set_partitions(instance, name, axis.keys(pipeline))


def set_partitions(instance: dg.DagsterInstance, name: str, keys: Sequence[str]) -> None:
    """Make the registered keys of a dynamic partitions definition exactly `keys`; what was made of removed ones stays in the store."""
    registered = instance.get_dynamic_partitions(name)
    for key in set(registered) - set(keys):
        instance.delete_dynamic_partition(name, key)
    instance.add_dynamic_partitions(name, list(keys))
