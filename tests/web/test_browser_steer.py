"""The panel "Steer" in a real browser: it writes what a notebook writes, its address and copies are the same recipe, and it says why it is off."""

import json
import re
import shlex
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import pytest
import torch
import yaml
from browser_site import NARROW, fits, serve_files, until
from chromium import Visit, lowest_contrast
from model_server import ModelServer, make_served, serve_model
from synthetic_bundle import DOSED, build_synthetic_bundle
from tiny_models import D_MODEL

from interp_assets.garcon.features import AttachedSae, Firings
from interp_assets.storage.store import Store, open_store
from interp_assets.train.sae import Sae
from interp_assets.web.opened import OpenBundle, list_bundles
from interp_assets.web.server import STATIC
from interp_assets.web.site import export_site

pytestmark = pytest.mark.browser
N_FEATURES = 24
PROMPT = "hello\nwine"
RECIPE = [{"sae": "synthetic", "latent": 3, "clamp": "10 max"}, {"sae": "synthetic", "latent": 7, "clamp": "-4 max"}]
STEER = "steer=3%3A10%2C7%3A-4&watch=5&prompt=hello%0Awine&new=8"


class Steered(NamedTuple):
    """A server with a bundle and the model that its SAE belongs to."""

    server: ModelServer
    name: str
    store: Store

    def page(self, path: str) -> str:
        """Return the address of a page of the bundle."""
        return f"{self.server.url}/#/{self.name}{path}"


@pytest.fixture(scope="module")
def steered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Steered]:
    """Serve an invented bundle, and a tiny model with an SAE that goes by the name and id of the bundle's."""
    if not (STATIC / "index.html").exists():
        pytest.skip("the pages are not built: python frontend/build.py")
    store = open_store(str(tmp_path_factory.mktemp("steered")))
    build_synthetic_bundle(store, n_features=N_FEATURES)
    bundle = OpenBundle(list_bundles(store)[0])
    generator = torch.Generator().manual_seed(0)
    W_enc, W_dec = (torch.randn(shape, generator=generator) for shape in ((D_MODEL, N_FEATURES), (N_FEATURES, D_MODEL)))
    sae = Sae(kind="relu", W_enc=W_enc, b_enc=torch.zeros(N_FEATURES), W_dec=W_dec, b_dec=torch.ones(D_MODEL), threshold=torch.zeros(N_FEATURES), k=0)
    maximum = torch.ones(N_FEATURES).index_fill(0, torch.tensor([9]), 0.0)
    firings = Firings(maximum, torch.linspace(0, 1, N_FEATURES), lambda _latent, share: share)
    served = make_served(saes={"synthetic": AttachedSae(sae, "resid_post.0", firings=firings)})
    facts = {**served.facts, "saes": {"synthetic": {"artifact_id": bundle.description["sae"]["artifact_id"]}}}
    with serve_model(served._replace(facts=facts), bundles=list_bundles(store)) as server:
        yield Steered(server, bundle.name, store)


