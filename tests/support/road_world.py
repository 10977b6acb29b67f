"""A tiny pipeline with several shards, buckets, experiments and slices, and what its finished road is."""

from pathlib import Path
from typing import NamedTuple

import dagster as dg
from tiny_models import make_tiny_config

from interp_assets.config import PipelineConfig
from interp_assets.jobs import recorded_versions
from interp_assets.manifest import find_manifest
from interp_assets.pipeline import load_pipeline, open_pipeline_store
from interp_assets.progress import AssetReport
from interp_assets.road import find_version, make_road
from interp_assets.shuffle.refs import certificate_ref
from interp_assets.verify import verify_tree


class Finished(NamedTuple):
    """A pipeline whose road has been run."""

    config: PipelineConfig
    instance: dg.DagsterInstance
    reports: list[AssetReport]


def make_road_config(world: Path, root: Path, **changes: object) -> PipelineConfig:
    """Return a small configuration with several shards, buckets, experiments and slices."""
    sections: dict[str, object] = {
        "root": str(root),
        "corpus": {"shard_bytes": 900},
        "shuffle": {"passes": 2, "fan_out": 2},
        "saes": [
            {"name": name, "hook_point": "resid_post.0", "d_sae": 32, "k": 4, "n_rows": 1024, "batch_rows": 128, "dead_after_rows": 512}
            for name in ("demo", "other")
        ],
        "features": {"saes": ["demo"], "latent_slices": 2, "top_k": 4, "n_random": 8, "window": 4, "n_intervals": 2, "examples_per_interval": 2},
        "execution": {"device": "cpu", "tokens_per_batch": 512, "rows_per_block": 256},
    }
    return make_tiny_config(world / "model", world / "texts", **{**sections, **changes})


def assert_as_if_nothing_happened(config: PipelineConfig, finished: Finished) -> None:
    """Every partition has the digest of an undisturbed run, every byte its checksum, and the certificate counts every row once."""
    store = open_pipeline_store(config)
    pipeline = load_pipeline(config, store)
    for stop in make_road(config)[1:]:
        found = {key: find_version(stop, pipeline, store, key) for key in stop.partition_keys(pipeline)}
        assert found == recorded_versions(finished.instance, stop), stop.name
    certificate = find_manifest(store, certificate_ref(pipeline, "resid_post.0"))
    assert certificate is not None
    assert certificate.facts["multiset_hash_before"] == certificate.facts["multiset_hash_after"]
    assert [fault for fault in verify_tree(store) if "belongs to no artifact" not in fault.what] == []
