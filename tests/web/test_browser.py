"""A real browser opens the pages, clicks through them, and must never see a blank screen or an error in its console.

Without Chromium the tests are skipped with the reason, except where `CI` is set: there its absence is a failure. Pictures of the pages:
`python docs/screenshots.py`.
"""

import csv
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import uvicorn
from chromium import Visit, lowest_contrast, skip_or_fail
from synthetic_bundle import build_synthetic_bundle

from interp_assets.errors import InputError
from interp_assets.storage.manifest import create_artifact, make_ref
from interp_assets.storage.store import Store, open_store
from interp_assets.web.labels import import_labels
from interp_assets.web.opened import OpenBundle, list_bundles
from interp_assets.web.server import STATIC, Desk, make_app
from interp_assets.web.table import FeatureTable, Query

pytestmark = pytest.mark.browser

NARROW = {"width": 390, "height": 844}
REPOSITORY = Path(__file__).parents[2]


class Site(NamedTuple):
    """A running server: its address, and the name of its good bundle."""

    address: str
    name: str
    store: Store

    def page(self, path: str = "") -> str:
        return f"{self.address}/#/{self.name}{path}"


class Fixed:
    """Stands for model and SAE: feature 3 fires on the second token, feature 1 on all but the first."""

    def ask(self, text: str, latent: int | None = None) -> dict:
        if text == "break":
            raise InputError("The text cannot be run.")
        features = [{"latent": 3, "max": 2.5, "activations": [[1, 2.5]]}, {"latent": 1, "max": 1.0, "activations": [[1, 0.5], [2, 1.0]]}]
        if latent not in (None, 1, 3):
            features.append({"latent": latent, "max": 0.0, "activations": []})
        return {"tokens": [0, 5, 6], "masked": [0], "l0": 1.5, "features": features, "by_token": [[], [[3, 2.5], [1, 0.5]], [[1, 1.0]]]}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Serve an invented bundle of 300 features, one of 40 of another SAE, and one of a newer version, with the pages built from these sources."""
    built = subprocess.run([sys.executable, str(REPOSITORY / "frontend" / "build.py")], check=False, capture_output=True, text=True)
    if built.returncode:
        skip_or_fail(f"the pages cannot be built: {built.stderr.strip()}")
    store = open_store(str(tmp_path_factory.mktemp("served")))
    build_synthetic_bundle(store, n_features=300)
    build_synthetic_bundle(store, n_features=40, seed=1, sae="second")
    with create_artifact(store, make_ref("feature_bundle", "6-web", identity={}, inputs={}, label="newer")) as art:
        art.put("bundle.json", json.dumps({"format": "interp-assets/feature-bundle", "version": 99}).encode())
    places = list_bundles(store)
    labels = tmp_path_factory.mktemp("labels") / "labels.csv"
    labels.write_text("latent,label,source,score\n4,<b>hostile</b> label,gpt,0.5\n9,Zebra,hand,\n4,worse label,gpt,0.1\n")
    import_labels(next(OpenBundle(place) for place in places if place.name.startswith("synthetic")), labels)
    notes = tmp_path_factory.mktemp("notes")
    desk = Desk(notes, {place.name: Fixed() for place in places if place.name.startswith("synthetic")})
    server = uvicorn.Server(uvicorn.Config(make_app(places, static=STATIC, desk=desk), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    port = server.servers[0].sockets[0].getsockname()[1]
    name = next(place.name for place in places if place.name.startswith("synthetic"))
    yield Site(f"http://127.0.0.1:{port}", name, store)
    server.should_exit = True
    thread.join(10)


def _heading(visit: Visit) -> str:
    return visit.page.locator("h1").inner_text()


def _colour(visit: Visit, selector: str, name: str) -> str:
    return visit.page.locator(selector).first.evaluate(f"element => getComputedStyle(element).{name}")


def _until(visit: Visit, expression: str) -> None:
    """Wait until `expression` holds in the page. Playwright's own way evaluates strings in the page, which our policy forbids."""
    for _ in range(600):
        if visit.page.evaluate(expression):
            return
        visit.page.wait_for_timeout(25)
    pytest.fail(f"never became true: {expression}")


