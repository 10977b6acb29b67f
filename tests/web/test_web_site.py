"""A bundle becomes a site of plain files, and a real browser reads it there by range requests alone."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser_site import serve_files
from chromium import Visit
from synthetic_bundle import build_synthetic_bundle

from interp_assets.errors import ConfigError
from interp_assets.storage.manifest import read_manifest
from interp_assets.storage.store import open_store
from interp_assets.storage.verify import verify_tree
from interp_assets.web.opened import OpenBundle, list_bundles
from interp_assets.web.server import STATIC
from interp_assets.web.site import export_site
from interp_assets.web.table import Query


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, OpenBundle]:
    """Export an invented bundle of 300 features."""
    if not (STATIC / "index.html").exists():
        pytest.skip("the pages are not built: python frontend/build.py")
    root = tmp_path_factory.mktemp("site")
    store = open_store(str(root / "store"))
    build_synthetic_bundle(store, n_features=300)
    export_site(list_bundles(store), open_store(str(root / "out")))
    return root / "out", OpenBundle(list_bundles(store)[0])


@pytest.fixture(scope="module")
def address(exported: tuple[Path, OpenBundle]) -> Iterator[str]:
    """Serve the folder as a static host would."""
    with serve_files(exported[0]) as found:
        yield found


def test_a_site_holds_every_file_unchanged(exported: tuple[Path, OpenBundle]) -> None:
    """`interp verify` must be able to check what lies on the host."""
    folder, bundle = exported
    assert verify_tree(open_store(str(folder)), "bundles", lambda _: None) == []
    assert read_manifest(open_store(str(folder)), f"bundles/{bundle.name}").digest == bundle.manifest.digest
    site = json.loads((folder / "site.json").read_text())
    assert (site["mode"], [item["name"] for item in site["bundles"]]) == ("static", [bundle.name])


def test_a_site_without_pages_is_refused(exported: tuple[Path, OpenBundle], tmp_path: Path) -> None:
    """A folder of bundles that no browser can open is of no use."""
    with pytest.raises(ConfigError, match=r"no built pages.*frontend/build\.py"):
        export_site([], open_store(str(tmp_path / "out")), static=tmp_path)


@pytest.mark.browser
@pytest.mark.parametrize(
    ("path", "query"),
    [
        ("", Query(life="live")),
        ("?sort=max&desc=1", Query("max", True, "live")),
        ("?sort=top_token&life=all", Query("top_token", False, "all")),
        ("?life=dead", Query(life="dead")),
        ("?sort=mean&filter=max%3E%3D4&filter=count%3C400", Query("mean", False, "live", ("max>=4", "count<400"))),
        ("?q=raised%3Adef&sort=frequency&desc=1", Query("frequency", True, "live", (), "raised:def")),
        ("?q=%22+in%22+1", Query("relevance", False, "live", (), '" in" 1')),
        ("?q=def&sort=latent&filter=frequency%3C5%25", Query("latent", False, "live", ("frequency<5%",), "def")),
        ("?q=re&life=all&desc=1", Query("relevance", True, "all", (), "re")),
    ],
)
def test_lists_are_the_same_as_on_a_server(visit: Visit, exported: tuple[Path, OpenBundle], address: str, path: str, query: Query) -> None:
    """Two programs sort, filter and search; they must agree."""
    bundle = exported[1]
    page = bundle.table().page(query, 0, 12)
    visit.open(f"{address}/#/{bundle.name}{path}", "[role=row] a")
    visit.page.wait_for_selector(f"[role=status]:has-text('{page.n_matches}')")
    assert visit.page.locator(".row .latent a").all_inner_texts()[:12] == [str(row["latent"]) for row in page.rows]
    assert not [request for request in visit.requests if "/api/" in request.url]


@pytest.mark.browser
def test_a_feature_opens_without_a_server(visit: Visit, exported: tuple[Path, OpenBundle], address: str) -> None:
    """Stepping follows the list there, too."""
    bundle = exported[1]
    latents = [row["latent"] for row in bundle.table().page(Query("max", True, "live"), 0, 3).rows]
    visit.open(f"{address}/#/{bundle.name}/{latents[0]}?sort=max&desc=1", f"h1:has-text('Feature {latents[0]}')")
    visit.page.wait_for_selector("nav:has-text('1 of 277')")
    visit.page.keyboard.press("j")
    visit.page.wait_for_selector(f"h1:has-text('Feature {latents[1]}')")
    assert visit.page.get_by_role("heading", name="Top activations", exact=True).count() == 1


@pytest.mark.browser
@pytest.mark.parametrize(
    ("path", "text"), [("?sort=weight", "Cannot sort by 'weight'"), ("?filter=max%3E%3Dx", "is no filter"), ("/300", "There is no feature 300")]
)
def test_wrong_addresses_are_explained_without_a_server(
    unhappy_visit: Visit, exported: tuple[Path, OpenBundle], address: str, path: str, text: str
) -> None:
    """The same sentences as from a server."""
    unhappy_visit.open(f"{address}/#/{exported[1].name}{path}", "[role=alert]")
    assert text in unhappy_visit.page.get_by_role("alert").inner_text()
