"""Heads over a text of one's own: the bytes that a pipeline keeps, terms that sum, cuts, and an answer to every bad request."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from model_server import ModelServer, make_served, serve_model
from tiny_models import CONTEXT, D_MODEL, VOCABULARY, make_tokenizer

from interp_assets.errors import InputError
from interp_assets.garcon.features import AttachedSae
from interp_assets.garcon.patterns.cuts import Cut, measure_cut
from interp_assets.garcon.patterns.pairs import Edge, explain_edge
from interp_assets.garcon.patterns.targets import Latent, Logit, explain_targets
from interp_assets.garcon.patterns.view import read_attention
from interp_assets.garcon.remote.limits import Limits
from interp_assets.harvest.heads.prompts import FILES, SCALES, TARGETS, TERMS, pack_prompt, unpack_prompt
from interp_assets.train.sae import Sae
from interp_assets.web.attention_live import AskedCut, AskedCuts, AskedPairs, cut, cut_each, pair

PAGE = (Path(__file__).parents[2] / "docs" / "formats" / "attention_answer.md").read_text(encoding="utf-8")
TEXT = "the cat; the cat"
ROW, (MARK, X) = (make_tokenizer()(text)["input_ids"] for text in (TEXT, ";x"))
ASK = {"text": TEXT}


def _make_sae() -> Sae:
    generator = torch.Generator().manual_seed(1)
    W_enc, W_dec = (torch.randn(shape, generator=generator) for shape in ((D_MODEL, 24), (24, D_MODEL)))
    return Sae(kind="relu", W_enc=W_enc, b_enc=torch.zeros(24), W_dec=W_dec, b_dec=torch.ones(D_MODEL), threshold=torch.zeros(24), k=0)


@pytest.fixture(scope="module")
def server() -> Iterator[ModelServer]:
    """A tiny model whose norms stand behind attention, with an SAE, and room for small answers."""
    saes = {"l0": AttachedSae(_make_sae(), "resid_post.0")}
    with serve_model(make_served("gemma2", saes=saes), Limits(answer_bytes=20_000)) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: ModelServer) -> Iterator[httpx.Client]:
    """Somebody who asks."""
    with httpx.Client(base_url=f"{server.url}/api/models/tiny/", timeout=60) as client:
        yield client


def _files(response: httpx.Response) -> dict[str, bytes]:
    assert response.status_code == 200, response.text
    length = int.from_bytes(response.content[:8], "little")
    places = json.loads(response.content[8 : 8 + length])["files"]
    return {name: response.content[8 + length + start : 8 + length + stop] for name, (start, stop) in places.items()}


def _problem(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    assert response.json()["error"]["do"]
    return response.json()["error"]["what"]


def test_the_files_are_those_that_a_pipeline_keeps(server: ModelServer, client: httpx.Client) -> None:
    """One format, and one reader for both; only the note is the server's."""
    files = _files(client.post("attention", json=ASK))
    subject = server.local.subject
    seen = read_attention(subject, ROW, server.local.pieces(ROW))
    kept = pack_prompt(seen, ROW, both_ways=False)
    assert list(files) == list(kept)
    assert json.loads(files["prompt.json"]) == {**json.loads(kept["prompt.json"]), "note": ""}
    assert {name: files[name] for name in FILES if name != "prompt.json"} == {name: kept[name] for name in FILES if name != "prompt.json"}
    np.testing.assert_allclose(unpack_prompt(files, "here").pattern("1.1"), seen.pattern("1.1"), atol=0.004)
    some = _files(client.post("attention", json={"ids": ROW, "layers": [1]}))
    assert json.loads(some["prompt.json"])["heads"] == ["1.0", "1.1"]