def _table(site: Site) -> FeatureTable:
    return OpenBundle(next(place for place in list_bundles(site.store) if place.name == site.name)).table()


def _cosine(site: Site, *features: tuple[str, int]) -> float:
    """Compute a cosine from the rows that the bundles hold."""
    rows = []
    for name, latent in features:
        bundle = OpenBundle(next(place for place in list_bundles(site.store) if place.name == name))
        width = bundle.description["directions"]["width"]
        rows.append(np.frombuffer(bundle.read("map/directions.bin"), np.int8).reshape(-1, width)[latent].astype(float))
    return float(rows[0] @ rows[1] / np.linalg.norm(rows[0]) / np.linalg.norm(rows[1]))


def _fits(visit: Visit) -> bool:
    return visit.page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_from_the_list_to_a_feature_and_its_tokens(visit: Visit, site: Site) -> None:
    """The way that everybody goes: list, sort, open, hover."""
    visit.open(site.page(), "[role=row] a")
    assert "300 features" in _heading(visit)
    visit.page.get_by_role("button", name="max").click()
    _until(visit, "location.hash.includes('sort=max')")
    header = visit.page.locator("[role=columnheader].max")
    _until(visit, "document.querySelector('[role=columnheader].max').getAttribute('aria-sort') === 'descending'")
    assert header.get_attribute("aria-sort") == "descending"
    visit.page.locator(".row .latent a").first.click()
    visit.page.wait_for_selector("h1:has-text('Feature')")
    for title in ("Top activations", "Quantile intervals", "Random activations", "Activations", "Logit effects", "Nearest decoder rows"):
        assert visit.page.get_by_role("heading", name=title, exact=True).count() == 1
    peak = visit.page.locator("[data-item='0'] [data-place].peak").first
    peak.hover()
    tip = visit.page.get_by_role("tooltip")
    assert "activation" in tip.inner_text()
    assert "100 %" in tip.inner_text()
    assert _colour(visit, "[data-item='0'] .peak", "backgroundColor") not in ("rgba(0, 0, 0, 0)", "transparent")


def test_one_feature_costs_one_range_request(visit: Visit, site: Site) -> None:
    """Everything else that a page asks for is shared by all features of its file."""
    visit.open(site.page("/40"), "h1:has-text('Feature 40')")
    visit.requests.clear()
    visit.page.keyboard.press("j")
    visit.page.wait_for_selector("h1:has-text('Feature 41')")
    ranges = [request for request in visit.requests if "range" in request.headers]
    assert len(ranges) == 1
    size = ranges[0].response().header_value("content-length")
    assert int(size) < 64 << 10
    assert not [request for request in visit.requests if request.url.endswith(".idx")]


def test_an_address_holds_the_whole_state(visit: Visit, site: Site) -> None:
    """A copied address shows a colleague the same list and the same view of a feature."""
    visit.open(site.page("?sort=frequency&desc=1&life=all&filter=max%3E%3D4&q=return"), "[role=row] a")
    visit.page.wait_for_selector("[role=status]:has-text('of 300')")
    status, first = visit.page.get_by_role("status").inner_text(), visit.page.locator(".row .latent a").first.inner_text()
    assert visit.page.get_by_role("searchbox").input_value() == "return"
    visit.page.reload()
    visit.page.wait_for_selector("[role=status]:has-text('of 300')")
    assert (visit.page.get_by_role("status").inner_text(), visit.page.locator(".row .latent a").first.inner_text()) == (status, first)
    visit.page.locator(".row .latent a").first.click()
    visit.page.wait_for_selector("h1:has-text('Feature')")
    visit.page.get_by_role("button", name="Windows").click()
    visit.page.wait_for_selector(".provenance")
    visit.page.reload()
    visit.page.wait_for_selector(".provenance")
    assert "view=full" in visit.page.url
    assert "sort=frequency" in visit.page.url


