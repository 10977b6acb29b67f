"""What pages compare SAEs by: the same from a server and on a static host, and whole."""

import json
import math
import re
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from synthetic_bundle import build_synthetic_bundle
from synthetic_sweep import N_HELD_OUT, build_synthetic_sweep, fvu_of

from interp_assets.storage.manifest import CONFIGURATION
from interp_assets.storage.store import Store, open_store
from interp_assets.web.comparison import MAX_CURVES, Comparisons, add_pipeline, describe_comparison, find_pipelines, find_stamp
from interp_assets.web.opened import list_bundles
from interp_assets.web.server import Desk, make_app
from interp_assets.web.site import export_site

PAGE = Path(__file__).parents[2] / "docs" / "formats" / "comparison.md"


@pytest.fixture(scope="module")
def store() -> Store:
    """Invent a pipeline with SAEs."""
    store = open_store("memory://").child("synthetic")
    build_synthetic_sweep(store)
    return store


def test_it_has_every_sae_its_replicas_and_its_curve(store: Store) -> None:
    """24 of a sweep, one elsewhere, one that failed; means and deviations as worked by hand; curves no longer than a page can draw."""
    found = describe_comparison(store)
    json.dumps(found, allow_nan=False)
    assert (found["n_held_out"], len(found["saes"]["name"])) == (N_HELD_OUT, 26)
    recipes = found["replicas"]["columns"]
    place = recipes["name"].index("topk-k16")
    assert found["replicas"]["members"][place] == [f"topk-k16-seed{seed}" for seed in range(3)]
    assert recipes["fvu"][place] == pytest.approx(fvu_of(16, 1, is_topk=True), rel=1e-5)
    assert recipes["fvu_deviation"][place] == pytest.approx(0.002, rel=1e-4)
    assert found["saes"]["status"].count("failed") == 1
    assert len(found["curves"]["bad"]["n_rows"]) == 4
    assert not {"sae_path", "evaluation_digest"} & set(found["saes"])
    assert len(found["curves"]) <= MAX_CURVES
    forth, back = found["matches"]
    assert (forth["sae"], back["sae"], forth["mean_cosine"], forth["n_held_out"]) == ("topk-k8-seed0", "relu-k8-seed0", 0.825, 4096)
    assert forth["best"]["latent"] == list(range(7))


def test_long_curves_keep_their_ends() -> None:
    """A hundred points of a thousand steps, the first and the last among them."""
    store = open_store("memory://").child("long")
    build_synthetic_sweep(store, ks=(8,), n_seeds=1, n_steps=1000)
    curve = describe_comparison(store)["curves"]["topk-k8-seed0"]
    assert (len(curve["n_rows"]), curve["n_rows"][0], curve["n_rows"][-1]) == (100, 100, 100_000)


def test_a_server_and_a_static_host_tell_the_same(store: Store, tmp_path: Path) -> None:
    """The page asks for one path, whoever answers; bundles of a pipeline lead to its SAEs by themselves."""
    build_synthetic_bundle(store, n_features=20)
    places = list_bundles(store)
    assert list(find_pipelines(places)) == ["synthetic"]
    client = TestClient(make_app(places, static=tmp_path), base_url="http://127.0.0.1")
    assert client.get("/site.json").json()["sweeps"] == ["synthetic"]
    told = client.get("/sweeps/synthetic.json").json()
    assert told == describe_comparison(store)
    missing = client.get("/sweeps/other.json")
    assert (missing.status_code, "No pipeline is called 'other'" in missing.json()["error"]["what"]) == (404, True)
    (tmp_path / "index.html").write_text("")
    out = open_store(str(tmp_path / "site"))
    export_site(places, out, static=tmp_path)
    assert json.loads(out.get("sweeps/synthetic.json")) == told
    assert json.loads(out.get("site.json"))["sweeps"] == ["synthetic"]


def test_a_comparison_is_made_again_when_something_is_written(tmp_path: Path) -> None:
    """And only then: a page that asks again gets 304, a table of ten thousand SAEs is not read for every visitor."""
    store = open_store("memory://").child("again")
    build_synthetic_sweep(store, ks=(8,), n_seeds=1)
    client = TestClient(make_app([], static=tmp_path, desk=Desk(pipelines={"synthetic": store})), base_url="http://127.0.0.1")
    headers = {"if-none-match": client.get("/sweeps/synthetic.json").headers["etag"]}
    again = client.get("/sweeps/synthetic.json", headers=headers)
    assert (again.status_code, again.content) == (304, b"")
    comparisons = Comparisons({"synthetic": store})
    assert comparisons.find("synthetic")[1] is comparisons.find("synthetic")[1]
    build_synthetic_sweep(store, ks=(8,), n_seeds=2)
    changed = client.get("/sweeps/synthetic.json", headers=headers)
    assert changed.status_code == 200
    assert len(changed.json()["saes"]["name"]) == 6
    before = find_stamp(store)
    store.put("4-sae/one-more", b"")
    assert find_stamp(store) != before, "whatever is written of the stage"


def test_saes_are_compared_without_any_bundle(store: Store, tmp_path: Path) -> None:
    """A sweep shows no features; what is no pipeline, or has no SAE, is left out."""
    found: dict[str, Store] = {}
    add_pipeline(found, store)
    add_pipeline(found, open_store(str(tmp_path)))
    assert list(found) == ["synthetic"]
    client = TestClient(make_app([], static=tmp_path, desk=Desk(pipelines=found)), base_url="http://127.0.0.1")
    assert client.get("/sweeps/synthetic.json").status_code == 200
    out = open_store(str(tmp_path / "site"))
    (tmp_path / "index.html").write_text("")
    export_site([], out, pipelines=found, static=tmp_path)
    assert json.loads(out.get("site.json")) == {"mode": "static", "bundles": [], "sweeps": ["synthetic"]}


def test_the_page_of_the_format_shows_what_is_written(store: Store) -> None:
    """Its example has the keys of the real one, and no number that JSON has not."""
    (text,) = re.findall(r"```json\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    example, found = json.loads(text), describe_comparison(store)
    assert list(example) == list(found)
    assert set(example["saes"]) <= set(found["saes"])
    assert set(example["replicas"]["columns"]) <= set(found["replicas"]["columns"])
    assert list(example["curves"]["k-seed0"]) == list(found["curves"]["bad"])
    assert math.isclose(example["replicas"]["columns"]["fvu_deviation"][0], 0.02 / math.sqrt(2), rel_tol=1e-4)


def test_two_pipelines_of_one_name_are_both_there_and_a_damaged_one_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """The second was dropped without a word, and so was one whose configuration cannot be read."""
    parent, found = open_store("memory://"), {}
    for folder in ("here", "there"):
        build_synthetic_sweep(parent.child(folder), ks=(8,), n_seeds=1)
        add_pipeline(found, parent.child(folder))
    add_pipeline(found, parent.child("there"))
    (first, second) = found
    assert second == f"{first}-2"
    add_pipeline(found, parent.child("nowhere"))
    assert not caplog.records
    build_synthetic_sweep(parent.child("torn"), ks=(8,), n_seeds=1)
    parent.child("torn").put(CONFIGURATION, b"{")
    add_pipeline(found, parent.child("torn"))
    assert list(found) == [first, second]
    assert "No comparison of the SAEs in" in caplog.text
