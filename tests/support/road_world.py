"""A tiny pipeline with several shards, buckets, experiments and slices, and what its finished road is."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import dagster as dg
import numpy as np
from tiny_models import make_tiny_config

from interp_assets.corpus.tokens import load_tokens
from interp_assets.graph.jobs import recorded_versions
from interp_assets.graph.stages import make_road
from interp_assets.planning.config import PipelineConfig
from interp_assets.planning.pipeline import Pipeline, load_pipeline, open_pipeline_store
from interp_assets.planning.progress import AssetReport
from interp_assets.shuffle.mixed import open_mixed, read_mixed_ids
from interp_assets.shuffle.refs import certificate_ref
from interp_assets.storage.manifest import find_manifest
from interp_assets.storage.store import Store
from interp_assets.storage.verify import verify_tree

POINT = "resid_post.0"


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


@contextmanager
def copied_history(finished: Finished) -> Iterator[dg.DagsterInstance]:
    """Open an instance of its own that knows what a finished pipeline's knows: running a road again over a copy of its artifacts takes seconds."""
    with dg.DagsterInstance.ephemeral() as instance:
        for name in ("run_storage", "event_log_storage"):
            source, target = (getattr(each, name)._held_conn.connection.driver_connection for each in (finished.instance, instance))
            source.backup(target)
        yield instance


class RowCount(NamedTuple):
    """Rows that there should be, and what has become of them in the mixed shards."""

    n_rows: int
    n_lost: int
    n_doubled: int


def assert_as_if_nothing_happened(config: PipelineConfig, finished: Finished, store: Store | None = None, names: Sequence[str] = ()) -> RowCount:
    """Every partition has the digest of an undisturbed run, every byte its checksum, and the certificate counts every row once.

    `names` limits it to some assets, certificate included. Returns the count of rows, made by comparing row ids.
    """
    store = store or open_pipeline_store(config)
    pipeline = load_pipeline(config, store)
    for stop in make_road(config).rest:
        if not names or stop.name in names:
            found = {key: make_road(pipeline.config).find_version(stop, pipeline, store, key) for key in stop.partition_keys(pipeline)}
            assert found == recorded_versions(finished.instance, stop), stop.name
    certificate = find_manifest(store, certificate_ref(pipeline, POINT))
    assert certificate is not None
    assert certificate.facts["multiset_hash_before"] == certificate.facts["multiset_hash_after"]
    assert [fault for fault in verify_tree(store) if "belongs to no artifact" not in fault.what] == []
    return count_rows(pipeline, store)


def count_rows(pipeline: Pipeline, store: Store) -> RowCount:
    """Compare the row ids of all mixed shards with those of the training shards' valid tokens."""
    valid = {index: np.flatnonzero(load_tokens(pipeline, store, index).valid).astype(np.uint64) for index in pipeline.train_indices}
    expected = np.concatenate([rows + (np.uint64(index) << np.uint64(40)) for index, rows in valid.items()])
    found = np.concatenate([read_mixed_ids(store, shard, 0, shard.n_rows) for shard in open_mixed(pipeline, store, POINT)])
    assert np.setdiff1d(found, expected).size == 0
    return RowCount(expected.size, np.setdiff1d(expected, found).size, found.size - np.unique(found).size)
