"""What the fault suite shares: a tiny pipeline, the digests that it must end in, and a count of what was done to it."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
from fault_tally import CASES, Tally
from road_world import Finished, make_road_config
from tiny_models import save_model, write_texts

from interp_assets.graph.jobs import run_road

TALLY = Tally()
REPORT = Path(os.environ["FAULTS_REPORT"]).resolve() if os.environ.get("FAULTS_REPORT") else None
"""A file to write the counts to, one JSON object a line; found now, because tests run in folders of their own."""
CASE_S, DAEMON_CASE_S = 400, 600
"""A case that takes longer has failed. Alone on two cores the slowest takes a fifth of it."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of it is `faults`, bounded in time, and Dagster may warn about its beta features."""
    for item in items:
        if "/faults/" in str(item.path):
            item.add_marker(pytest.mark.faults)
            item.add_marker(pytest.mark.timeout(DAEMON_CASE_S if "daemon" in item.name else CASE_S))
            item.add_marker(pytest.mark.filterwarnings("ignore::dagster.BetaWarning"))
            item.add_marker(pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"))  # sockets that the proxy reset


@pytest.fixture(scope="session")
def tally() -> Tally:
    """Return the counts that the summary reports."""
    return TALLY


def pytest_sessionstart(session: pytest.Session) -> None:
    """Start the clock."""
    TALLY.seconds = time.monotonic()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Count the cases that passed."""
    if report.when == "call" and report.passed and "faults/" in report.nodeid:
        TALLY.outcomes[CASES] += 1


@pytest.hookimpl
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Report how many faults of each kind were met, and how they ended."""
    if not TALLY.outcomes[CASES]:
        return
    TALLY.seconds = time.monotonic() - TALLY.seconds
    terminalreporter.write_sep("=", "faults")
    for n, name in TALLY.lines():
        terminalreporter.write_line(f"{n:>8,}  {name}")
    if REPORT:
        TALLY.write(REPORT)


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
