"""A tiny pipeline, and its road run once for all tests that only look at the result."""

from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
from odd_names import ODD_NAME
from road_world import Finished, make_road_config
from tiny_models import save_model, write_texts

from interp_assets.graph.jobs import run_road
from interp_assets.planning.config import PipelineConfig


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let Dagster warn about its beta features: it pins them by version, and so do we."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.filterwarnings("ignore::dagster.BetaWarning"))


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny model and some texts."""
    folder = tmp_path_factory.mktemp("world") / ODD_NAME
    save_model(folder / "model", "gpt2")
    write_texts(folder / "texts", n_files=5, n_chars=900)
    return folder


@pytest.fixture
def road_config(tiny_world: Path, tmp_path: Path) -> PipelineConfig:
    """Return the small configuration with a root of its own."""
    return make_road_config(tiny_world, tmp_path / "data")


@pytest.fixture(scope="session")
def finished(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    """Return a pipeline whose road has been run once. Tests must not change it."""
    config = make_road_config(tiny_world, tmp_path_factory.mktemp("finished") / ODD_NAME)
    with dg.DagsterInstance.ephemeral() as instance:
        yield Finished(config, instance, list(run_road(config, instance)))