def test_the_keyboard_reaches_everything(visit: Visit, site: Site) -> None:
    """j, k, Enter, e, u, / and t: nobody who looks at a thousand features wants a mouse."""
    page = visit.page
    visit.open(site.page(), "[role=row] a")
    for key in "jjk":
        page.keyboard.press(key)
    assert page.locator(".row.selected .latent").inner_text() == "0"
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    page.wait_for_selector("h1:has-text('Feature 1')")
    page.keyboard.press("j")
    page.wait_for_selector("h1:has-text('Feature 2')")
    page.keyboard.press("k")
    page.wait_for_selector("h1:has-text('Feature 1')")
    page.keyboard.press("e")
    page.wait_for_selector(".provenance")
    page.keyboard.press("u")
    page.wait_for_selector(".row.selected")
    assert page.locator(".row.selected .latent").inner_text() == "1"
    page.keyboard.press("/")
    _until(visit, "document.activeElement.type === 'search'")
    page.keyboard.type("import")
    _until(visit, "location.hash.includes('q=import')")
    page.keyboard.press("Enter")
    page.keyboard.press("?")
    page.wait_for_selector("dialog[open]")
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog", state="detached")
    page.keyboard.press("t")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_stepping_follows_the_list(visit: Visit, site: Site) -> None:
    """Next means the next of the list that one came from, not the next number."""
    visit.open(site.page("?sort=max&desc=1"), "[role=row] a")
    shown = visit.page.locator(".row .latent a").all_inner_texts()[:3]
    visit.page.locator(".row .latent a").first.click()
    visit.page.wait_for_selector(f"h1:has-text('Feature {shown[0]}')")
    visit.page.wait_for_selector("nav:has-text('1 of 277')")
    for latent in shown[1:]:
        visit.page.keyboard.press("j")
        visit.page.wait_for_selector(f"h1:has-text('Feature {latent}')")


PLACE = re.compile(r"/place\?")
"""What is asked to learn which features stand before and after one."""


class HeldPlaces:
    """Holds back what a page asks for its place in the list, until `answer`."""

    def __init__(self, visit: Visit) -> None:
        self._visit, self._held, self._is_open = visit, [], False
        visit.page.route(PLACE, self._hold)

    def _hold(self, route) -> None:
        if self._is_open:
            route.continue_()
        else:
            self._held.append(route)

    def answer(self, latent: int) -> None:
        """Let the requests go on; return when the page of `latent` has its place, and has asked for what it asks for next."""
        self._is_open = True
        with self._visit.page.expect_request(re.compile(rf"/labels\?latent={latent}$")):
            for route in self._held:
                route.continue_()


def test_a_step_is_forgotten_with_the_page_it_was_asked_on(visit: Visit, site: Site) -> None:
    """Whoever pressed j and then chose a neighbour must not be carried away from it a moment later."""
    places = HeldPlaces(visit)
    with visit.page.expect_request(PLACE):
        visit.open(site.page("/40"), "h1:has-text('Feature 40')")
    visit.page.keyboard.press("j")
    link = visit.page.locator("section:has(h2:text-is('Nearest decoder rows')) a").first
    chosen = int(link.get_attribute("href").partition("?")[0].rpartition("/")[2])
    with visit.page.expect_request(lambda request: PLACE.search(request.url) and f"latent={chosen}" in request.url):
        link.click()
    places.answer(chosen)
    assert visit.page.evaluate("location.hash.split('?')[0]") == f"#/{site.name}/{chosen}"
    assert _heading(visit) == f"Feature {chosen}"


def test_a_click_before_the_place_is_known_steps_when_it_is(visit: Visit, site: Site) -> None:
    """Until the list answers, Next must neither lead to the page itself nor lose a click."""
    visit.open(site.page("/40"), "nav.step a[href][title='Next (j)']")
    places = HeldPlaces(visit)
    with visit.page.expect_request(PLACE):
        visit.page.keyboard.press("j")
        visit.page.wait_for_selector("h1:has-text('Feature 41')")
    following = visit.page.get_by_title("Next (j)")
    assert following.get_attribute("href") is None
    following.click()
    places.answer(41)
    visit.page.wait_for_selector("h1:has-text('Feature 42')")


