"""The other pages in a real browser: bundles, map, search by example, two features side by side, and what is saved of them."""

import csv
import json
import re
from pathlib import Path

import pytest
from browser_site import NARROW, Site, colour, cosine_of, fits, heading, percent, until
from chromium import Visit

pytestmark = pytest.mark.browser


def test_a_feature_leads_to_its_place_on_the_map_in_a_text_and_in_the_list(visit: Visit, site: Site) -> None:
    """Whoever looks at a feature looks at it from several sides, and comes back to it."""
    page = visit.page
    visit.open(site.page("/4"), "h1:has-text('Feature 4')")
    page.get_by_role("link", name="Map").click()
    page.wait_for_selector(".below a:has-text('feature 4')")
    page.get_by_role("link", name="Feature 4", exact=True).click()
    page.wait_for_selector("h1:has-text('Feature 4')")
    page.get_by_role("link", name="Try").click()
    until(visit, "document.querySelector('textarea')?.value.length > 10")
    page.get_by_role("button", name="Run").click()
    page.wait_for_selector(".found .chosen .latent:has-text('4')")
    assert "does not fire here" in page.locator(".found .chosen").inner_text()
    page.get_by_role("link", name="List").click()
    page.wait_for_selector(".row.selected .latent:has-text('4')")


def test_several_bundles_have_a_first_page(visit: Visit, site: Site) -> None:
    """One card for each SAE; one that cannot be shown says why."""
    visit.open(f"{site.address}/", "h1:text-is('Bundles')")
    assert "version 99; this release reads version 3" in visit.page.get_by_role("alert").inner_text()
    assert visit.page.locator("a.whole").count() == 4
    visit.page.locator(f"a.whole[href*='{site.name}']").click()
    visit.page.wait_for_selector("h1:has-text('300 features')")


def test_two_features_stand_side_by_side(visit: Visit, site: Site) -> None:
    """From a neighbour's link, by number, and from an address; on a telephone one below the other."""
    visit.open(site.page("/1"), "h1:has-text('Feature 1')")
    visit.page.get_by_label("Compare with feature").fill("2")
    visit.page.keyboard.press("Enter")
    visit.page.wait_for_selector("h1:has-text('Two features')")
    assert visit.page.locator("section h2").all_inner_texts()[0].startswith("Feature 1")
    assert visit.page.locator("section h2").all_inner_texts()[1].startswith("Feature 2")
    assert "decoder cosine" in visit.page.locator("table").inner_text()
    record = site.bundle().record(1)
    other = next(latent for latent in range(2, 300) if latent not in {near for near, _ in record["neighbours"]})
    visit.open(site.page(f"/1/with/{site.name}/{other}"), f"table a:has-text('Feature {other}')")
    shown = f"{cosine_of(site, (site.name, 1), (site.name, other)):.2f}".replace("-", "\N{MINUS SIGN}")
    assert f"decoder cosine\t{shown}" in visit.page.locator("table").inner_text()
    visit.page.set_viewport_size(NARROW)
    assert fits(visit)
    visit.page.reload()
    visit.page.wait_for_selector("h1:has-text('Two features')")


def test_features_of_two_saes_stand_side_by_side(visit: Visit, site: Site) -> None:
    """The same question asked of two SAEs: what each fires on, and nothing that was not measured."""
    second = site.second
    visit.open(site.page("/3"), "h1:has-text('Feature 3')")
    visit.page.get_by_label("Compare with feature").fill(f"{second}/3")
    visit.page.keyboard.press("Enter")
    visit.page.wait_for_selector("h1:has-text('Two features')")
    rows = dict(row.split("\t", 1) for row in visit.page.locator("table").inner_text().splitlines() if "\t" in row)
    assert rows["SAE"].split("\t") == ["synthetic", "second"]
    assert rows["decoder cosine"] == f"{cosine_of(site, (site.name, 3), (second, 3)):.2f}".replace("-", "\N{MINUS SIGN}")
    for i, name in enumerate((site.name, second)):
        record = site.bundle(name).record(3)
        assert rows["firings"].split("\t")[i] == f"{record['statistics']['count']:,}"
    assert visit.page.get_by_role("list", name="Top activations").count() == 2


