"""Lists of features in a real browser: sorted, filtered, searched, walked by keyboard, and kept in the address."""

import pytest
from browser_site import Site, colour, heading, table_of, until
from chromium import Visit, lowest_contrast

from interp_assets.web.table import Query

pytestmark = pytest.mark.browser


def test_from_the_list_to_a_feature_and_its_tokens(visit: Visit, site: Site) -> None:
    """The way that everybody goes: list, sort, open, hover."""
    visit.open(site.page(), "[role=row] a")
    assert "300 features" in heading(visit)
    visit.page.get_by_role("button", name="max").click()
    until(visit, "location.hash.includes('sort=max')")
    header = visit.page.locator("[role=columnheader].max")
    until(visit, "document.querySelector('[role=columnheader].max').getAttribute('aria-sort') === 'descending'")
    assert header.get_attribute("aria-sort") == "descending"
    visit.page.locator(".row .latent a").first.click()
    visit.page.wait_for_selector("h1:text-matches('^Feature [0-9]')")
    for title in ("Top activations", "Quantile intervals", "Random activations", "Activations", "Logit effects", "Nearest decoder rows"):
        found = visit.page.get_by_role("heading", name=title, exact=True)
        found.first.wait_for()
        assert found.count() == 1
    peak = visit.page.locator("[data-item='0'] [data-place].peak").first
    peak.hover()
    tip = visit.page.get_by_role("tooltip")
    assert "activation" in tip.inner_text()
    assert "100 %" in tip.inner_text()
    assert colour(visit, "[data-item='0'] .peak", "backgroundColor") not in ("rgba(0, 0, 0, 0)", "transparent")


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
    visit.page.wait_for_selector("h1:text-matches('^Feature [0-9]')")
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
    until(visit, "document.activeElement.type === 'search'")
    page.keyboard.type("import")
    until(visit, "location.hash.includes('q=import')")
    page.keyboard.press("Enter")
    page.keyboard.press("?")
    page.wait_for_selector("dialog[open]")
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog", state="detached")
    page.keyboard.press("t")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_a_drag_over_a_distribution_filters_the_list(visit: Visit, site: Site) -> None:
    """The overview is the filter."""
    visit.open(site.page(), "[role=row] a")
    box = visit.page.get_by_role("img", name="Maximum activation").bounding_box()
    visit.page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + 20)
    visit.page.mouse.down()
    visit.page.mouse.move(box["x"] + box["width"] * 0.8, box["y"] + 20, steps=3)
    visit.page.mouse.up()
    until(visit, "location.hash.includes('filter=max')")
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
    until(visit, "location.hash.includes('filter=frequency%3E%3D0.02')")
    wanted = len(table_of(site).order(Query(life="live", filters=("frequency>=2%",))))
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
    until(visit, "location.hash.includes('filter=frequency%3C%3D0.03')")
    assert field.get_attribute("aria-invalid") == "false"


def test_a_search_shows_the_best_match_first_and_marks_it(visit: Visit, site: Site) -> None:
    """A person must see why each feature is in the list, wherever in its evidence the text was found."""
    page = visit.page
    visit.open(site.page(), "[role=row] a")
    page.get_by_role("searchbox").fill("return")
    until(visit, "location.hash.includes('q=return')")
    wanted = [str(row["latent"]) for row in table_of(site).page(Query("relevance", life="live", text="return"), 0, 10).rows]
    until(visit, f"[...document.querySelectorAll('.row .latent a')].slice(0, 10).map((a) => a.innerText).join() === '{','.join(wanted)}'")
    until(visit, "[...document.querySelectorAll('.row')].slice(0, 10).every((row) => row.querySelector('.tokens mark')?.innerText === 'return')")
    page.locator("[role=columnheader].max button").click()
    until(visit, "location.hash.includes('sort=max')")
    page.get_by_role("button", name="best match first").click()
    until(visit, "!location.hash.includes('sort=')")
    page.get_by_role("button", name="clear all filters").click()
    page.wait_for_selector("[role=status]:has-text('277 of 300')")
    assert page.locator("mark").count() == 0


def test_the_long_list_draws_only_what_is_in_view(visit: Visit, site: Site) -> None:
    """Rows beyond the view do not exist, and come when they are scrolled to."""
    visit.open(site.page("?life=all"), "[role=row] a")
    assert visit.page.locator(".row").count() < 60
    visit.page.keyboard.press("G")
    visit.page.wait_for_selector(".row .latent a:has-text('299')")
    assert visit.page.locator(".row").count() < 60


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