def test_a_drag_over_a_distribution_filters_the_list(visit: Visit, site: Site) -> None:
    """The overview is the filter."""
    visit.open(site.page(), "[role=row] a")
    box = visit.page.get_by_role("img", name="Maximum activation").bounding_box()
    visit.page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + 20)
    visit.page.mouse.down()
    visit.page.mouse.move(box["x"] + box["width"] * 0.8, box["y"] + 20, steps=3)
    visit.page.mouse.up()
    _until(visit, "location.hash.includes('filter=max')")
    visit.page.wait_for_selector("[role=status]:has-text('clear all filters')")
    visit.page.get_by_role("button", name="clear all filters").click()
    visit.page.wait_for_selector("[role=status]:has-text('277 of 300')")


def test_a_filter_in_percent_is_taken_and_one_that_is_none_turns_red(visit: Visit, site: Site) -> None:
    """What is not understood must not look as if it were a filter, nor take away the one that is there."""
    page = visit.page
    visit.open(site.page(), "[role=row] a")
    field = page.get_by_label("Firing frequency: at least")
    field.fill("2 %")
    field.press("Enter")
    _until(visit, "location.hash.includes('filter=frequency%3E%3D0.02')")
    wanted = len(_table(site).order(Query(life="live", filters=("frequency>=2%",))))
    page.wait_for_selector(f"[role=status]:has-text('{wanted} of 300')")
    for text, said in (("often", "“often” is not understood"), ("5", "write 5 %"), ("5 percent", "is not understood")):
        field.fill(text)
        field.press("Enter")
        assert said in page.get_by_role("alert").inner_text()
        assert field.get_attribute("aria-invalid") == "true"
        assert page.locator(f"#{field.get_attribute('aria-describedby')}").inner_text() == page.get_by_role("alert").inner_text()
    assert lowest_contrast(visit) >= 4.5
    upper = page.get_by_label("Firing frequency: at most")
    field.fill("2 %")
    upper.fill("1 %")
    upper.press("Enter")
    assert "Nothing is at least 2 % and at most 1 %" in page.get_by_role("alert").inner_text()
    assert "filter=frequency%3E%3D0.02" in page.url
    upper.fill("3%")
    upper.press("Enter")
    page.wait_for_selector("[role=alert]", state="detached")
    _until(visit, "location.hash.includes('filter=frequency%3C%3D0.03')")
    assert field.get_attribute("aria-invalid") == "false"


def test_a_search_shows_the_best_match_first_and_marks_it(visit: Visit, site: Site) -> None:
    """A person must see why each feature is in the list, wherever in its evidence the text was found."""
    page = visit.page
    visit.open(site.page(), "[role=row] a")
    page.get_by_role("searchbox").fill("return")
    _until(visit, "location.hash.includes('q=return')")
    wanted = [str(row["latent"]) for row in _table(site).page(Query("relevance", life="live", text="return"), 0, 10).rows]
    _until(visit, f"[...document.querySelectorAll('.row .latent a')].slice(0, 10).map((a) => a.innerText).join() === '{','.join(wanted)}'")
    _until(visit, "[...document.querySelectorAll('.row')].slice(0, 10).every((row) => row.querySelector('.tokens mark')?.innerText === 'return')")
    page.locator("[role=columnheader].max button").click()
    _until(visit, "location.hash.includes('sort=max')")
    page.get_by_role("button", name="best match first").click()
    _until(visit, "!location.hash.includes('sort=')")
    page.get_by_role("button", name="clear all filters").click()
    page.wait_for_selector("[role=status]:has-text('277 of 300')")
    assert page.locator("mark").count() == 0