@pytest.mark.parametrize(
    ("path", "selector"), [("/1", "h1:has-text('Feature 1')"), ("?sort=max&desc=1", "[role=row] a"), ("/1/with/{name}/2", "table")]
)
def test_what_is_on_the_screen_can_be_saved(visit: Visit, site: Site, path: str, selector: str, tmp_path: Path) -> None:
    """JSON and CSV are what is shown; the HTML page shows the same with no script and no request."""
    page = visit.page
    visit.open(site.page(path.format(name=site.name)), selector)
    page.wait_for_timeout(300)
    saved = {}
    for kind in ("JSON", "CSV", "HTML"):
        page.get_by_role("button", name="Export").click()
        with page.expect_download() as waiting:
            page.get_by_role("button", name=kind, exact=True).click()
        saved[kind] = tmp_path / waiting.value.suggested_filename
        waiting.value.save_as(saved[kind])
    assert json.loads(saved["JSON"].read_text())["format"].startswith("interp-assets/")
    rows = list(csv.reader(saved["CSV"].read_text().splitlines()))
    assert len({len(row) for row in rows if row}) == 1 or "\n" in saved["CSV"].read_text()
    if path.startswith("?"):
        assert [row[0] for row in rows[1:4]] == page.locator(".row .latent a").all_inner_texts()[:3]
    title = heading(visit)
    text = saved["HTML"].read_text()
    assert "<script" not in text.replace("&lt;script", "")
    visit.requests.clear()
    page.goto(saved["HTML"].as_uri())
    assert heading(visit) == title
    assert [request.url for request in visit.requests if not request.url.startswith("file:")] == []
    assert colour(visit, "body", "color") != "rgb(0, 0, 0)"


def test_a_text_shows_which_features_fire_on_it(visit: Visit, site: Site) -> None:
    """Type, see the strongest features coloured over the text, point at a token for its own, open one."""
    visit.open(site.page("/try"), "textarea")
    visit.page.get_by_role("textbox", name="Text").fill("def in")
    visit.page.get_by_role("button", name="Run").click()
    visit.page.wait_for_selector(".found a")
    assert visit.page.locator(".found .latent").all_inner_texts() == ["3", "1"]
    visit.page.locator(".text [data-place='2']").click()
    visit.page.wait_for_selector(".found li:first-child .latent:has-text('1')")
    assert visit.page.locator(".found .latent").all_inner_texts() == ["1"]
    visit.page.locator(".found a").first.click()
    visit.page.wait_for_selector("h1:has-text('Feature 1')")


def test_a_text_that_fails_leaves_no_older_answer(unhappy_visit: Visit, site: Site) -> None:
    """Results under an error look like its own; while the model is loaded, the page says so."""
    page = unhappy_visit.page
    unhappy_visit.open(site.page("/try"), "textarea")
    field, button = page.get_by_role("textbox", name="Text"), page.locator("form button")
    page.route(re.compile(r"/try\?"), lambda route: (said.append((button.inner_text(), page.get_by_role("status").inner_text())), route.continue_()))
    said: list[tuple[str, str]] = []
    for text in ("def in", "def in"):
        field.fill(text)
        button.click()
        page.wait_for_selector(".found a")
    field.fill("break")
    button.click()
    page.wait_for_selector("[role=alert]:has-text('The text cannot be run.')")
    assert page.locator(".found, .text").count() == 0
    assert [shown[0] for shown in said] == ["Loading the model…", "Running…", "Running…"]
    assert "Loading the model" in said[0][1]


def test_the_map_shows_every_live_feature(visit: Visit, site: Site) -> None:
    """Points by range requests, never more than a million; the keyboard moves, zooms and picks; it says what its axes are worth."""
    visit.open(site.page("/map"), "canvas")
    until(visit, "document.querySelector('canvas').dataset.points === '277'")
    assert "Two dimensions show too little" not in visit.page.locator("main").inner_text()  # of eight dimensions they show a third
    assert "of the variance" in visit.page.locator("main").inner_text()
    assert [request for request in visit.requests if request.url.endswith("map/tiles.bin") and "range" in request.headers]
    canvas = visit.page.locator("canvas")
    painted = "(c) => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some((v) => v)"
    assert canvas.evaluate(painted)
    canvas.focus()
    visit.page.keyboard.press("+")
    for _ in range(60):
        visit.page.keyboard.press("Enter")
        if visit.page.locator(".below a").count():
            break
        visit.page.keyboard.press("-")
        visit.page.keyboard.press("ArrowRight")
    box = canvas.bounding_box()
    if not visit.page.locator(".below a").count():
        visit.page.get_by_role("button", name="all").click()
        for x in range(10, int(box["width"]), 24):
            canvas.click(position={"x": x, "y": box["height"] * 0.4})
            if visit.page.locator(".below a").count():
                break
    visit.page.locator(".below a").click()
    visit.page.wait_for_selector("h1:text-matches('^Feature [0-9]')")
    visit.page.set_viewport_size(NARROW)
    visit.open(site.page("/map"), "canvas")
    assert fits(visit)


