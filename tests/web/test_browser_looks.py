"""Pages in a real browser as people see them: light and dark, wide and narrow, with contrast and with names for a screen reader."""

import pytest
from browser_site import NARROW, Site, fits
from chromium import Visit, lowest_contrast

pytestmark = pytest.mark.browser


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
    assert fits(visit)
    for name in ("frequency", "max"):  # each number stands below the name of its column
        head, cell = (visit.page.locator(f".{where} .{name}").first.bounding_box() for where in ("columns", "row"))
        assert abs(head["x"] + head["width"] - cell["x"] - cell["width"]) <= 12
    visit.page.locator(".row .latent a").nth(2).click()
    visit.page.wait_for_selector("h1:has-text('Feature 2')")
    assert fits(visit)
    visit.page.wait_for_selector(".evidence section")
    places = [visit.page.locator(where).bounding_box() for where in (".column.examples", ".column.evidence", ".column.context")]
    assert [place["y"] for place in places] == sorted(place["y"] for place in places)  # what a person came for stands first
    assert places[0]["y"] < NARROW["height"] / 2
    visit.page.get_by_role("button", name="Windows").click()
    visit.page.wait_for_selector(".provenance")
    assert fits(visit)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(
    ("path", "selector"),
    [
        (None, "h1:text-is('Bundles')"),
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