def test_examples_say_where_in_their_context_they_lie(visit: Visit, site: Site) -> None:
    """The start of a context is a mark and not the name of a token, and each example tells its place."""
    bundle = OpenBundle(next(place for place in list_bundles(site.store) if place.name == site.name))
    record = next(
        record for record in map(bundle.record, range(300)) if any(item["position"] == item["peak"] for item in record["examples"]["random"])
    )
    visit.open(site.page(f"/{record['latent']}"), f"h1:has-text('Feature {record['latent']}')")
    visit.page.wait_for_selector("ol[aria-label='Random activations']")
    for name, windows in (("Top activations", record["examples"]["top"]), ("Random activations", record["examples"]["random"])):
        shown = visit.page.locator(f"ol[aria-label='{name}'] .position").all_text_contents()
        assert [int(text.rpartition(":")[2]) for text in shown] == [window["position"] for window in windows][: len(shown)]
        assert len(shown) >= 8
    starts = [window for window in record["examples"]["random"] if window["position"] == window["peak"]]
    marks = visit.page.locator("ol[aria-label='Random activations'] .edge[title^='start of the context']")
    assert marks.count() == len(starts) > 0
    assert set(marks.all_inner_texts()) == {"⊢"}
    assert "<|bos|>" not in visit.page.locator(".column.examples").inner_text()


def test_a_feature_leads_to_its_place_on_the_map_in_a_text_and_in_the_list(visit: Visit, site: Site) -> None:
    """Whoever looks at a feature looks at it from several sides, and comes back to it."""
    page = visit.page
    visit.open(site.page("/4"), "h1:has-text('Feature 4')")
    page.get_by_role("link", name="Map").click()
    page.wait_for_selector(".below a:has-text('feature 4')")
    page.get_by_role("link", name="Feature 4", exact=True).click()
    page.wait_for_selector("h1:has-text('Feature 4')")
    page.get_by_role("link", name="Try").click()
    _until(visit, "document.querySelector('textarea')?.value.length > 10")
    page.get_by_role("button", name="Run").click()
    page.wait_for_selector(".found .chosen .latent:has-text('4')")
    assert "does not fire here" in page.locator(".found .chosen").inner_text()
    page.get_by_role("link", name="List").click()
    page.wait_for_selector(".row.selected .latent:has-text('4')")


def test_a_bar_of_the_histogram_opens_its_examples(visit: Visit, site: Site) -> None:
    """From a number to the text behind it, by mouse or keyboard, and in the address."""
    visit.open(site.page("/1"), "h1:has-text('Feature 1')")
    bar = visit.page.locator("rect.target[tabindex='0']").last
    bar.focus()
    visit.page.keyboard.press("Enter")
    visit.page.wait_for_selector("h2:has-text('Activations from')")
    assert "range=" in visit.page.url
    low, high = (float(part) for part in visit.page.url.split("range=")[1].replace("%7E", "~").split("~"))
    shown = visit.page.get_by_role("list", name="Activations from").first.locator("button.value").all_inner_texts()
    assert shown
    assert all(low * 0.995 <= float(text) <= high * 1.005 for text in shown)
    visit.page.get_by_role("button", name="close").click()
    visit.page.wait_for_selector("h2:has-text('Activations from')", state="detached")


def test_the_long_list_draws_only_what_is_in_view(visit: Visit, site: Site) -> None:
    """Rows beyond the view do not exist, and come when they are scrolled to."""
    visit.open(site.page("?life=all"), "[role=row] a")
    assert visit.page.locator(".row").count() < 60
    visit.page.keyboard.press("G")
    visit.page.wait_for_selector(".row .latent a:has-text('299')")
    assert visit.page.locator(".row").count() < 60


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_follow_the_system_and_the_choice(chromium, site: Site, scheme: str) -> None:
    """Dark text on light ground or the other way round, with the contrast of WCAG AA, and the choice is kept."""
    visit = Visit(chromium, color_scheme=scheme)
    visit.open(site.page("/1"), "h1:has-text('Feature 1')")
    assert visit.page.evaluate("document.documentElement.dataset.theme") == scheme
    assert lowest_contrast(visit) >= 4.5
    visit.page.keyboard.press("t")
    visit.page.reload()
    visit.page.wait_for_selector("h1:has-text('Feature 1')")
    other = "dark" if scheme == "light" else "light"
    assert visit.page.evaluate("document.documentElement.dataset.theme") == other
    visit.context.close()
    assert visit.complaints == []


