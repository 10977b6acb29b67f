"""Pages of attention heads in a real browser: the map, a head, a prompt; keys, a screen reader's words, a telephone, and hosts without a server."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from browser_site import NARROW, Site, fits, percent, serve_files, until
from chromium import Visit, lowest_contrast

from interp_assets.storage.store import open_store
from interp_assets.web.opened import OpenAttention, list_bundles, open_any
from interp_assets.web.site import export_site

pytestmark = pytest.mark.browser


def _heads(site: Site) -> OpenAttention:
    """Open the bundle of heads as the server does."""
    (found,) = (bundle for place in list_bundles(site.store) if place.name == site.heads and isinstance(bundle := open_any(place), OpenAttention))
    return found


def test_the_map_says_every_number_with_chance_beside_it(visit: Visit, site: Site) -> None:
    """The picture is a table: a screen reader hears the value, its chance and its rank; keys walk from cell to cell; the address is the state."""
    columns = _heads(site).description["heads"]
    visit.open(site.page_of(site.heads, "/heads"), ".grid td a")
    said = visit.page.locator(".grid td a").evaluate_all("links => links.map((link) => link.ariaLabel)")
    order = np.argsort([-value for value in columns["induction"]], kind="stable").tolist()
    for place, name in enumerate(_heads(site).head_names()):
        value, chance = (percent(columns[key][place]) if columns[key][place] else "0 %" for key in ("induction", "uniform_induction"))
        assert said[place].startswith(f"head {name}: {value} ")
        assert f", chance {chance}, rank" in said[place]
    assert "rank 1 of 6" in said[order[0]]
    assert "mamba: no attention heads" in visit.page.locator(".grid tr.other").inner_text()
    assert ["resting" in text for text in said] == [a + b > 0.9 for a, b in zip(columns["first"], columns["self"], strict=True)]
    visit.page.locator(".grid td a").first.focus()
    visit.page.keyboard.press("l")
    visit.page.keyboard.press("ArrowDown")
    assert visit.page.evaluate("document.activeElement.ariaLabel").startswith("head 1.1:")
    visit.page.get_by_label("Statistic").select_option("previous")
    visit.page.get_by_label("at least").fill("0.5")
    visit.page.keyboard.press("Enter")
    visit.page.wait_for_selector("h2:has-text('1 heads')")
    assert visit.page.url.endswith(f"#/{site.heads}/heads?by=previous&and=induction&least=0.5")
    visit.page.reload()
    visit.page.wait_for_selector("h2:has-text('1 heads')")
    assert visit.page.locator(".list tbody td a").inner_text() == "0.1"


def test_a_head_shows_what_its_queries_look_at(visit: Visit, site: Site) -> None:
    """Hovering previews another query, a click keeps it, the table has the numbers of the record; one range request opens a head."""
    record = _heads(site).head("1.0")
    visit.open(site.page_of(site.heads, "/heads/1.0"), "article")
    ranges = [request.headers.get("range") for request in visit.requests if request.url.endswith("records.bin")]
    assert len(ranges) == 1
    example = record["examples"][record["top"][0]]
    card = visit.page.locator("article").first
    assert f"query {example['query']} " in card.get_by_role("status").inner_text()
    assert card.locator("span.query").get_attribute("data-place") == str(example["query"])
    before = card.locator("tbody").inner_text()
    card.locator(f"span[data-place='{example['query'] + 1}']").hover()
    assert f"query {example['query'] + 1} " in card.get_by_role("status").inner_text()
    visit.page.mouse.move(0, 0)
    assert card.locator("tbody").inner_text() == before
    card.locator(f"span[data-place='{example['query'] + 1}']").click()
    visit.page.mouse.move(0, 0)
    assert "kept" in card.get_by_role("status").inner_text()
    row = example["query"] + 1 - example["first_query"]
    strongest = (example["masses"][row][0] / 255) ** 2
    assert card.locator("tbody tr").first.inner_text().split()[-1] == f"{strongest:.3f}"
    mean = visit.page.locator("tr:has(a:text('Induction')) td").first.inner_text()
    assert mean == percent(record["statistics"]["induction"])
    visit.page.get_by_role("group", name=re.compile("Rows by score")).get_by_role("button").nth(2).click()
    visit.page.wait_for_selector("h2:has-text('Score 0.500 to 1.00')")
    expected = sorted((each["score"] for each in record["examples"] if 0.5 <= each["score"] < 1), reverse=True)
    assert visit.page.locator("article").count() == min(3, len(expected))
    visit.page.keyboard.press("l")
    visit.page.wait_for_selector("h1:has-text('Head 1.1')")
    visit.page.keyboard.press("k")
    visit.page.wait_for_selector("h1:has-text('Head 0.1')")


def _table(visit: Visit) -> list[list[str]]:
    return [[cell.strip() for cell in row.split("\t")] for row in visit.page.locator(".reading tbody tr").all_inner_texts()]


def test_a_prompt_links_pattern_tokens_and_table(visit: Visit, site: Site) -> None:
    """What a token looks at, and what looks at it; weighted, without the first token; by keys alone, and all of it in the address."""
    seen = _heads(site).prompt("short")
    pattern = seen.pattern("1.0")
    visit.open(site.page_of(site.heads, "/prompt/short?head=1.0&q=20&k=9"), ".reading tbody tr")
    status = visit.page.get_by_role("status")
    assert f"head 1.0: query 20 {seen.tokens[20].strip()}" in status.inner_text()
    assert f"{pattern[20, 9]:.3f}, rank 1" in status.inner_text()
    assert [(row[0], row[2]) for row in _table(visit)] == [("9", f"{pattern[20, 9]:.3f}"), ("0", f"{pattern[20, 0]:.3f}")]
    visit.page.keyboard.press("x")
    visit.page.wait_for_selector("[role=status]:has-text('is hidden')")
    assert [row[0] for row in _table(visit)] == ["9"]
    visit.page.keyboard.press("x")
    visit.page.wait_for_selector("[role=status]:has-text('adds up to one')")
    assert _table(visit)[0][2] == f"{pattern[20, 9] / (1 - pattern[20, 0]):.3f}"
    visit.page.keyboard.press("x")
    visit.page.keyboard.press("]")
    visit.page.keyboard.press("]")
    visit.page.wait_for_selector("th:has-text('weight')")
    until(visit, f"document.querySelector('.reading tbody td:nth-child(3)').innerText === '{pattern[20, 9] * seen.lengths[1][0, 1, 9]:.3f}'")
    assert "by=output" in visit.page.url
    visit.page.keyboard.press("]")
    visit.page.keyboard.press("]")
    visit.page.keyboard.press("s")
    visit.page.wait_for_selector("caption:has-text('What looks at key 9')")
    looking = np.flatnonzero(pattern[:, 9])
    until(visit, f"document.querySelectorAll('.reading tbody tr').length === {len(looking)}")
    assert sorted(int(row[0]) for row in _table(visit)) == looking.tolist()
    visit.page.keyboard.press("s")
    visit.page.keyboard.press("ArrowUp")
    visit.page.keyboard.press("h")
    until(visit, "location.hash.includes('head=0.2&q=19&k=9')")
    assert visit.page.get_by_role("button", name="Head 0.2").get_attribute("aria-pressed") == "true"


def test_a_configured_target_is_explained_without_a_model(visit: Visit, site: Site) -> None:
    """Edges by what they add to a token's logit, of both signs, and terms that sum to it, from the bundle's files alone."""
    bundle = _heads(site)
    pattern = bundle.prompt("short").pattern("1.0")
    files = {name: bundle.read(f"prompts/short/{name}") for name in ("targets.json", "columns.bin", "scales.bin", "terms.bin")}
    (target,) = json.loads(files["targets.json"])
    column = np.frombuffer(files["columns.bin"], "<f2").reshape(6, 3, 24)[3, 2].astype(float)
    scale = np.frombuffer(files["scales.bin"], "<f4").reshape(2, 24)[1]
    terms = np.frombuffer(files["terms.bin"], "<f4").reshape(-1, 24)[:, 20]
    visit.open(site.page_of(site.heads, f"/prompt/short?head=1.0&q=20&k=9&by={target['column']}"), "caption:has-text('What adds to it at query 20')")
    edges = pattern[20] * column * scale[20]
    order = np.argsort(-np.abs(edges), kind="stable")[: np.count_nonzero(edges)]
    first = visit.page.locator(".reading table").first.locator("tbody tr").all_inner_texts()
    assert [int(line.split("\t")[0]) for line in first] == order.tolist()
    assert [line.split("\t")[2].replace("\N{MINUS SIGN}", "-") for line in first] == [f"{edges[key]:.3f}" for key in order]
    parts = visit.page.locator("table:has(caption:has-text('What adds')) tbody tr").all_inner_texts()
    total = sum(float(line.split("\t")[-1].replace("\N{MINUS SIGN}", "-")) for line in parts)
    assert total == pytest.approx(terms[6], abs=0.01)
    assert f"{terms[6]:.3f} in all".replace("-", "\N{MINUS SIGN}") in visit.page.locator("caption:has-text('What adds')").inner_text()
    assert target["note"] in visit.page.locator(".lead").inner_text()


def test_lines_run_from_the_chosen_token_to_what_it_looks_at(visit: Visit, site: Site) -> None:
    """Pattern, tokens and lines are one choice; on a telephone there is no room for lines, nor for what runs off the side."""
    visit.open(site.page_of(site.heads, "/prompt/short?head=1.0&q=20&k=9"), ".tokens path")
    ends = """[...document.querySelectorAll('.tokens path')].map((path) => {
        const [from, to] = [path.getPointAtLength(0), path.getPointAtLength(path.getTotalLength())];
        const spans = [...document.querySelectorAll('.tokens [data-place]')];
        const away = (span, point) => Math.hypot(span.offsetLeft + span.offsetWidth / 2 - point.x, span.offsetTop + 3 - point.y);
        const nearest = (point) => Number(spans.toSorted((a, b) => away(a, point) - away(b, point))[0].dataset.place);
        return [nearest(from), nearest(to), path.classList.contains('sight')];
    })"""
    pattern = _heads(site).prompt("short").pattern("1.0")
    wanted = [[20, int(key), bool(key == 9)] for key in np.argsort(-pattern[20], kind="stable")[: np.count_nonzero(pattern[20])]]
    assert visit.page.evaluate(ends) == wanted
    visit.page.locator(".tokens [data-place='15']").hover()
    visit.page.wait_for_selector("caption:has-text('What query 15 looks at')")
    assert {start for start, *_ in visit.page.evaluate(ends)} == {15}
    visit.page.set_viewport_size(NARROW)
    visit.page.wait_for_timeout(100)
    assert not visit.page.locator(".tokens svg").is_visible()
    assert fits(visit)


def test_hovering_previews_and_clicking_keeps(visit: Visit, site: Site) -> None:
    """A person looks around without losing the place; shift adds a token's line to another's."""
    visit.open(site.page_of(site.heads, "/prompt/short?head=0.1&q=10"), ".reading tbody tr")
    visit.page.locator(".tokens [data-place='15']").hover()
    visit.page.wait_for_selector("caption:has-text('What query 15 looks at')")
    visit.page.mouse.move(0, 0)
    visit.page.wait_for_selector("caption:has-text('What query 10 looks at')")
    visit.page.locator(".tokens [data-place='15']").click()
    until(visit, "location.hash.includes('q=15')")
    visit.page.locator(".tokens [data-place='12']").click(modifiers=["Shift"])
    visit.page.mouse.move(0, 0)
    visit.page.wait_for_selector("[role=status]:has-text('sum of 2 tokens')")
    pattern = _heads(site).prompt("short").pattern("0.1")
    until(visit, "document.querySelectorAll('.reading tbody tr').length === 3")
    assert [row[2] for row in _table(visit)] == [f"{value:.3f}" for value in sorted(pattern[15] + pattern[12], reverse=True)[:3]]
    box = visit.page.locator(".frame canvas").bounding_box()
    visit.page.mouse.click(box["x"] + box["width"] * 3.5 / 24, box["y"] + box["height"] * 20.5 / 24)
    until(visit, "location.hash.includes('q=20&k=3')")


def test_two_prompts_are_compared_token_by_token(visit: Visit, site: Site) -> None:
    """Both values and their signed difference, at tokens that both texts have; the one that changed is marked."""
    bundle = _heads(site)
    here, there = bundle.prompt("short").pattern("1.0"), bundle.prompt("other").pattern("1.0")
    visit.open(site.page_of(site.heads, "/prompt/short?head=1.0&q=13&with=other"), "th:has-text('difference')")
    until(visit, "/^.?0\\./.test(document.querySelector('.reading tbody td:nth-child(6)')?.innerText)")
    for key, _, own, _, other, difference in _table(visit):
        assert (own, other) == (f"{here[13, int(key)]:.3f}", f"{there[13, int(key)]:.3f}")
        assert float(difference.replace("\N{MINUS SIGN}", "-")) == pytest.approx(here[13, int(key)] - there[13, int(key)], abs=6e-4)
    assert visit.page.locator(".tokens .gone").evaluate_all("spans => spans.map((span) => span.dataset.place)") == ["12"]


def test_a_long_prompt_loads_the_tiles_in_view(visit: Visit, site: Site) -> None:
    """Above 1,024 tokens: one tile first, more when one zooms, and single numbers all the same."""
    pattern = _heads(site).prompt("long").pattern("0.1")
    visit.open(site.page_of(site.heads, "/prompt/long?head=0.1&q=900&k=899"), ".frame canvas[data-level='3']")
    until(visit, "document.querySelectorAll('.reading tbody tr').length === 2")
    assert [(row[0], row[2]) for row in _table(visit)] == [("899", f"{pattern[900, 899]:.3f}"), ("0", f"{pattern[900, 0]:.3f}")]
    n_before = len([request for request in visit.requests if request.url.endswith("patterns.bin")])
    for level in (2, 1, 0):
        visit.page.keyboard.press("+")
        visit.page.wait_for_selector(f".frame canvas[data-level='{level}']")
    visit.page.wait_for_selector("p:has-text('every token')")
    visit.page.wait_for_timeout(300)
    assert len([request for request in visit.requests if request.url.endswith("patterns.bin")]) - n_before <= 3 + 4 + 4
    assert visit.page.locator(".tokens span[data-place]").count() == 1024


def test_a_long_prompt_is_compared_too(visit: Visit, site: Site) -> None:
    """A signed picture of the difference where both have a token, and the same numbers as the table's."""
    bundle = _heads(site)
    here, there = bundle.prompt("long").pattern("1.2"), bundle.prompt("short").pattern("1.2")
    visit.open(site.page_of(site.heads, "/prompt/long?head=1.2&q=9&k=3&with=short"), ".frame canvas[data-level='3']")
    assert "compared where both texts run alike" in visit.page.locator(".below").inner_text()
    for level in (2, 1, 0):
        visit.page.keyboard.press("+")
        visit.page.wait_for_selector(f".frame canvas[data-level='{level}']")
    visit.page.wait_for_selector("p:has-text('every token')")
    until(visit, "document.querySelector('.frame canvas').width === 512")
    visit.page.wait_for_timeout(300)
    read = "[...document.querySelector('.frame canvas').getContext('2d').getImageData(0, 0, 12, 12).data]"
    pixels = np.array(visit.page.evaluate(read)).reshape(12, 12, 4)  # the twelve tokens with which both begin
    wanted = here[:12, :12] - there[:12, :12]
    strong = np.abs(wanted) > 0.02
    assert strong.sum() > 10
    assert (np.where(pixels[..., 2] > pixels[..., 0], 1, -1)[strong] == np.sign(wanted)[strong]).all()
    assert not pixels[..., 3][np.triu_indices(12, 1)].any()
    until(visit, "/^.?0\\./.test(document.querySelector('.reading tbody td:nth-child(6)')?.innerText)")
    for key, _, _, _, other, difference in _table(visit):
        if other != "\N{EN DASH}":
            assert _signed(difference) == pytest.approx(here[9, int(key)] - _signed(other), abs=1.1e-3)


