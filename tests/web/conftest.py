"""Chromium for the tests that need one."""

import shutil
from collections.abc import Iterator

import pytest
from chromium import FLAGS, Visit, skip_or_fail


@pytest.fixture(scope="module")
def chromium() -> Iterator:
    """Start Chromium."""
    path = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
    if path is None:
        skip_or_fail("there is no Chromium: apt-get install --no-install-recommends chromium fonts-dejavu-core")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


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
