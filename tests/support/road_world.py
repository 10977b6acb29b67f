"""A tiny pipeline with several shards, buckets, experiments and slices, and what its finished road is."""

from pathlib import Path
from typing import NamedTuple

import dagster as dg
from tiny_models import make_tiny_config

from interp_assets.config import PipelineConfig
from interp_assets.progress import AssetReport


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