def test_pages_fit_a_telephone(visit: Visit, site: Site) -> None:
    """390 pixels, nothing to scroll sideways."""
    visit.page.set_viewport_size(NARROW)
    visit.open(site.page(), "[role=row] a")
    assert _fits(visit)
    for name in ("frequency", "max"):  # each number stands below the name of its column
        head, cell = (visit.page.locator(f".{where} .{name}").first.bounding_box() for where in ("columns", "row"))
        assert abs(head["x"] + head["width"] - cell["x"] - cell["width"]) <= 12
    visit.page.locator(".row .latent a").nth(2).click()
    visit.page.wait_for_selector("h1:has-text('Feature 2')")
    assert _fits(visit)
    visit.page.wait_for_selector(".evidence section")
    places = [visit.page.locator(where).bounding_box() for where in (".column.examples", ".column.evidence", ".column.context")]
    assert [place["y"] for place in places] == sorted(place["y"] for place in places)  # what a person came for stands first
    assert places[0]["y"] < NARROW["height"] / 2
    visit.page.get_by_role("button", name="Windows").click()
    visit.page.wait_for_selector(".provenance")
    assert _fits(visit)


def test_hostile_tokens_are_text(visit: Visit, site: Site) -> None:
    """A token that looks like a script is shown as it is, and a split character is one again."""
    dialogs: list = []
    visit.page.on("dialog", lambda dialog: (dialogs.append(dialog), dialog.dismiss()))
    visit.open(site.page("?q=%3Cscript"), "[role=row] a")
    visit.page.locator(".row .latent a").first.click()
    visit.page.wait_for_selector("h1:has-text('Feature')")
    assert "<script>alert(1)</script>" in visit.page.locator("article").inner_text()
    assert visit.page.locator("article script, article img").count() == 0
    assert dialogs == []


def test_several_bundles_have_a_first_page(visit: Visit, site: Site) -> None:
    """One card for each SAE; one that cannot be shown says why."""
    visit.open(f"{site.address}/", "h1:has-text('Feature bundles')")
    assert "version 99; this release reads version 3" in visit.page.get_by_role("alert").inner_text()
    assert visit.page.locator("a.whole").count() == 2
    visit.page.locator(f"a.whole[href*='{site.name}']").click()
    visit.page.wait_for_selector("h1:has-text('300 features')")


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/100000", "There is no feature 100000"),
        ("/abc", "The address names no feature"),
        ("?sort=weight", "Cannot sort by 'weight'"),
        ("?filter=max%3E%3Dx", "is no filter"),
    ],
)
def test_wrong_addresses_are_never_blank(unhappy_visit: Visit, site: Site, path: str, text: str) -> None:
    """What is wrong, and a way back."""
    unhappy_visit.open(site.page(path), "[role=alert]")
    assert text in unhappy_visit.page.get_by_role("alert").inner_text()
    assert unhappy_visit.page.get_by_role("alert").get_by_role("link").count() == 1


def test_a_newer_or_unknown_bundle_is_never_blank(unhappy_visit: Visit, site: Site) -> None:
    """The server's reason is what the page says."""
    newer = next(place.name for place in list_bundles(site.store) if place.name.startswith("newer"))
    unhappy_visit.open(f"{site.address}/#/{newer}", "[role=alert]")
    assert "Upgrade interp-assets" in unhappy_visit.page.get_by_role("alert").inner_text()
    unhappy_visit.open(f"{site.address}/#/nothing", "[role=alert]:has-text('No bundle is called')")


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ({"status": 206, "body": b"\x1f\x8b broken"}, "ends early"),
        ({"status": 200, "body": b"short"}, "ends early"),
        ({"status": 502, "body": b"<html>proxy</html>"}, "The server answered 502"),
    ],
)
def test_a_damaged_record_is_never_blank(unhappy_visit: Visit, site: Site, answer: dict, text: str) -> None:
    """Truncated files, hosts without ranges and proxies: the page names the file and offers to try again."""
    page = unhappy_visit.page
    page.route("**/*.bin", lambda route: route.fulfill(**answer))
    unhappy_visit.open(site.page("/5"), "[role=alert]")
    assert text in page.get_by_role("alert").inner_text()
    page.unroute("**/*.bin")
    page.get_by_role("button", name="Try again").click()
    page.wait_for_selector("h1:has-text('Feature 5')")


