"""The page of models in a real browser: what is served, and a first trace that runs as it is copied."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from chromium import Visit, lowest_contrast
from model_server import ModelServer, make_served, serve_model

from interp_assets.web.server import STATIC

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def server() -> Iterator[ModelServer]:
    """A server of a tiny model without any bundle."""
    if not (STATIC / "index.html").exists():
        pytest.skip("the pages are not built: python frontend/build.py")
    with serve_model(make_served()) as server:
        yield server


def test_models_are_shown_with_points_and_a_first_trace_to_copy(server: ModelServer, visit: Visit) -> None:
    """Whoever has only the address finds out what to type."""
    visit.context.grant_permissions(["clipboard-read", "clipboard-write"])
    visit.open(server.url, "section[aria-label=tiny]")  # without bundles the models are the first page
    assert visit.page.url.endswith("#/models")
    card = visit.page.inner_text("section[aria-label=tiny]")
    for words in ("tiny gpt2", "layers\n2", "vocabulary\n259", "float32 on cpu", "32 rows of 8,192 tokens", "256 MB of answer, 60 s", "64 in line"):
        assert words in card
    visit.page.click("section button")
    visit.page.wait_for_selector("text=Copied")
    program = visit.page.evaluate("navigator.clipboard.readText()")
    names: dict[str, Any] = {}
    exec(re.sub("The quick brown fox", "hello", program), names)
    assert names["read"].tensor.shape == (1, 5, 16)
    assert names["loss"].value > 0
    visit.page.click("summary")
    visit.page.wait_for_selector("td:text-is('resid_post.1')")
    assert "blocks.1.hook_resid_post" in visit.page.inner_text("table")
    assert lowest_contrast(visit) >= 4.5


def test_a_server_without_models_says_how_some_are_served(site: Any, visit: Visit) -> None:
    """And its other pages have no link to them."""
    visit.open(f"{site.address}/#/models", "text=No models are served here")
    assert "--model" in visit.page.inner_text("main")
    visit.open(site.address, "h1:text-is('Bundles')")
    assert visit.page.locator("header >> text=Models").count() == 0