def _signed(text: str) -> float:
    return float(text.replace("\N{MINUS SIGN}", "-"))


def _save(visit: Visit, way: str) -> bytes:
    visit.page.get_by_role("button", name="Export").click()
    with visit.page.expect_download() as download:
        visit.page.get_by_role("button", name=way, exact=True).click()
    return Path(download.value.path()).read_bytes()


def _check_svg(text: str, pattern: np.ndarray, tokens: list[str]) -> None:
    """Every edge is drawn once, as strongly as its square root; tokens stand on both sides."""
    root = ET.fromstring(text)
    drawn = np.zeros(pattern.shape)
    for rect in root.iter("{http://www.w3.org/2000/svg}rect"):
        x, y, width = (int(rect.get(name) or 0) for name in ("x", "y", "width"))
        drawn[y, x : x + width] += float(rect.get("fill-opacity") or 0)
    np.testing.assert_allclose(drawn, np.sqrt(pattern / pattern.max()), atol=0.01)
    assert len(list(root.iter("{http://www.w3.org/2000/svg}text"))) == 2 * len(tokens)
    assert root[0].text.startswith("Pattern of head 1.0")


def test_what_is_shown_is_saved(visit: Visit, site: Site) -> None:
    """For a paper or a talk: numbers as JSON and CSV, the pattern as a picture, the page as one file without a network."""
    bundle = _heads(site)
    seen = bundle.prompt("short")
    visit.open(site.page_of(site.heads, "/prompt/short?head=1.0&q=20"), ".reading tbody tr")
    saved = json.loads(_save(visit, "JSON"))
    assert (saved["head"], saved["query"], len(saved["tokens"])) == ("1.0", 20, 24)
    assert np.allclose(saved["values"], seen.pattern("1.0")[20], atol=1e-4)
    assert _save(visit, "CSV").decode().splitlines()[0] == "key,token,value"
    assert _save(visit, "PNG").startswith(b"\x89PNG")
    _check_svg(_save(visit, "SVG").decode(), seen.pattern("1.0"), seen.tokens)
    page = _save(visit, "HTML").decode()
    assert page.count("<img ") == 1 + len(seen.patterns)
    assert not re.findall("<script|<canvas|https?://(?!www.w3.org)", page)
    visit.open(site.page_of(site.heads, "/heads/1.0"), "article")
    assert json.loads(_save(visit, "JSON"))["statistics"] == bundle.head("1.0")["statistics"]
    assert _save(visit, "CSV").decode().splitlines()[1].startswith("Strongest,invented/module_")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("path", ["/heads", "/heads/1.0", "/prompt/short?head=1.0&with=other", "/prompt/long", "/prompt/long?with=short"])
