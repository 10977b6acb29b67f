"""What the fault suite shares: a tiny pipeline, the digests that it must end in, and a count of what was done to it."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
from road_world import Finished, make_road_config
from tiny_models import save_model, write_texts

from interp_assets.jobs import run_road

COUNTS: Counter[str] = Counter()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of it is `faults`, and Dagster may warn about its beta features."""
    for item in items:
        if "/faults/" in str(item.path):
            item.add_marker(pytest.mark.faults)
            item.add_marker(pytest.mark.timeout(900))  # each starts many processes that import torch
            item.add_marker(pytest.mark.filterwarnings("ignore::dagster.BetaWarning"))
            item.add_marker(pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"))  # sockets that the proxy reset


@pytest.fixture(scope="session")
def counts() -> Counter[str]:
    """Return the counts that the summary reports."""
    return COUNTS


@pytest.hookimpl
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Report how many faults of each kind were met, and how they ended."""
    if COUNTS:
        terminalreporter.write_sep("=", "faults")
        for name, n in sorted(COUNTS.items()):
            terminalreporter.write_line(f"{n:>6}  {name}")


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny model and some texts."""
    folder = tmp_path_factory.mktemp("world")
    save_model(folder / "model", "gpt2")
    write_texts(folder / "texts", n_files=5, n_chars=900)
    return folder


@pytest.fixture(scope="session")
def finished(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    """Return a pipeline that nothing has happened to."""
    config = make_road_config(tiny_world, tmp_path_factory.mktemp("finished"))
    with dg.DagsterInstance.ephemeral() as instance:
        yield Finished(config, instance, list(run_road(config, instance)))
