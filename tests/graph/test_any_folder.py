"""A folder may be called anything: a whole road, its model and its text lie in such a one here, and whatever reads or writes files works there."""

import shutil
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from odd_names import ODD_NAME
from road_world import Finished

from interp_assets.graph.jobs import dagster_home, open_instance
from interp_assets.planning.pipeline import load_pipeline, open_pipeline_store
from interp_assets.storage.store import open_store
from interp_assets.storage.verify import list_tree, locate, verify_tree
from interp_assets.train.exchange.folders import SAE_FORMATS, export_sae, read_foreign
from interp_assets.web.exports import FORMATS, export_bundle
from interp_assets.web.labels import import_labels
from interp_assets.web.opened import OpenBundle, find_bundles
from interp_assets.web.server import Desk, make_app
from interp_assets.web.site import export_site


@pytest.fixture
def place(finished: Finished, tmp_path: Path) -> Path:
    """Copy the artifacts of the finished road into a folder with such a name, to be changed."""
    assert ODD_NAME in finished.config.root
    assert ODD_NAME in finished.config.corpus.path
    assert ODD_NAME in finished.config.model.name
    return Path(shutil.copytree(finished.config.root, tmp_path / ODD_NAME))


def test_a_road_in_a_folder_of_any_name_is_whole(place: Path) -> None:
    """`interp verify` and `interp inspect` begin at the folder's own name, which becomes a key of a store."""
    found = locate(str(place))
    assert len(list_tree(found.store, found.path).artifacts) > 20
    assert verify_tree(found.store, found.path) == []


def test_every_export_is_written_to_and_read_from_a_folder_of_any_name(finished: Finished, place: Path) -> None:
    """Bundles, SAEs and sites."""
    (bundle,) = find_bundles(str(place))
    static = place.parent / "static"
    static.mkdir()
    (static / "index.html").write_text("pages")
    for name in FORMATS:
        assert export_bundle(OpenBundle(bundle), name, open_store(str(place / f"{name} {ODD_NAME}"))).n_features > 0
    assert export_site([bundle], open_store(str(place / "site" / ODD_NAME)), static=static).n_files > 1
    assert [found.name for found in find_bundles(str(place / "site" / ODD_NAME / "bundles"))] == [bundle.name]
    store = open_pipeline_store(finished.config)
    for name in SAE_FORMATS:
        target = open_store(str(place / name / ODD_NAME))
        export_sae(load_pipeline(finished.config, store), store, "demo", name, target)
        assert read_foreign(target).sae.d_sae == finished.config.sae("demo").d_sae
    assert [path.name for path in place.parent.iterdir() if path.name not in (ODD_NAME, "static")] == []


def test_a_bundle_in_a_folder_of_any_name_is_served_with_labels_and_notes(place: Path) -> None:
    """The address of a database of labels was pasted together: `?` ended the path, and another file was opened, or made."""
    (bundle,) = find_bundles(str(place))
    (place / f"labels {ODD_NAME}.csv").write_text("latent,label,source\n3,a good label,me\n")
    import_labels(OpenBundle(bundle), place / f"labels {ODD_NAME}.csv")
    app = make_app([bundle], static=place, desk=Desk(notes=place / "notes" / ODD_NAME))
    client = TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False, headers={"Origin": "http://127.0.0.1"})
    shown = client.get(f"/api/bundles/{bundle.name}/labels", params={"latent": 3}).json()
    assert [label["text"] for label in shown["labels"]] == ["a good label"]
    assert client.put(f"/api/bundles/{bundle.name}/notes/3", json={"note": "mine", "lists": []}).status_code == 200
    assert client.get(f"/api/bundles/{bundle.name}/notes").json()["notes"] == {"3": "mine"}
    assert client.get(f"/api/bundles/{bundle.name}/rows", params={"latent": 3}).status_code == 200
    assert [path.name for path in place.parent.iterdir()] == [ODD_NAME]


def test_dagsters_history_is_kept_in_a_folder_of_any_name(finished: Finished, tmp_path: Path) -> None:
    """Dagster writes addresses of SQLite files by hand: at a `?` the path ended, and there was "no such table"."""
    config = finished.config.model_copy(update={"root": str(tmp_path / ODD_NAME)})
    home = tmp_path / ODD_NAME / ".dagster" / config.name
    with open_instance(config) as instance:
        assert instance.get_runs() == []
        assert dagster_home(config).resolve() == home
    assert (home / "history" / "runs.db").is_file()
    assert [path.name for path in tmp_path.iterdir()] == [ODD_NAME]