def test_one_can_step_over_a_damaged_record(unhappy_visit: Visit, site: Site) -> None:
    """One bad byte must not end a walk through the list."""
    page = unhappy_visit.page
    page.route("**/*.bin", lambda route: route.fulfill(status=206, body=b"\x1f\x8b broken"))
    unhappy_visit.open(site.page("/5"), "[role=alert]")
    page.unroute("**/*.bin")
    page.keyboard.press("j")
    page.wait_for_selector("h1:has-text('Feature 6')")


def test_a_server_that_has_gone_is_told(unhappy_visit: Visit, site: Site) -> None:
    """The commonest failure of all: somebody closed the terminal."""
    page = unhappy_visit.page
    unhappy_visit.open(site.page(), "[role=row] a")
    page.route("**/*", lambda route: route.abort())
    page.evaluate(f"location.hash = '#/{site.name}/250'")
    page.wait_for_selector("[role=alert]")
    assert "The server does not answer" in page.get_by_role("alert").inner_text()


def test_labels_are_shown_with_their_provenance(visit: Visit, site: Site) -> None:
    """A label without its source and score would be taken for a fact; markup in it is text."""
    visit.open(site.page(), "[role=row] a")
    visit.page.get_by_role("button", name="labelled").click()
    visit.page.wait_for_selector("[role=status]:has-text('2 of 300')")
    assert visit.page.locator(".row .latent a").all_inner_texts() == ["4", "9"]
    assert visit.page.locator(".row .said").all_inner_texts() == ["<b>hostile</b> label", "Zebra"]
    visit.page.locator(".row .latent a").first.click()
    visit.page.wait_for_selector("article li:has-text('worse label')")
    shown = visit.page.locator("article header li").all_inner_texts()
    assert "gpt" in shown[0]
    assert "score 0.500" in shown[0]
    assert "labels.csv, imported 20" in shown[0]
    assert visit.page.locator("article header b").count() == 0
    visit.open(site.page("?q=label%3Azeb"), "[role=row] a")
    visit.page.wait_for_selector("[role=status]:has-text('1 of 300')")


def test_a_note_and_a_list_are_kept(visit: Visit, site: Site) -> None:
    """They are there after a reload, and the list can be opened as a list."""
    visit.open(site.page("/40"), "h1:has-text('Feature 40')")
    visit.page.get_by_label("Note on this feature").fill("looks like <i>indentation</i>")
    visit.page.get_by_label("Add to a new list").fill("to check")
    visit.page.keyboard.press("Enter")
    visit.page.wait_for_selector("button[aria-pressed=true]:has-text('to check')")
    visit.page.reload()
    visit.page.wait_for_selector("button[aria-pressed=true]:has-text('to check')")
    assert visit.page.get_by_label("Note on this feature").input_value() == "looks like <i>indentation</i>"
    visit.open(site.page("?list=to+check"), "[role=row] a")
    visit.page.wait_for_selector("[role=status]:has-text('1 of 300')")
    assert visit.page.get_by_label("My lists").input_value() == "to check"


