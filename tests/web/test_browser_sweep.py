"""Pages that compare SAEs, in a real browser: what differs, noise, curves, two side by side; by keys, on a telephone, and on a static host."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from browser_site import NARROW, fits, serve_files, until
from chromium import Visit, lowest_contrast
from synthetic_sweep import N_HELD_OUT, build_synthetic_sweep

from interp_assets.storage.store import Store, open_store
from interp_assets.web.comparison import describe_comparison
from interp_assets.web.server import Desk, make_app
from interp_assets.web.site import export_site

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def store() -> Store:
    """Invent a pipeline with SAEs."""
    store = open_store("memory://").child("synthetic")
    build_synthetic_sweep(store)
    return store


@pytest.fixture(scope="module")
def address(site, store: Store) -> Iterator[str]:
    """Serve its comparison alone, with the pages that were built for the other browser tests."""
    assert site.address
    server = uvicorn.Server(uvicorn.Config(make_app([], desk=Desk(pipelines={"synthetic": store})), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = True
    thread.join(10)


def names(visit: Visit) -> list[str]:
    """Return the names in the table, in its order."""
    return visit.page.locator(".table tbody th").all_inner_texts()


def test_the_table_shows_what_differs_with_n_and_noise(visit: Visit, address: str, store: Store) -> None:
    """An address without a page leads there; recipes over seeds at first; sorted by a click, and the address has it all."""
    visit.open(address, ".table tbody tr")
    until(visit, "location.hash === '#/sweep/synthetic'")
    head = visit.page.locator(".table thead th").all_inner_texts()
    assert [text for text in head if text in ("name", "n", "architecture", "k", "sparsity coefficient")] == [
        "name",
        "n",
        "architecture",
        "k",
        "sparsity coefficient",
    ]
    assert not {"seed", "d sae", "task"} & set(head)
    row = visit.page.locator(".table tbody tr", has_text="topk-k16").inner_text().split("\t")
    told = describe_comparison(store)["replicas"]["columns"]
    assert f"{told['fvu'][told['name'].index('topk-k16')]:.3f}± 0.002" in "".join(row).replace("\n", "")
    assert names(visit)[0] == "topk-k64"
    assert f"{N_HELD_OUT:,} held-out rows" in visit.page.locator(".lead").inner_text()
    visit.page.get_by_role("button", name="k", exact=True).click()
    until(visit, "location.hash.includes('by=k')")
    assert names(visit)[0] == "topk-k8"
    visit.page.get_by_label("every seed by itself").check()
    until(visit, "document.querySelectorAll('.table tbody tr').length === 25")
    assert "n = 1" in visit.page.locator(".lead").inner_text()
    visit.page.reload()
    visit.page.wait_for_selector(".table tbody tr")
    assert visit.page.locator(".table tbody tr").count() == 25
    assert "bad failed: The loss of SAE 'bad' is nan" in visit.page.locator(".ended").inner_text()
    visit.page.get_by_label("what they do").select_option("sae mlp_out.1")
    until(visit, "document.querySelectorAll('.table tbody tr').length === 1")


def test_two_are_chosen_by_keys_and_told_apart(visit: Visit, address: str) -> None:
    """Boxes in the table do what marks in the picture do; what differs, the numbers with n, and whether it is noise; both curves."""
    visit.open(f"{address}#/sweep/synthetic", ".table tbody tr")
    visit.page.get_by_label("Choose topk-k16").focus()
    visit.page.keyboard.press("Space")
    until(visit, "location.hash.includes('arm=topk-k16')")
    visit.page.locator(".mark", has_text="relu-k16").first.click()
    visit.page.wait_for_selector(".measures tbody tr")
    rows = dict(
        text.split("\t", 1) for text in visit.page.locator("section[aria-label='Two SAEs'] table").first.locator("tbody tr").all_inner_texts()
    )
    assert rows == {"architecture": "topk\trelu", "k": "16\tnot set", "sparsity_coefficient": "not set\t6.25"}
    fvu = visit.page.locator(".measures tbody tr", has_text="FVU").first.inner_text()
    assert "more than noise" in fvu
    assert "within noise" in visit.page.locator(".measures tbody tr", has=visit.page.locator("th", has_text="L0")).inner_text()
    assert "relu-k16, n = 3" in visit.page.locator(".measures thead").inner_text()
    assert "same rows in the same order" in visit.page.locator("section[aria-label='Two SAEs']").inner_text()
    assert visit.page.locator("section[aria-label='Curves'] polyline").count() == 6
    visit.page.get_by_label("shown").select_option("loss")
    until(visit, "document.querySelector('section[aria-label=Curves] svg').getAttribute('aria-label').startsWith('loss over rows')")
    assert visit.page.locator("section[aria-label='FVU over L0'] .bar").count() > 0


def test_matched_latents_stand_beside_two_that_were_matched(visit: Visit, address: str) -> None:
    """The mutual ones, those that fire most alike first, whichever of both is chosen first; of others there is no such table."""
    visit.open(f"{address}#/sweep/synthetic?each=1&arm=relu-k8-seed0&arm=topk-k8-seed0", ".matched tbody tr")
    assert visit.page.locator(".matched tbody tr").count() == 7
    assert visit.page.locator(".matched thead th").all_inner_texts()[:2] == ["relu-k8-seed0", "topk-k8-seed0"]
    assert visit.page.locator(".matched tbody tr").first.inner_text().split("\t") == ["0", "7", "0.990", "1.000", "10 and 12"]
    assert "Correlations on 4,096 held-out rows" in visit.page.locator("section[aria-label='Two SAEs']").inner_text()
    visit.page.goto(f"{address}#/sweep/synthetic?arm=topk-k16&arm=relu-k16")
    until(visit, "document.querySelectorAll('.measures').length === 1")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_readable_in_both_schemes_and_on_a_telephone(chromium, address: str, scheme: str) -> None:
    """Contrast of text 4.5 and more; nothing is wider than the window."""
    visit = Visit(chromium, color_scheme=scheme)
    visit.open(f"{address}#/sweep/synthetic?arm=topk-k16&arm=relu-k16", ".measures tbody tr")
    assert lowest_contrast(visit) >= 4.5
    visit.page.set_viewport_size(NARROW)
    assert fits(visit)
    visit.context.close()
    assert visit.complaints == []


def test_a_static_host_shows_the_same(visit: Visit, address: str, store: Store, tmp_path: Path) -> None:
    """Without a server; a comparison of another version is a sentence, not an empty page."""
    visit.open(f"{address}#/sweep/synthetic", ".table tbody tr")
    served = visit.page.locator(".table").inner_text()
    export_site([], open_store(str(tmp_path)), pipelines={"synthetic": store})
    with serve_files(tmp_path) as files:
        visit.open(f"{files}/#/sweep/synthetic", ".table tbody tr")
        assert visit.page.locator(".table").inner_text() == served
        path = tmp_path / "sweeps" / "synthetic.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "version": 9}))
        visit.page.goto("about:blank")
        visit.open(f"{files}/#/sweep/synthetic", "[role=alert]")
        assert "version 9" in visit.page.locator("[role=alert]").inner_text()
