"""The bundle of attention heads: its page is true, it is served, copied and refused like a bundle of features."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from synthetic_bundle import build_synthetic_bundle
from synthetic_heads import KINDS, PROMPTS, build_synthetic_heads

from interp_assets.errors import ArtifactCorruptError, InputError
from interp_assets.storage.manifest import create_artifact, make_ref
from interp_assets.storage.store import Store, open_store
from interp_assets.terminal.web import _choose
from interp_assets.web.attention import DESCRIPTION, FORMAT, KIND, VERSION, AttentionContent, write_attention_bundle
from interp_assets.web.opened import BrokenBundle, BundlePlace, OpenAttention, list_bundles, open_any, open_bundle
from interp_assets.web.server import make_app
from interp_assets.web.site import export_site
from interp_assets.web.vocabulary import Vocabulary

PAGE = (Path(__file__).parents[2] / "docs" / "formats" / "attention_bundle.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def store() -> Store:
    """Write the invented bundle once, beside one of features."""
    store = open_store("memory://attention")
    build_synthetic_heads(store)
    build_synthetic_bundle(store, n_features=4)
    return store


@pytest.fixture
def bundle(store: Store) -> OpenAttention:
    """Open it."""
    (found,) = (each for each in map(open_any, list_bundles(store)) if isinstance(each, OpenAttention))
    return found


def test_the_page_lists_files_and_keys_and_layers(bundle: OpenAttention) -> None:
    """A format page lives only if a test executes it."""
    files, keys = PAGE.split("## `attention.json`")
    listed = set(re.findall(r"^\| `([^`]+)` \|", files, re.MULTILINE))
    names = {re.sub("/(" + "|".join(PROMPTS) + ")/", "/<name>/", entry.name) for entry in bundle.manifest.files}
    assert listed == names
    assert set(re.findall(r"^\| `(\w+)` \|", keys, re.MULTILINE)) == set(bundle.description)
    assert f"`{FORMAT}`" in keys
    assert f"| `version` | {VERSION};" in keys
    for key in [*bundle.description["layers"][0], *bundle.description["prompts"][0]]:
        assert f"`{key}`" in keys
    assert set(bundle.manifest.facts) == set(re.findall(r"`(\w+)`", keys.split("## Facts")[1]))


def test_a_record_is_found_by_its_head_and_a_wrong_one_is_named(bundle: OpenAttention) -> None:
    """The order of the columns is the order of the records."""
    assert bundle.head_names() == ["0.0", "0.1", "0.2", "1.0", "1.1", "1.2"]
    columns = bundle.description["heads"]
    for place, name in enumerate(bundle.head_names()):
        assert bundle.head(name)["statistics"]["previous"] == columns["previous"][place]
    assert columns["previous"][KINDS.index("previous")] > 0.9
    with pytest.raises(InputError, match=r"no head '2\.0' .*; there are 0\.0, 0\.1"):
        bundle.head("2.0")
    with pytest.raises(InputError, match=r"no prompt 'none' .*\['short', 'other', 'long'\]"):
        bundle.prompt("none")


def test_it_is_served_by_range_and_has_no_features(store: Store, bundle: OpenAttention, tmp_path: Path) -> None:
    """One server and one set of routes for all bundles; what is asked of features alone says why there is none."""
    client = TestClient(make_app(list_bundles(store), static=tmp_path), base_url="http://127.0.0.1")
    listed = {item["kind"]: item for item in client.get("/site.json").json()["bundles"]}
    assert listed["attention"]["name"] == bundle.name
    assert (listed["attention"]["n_layers"], listed["attention"]["n_heads"], listed["attention"]["n_prompts"]) == (2, 6, 3)
    assert listed["features"]["sae"]["name"] == "synthetic"
    assert client.get(f"/bundles/{bundle.name}/{DESCRIPTION}").json() == bundle.description
    part = client.get(f"/bundles/{bundle.name}/records.bin", headers={"Range": "bytes=4-9"})
    assert (part.status_code, part.content) == (206, bundle.read("records.bin")[4:10])
    for path in ("", "/features", "/notes", "/labels?latent=0"):
        refused = client.get(f"/api/bundles/{bundle.name}{path}")
        assert refused.status_code == 404
        assert "is of attention heads: it has no features" in refused.json()["error"]["what"]


def test_a_site_for_static_hosts_has_its_files(store: Store, bundle: OpenAttention, tmp_path: Path) -> None:
    """`interp export site` copies every bundle, byte for byte."""
    (tmp_path / "static").mkdir()
    (tmp_path / "static" / "index.html").write_text("pages")
    export_site(list_bundles(store), open_store(str(tmp_path / "site")), static=tmp_path / "static")
    for entry in bundle.manifest.files:
        assert (tmp_path / "site" / "bundles" / bundle.name / entry.name).read_bytes() == bundle.read(entry.name)
    assert [item["kind"] for item in json.loads((tmp_path / "site" / "site.json").read_text())["bundles"]] == ["attention", "features"]


def test_other_exports_take_the_features_and_say_where_there_are_none(store: Store, bundle: OpenAttention) -> None:
    """Neuronpedia's files are of features: a bundle of heads beside them is no reason to ask, and alone it is told."""
    assert _choose(list_bundles(store), None).description["sae"]["name"] == "synthetic"
    with pytest.raises(InputError, match="of attention heads and has no features"):
        _choose([bundle.place], None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda said: said.update(version=9), f"version 9; this release reads version {VERSION}. Upgrade interp-assets"),
        (lambda said: said.update(format="other"), "is 'other' version 1"),
        (lambda said: said.pop("layers"), "lacks what a bundle needs (layers"),
        (lambda said: said["heads"].update(self=[0.5]), "speaks of 6 heads"),
        (lambda said: said["layers"].pop(), "speaks of 3 heads"),
        (lambda said: said["heads"].update(head=[0, 2, 1, 0, 1, 2]), "speaks of 6 heads"),
    ],
)
def test_a_bundle_that_cannot_be_shown_says_why(bundle: OpenAttention, change: Callable[[dict], None], reason: str) -> None:
    """Bundles come from elsewhere: a wrong one is listed with its reason and the next step."""
    found = _rewrite(bundle, change)
    assert isinstance(found, BrokenBundle)
    assert reason in found.reason
    assert "Materialize `attention_browser` again" in found.reason or "Upgrade" in found.reason


def _rewrite(bundle: OpenAttention, change: Callable[[dict], None]) -> OpenAttention | BrokenBundle:
    described = json.loads(json.dumps(bundle.description))
    change(described)
    store, ref = open_store("memory://rewritten"), make_ref(KIND, "6-web", identity={}, inputs={}, label="rewritten")
    with create_artifact(store, ref) as art:
        art.put(DESCRIPTION, json.dumps(described).encode())
        art.put("records.idx", bundle.read("records.idx"))
    return open_bundle(BundlePlace(store, ref.path))


def test_records_must_be_as_many_as_heads(bundle: OpenAttention) -> None:
    """A layer whose records are short would show every later head under another name."""
    content = AttentionContent(bundle.description, [b"one"], [], Vocabulary([], {}, [], []))
    ref = make_ref(KIND, "6-web", identity={}, inputs={}, label="short")
    with pytest.raises(ArtifactCorruptError, match="6 heads and 1 records"), create_artifact(open_store("memory://short"), ref) as art:
        write_attention_bundle(art, content)
