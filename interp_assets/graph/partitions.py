"""How work divides: the partitions of every asset, and which upstream partitions each one reads.

    shards        corpus shards, registered by `corpus_plan` (they come and go with the text)
    buckets       mixed shards, a number of the configuration
    experiments   SAEs of the sweep, registered by `corpus_plan`
    slices        latent slices, a number of the configuration
    grid          latent slice x shard

Dagster guesses a mapping where none is written, and two different definitions without one become "identity, no upstream partitions"
in silence. So every dependency of the graph is made by one of the functions below, and a test compares all of them with the road.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import dagster as dg

from interp_assets.errors import ConfigError
from interp_assets.planning.config import PipelineConfig
from interp_assets.shuffle.refs import bucket_key
from interp_assets.visualize.refs import slice_key

PIPELINE: Final = "pipeline"
"""Set of one key: the name of the pipeline that a history belongs to."""
SHARDS: Final = "shards"
EXPERIMENTS: Final = "experiments"
SHARD_DIMENSION: Final = "shard"
SLICE_DIMENSION: Final = "latent_slice"

Key = str | tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """The partitions of one pipeline's assets. Made by `make_layout`."""

    config: PipelineConfig
    shards: dg.DynamicPartitionsDefinition
    experiments: dg.DynamicPartitionsDefinition
    slices: dg.StaticPartitionsDefinition
    grid: dg.MultiPartitionsDefinition

    def buckets(self, n_passes: int) -> dg.StaticPartitionsDefinition:
        """Return the buckets that there are after `n_passes` distribution passes."""
        return dg.StaticPartitionsDefinition([bucket_key(bucket) for bucket in range(self.config.shuffle.fan_out**n_passes)])

    def spread(self) -> dg.BackfillPolicy:
        """Return the backfill policy of work that wants many machines: runs of some partitions each, side by side.

        That is everything by shard, bucket or slice, where a partition is minutes of work at scale and starting a run costs seconds. SAEs are
        `single_run`: a sweep shares one read of the data, its evaluation one subject model. So are grids: Dagster makes of them one run for
        each latent slice anyway, and would read a piece of a grid as a rectangle, and run cells that nobody asked for. In either kind a crash
        keeps every finished partition, because each is recorded when it is done.
        """
        return dg.BackfillPolicy.multi_run(max_partitions_per_run=self.config.execution.partitions_per_run)

    def on_gpu(self) -> dict[str, Any]:
        """Return the tags of work that holds a model: what a step's pod or Ray job asks for. Without a GPU when it is told to use the CPU."""
        if self.config.execution.device == "cpu":
            resources = {"requests": {"cpu": "4", "memory": "32Gi"}, "limits": {"memory": "32Gi"}}
            return {"dagster-k8s/config": {"container_config": {"resources": resources}}}
        resources = {"requests": {"cpu": "4", "memory": "32Gi"}, "limits": {"nvidia.com/gpu": "1", "memory": "32Gi"}}
        pod = {
            "node_selector": {"interp-assets/accelerator": "gpu"},
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        }
        return {"dagster-k8s/config": {"container_config": {"resources": resources}, "pod_spec_config": pod}, "dagster-ray/config": {"num_gpus": 1}}

    def in_memory(self) -> dict[str, Any]:
        """Return the tags of a shuffle job: the memory that the configuration allows its rows, and what a process needs besides."""
        memory = f"{-(-self.config.shuffle.memory_bytes // (1 << 20)) + 1536}Mi"
        resources = {"requests": {"cpu": "1", "memory": memory}, "limits": {"memory": memory}}
        pod = {"node_selector": {"interp-assets/accelerator": "none"}}
        return {"dagster-k8s/config": {"container_config": {"resources": resources}, "pod_spec_config": pod}}

    def kinds(self, *kinds: str) -> set[str]:
        """Return an asset's kinds, with the kind of its storage."""
        return {*kinds, "s3"} if self.config.root.startswith("s3://") else set(kinds)


def make_layout(config: PipelineConfig) -> Layout:
    """Make the partition definitions of a pipeline."""
    shards = dg.DynamicPartitionsDefinition(name=SHARDS)
    slices = dg.StaticPartitionsDefinition([slice_key(index) for index in range(config.features.latent_slices)])
    grid = dg.MultiPartitionsDefinition({SHARD_DIMENSION: shards, SLICE_DIMENSION: slices})
    return Layout(config, shards, dg.DynamicPartitionsDefinition(name=EXPERIMENTS), slices, grid)


def whole(key: Key) -> dg.AssetDep:
    """Depend on an asset without partitions."""
    return dg.AssetDep(_asset_key(key))


def same(key: Key) -> dg.AssetDep:
    """Depend on the upstream partition with the same key."""
    return dg.AssetDep(_asset_key(key), partition_mapping=dg.IdentityPartitionMapping())


def every(key: Key) -> dg.AssetDep:
    """Depend on all upstream partitions."""
    return dg.AssetDep(_asset_key(key), partition_mapping=dg.AllPartitionMapping())


def only(key: Key, partitions: Sequence[str]) -> dg.AssetDep:
    """Depend on the named upstream partitions, whatever the own partition is."""
    return dg.AssetDep(_asset_key(key), partition_mapping=dg.SpecificPartitionsPartitionMapping(list(partitions)))


def same_shard(key: Key) -> dg.AssetDep:
    """Depend on the same shard: from a grid to shards (that one shard), or from shards to a grid (all its slices)."""
    return dg.AssetDep(_asset_key(key), partition_mapping=dg.MultiToSingleDimensionPartitionMapping(SHARD_DIMENSION))


def same_slice(key: Key) -> dg.AssetDep:
    """Depend on the same latent slice of a grid, in all its shards."""
    return dg.AssetDep(_asset_key(key), partition_mapping=dg.MultiToSingleDimensionPartitionMapping(SLICE_DIMENSION))


def parent_bucket(key: Key, n_parents: int, fan_out: int) -> dg.AssetDep:
    """Depend on the bucket that the own buckets are divided from: parent b has the children b * fan_out and following."""
    children = {bucket_key(b): [bucket_key(b * fan_out + child) for child in range(fan_out)] for b in range(n_parents)}
    return dg.AssetDep(_asset_key(key), partition_mapping=dg.StaticPartitionMapping(children))


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


def set_partitions(instance: dg.DagsterInstance, name: str, keys: Sequence[str]) -> None:
    """Make the registered keys of a dynamic partitions definition exactly `keys`; what was made of removed ones stays in the store."""
    registered = instance.get_dynamic_partitions(name)
    for key in set(registered) - set(keys):
        instance.delete_dynamic_partition(name, key)
    instance.add_dynamic_partitions(name, list(keys))


def _asset_key(key: Key) -> dg.AssetKey:
    return dg.AssetKey([key] if isinstance(key, str) else list(key))