def test_pages_of_heads_have_contrast_names_and_fit_a_telephone(chromium, site: Site, scheme: str, path: str) -> None:
    """WCAG AA, a name for every control, one heading, 390 pixels, and no address but our own."""
    visit = Visit(chromium, color_scheme=scheme)
    visit.open(site.page_of(site.heads, path), "h2")
    visit.page.wait_for_timeout(200)
    assert lowest_contrast(visit) >= 4.5
    nameless = """() => [...document.querySelectorAll('a[href], button, input, select, canvas:not([aria-hidden]), [role=img], [tabindex="0"]')]
        .filter((e) => e.checkVisibility() && !(e.ariaLabel || e.title || e.labels?.length || e.textContent.trim()))
        .map((e) => e.outerHTML.slice(0, 120))"""
    assert visit.page.evaluate(nameless) == []
    assert visit.page.locator("h1").count() == 1
    visit.page.set_viewport_size(NARROW)
    visit.page.wait_for_timeout(100)
    assert fits(visit)
    assert all(request.url.startswith(site.address) for request in visit.requests)
    visit.context.close()
    assert visit.complaints == []


def test_heads_and_features_of_a_pipeline_lead_to_each_other(visit: Visit, site: Site) -> None:
    """The first page lists both; pages of features bring none of the script for heads."""
    visit.open(site.page(), "[role=row] a")
    assert not [request for request in visit.requests if "Attention" in request.url]
    visit.page.get_by_role("link", name="Attention", exact=True).click()
    visit.page.wait_for_selector("h1:has-text('Attention heads')")
    visit.page.locator("header a:has-text('Features of')").click()
    visit.page.wait_for_selector("[role=row] a")
    visit.open(f"{site.address}/#/", "h1:has-text('Bundles')")
    visit.page.locator("a.whole:has-text('Attention heads')").click()
    visit.page.wait_for_selector(".grid")


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/heads/7.0", "There is no head 7.0; there are 0.0 to 0.2, 1.0 to 1.2."),
        ("/prompt/none", "There is no prompt 'none'; there are short, other, long."),
    ],
)
def test_a_wrong_address_says_what_there_is(visit: Visit, site: Site, path: str, text: str) -> None:
    """Addresses are copied and mistyped."""
    visit.open(site.page_of(site.heads, path), "[role=alert]")
    assert text in visit.page.get_by_role("alert").inner_text()


def test_a_host_with_files_only_shows_the_same(visit: Visit, site: Site, tmp_path) -> None:
    """No server answers there: map, head and prompt come from the bundle's files by range."""
    places = [place for place in list_bundles(site.store) if place.name == site.heads]
    export_site(places, open_store(str(tmp_path)))
    assert json.loads((tmp_path / "site.json").read_text())["bundles"][0]["kind"] == "attention"
    with serve_files(tmp_path) as address:
        for path, selector in (("", ".grid td a"), ("/heads/1.0", "article"), ("/prompt/short?head=1.0&q=20", ".reading tbody tr")):
            visit.open(f"{address}/#/{site.heads}{path}", selector)
    assert not [request for request in visit.requests if "/api/" in request.url]
