"""Chromium for the tests that need one."""

from collections.abc import Iterator

import pytest
from chromium import Visit, run_chromium


@pytest.fixture(scope="module")
def chromium() -> Iterator:
    """Start Chromium."""
    with run_chromium() as browser:
        yield browser


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