def test_terms_of_targets_lie_beside_and_sum(server: ModelServer, client: httpx.Client) -> None:
    """A page needs no more than these bytes: the layer that is not shown, and the layers behind an SAE, are in the sum."""
    asked = {**ASK, "layers": [1], "targets": [{"token": ";"}, {"sae": "l0", "latent": 5}]}
    files = _files(client.post("attention", json=asked))
    described, heads = json.loads(files["prompt.json"]), ["1.0", "1.1"]
    targets = json.loads(files[TARGETS])
    assert described["columns"] == ["value", "output", f"logit:{MARK}", "feature:l0:5"] == ["value", "output", *(each["column"] for each in targets)]
    assert described["note"] == "The logit before it is bounded by 30."
    scales = np.frombuffer(files[SCALES], "<f4").reshape(2, 1, len(ROW))
    terms = np.frombuffer(files[TERMS], "<f4").reshape(-1, len(ROW))
    columns = np.frombuffer(files["columns.bin"], "<f2").reshape(2, 4, len(ROW))
    saes = {"l0": AttachedSae(_make_sae(), "resid_post.0")}
    expected = explain_targets(server.local.subject, ROW, [Logit(MARK), Latent("l0", 5)], saes)
    first = 0
    for i, (target, wanted) in enumerate(zip(targets, expected, strict=True)):
        n_rows = len(heads) + 2 + len(target["others"])
        own = terms[first : first + n_rows]
        np.testing.assert_allclose(own[len(heads)], wanted.value, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(own.sum(axis=0) - own[len(heads)], own[len(heads)], atol=1e-4)
        if i == 0:
            np.testing.assert_allclose(scales[i, 0], wanted.scales[1], rtol=1e-6)
            np.testing.assert_allclose(columns[:, 2 + i], wanted.columns[1], rtol=1e-3, atol=1e-6)
        else:
            assert not columns[:, 2 + i].any()  # layer 1 comes after what the SAE reads
        first += n_rows
    assert first == len(terms)


def test_cuts_are_those_of_the_model(server: ModelServer, client: httpx.Client) -> None:
    """Through the server as in memory; tokens that were asked for come first."""
    change = measure_cut(server.local.subject, ROW, Cut(0, 1, query=9, key=3), 12, [X])
    found = client.post("cut", json={**ASK, "head": "0.1", "query": 9, "key": 3, "position": 12, "tokens": ["x"]}).json()
    assert found["position"] == 12
    assert found["kl"] == pytest.approx(change.kl, rel=1e-4)
    assert [token["id"] for token in found["tokens"]] == change.tokens
    assert (found["tokens"][0]["text"], found["tokens"][0]["after"]) == ("x", pytest.approx(change.after[0], rel=1e-4))
    each = client.post("cuts", json={**ASK, "how": "mean"}).json()
    assert each["position"] == len(ROW) - 1
    assert each["kl"]["1.1"] == pytest.approx(measure_cut(server.local.subject, ROW, Cut(1, 1, "mean")).kl, rel=1e-3)
    assert list(each["kl"]) == ["0.0", "0.1", "1.0", "1.1"]


def test_pairs_are_those_of_the_model(server: ModelServer, client: httpx.Client) -> None:
    """The strongest first, sides and the rest beside, so that a page can show that nothing is missing."""
    edge, saes = Edge(1, 0, 9, 4), {"l0": AttachedSae(_make_sae(), "resid_post.0")}
    expected = explain_edge(server.local.subject, ROW, edge, saes, "l0", [Logit(MARK)])
    found = client.post("pairs", json={**ASK, "head": "1.0", "query": 9, "key": 4, "targets": [{"token": ";"}]}).json()
    assert (found["sae"], found["score"], found["mean"]) == ("l0", pytest.approx(expected.score, rel=1e-5), pytest.approx(expected.mean, rel=1e-5))
    assert (found["slope"], found["mass"]) == (pytest.approx(expected.slope, rel=1e-5), pytest.approx(expected.mass, rel=1e-5))
    sizes = [abs(value) for *_, value in found["pairs"]]
    assert sizes == sorted(sizes, reverse=True)
    total = sum(value for *_, value in found["pairs"]) + found["others"]["sum"]
    assert total == pytest.approx(found["score"] - found["mean"], abs=1e-3)
    assert len(found["pairs"]) + found["others"]["n"] == expected.pairs.size
    query, key, value = found["pairs"][0]
    assert value == pytest.approx(expected.pairs[expected.queries.index(query), expected.keys.index(key)], rel=1e-5)
    assert [name for name, _ in found["queries"]] == expected.queries
    assert [value for _, value in found["keys"]] == pytest.approx(expected.pairs.sum(axis=0).tolist(), rel=1e-4, abs=1e-6)
    assert [value for _, value in found["written"][f"logit:{MARK}"]] == pytest.approx(expected.written[f"logit:{MARK}"].tolist(), rel=1e-4, abs=1e-9)


def test_what_is_wrong_is_said_before_anyone_waits(server: ModelServer) -> None:
    """A model that is at work for somebody keeps nobody waiting for the news that there is no such head."""
    backend, limits = server.local.backend, Limits()
    wrong = {"text": "ab", "head": "0.9", "query": 0, "key": 0}
    with pytest.raises(InputError, match=r"no head 0\.9"):
        cut(backend, AskedCut(**wrong), limits)
    with pytest.raises(InputError, match="no position 5"):
        cut_each(backend, AskedCuts(text="ab", position=5), limits)
    with pytest.raises(InputError, match=r"no head 1\.9"):
        pair(backend, AskedPairs(**{**wrong, "head": "1.9"}), limits)
    with pytest.raises(InputError, match=r"Pairs of layer 0 take an SAE at resid_pre\.0"):
        pair(backend, AskedPairs(**{**wrong, "head": "0.0"}), limits)


def test_a_text_that_is_too_long_is_cut_and_says_so(client: httpx.Client) -> None:
    """As a notebook does it."""
    described = json.loads(_files(client.post("attention", json={"text": "a" * (CONTEXT + 5), "layers": [0]}))["prompt.json"])
    assert described["note"] == f"Cut to the {CONTEXT} tokens that the model takes, of {CONTEXT + 5}."
    assert len(described["tokens"]) == CONTEXT


@pytest.mark.parametrize(
    ("path", "body", "status", "what"),
    [
        ("attention", {}, 400, "Give a text, or the ids of its tokens"),
        ("attention", {"text": "a", "ids": [1]}, 400, "one of both"),
        ("attention", {"text": "a", "more": 1}, 400, "wrong at more"),
        ("attention", {"text": "a", "layers": [7]}, 400, "has no attention in layer 7"),
        ("attention", {"ids": [VOCABULARY]}, 400, "is outside the 259 embeddings"),
        ("attention", {"text": "a", "targets": [{"token": "ab"}]}, 400, "'ab' is 2 tokens: ['a', 'b']"),
        ("attention", {"text": "a", "targets": [{}]}, 400, "a target is a token, or a latent"),
        ("attention", {"text": "a", "targets": [{"token": 1}] * 9}, 400, "at most 8"),
        ("attention", {"text": "a", "targets": [{"sae": "none"}]}, 400, "No SAE is called 'none' here; there are ['l0']"),
        ("attention", {"text": "a", "targets": [{"sae": "l0", "latent": 24}]}, 400, "has latents 0 to 23"),
        ("attention", {"text": "a" * 40}, 413, "35 tokens would fit, or 3 heads: shorten the text, or name fewer `layers`."),
        ("attention", {"text": "a" * 34, "targets": [{"token": 1}] * 2}, 413, "31 tokens would fit, or 3 heads: shorten"),
        ("attention", {"text": "a" * 34, "layers": [0], "targets": [{"token": 1}] * 8}, 413, "27 tokens would fit, or 4 targets: shorten"),
        ("cut", {"text": "ab", "head": "x"}, 400, "wrong at head"),
        ("cut", {"text": "ab", "head": "0.9"}, 400, "There is no head 0.9"),
        ("cut", {"text": "ab", "head": "0.0", "position": 2}, 400, "There is no position 2"),
        ("cut", {"text": "ab", "head": "0.0", "query": 0, "key": 1}, 400, "There is no edge"),
        ("cuts", {"text": "ab", "how": "half"}, 400, "wrong at how"),
        ("pairs", {"text": "ab", "head": "1.0", "query": 1}, 400, "wrong at key"),
        ("pairs", {"text": "ab", "head": "1.0", "query": 0, "key": 1}, 400, "There is no edge from query 0 to key 1"),
        (
            "pairs",
            {"text": "ab", "head": "0.0", "query": 1, "key": 0},
            400,
            "take an SAE at resid_pre.0, what the layer reads. There are: l0 at resid_post.0",
        ),
    ],
)
def test_what_cannot_be_answered_says_why(client: httpx.Client, path: str, body: dict[str, Any], status: int, what: str) -> None:
    """Before or after the line: the reason with what would do."""
    assert what in _problem(client.post(path, json=body), status)


def test_who_may_not_ask_is_told_nothing() -> None:
    """The guard stands before these routes as before all others."""
    with serve_model(make_served(), token="a long secret token") as server:
        for path in ("attention", "pairs", "cut", "cuts"):
            assert httpx.post(f"{server.url}/api/models/tiny/{path}", json=ASK).status_code == 401


def test_the_page_lists_files_and_keys(client: httpx.Client) -> None:
    """A format page lives only if a test executes it."""
    files, keys = PAGE.split("| key of `targets.json`")
    made = _files(client.post("attention", json={**ASK, "targets": [{"token": 5}]}))
    assert set(re.findall(r"^\| `([^`]+)` \|", files, re.MULTILINE)) == set(made)
    assert set(re.findall(r"^\| `(\w+)` \|", keys, re.MULTILINE)) == set(json.loads(made[TARGETS])[0])
    example = json.loads(re.search(r"```json\n(.*?)```", PAGE, re.DOTALL)[1])
    assert _problem(client.post("attention", json=example), 400).startswith("No SAE is called 'l8' here")
