"""What every head looks at in one text: arrays, a table, and a page that carries everything and asks for nothing."""

import base64
import json
import re
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch
from chromium import Visit, run_chromium
from tiny_models import CONTEXT, make_net, make_subject, make_tokenizer

from interp_assets import lab
from interp_assets.errors import InputError
from interp_assets.garcon.patterns import view
from interp_assets.garcon.patterns.codec import quantize, unpack_triangle
from interp_assets.garcon.patterns.view import Attention
from interp_assets.garcon.session import Model

TEXT = "</script> <b>a & b</b> def def"


@pytest.fixture(scope="module")
def model() -> Model:
    """Open a tiny model with grouped heads."""
    return Model(make_subject("llama"), make_tokenizer())


def _content(page: str) -> dict:
    return json.loads(re.search(r"const content = (\{.*?\}), n =", page, re.DOTALL)[1])


def test_arrays_are_those_of_eager_attention(model: Model) -> None:
    """The same oracle as everywhere: the family's own eager attention, with the text's own tokens."""
    found = model.attention(TEXT)
    oracle = make_net("llama")
    oracle.set_attn_implementation("eager")
    rows = model.tokenize(TEXT)
    with torch.no_grad():
        expected = oracle(input_ids=torch.tensor(rows), output_attentions=True).attentions
    assert found.tokens == model.pieces(rows[0])
    for layer, pattern in found.patterns.items():
        torch.testing.assert_close(torch.from_numpy(pattern), expected[layer][0], rtol=1e-4, atol=1e-6)
    table = found.table("1.1", 5, n=3)
    assert table["mass"].to_list() == sorted(found.pattern("1.1")[5].astype(float).tolist(), reverse=True)[:3]
    assert model.attention(TEXT, layers=[1]).heads() == ["1.0", "1.1"]


def test_the_page_carries_every_head_and_nothing_of_its_text_is_run(model: Model) -> None:
    """A token may be the end of a script; notebooks show the page of a stranger's text."""
    found = model.attention(TEXT)
    frame = found._repr_html_()
    assert frame.startswith('<iframe sandbox="allow-scripts" ')
    page = unescape(re.search(r'srcdoc="([^"]*)"', frame)[1])
    assert page == found.to_html()
    assert "default-src 'none'" in page
    assert page.count("</script>") == 1
    assert not re.search(r"(src|href)=|https?:|fetch\(|import\(", page)
    content = _content(page)
    assert "".join(content["tokens"]) == "".join(found.tokens)
    for head in content["heads"]:
        values = unpack_triangle(base64.b64decode(head["data"]), len(found.tokens), "x")
        assert (values == quantize(found.pattern(head["name"]))).all()


def test_heads_that_do_not_fit_the_page_are_named(model: Model) -> None:
    """A notebook of hundreds of megabytes opens nowhere; a head that is left out in silence is taken for one that does nothing."""
    n = 600
    noise = np.random.Generator(np.random.Philox(1)).random((90, n, n)) * np.tri(n)
    found = Attention({3: noise / noise.sum(axis=2, keepdims=True)}, ["a"] * n)
    page = found.to_html()
    content = _content(page)
    assert len(page) < view.PAGE_BYTES + 100_000
    assert 10 < len(content["heads"]) < 90
    assert content["note"].startswith(f"Not shown, for the size of the page: 3.{len(content['heads'])}, ")


def test_what_cannot_be_shown_says_why(model: Model) -> None:
    """A wrong layer, two texts, an array that is no pattern, a text that is too long: each is told, and the last is cut and says so."""
    with pytest.raises(InputError, match=r"no attention in layer 7; those that attend are 0, 1"):
        model.attention(TEXT, layers=[7])
    with pytest.raises(InputError, match="Attention is shown of one text; the prompt has 2"):
        model.attention([[1, 2], [3, 4]])
    with pytest.raises(InputError, match=r"There is no head '9\.0'; there are 0\.0, 0\.1, 1\.0, 1\.1"):
        model.attention(TEXT).pattern("9.0")
    with pytest.raises(InputError, match=r"sums to 2\.0000, not 1"):
        Attention({0: np.full((1, 2, 2), 1.0)}, ["a", "b"])
    long = model.attention([5] * (CONTEXT + 9))
    assert long.note == f"Cut to the {CONTEXT} tokens that the model takes, of {CONTEXT + 9}."
    assert len(long.tokens) == CONTEXT


def test_patterns_of_ones_own_are_shown() -> None:
    """From another library, as arrays or tensors, with or without heads and layers."""
    tokens, square = ["a", "b"], np.array([[1.0, 0.0], [0.25, 0.75]])
    assert lab.attention(square, tokens).heads() == ["0.0"]
    assert lab.attention(torch.from_numpy(np.stack([square] * 3)).bfloat16(), tokens).heads() == ["0.0", "0.1", "0.2"]
    found = lab.attention(np.stack([[square, square]] * 2), tokens)
    assert found.heads() == ["0.0", "0.1", "1.0", "1.1"]
    assert found.table("1.1", 1)["mass"].to_list() == [0.75, 0.25]
    assert lab.attention({7: square[None]}, tokens)._repr_html_().startswith("<iframe sandbox")
    with pytest.raises(InputError, match=r"shape \[2\]"):
        lab.attention(square[0], tokens)
    with pytest.raises(InputError, match=r"\[\.\.\., 3, 3\]; found"):
        lab.attention(square, ["a", "b", "c"])
    with pytest.raises(InputError, match=r"sums to 2\.0000, not 1"):
        lab.attention(2 * square, tokens)
    assert lab.attention(2 * square, tokens, weights=True).pattern("0.0")[0, 0] == 2.0


@pytest.mark.browser
def test_the_page_works_in_a_browser_without_a_network(model: Model, tmp_path: Path) -> None:
    """The table of the locked token against the arrays; keys move; nothing is asked of anybody; no sideways scroll on a phone."""
    found = model.attention(TEXT)
    page = tmp_path / "page.html"
    page.write_text(f"<!doctype html>{found._repr_html_()}")
    with run_chromium() as chromium:
        visit = Visit(chromium)
        visit.page.set_viewport_size({"width": 390, "height": 800})
        visit.page.goto(page.as_uri())
        frame = visit.page.frame_locator("iframe")
        frame.locator("#table tr:nth-child(2)").wait_for()
        assert frame.locator("#heads button").count() == 4
        frame.locator("#tokens span").nth(6).click()
        visit.page.keyboard.press("l")
        expected = found.table("0.1", 6, n=1).row(0)
        row = frame.locator("#table tr:nth-child(2)")
        row.filter(has_text=f"{restored(expected[2]):.4f}").wait_for()
        assert row.locator("td").first.inner_text() == str(expected[0])
        assert "head 0.1: query 6" in frame.locator("#said").inner_text()
        assert frame.locator("html").evaluate("root => root.scrollWidth <= root.clientWidth")
        assert not visit.complaints
        assert all(request.url.startswith(("file:", "about:", "blob:")) for request in visit.requests)


def restored(mass: float) -> float:
    """Return what the page makes of a mass, which it has as a byte."""
    return (round(255 * mass**0.5) / 255) ** 2
