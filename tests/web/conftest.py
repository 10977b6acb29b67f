"""Chromium for the tests that need one, and a server that they visit."""

from collections.abc import Iterator

import pytest
from browser_site import Site, serve_site
from chromium import Visit, run_chromium


@pytest.fixture(scope="module")
def chromium() -> Iterator:
    """Start Chromium."""
    with run_chromium() as browser:
        yield browser


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Serve the invented bundles once for all files of browser tests."""
    with serve_site(tmp_path_factory.mktemp("site")) as found:
        yield found


@pytest.fixture
def visit(chromium) -> Iterator[Visit]:
    """Open a fresh page; at the end it must not have complained."""
    visit = Visit(chromium, color_scheme="light")
    yield visit
    visit.context.close()
    assert visit.complaints == []


@pytest.fixture
def unhappy_visit(chromium) -> Iterator[Visit]:
    """Open a fresh page that is expected to meet failing requests, which Chromium reports in its console."""
    visit = Visit(chromium, color_scheme="light")
    yield visit
    visit.context.close()
    assert [text for text in visit.complaints if "Failed to load resource" not in text] == []