def test_two_features_stand_side_by_side(visit: Visit, site: Site) -> None:
    """From a neighbour's link, by number, and from an address; on a telephone one below the other."""
    visit.open(site.page("/1"), "h1:has-text('Feature 1')")
    visit.page.get_by_label("Compare with feature").fill("2")
    visit.page.keyboard.press("Enter")
    visit.page.wait_for_selector("h1:has-text('Two features')")
    assert visit.page.locator("section h2").all_inner_texts()[0].startswith("Feature 1")
    assert visit.page.locator("section h2").all_inner_texts()[1].startswith("Feature 2")
    assert "decoder cosine" in visit.page.locator("table").inner_text()
    record = OpenBundle(next(place for place in list_bundles(site.store) if place.name == site.name)).record(1)
    other = next(latent for latent in range(2, 300) if latent not in {near for near, _ in record["neighbours"]})
    visit.open(site.page(f"/1/with/{site.name}/{other}"), f"table a:has-text('Feature {other}')")
    shown = f"{_cosine(site, (site.name, 1), (site.name, other)):.2f}".replace("-", "\N{MINUS SIGN}")
    assert f"decoder cosine\t{shown}" in visit.page.locator("table").inner_text()
    visit.page.set_viewport_size(NARROW)
    assert _fits(visit)
    visit.page.reload()
    visit.page.wait_for_selector("h1:has-text('Two features')")


def test_features_of_two_saes_stand_side_by_side(visit: Visit, site: Site) -> None:
    """The same question asked of two SAEs: what each fires on, and nothing that was not measured."""
    second = next(place.name for place in list_bundles(site.store) if place.name.startswith("second"))
    visit.open(site.page("/3"), "h1:has-text('Feature 3')")
    visit.page.get_by_label("Compare with feature").fill(f"{second}/3")
    visit.page.keyboard.press("Enter")
    visit.page.wait_for_selector("h1:has-text('Two features')")
    rows = dict(row.split("\t", 1) for row in visit.page.locator("table").inner_text().splitlines() if "\t" in row)
    assert rows["SAE"].split("\t") == ["synthetic", "second"]
    assert rows["decoder cosine"] == f"{_cosine(site, (site.name, 3), (second, 3)):.2f}".replace("-", "\N{MINUS SIGN}")
    for i, name in enumerate((site.name, second)):
        record = OpenBundle(next(place for place in list_bundles(site.store) if place.name == name)).record(3)
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
    heading = _heading(visit)
    text = saved["HTML"].read_text()
    assert "<script" not in text.replace("&lt;script", "")
    visit.requests.clear()
    page.goto(saved["HTML"].as_uri())
    assert _heading(visit) == heading
    assert [request.url for request in visit.requests if not request.url.startswith("file:")] == []
    assert _colour(visit, "body", "color") != "rgb(0, 0, 0)"


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
    _until(visit, "document.querySelector('canvas').dataset.points === '277'")
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
    visit.page.wait_for_selector("h1:has-text('Feature')")
    visit.page.set_viewport_size(NARROW)
    visit.open(site.page("/map"), "canvas")
    assert _fits(visit)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(
    ("path", "selector"),
    [
        (None, "h1:has-text('Feature bundles')"),
        ("", "[role=row] a"),
        ("/4", ".evidence section h2"),
        ("/4/with/{name}/9", "table"),
        ("/try", "textarea"),
        ("/map", "canvas"),
    ],
)
def test_every_page_has_contrast_and_names(chromium, site: Site, scheme: str, path: str | None, selector: str) -> None:
    """WCAG AA: text stands out, and every control, picture and field has a name that a screen reader says."""
    visit = Visit(chromium, color_scheme=scheme)
    visit.open(f"{site.address}/" if path is None else site.page(path.format(name=site.name)), selector)
    visit.page.wait_for_timeout(200)
    assert lowest_contrast(visit) >= 4.5
    nameless = """() => [...document.querySelectorAll('a[href], button, input, select, textarea, canvas, [role=img], [tabindex="0"]')]
        .filter((e) => e.checkVisibility() && !(e.ariaLabel || e.title || e.labels?.length || e.textContent.trim()))
        .filter((e) => !e.getAttribute('aria-labelledby'))
        .map((e) => e.outerHTML.slice(0, 120))"""
    assert visit.page.evaluate(nameless) == []
    assert visit.page.evaluate("document.documentElement.lang") == "en"
    assert visit.page.locator("h1").count() == 1
    visit.context.close()
    assert visit.complaints == []