def test_a_map_of_little_variance_warns(visit: Visit, site: Site) -> None:
    """Two of 64 random dimensions show nothing of how directions lie, however pretty the picture."""
    visit.open(site.page_of(site.sinks, "/map"), "canvas")
    share = site.bundle(site.sinks).description["map"]["variance_share"]
    assert share < 0.2
    assert f"they hold {percent(share)} of the variance" in visit.page.locator(".warn").inner_text()
    assert "near points need not be near directions" in visit.page.locator(".warn").inner_text()
    assert "No part of this map has tokens of its own beyond chance" in visit.page.locator("main").inner_text()
    assert visit.page.get_by_role("list", name="Clusters").locator("li").count() == 0


@pytest.mark.parametrize("path", ["", "/1", "/map", "/try", "/1/with/{name}/2"])
def test_every_page_says_what_the_evidence_leaves_out(visit: Visit, site: Site, path: str) -> None:
    """Whoever lands on any page from a link must not take a part of the rows for all of them."""
    selector = {"": "[role=row] a", "/1": "h1:has-text('Feature 1')", "/map": "canvas", "/try": "textarea"}.get(path, "table")
    description = site.bundle(site.sinks).description
    n_excluded, n_scanned = description["corpus"]["n_excluded"], description["tokens_scanned"]
    visit.open(site.page_of(site.sinks, path.format(name=site.second)), selector)
    said = visit.page.locator(".left-out").all_inner_texts()
    assert len(said) == 1  # of the other SAE beside it nothing is left out
    assert (
        f"leaves out {n_excluded:,} of {n_excluded + n_scanned:,} rows: the first 2 tokens of each context (harvest.excluded_positions)." in said[0]
    )
    assert "12 of 4,096 held-out rows are outliers, over 10 times the median norm: FVU 0.210, without them 0.386." in said[0]
    visit.page.set_viewport_size(NARROW)
    assert fits(visit)
    visit.page.goto(site.page(path.format(name=site.second)))
    visit.page.reload()
    visit.page.wait_for_selector(selector)
    assert visit.page.locator(".left-out").count() == 0


def test_the_model_card_tells_ordinary_rows_from_outliers(visit: Visit, site: Site) -> None:
    """An FVU that a few huge rows make look good stands beside the one over all others."""
    visit.open(site.page_of(site.sinks, "/1"), "section:has(h2:text-is('Where this comes from')) table")
    rows = [row.split() for row in visit.page.locator("section:has(h2:text-is('Where this comes from')) tbody tr").all_inner_texts()]
    assert rows == [["FVU", "0.210", "0.386", "0.00400"], ["L0", "8.00", "8.10", "2.50"], ["CE", "recovered", "0.930", "0.920", "0.710"]]


@pytest.mark.parametrize("size", [None, NARROW])
def test_clusters_of_the_map_have_names_that_do_not_overlap(visit: Visit, site: Site, size: dict | None) -> None:
    """What features in one place share is read off the map, at every zoom, on a telephone too."""
    page = visit.page
    if size:
        page.set_viewport_size(size)
    visit.open(site.page("/map"), "ul[aria-label='Clusters'] li")
    names = page.locator("ul[aria-label='Clusters'] li")
    described = site.bundle().description["map"]
    said = f"Of the 10 nearest decoder rows of a feature {percent(described['neighbours']['kept'])} are near it here"
    assert said in page.locator("main").inner_text()
    written = json.loads(site.bundle().read("map/clusters.json"))["clusters"]
    assert len(written) == described["n_clusters"]
    assert {"\u2191import", "\u2191yield"} <= set(names.all_inner_texts())
    frame = page.locator("canvas").bounding_box()
    for _ in range(4):
        boxes = [item.bounding_box() for item in names.all()]
        for i, a in enumerate(boxes):
            assert frame["x"] <= a["x"] <= a["x"] + a["width"] <= frame["x"] + frame["width"]
            assert all(abs(a["x"] - b["x"]) >= min(a["width"], b["width"]) or abs(a["y"] - b["y"]) >= a["height"] for b in boxes[:i])
        page.get_by_role("button", name="Zoom in").click()
    assert fits(visit)
