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


def lowest_contrast(visit: Visit) -> float:
    """Return the lowest contrast of text with its ground over the page (WCAG 2.2, 1.4.3), colours painted by the browser itself."""
    return visit.page.evaluate(
        """() => {
        const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
        const paint = (...colours) => {
            canvas.clearRect(0, 0, 1, 1);
            for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
            return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map((v) => v / 255);
        };
        const light = (rgb) => {
            const [r, g, b] = rgb.map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        let lowest = 21;
        const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
        while (walker.nextNode()) {
            const element = walker.currentNode.parentElement;
            if (!walker.currentNode.data.trim() || element.closest('svg, .hidden, .masked, .repeat, [aria-disabled=true]')) continue;
            const grounds = [];
            for (let at = element; at; at = at.parentElement) grounds.unshift(getComputedStyle(at).backgroundColor);
            const ground = paint('#fff', ...grounds);
            const ink = paint('#fff', ...grounds, getComputedStyle(element).color);
            const [high, low] = [light(ink), light(ground)].sort((a, b) => b - a);
            lowest = Math.min(lowest, (high + 0.05) / (low + 0.05));
        }
        return lowest;
    }"""
    )
