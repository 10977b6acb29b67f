"""One page of a real browser for tests, with everything that it complained about."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
WIDE = {"width": 1280, "height": 900}


def skip_or_fail(reason: str) -> None:
    """Skip, except where `CI` is set: there the browser tests must run."""
    if os.environ.get("CI"):
        pytest.fail(f"{reason}; CI must run the browser tests")
    pytest.skip(reason)


@contextmanager
def run_chromium() -> Iterator:
    """Run Chromium; skip the test where there is none."""
    path = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
    if path is None:
        skip_or_fail("there is no Chromium: apt-get install --no-install-recommends chromium fonts-dejavu-core")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


class Visit:
    """One page of one browser context, with everything that it complained about."""

    def __init__(self, chromium, **options) -> None:
        self.context = chromium.new_context(viewport=WIDE, **options)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text) if message.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.requests: list = []
        self.page.on("request", lambda request: self.requests.append(request))  # noqa: PLW0108 - Playwright cannot wrap built-in functions
        self.page.set_default_timeout(15_000)

    def open(self, address: str, wait_for: str) -> None:
        self.page.goto(address)
        self.page.wait_for_selector(wait_for)
