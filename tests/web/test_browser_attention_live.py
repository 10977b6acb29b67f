"""A text of one's own in a real browser: heads of a served model over it, what adds to a token, what is lost without a head; and why not."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from browser_site import NARROW, Site, fits, serve_files, until
from chromium import Visit, lowest_contrast
from model_server import ModelServer, make_served, serve_model
from tiny_models import D_MODEL, make_tokenizer

from interp_assets.garcon.features import AttachedSae
from interp_assets.garcon.patterns.cuts import Cut, measure_cut, sweep_heads
from interp_assets.garcon.patterns.pairs import Edge, explain_edge
from interp_assets.garcon.patterns.targets import Logit, explain_targets
from interp_assets.garcon.patterns.view import read_attention
from interp_assets.storage.store import open_store
from interp_assets.train.sae import Sae
from interp_assets.web.opened import list_bundles
from interp_assets.web.site import export_site

pytestmark = pytest.mark.browser
TEXT = "the cat; the cat"
ROW, (SPACE,) = (make_tokenizer()(text)["input_ids"] for text in (TEXT, " "))


def _make_sae() -> Sae:
    generator = torch.Generator().manual_seed(1)
    W_enc, W_dec = (torch.randn(shape, generator=generator) for shape in ((D_MODEL, 24), (24, D_MODEL)))
    return Sae(kind="relu", W_enc=W_enc, b_enc=torch.zeros(24), W_dec=W_dec, b_dec=torch.ones(D_MODEL), threshold=torch.zeros(24), k=0)


@pytest.fixture(scope="module")
def server(site: Site) -> Iterator[ModelServer]:
    """A tiny model that is served beside the bundle of heads, and said to be theirs."""
    places = [place for place in list_bundles(site.store) if place.name == site.heads]
    saes = {"l0": AttachedSae(_make_sae(), "resid_post.0")}
    served = make_served("gpt2", saes=saes)._replace(facts={"model": "some/invented", "revision": "main"})
    with serve_model(served, bundles=places) as server:
        yield server


def _rows(visit: Visit, selector: str) -> list[list[str]]:
    return [[cell.strip() for cell in row.split("\t")] for row in visit.page.locator(f"{selector} tbody tr").all_inner_texts()]


def _number(text: str) -> float:
    return float(text.replace("\N{MINUS SIGN}", "-"))


def test_a_text_is_run_and_shown_like_a_prompt(server: ModelServer, site: Site, visit: Visit) -> None:
    """Typed, kept in the address, and the same numbers as in a notebook."""
    visit.open(f"{server.url}/#/{site.heads}/heads", ".grid")
    visit.page.get_by_role("link", name="Your own text").click()
    visit.page.get_by_label("Text").fill(TEXT)
    visit.page.get_by_role("button", name="Run").click()
    visit.page.wait_for_selector(".reading tbody tr")
    seen = read_attention(server.local.subject, ROW, server.local.pieces(ROW))
    row = seen.pattern("0.0")[len(ROW) - 1]
    until(visit, "document.querySelectorAll('.reading tbody tr').length === 10")
    shown = _rows(visit, ".reading > table:first-of-type")
    assert [_number(cells[2]) for cells in shown] == pytest.approx(sorted(row.tolist(), reverse=True)[:10], abs=0.005)
    assert visit.page.locator(".layer button").count() == 4
    assert visit.page.evaluate("new URLSearchParams(location.hash.split('?')[1]).get('text')") == TEXT
    visit.page.reload()
    visit.page.wait_for_selector(".reading tbody tr")
    assert visit.page.get_by_label("Text").input_value() == TEXT


def test_edges_add_to_a_token_and_a_cut_takes_them_away(server: ModelServer, site: Site, visit: Visit) -> None:
    """Both signs are told apart; the terms sum to the logit; a cut head or edge shows what the prediction loses."""
    path = f"{server.url}/#/{site.heads}/live?text=the+cat%3B+the+cat&logit=%20&head=1.0&q=12&k=3&by=logit%3A{SPACE}"
    visit.open(path, "caption:has-text('What adds to it at query 12')")
    (terms,) = explain_targets(server.local.subject, ROW, [Logit(SPACE)], {})
    pattern = read_attention(server.local.subject, ROW, [""] * len(ROW)).pattern("1.0")
    edges = terms.edges("1.0", pattern)[12]
    until(visit, "document.querySelectorAll('.reading > table:first-of-type tbody tr').length === 10")
    shown = _rows(visit, ".reading > table:first-of-type")
    order = np.argsort(-np.abs(edges), kind="stable")[:3]
    assert [_number(cells[2]) for cells in shown[:3]] == pytest.approx(edges[order].tolist(), abs=0.01 * np.abs(edges).max() + 1e-3)
    assert all(cells[2].startswith("\N{MINUS SIGN}") for cells in shown)
    parts = _rows(visit, ".reading table:has(caption:has-text('What adds'))")
    said = visit.page.locator("caption:has-text('What adds')").inner_text()
    assert sum(_number(cells[-1]) for cells in parts) == pytest.approx(terms.value[12], abs=0.01)
    assert _number(said.split(":")[1].split()[0]) == pytest.approx(terms.value[12], abs=6e-4)
    assert len(parts) == 4 + 4
    panel = visit.page.get_by_label("Without it")
    panel.get_by_role("button", name="Head 1.0 to zero").click()
    change = measure_cut(server.local.subject, ROW, Cut(1, 0), tokens=[SPACE])
    until(visit, "document.querySelectorAll('[aria-label=\"Without it\"] tbody tr').length > 0")
    assert f"at token {len(ROW) - 1}: KL {change.kl:.3g}"[:-1] in panel.get_by_role("status").inner_text()
    first = _rows(visit, "[aria-label='Without it']")[0]
    assert _number(first[3]) == pytest.approx(change.after[0] - change.before[0], abs=2e-3)
    panel.get_by_label("measured at token").fill("13")
    panel.get_by_label("measured at token").press("Tab")
    panel.get_by_role("button", name="Edge 12 → 3 to zero").click()
    until(visit, "document.querySelector('[aria-label=\"Without it\"] [role=status]').innerText.includes('at token 13: KL')")
    panel.get_by_role("button", name="Edge 12 → 3 to its mean").click()
    mean = measure_cut(server.local.subject, ROW, Cut(1, 0, "mean", 12, 3), 13)
    until(visit, "document.querySelector('[aria-label=\"Without it\"] [role=status]').innerText.includes('with the mean of what queries')")
    until(visit, "document.querySelector('[aria-label=\"Without it\"] [role=status]').innerText.includes('KL')")
    said = panel.get_by_role("status").inner_text()
    assert _number(said.split("KL ")[1].split()[0]) == pytest.approx(mean.kl, rel=0.02, abs=1e-9)
    panel.get_by_role("button", name="Each head to its mean").click()
    visit.page.wait_for_selector("[aria-label='Without it'] th:has-text('KL, nats')")
    found = {
        f"{cut.layer}.{cut.head}": kl for cuts, kls in sweep_heads(server.local.subject, ROW, "mean", 13) for cut, kl in zip(cuts, kls, strict=True)
    }
    assert [cells[0] for cells in _rows(visit, "[aria-label='Without it']")] == sorted(found, key=lambda name: -found[name])


def test_an_edge_shows_the_pairs_that_its_score_is_made_of(server: ModelServer, site: Site, visit: Visit) -> None:
    """Pairs, sides, and what the key's latents add to the token sum before one's eyes; a layer without an SAE says at which point it takes one."""
    visit.open(
        f"{server.url}/#/{site.heads}/live?text=the+cat%3B+the+cat&logit=%20&head=1.1&q=12&k=3", "[aria-label='What the edge is made of'] button"
    )
    panel = visit.page.get_by_label("What the edge is made of")
    panel.get_by_role("button", name="Latents behind 12 → 3 of head 1.1").click()
    visit.page.wait_for_selector("[aria-label='What the edge is made of'] tbody tr")
    found = explain_edge(server.local.subject, ROW, Edge(1, 1, 12, 3), {"l0": AttachedSae(_make_sae(), "resid_post.0")}, "l0", [Logit(SPACE)])
    tables = [
        [[cell.strip() for cell in row.split("\t")] for row in table.locator("tbody tr").all_inner_texts()] for table in panel.locator("table").all()
    ]
    totals = [found.score - found.mean] * 3 + [found.written[f"logit:{SPACE}"].sum()]
    for lines, total in zip(tables, totals, strict=True):
        assert sum(_number(cells[-1]) for cells in lines[:-1]) == pytest.approx(total, abs=0.02)
        assert _number(lines[-1][-1]) == pytest.approx(total, abs=6e-4)
    i, j = np.unravel_index(np.abs(found.pairs).argmax(), found.pairs.shape)
    names = [name if isinstance(name, str) else f"latent {name}" for name in (found.queries[i], found.keys[j])]
    assert tables[0][0][:2] == names
    assert _number(tables[0][0][2]) == pytest.approx(found.pairs[i, j], abs=6e-4)
    said = panel.get_by_role("status").inner_text()
    assert f"Score {found.score:.3f}".replace("-", "\N{MINUS SIGN}") in said
    visit.page.locator(".controls select").first.select_option("0.0")
    assert "take an SAE at what the layer reads: resid_pre.0. Served are l0 at resid_post.0." in panel.inner_text()


def test_what_goes_wrong_is_said_on_the_page(server: ModelServer, site: Site, unhappy_visit: Visit) -> None:
    """A token that is two, and a feature of an SAE that is not served."""
    unhappy_visit.open(f"{server.url}/#/{site.heads}/live?text=ab&logit=xy", "[role=alert]")
    assert "'xy' is 2 tokens" in unhappy_visit.page.get_by_role("alert").inner_text()
    unhappy_visit.open(f"{server.url}/#/{site.heads}/live?text=abc&feature=l8:5", "[role=alert]:has-text('No SAE is called')")


def test_without_a_model_the_page_says_why(site: Site, visit: Visit, tmp_path) -> None:
    """On a server without one, and on a host of files."""
    visit.open(site.page_of(site.heads, "/live"), "[role=status]")
    said = "This server has no model. Start `interp serve` with --model invented, by its name or its folder."
    assert visit.page.get_by_role("status").inner_text() == said
    assert visit.page.get_by_label("Text").is_disabled()
    export_site([place for place in list_bundles(site.store) if place.name == site.heads], open_store(str(tmp_path)))
    with serve_files(tmp_path) as address:
        visit.open(f"{address}/#/{site.heads}/live", "[role=status]:has-text('files only')")
    served = make_served()
    with serve_model(served, bundles=[place for place in list_bundles(site.store) if place.name == site.heads]) as server:
        visit.open(f"{server.url}/#/{site.heads}/live", "[role=status]:has-text('This server has tiny gpt2; these are heads of invented')")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_has_contrast_and_fits_a_telephone(server: ModelServer, site: Site, chromium, scheme: str) -> None:
    """Minus and plus are colours with text on them."""
    visit = Visit(chromium, color_scheme=scheme)
    visit.open(
        f"{server.url}/#/{site.heads}/live?text=the+cat%3B+the+cat&logit=%20&by=logit%3A{SPACE}&q=12&head=1.0", "caption:has-text('What adds')"
    )
    visit.page.get_by_role("button", name="to zero").first.click()
    visit.page.wait_for_selector("[aria-label='Without it'] tbody tr")
    visit.page.get_by_role("button", name="Latents behind").click()
    visit.page.wait_for_selector("[aria-label='What the edge is made of'] tbody tr")
    assert lowest_contrast(visit) >= 4.5
    assert visit.page.locator("h1").count() == 1
    visit.page.set_viewport_size(NARROW)
    visit.page.wait_for_timeout(100)
    assert fits(visit)
    visit.context.close()
    assert visit.complaints == []
