"""A text shows the features that fire on it: the same numbers as running model and SAE by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from synthetic_bundle import build_synthetic_bundle
from tiny_models import make_subject, make_tokenizer

from interp_assets.errors import InputError
from interp_assets.planning.sections import CorpusConfig
from interp_assets.storage.store import open_store
from interp_assets.train.sae import Sae
from interp_assets.web.example import MAX_TEXT, Examples, Probe, run_example
from interp_assets.web.opened import list_bundles
from interp_assets.web.server import Desk, make_app

TEXT = "some words of a small text"


@pytest.fixture(scope="module")
def probe() -> Probe:
    """Return a tiny model with an SAE of random weights."""
    model, tokenizer = make_subject("gpt2"), make_tokenizer()
    generator = torch.Generator().manual_seed(0)
    d_in, d_sae = model.d_model, 24
    W = torch.randn(d_in, d_sae, generator=generator)
    threshold = torch.full((d_sae,), 0.3)
    sae = Sae(kind="jump_relu", W_enc=W, b_enc=torch.zeros(d_sae), W_dec=W.T.contiguous(), b_dec=torch.zeros(d_in), threshold=threshold, k=0)
    return Probe(model, tokenizer, sae, "resid_post.0", CorpusConfig(source="stdlib", context_length=8))


def test_every_number_is_the_encoders(probe: Probe) -> None:
    """Contexts as in the corpus, special tokens not counted, strongest first."""
    answer = run_example(probe, TEXT)
    n = len(answer["tokens"])
    bos = probe.tokenizer.bos_token_id
    assert answer["masked"] == [place for place, token in enumerate(answer["tokens"]) if token == bos]
    dense = np.zeros((n, probe.sae.d_sae))
    for first in range(0, n, 8):
        ids = torch.tensor([answer["tokens"][first : first + 8]])
        rows = probe.model.capture(ids, None, ["resid_post.0"])["resid_post.0"][0].float()
        dense[first : first + 8] = torch.relu(probe.sae.pre_activations(rows)).numpy() * (probe.sae.pre_activations(rows) > 0.3).numpy()
    dense[answer["masked"]] = 0
    assert n > 8
    assert [item["latent"] for item in answer["features"]] == [
        latent for latent in np.argsort(-dense.max(0), kind="stable") if dense[:, latent].any()
    ][:30]
    for item in answer["features"]:
        wanted = {place: dense[place, item["latent"]] for place in np.flatnonzero(dense[:, item["latent"]])}
        assert dict(map(tuple, item["activations"])) == pytest.approx(wanted, rel=1e-3)
    for place, strongest in enumerate(answer["by_token"]):
        assert [value for _, value in strongest] == pytest.approx(sorted(dense[place][dense[place] > 0], reverse=True)[:8], rel=1e-3)


def test_a_feature_that_is_asked_about_is_told_of(probe: Probe) -> None:
    """Who comes from a feature wants to know how it fires on a text, even if it does not at all."""
    threshold = probe.sae.threshold.clone()
    threshold[7] = 1e9
    quiet = probe._replace(sae=replace(probe.sae, threshold=threshold))
    every = run_example(quiet, TEXT)
    assert 7 not in [item["latent"] for item in every["features"]]
    asked = run_example(quiet, TEXT, 7)
    assert asked == {**every, "features": [*every["features"], {"latent": 7, "max": 0.0, "activations": []}]}
    assert run_example(quiet, TEXT, every["features"][0]["latent"]) == every


def test_texts_that_make_no_sense_are_refused_before_anything_is_loaded() -> None:
    """Loading a model takes seconds; a wrong text should not."""

    def load() -> Probe:
        raise AssertionError

    for text in ("", " \n", "x" * (MAX_TEXT + 1)):
        with pytest.raises(InputError, match="give 1 to 2,000"):
            Examples(load).ask(text)


def test_a_text_with_too_many_tokens_is_refused(probe: Probe) -> None:
    """One text must not occupy the server."""
    with pytest.raises(InputError, match="at most 512 are run"):
        run_example(probe, "\u20ac" * MAX_TEXT)


def test_the_server_answers_where_model_and_sae_are_at_hand(probe: Probe, tmp_path) -> None:
    """Elsewhere it says what is needed."""
    store = open_store(str(tmp_path / "store"))
    build_synthetic_bundle(store, n_features=24, n_documents=4)
    places = list_bundles(store)
    desk = Desk(None, {places[0].name: Examples(lambda: probe)})
    for app, status in ((make_app(places, static=tmp_path, desk=desk), 200), (make_app(places, static=tmp_path), 400)):
        client = TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False)
        answer = client.get(f"/api/bundles/{places[0].name}/try", params={"text": TEXT})
        assert answer.status_code == status
        assert client.get("/site.json").json()["examples"][places[0].name] == (status == 200)
    assert "--config" in answer.json()["error"]["what"]