@pytest.fixture(scope="module")
def static_site(steered: Steered, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Export the bundle as a static site, and serve its files alone."""
    folder = tmp_path_factory.mktemp("exported")
    export_site(list_bundles(steered.store), open_store(str(folder)))
    with serve_files(folder) as address:
        yield address


def _finish(visit: Visit) -> None:
    """Wait until all is written and read."""
    visit.page.wait_for_selector("section[aria-label=Steer] p[role=status]:has-text('Writing')", state="detached")


def _lines(visit: Visit) -> list[dict[str, Any]]:
    """Have the page write, and return what the server sent."""
    with visit.page.expect_response(lambda answer: answer.url.endswith("/generate")) as waiting:
        visit.page.get_by_role("button", name="Write", exact=True).click()
    lines = [json.loads(line) for line in waiting.value.text().splitlines()]
    _finish(visit)
    return lines


def _shown(visit: Visit) -> list[str]:
    return [visit.page.inner_text(f"section[aria-label={name}] p.mono") for name in ("Default", "Steered")]


def test_two_texts_are_written_as_a_notebook_writes_them(steered: Steered, visit: Visit) -> None:
    """Features are added, set and watched by hand; tokens, effects and activations are those of the same recipe in Python."""
    visit.open(steered.page("/3"), "h1:has-text('Feature 3')")
    visit.page.keyboard.press("s")
    visit.page.wait_for_selector("section[aria-label=Steer]")
    assert visit.page.input_value("textarea[aria-label=Prompt]")  # a beginning to begin with
    visit.page.fill("textarea[aria-label=Prompt]", PROMPT)
    visit.page.get_by_label("new tokens").fill("8")
    visit.page.get_by_label("Set another feature").fill("7")
    visit.page.keyboard.press("Enter")  # adds a feature, and writes nothing yet
    visit.page.get_by_label("Strength of feature 7, as a number").fill("-4")
    visit.page.get_by_label("also watch").fill("5")
    lines = _lines(visit)
    assert visit.page.url == steered.page(f"/3?{STEER}")
    llm = steered.server.local
    texts = llm.generate(PROMPT, steer=RECIPE, new_tokens=8, compare=True)
    written = {kind: [token["token"][3] for token in lines[:-1] if token["token"][1] == kind] for kind in (False, True)}
    assert written[False] == [token.token for token in texts.generated.texts[0].tokens]
    assert written[True] == [token.token for token in texts.generated.defaults[0].tokens]
    assert written[False] != written[True]
    cells = [re.split(r"\s+", row) for row in visit.page.locator("section[aria-label=Steer] tbody tr").all_inner_texts()]
    effects = texts.effects()
    assert [[float(cell.replace("\u2212", "-")) for cell in row] for row in cells] == [
        [pytest.approx(line[name], rel=6e-3) for name in ("latent", "value", "before", "after", "places", "moved")] for line in effects.to_dicts()
    ]
    with llm.trace(PROMPT + "".join(texts.texts)) as t:
        t.sae_clamp("synthetic", {3: "10 raw"})
        t.sae_clamp("synthetic", {7: "-4 raw"})
        read = t.sae_read("synthetic", [3, 7, 5], after=True)
    first = read.tensor[0, len(PROMPT) :].amax(0)
    for latent, highest in zip((3, 7, 5), first.tolist(), strict=True):
        label = visit.page.get_attribute(f"section[aria-label=Steered] svg[aria-label^='feature {latent}:']", "aria-label")
        found = re.search(r"8 tokens, \S+ to (\S+);", label or "")
        assert found
        assert float(found[1]) == pytest.approx(highest, rel=6e-3)


def test_activations_come_with_the_tokens(steered: Steered, unhappy_visit: Visit) -> None:
    """Before the whole texts are read again, which fails here: each strip has all tokens but the last, whose activation no forward has seen yet."""
    unhappy_visit.page.route("**/run*", lambda route: route.abort())
    unhappy_visit.open(steered.page(f"/3?{STEER}"), "section[aria-label=Steer] [role=alert]")
    texts = steered.server.local.generate(PROMPT, steer=RECIPE, new_tokens=8, compare=True, latents={"synthetic": [3, 7, 5]})
    for name, is_edited in (("Steered", True), ("Default", False)):
        table = texts.table().filter(pl.col("edited") == is_edited)
        for latent in (3, 7, 5):
            label = unhappy_visit.page.get_attribute(f"section[aria-label={name}] svg[aria-label^='feature {latent}:']", "aria-label")
            found = re.search(r"7 tokens, \S+ to (\S+);", label or "")
            assert found
            assert float(found[1]) == pytest.approx(table[f"synthetic.{latent}"][1:].max(), rel=6e-3)


def test_an_address_shows_the_same_again(steered: Steered, visit: Visit) -> None:
    """Whoever gets it sees both texts without a click; tokens are stepped through by the keyboard."""
    visit.open(steered.page(f"/3?{STEER}"), "section[aria-label=Steered] svg[aria-label^='feature 5']")
    _finish(visit)
    before = _shown(visit)
    assert _lines(visit)
    assert _shown(visit) == before
    visit.page.get_by_role("button", name="Next token").focus()
    visit.page.keyboard.press("Enter")
    visit.page.keyboard.press("Enter")
    assert "token 2 of 8" in visit.page.inner_text("section[aria-label=Steer]")
    assert "without" in visit.page.inner_text("section[aria-label=Steered] .strips")
    visit.page.get_by_role("button", name="close").click()
    visit.page.wait_for_selector("section[aria-label=Steer]", state="detached")
    assert visit.page.url == steered.page("/3")


def test_a_recipe_is_copied_in_three_languages(steered: Steered, visit: Visit, tmp_path: Path) -> None:
    """Each of them writes the same text, run as it was copied."""
    visit.context.grant_permissions(["clipboard-read", "clipboard-write"])
    visit.open(steered.page(f"/3?{STEER}"), "section[aria-label=Steered] svg[aria-label^='feature 5']")
    copies = {}
    for way in ("Python", "YAML", "curl"):
        visit.page.get_by_role("button", name=way, exact=True).click()
        visit.page.wait_for_selector(f"text={way} copied")
        copies[way] = visit.page.evaluate("navigator.clipboard.readText()")
    expected = [token.token for token in steered.server.local.generate(PROMPT, steer=RECIPE, new_tokens=8).generated.texts[0].tokens]
    names: dict[str, Any] = {}
    exec(copies["Python"], names)
    assert [token.token for token in names["texts"].generated.texts[0].tokens] == expected
    assert yaml.safe_load(copies["YAML"]) == {"edits": RECIPE}
    words = shlex.split(copies["curl"])
    asked = urllib.request.Request(words[2], words[words.index("-d") + 1].encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(asked) as answer:
        last = json.loads(answer.read().splitlines()[-1])
    assert [token[3] for token in last["generated"]["texts"][0][0]] == expected


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_panel_has_contrast_names_and_fits_a_telephone(chromium, steered: Steered, scheme: str) -> None:
    """WCAG AA in both schemes, with texts, strips and effects on the screen; nothing is scrolled sideways at 390 pixels."""
    visit = Visit(chromium, color_scheme=scheme)
    visit.page.set_viewport_size(NARROW)
    visit.open(steered.page(f"/3?{STEER}"), "section[aria-label=Steered] svg[aria-label^='feature 5']")
    _finish(visit)
    assert lowest_contrast(visit) >= 4.5
    assert fits(visit)
    nameless = """() => [...document.querySelectorAll('a[href], button, input, select, textarea, [role=img]')]
        .filter((e) => e.checkVisibility() && !(e.ariaLabel || e.title || e.labels?.length || e.textContent.trim()))
        .map((e) => e.outerHTML.slice(0, 120))"""
    assert visit.page.evaluate(nameless) == []
    visit.context.close()
    assert visit.complaints == []


def test_what_the_server_refuses_is_told(steered: Steered, unhappy_visit: Visit) -> None:
    """A latent that never fired has no maximum: the server's words, and what to do, stand on the page."""
    unhappy_visit.open(steered.page("/3?steer=9%3A1&prompt=hello"), "section[aria-label=Steer] [role=alert]")
    assert "'1 max' of latent 9 of 'synthetic': it is dead" in unhappy_visit.page.inner_text("section[aria-label=Steer]")
    until(unhappy_visit, "document.querySelector('section[aria-label=Steer]').innerText.includes('Writing') === false")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_dose_curves_are_shown_on_any_static_host(chromium, steered: Steered, static_site: str, scheme: str) -> None:
    """Beside their controls and with their numbers and texts, where no model is: and the panel says so, and what to start."""
    visit = Visit(chromium, color_scheme=scheme)
    visit.page.set_viewport_size(NARROW)
    visit.open(f"{static_site}/#/{steered.name}/3?steer=3%3A10", "section[aria-label=Steer] .swept")
    assert "This site is files only, and steering needs the model." in visit.page.inner_text("section[aria-label=Steer] .warn")
    visit.page.click(f".swept a:text-is('{DOSED}')")
    visit.page.wait_for_selector(".doses svg[role=img]")
    said = visit.page.get_attribute(".doses svg[role=img]", "aria-label")
    assert said == (
        "kl at 10 max: feature 8.00 (6.00 to 9.00), other 2.00 (1.50 to 2.50), random 4.00 (3.00 to 4.50), flip 4.00 (3.00 to 4.50), "
        "zero 0 (0 to 0), feature - controls 5.00 (3.75 to 5.63)"
    )
    assert len(visit.page.get_attribute(".doses polyline.other", "points").split()) == 2  # its first point could not be measured
    for summary in visit.page.locator(".doses summary").all():
        summary.press("Enter")
    assert "golden text 2\u21b5<b>" in visit.page.inner_text(".doses dl")
    visit.page.locator(".doses").get_by_label("recipe").select_option("other")
    assert "other text 2" in visit.page.inner_text(".doses dl")
    visit.page.locator(".doses").get_by_label("outcome").select_option("perplexity")
    assert visit.page.locator(".doses tbody tr").count() == 1
    assert lowest_contrast(visit) >= 4.5
    assert fits(visit)
    visit.context.close()
    assert visit.complaints == []


def test_without_a_model_the_panel_says_what_to_start(site: Any, visit: Visit) -> None:
    """The recipe can still be set and copied."""
    visit.open(site.page("/3?steer=3%3A10&prompt=hello"), "section[aria-label=Steer] .warn")
    text = visit.page.inner_text("section[aria-label=Steer] .warn")
    assert "This server serves no model" in text
    assert "interp serve --config PIPELINE.yaml --model" in text
    assert visit.page.get_by_role("button", name="Write", exact=True).is_disabled()
    assert visit.page.get_by_role("button", name="YAML", exact=True).is_enabled()
