"""A tiny pipeline, and its road run once for all tests that only look at the result."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import dagster as dg
import pytest
from tiny_models import make_tiny_config, save_model, write_texts

from interp_assets.config import PipelineConfig
from interp_assets.jobs import run_road
from interp_assets.progress import AssetReport


class Finished(NamedTuple):
    """A pipeline whose road has been run."""

    config: PipelineConfig
    instance: dg.DagsterInstance
    reports: list[AssetReport]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let Dagster warn about its beta features: it pins them by version, and so do we."""
    for item in items:
        if "/dagster/" in str(item.path):
            item.add_marker(pytest.mark.filterwarnings("ignore::dagster.BetaWarning"))


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny model and some texts."""
    folder = tmp_path_factory.mktemp("world")
    save_model(folder / "model", "gpt2")
    write_texts(folder / "texts", n_files=5, n_chars=900)
    return folder


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


@pytest.fixture
def road_config(tiny_world: Path, tmp_path: Path) -> PipelineConfig:
    """Return the small configuration with a root of its own."""
    return make_road_config(tiny_world, tmp_path / "data")


@pytest.fixture(scope="session")
def finished(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    """Return a pipeline whose road has been run once. Tests must not change it."""
    config = make_road_config(tiny_world, tmp_path_factory.mktemp("finished"))
    with dg.DagsterInstance.ephemeral() as instance:
        yield Finished(config, instance, list(run_road(config, instance)))
