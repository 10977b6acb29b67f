"""The page of one feature in a real browser: stepping through a list, examples and their places, bars, notes."""

import re

import pytest
from browser_site import NARROW, Site, fits, heading
from chromium import Visit, lowest_contrast

pytestmark = pytest.mark.browser


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
    assert heading(visit) == f"Feature {chosen}"


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


def test_examples_say_where_in_their_context_they_lie(visit: Visit, site: Site) -> None:
    """The start of a context is a mark and not the name of a token, and each example tells its place."""
    bundle = site.bundle()
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


def test_a_feature_whose_examples_crowd_where_contexts_begin_is_noted(visit: Visit, site: Site) -> None:
    """Attention sinks make features of a place and not of a text, and twenty strong examples hide that."""
    visit.open(site.page_of(site.sinks, "/2"), "ol[aria-label='Random activations']")
    record = site.bundle(site.sinks).record(2)
    for title, windows in (("Top activations", record["examples"]["top"]), ("Random activations", record["examples"]["random"])):
        n_first = sum(window["position"] < 4 for window in windows)
        note = visit.page.locator(f"section:has(h2:text-is('{title}')) .warn").all_inner_texts()
        assert [text.split(":")[0] for text in note] == [f"{n_first} of these {len(windows)} lie in the first 4 places of their context"] * (
            2 * n_first >= len(windows)
        )
    assert visit.page.locator("section:has(h2:text-is('Top activations')) .warn").count() == 1
    assert lowest_contrast(visit) >= 4.5
    visit.open(site.page("/1"), "ol[aria-label='Random activations']")
    assert visit.page.locator(".warn").count() == 0


def test_examples_of_messages_say_whose_words_they_are(visit: Visit, site: Site) -> None:
    """A feature of questions and one of answers look alike without the roles."""
    page = visit.page
    visit.open(site.page_of(site.sinks, "/1"), "ol[aria-label='Top activations'] li")
    top = site.bundle(site.sinks).record(1)["examples"]["top"]
    spoken = [[name for place, name in window["roles"] if place <= window["peak"]][-1] for window in top]
    shown = page.locator("ol[aria-label='Top activations'] li > .role").all_inner_texts()
    assert shown == spoken[: len(shown)]
    assert len(shown) >= 8
    page.get_by_role("button", name="Windows").click()
    page.wait_for_selector("ol[aria-label='Top activations'] .text")
    first = page.locator("ol[aria-label='Top activations'] .text").first
    assert first.locator(".role").all_inner_texts() == [name for _, name in top[0]["roles"] if name != "template"]
    assert spoken[0] in page.locator("ol[aria-label='Top activations'] .provenance").first.inner_text()
    assert lowest_contrast(visit) >= 4.5
    page.set_viewport_size(NARROW)
    assert fits(visit)
    visit.open(site.page("/1"), "ol[aria-label='Top activations'] li")
    assert page.locator(".role").count() == 0
