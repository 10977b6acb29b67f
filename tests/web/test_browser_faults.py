"""What is wrong or hostile is never a blank page in a real browser, nor an error in its console."""

import pytest
from browser_site import Site
from chromium import Visit

from interp_assets.web.opened import list_bundles

pytestmark = pytest.mark.browser


def test_hostile_tokens_are_text(visit: Visit, site: Site) -> None:
    """A token that looks like a script is shown as it is, and a split character is one again."""
    dialogs: list = []
    visit.page.on("dialog", lambda dialog: (dialogs.append(dialog), dialog.dismiss()))
    visit.open(site.page("?q=%3Cscript"), "[role=row] a")
    visit.page.locator(".row .latent a").first.click()
    visit.page.wait_for_selector("h1:text-matches('^Feature [0-9]')")
    assert "<script>alert(1)</script>" in visit.page.locator("article").inner_text()
    assert visit.page.locator("article script, article img").count() == 0
    assert dialogs == []


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
