"""`interp export` and `interp labels import` do from a terminal what the functions do, and say what they did."""

import shutil
import time
from contextlib import chdir
from pathlib import Path

import pytest
from synthetic_bundle import build_synthetic_bundle
from typer.testing import CliRunner

from interp_assets.errors import InputError
from interp_assets.planning.config import make_config
from interp_assets.storage.store import open_store
from interp_assets.terminal.cli import app
from interp_assets.terminal.web import find_notes, make_desk, read_token
from interp_assets.web.opened import OpenBundle, find_bundles, list_bundles
from interp_assets.web.server import STATIC


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """Return the folder of an invented bundle of 14 features, one of them dead."""
    store = open_store(str(tmp_path / "store"))
    made = build_synthetic_bundle(store, n_features=14, n_documents=4)
    return tmp_path / "store" / made.ref.path


def _run(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments))
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    return " ".join(done.output.split())


def test_a_bundle_is_exported_for_another_tool(bundle: Path, tmp_path: Path) -> None:
    """What was left out is said."""
    said = _run("export", "attribution-graph", str(tmp_path / "out"), "--bundle", str(bundle))
    assert "13 features in 13 files" in said
    assert "1 dead feature left out" in said
    assert len(list((tmp_path / "out").rglob("*.json"))) == 13


def test_a_site_is_exported(bundle: Path, tmp_path: Path) -> None:
    """Pages, `site.json` and the bundle's files."""
    if not (STATIC / "index.html").exists():
        pytest.skip("the pages are not built: python frontend/build.py")
    assert "Range requests" in _run("export", "site", str(tmp_path / "out"), "--bundle", str(bundle))
    assert (tmp_path / "out" / "site.json").exists()
    assert (tmp_path / "out" / "bundles" / bundle.name / "manifest.json").exists()


def test_unknown_formats_and_missing_files_are_explained(bundle: Path, tmp_path: Path) -> None:
    """The message names what there is."""
    with pytest.raises(InputError, match="there are site, headvis, attribution-graph, neuronpedia, saedashboard"):
        _run("export", "pdf", str(tmp_path / "out"), "--bundle", str(bundle))
    with pytest.raises(InputError, match="There is no file"):
        _run("labels", "import", str(tmp_path / "none.csv"), "--bundle", str(bundle))


def test_of_bundles_of_one_sae_the_newest_is_meant(bundle: Path, tmp_path: Path) -> None:
    """After a release or a change of the configuration there are two: nobody should have to look up which one is current."""
    time.sleep(1.1)  # `created` is in seconds
    newer = build_synthetic_bundle(open_store(str(tmp_path / "store")), n_features=10, n_documents=4)
    folder, name = str(tmp_path / "store"), OpenBundle(list_bundles(open_store(str(bundle.parent)))[0]).description["sae"]["name"]
    said = _run("export", "attribution-graph", str(tmp_path / "out"), "--bundle", folder, "--sae", name)
    newest = newer.ref.path.rsplit("/", 1)[-1]
    assert f"Of 2 bundles, {newest} is the newest; older ones are taken only if --bundle names them." in said
    assert len(list((tmp_path / "out").rglob("*.json"))) < 13
    with pytest.raises(InputError, match=f"No bundle shows an SAE 'nope'; there are {name}"):
        _run("export", "attribution-graph", str(tmp_path / "out"), "--bundle", folder, "--sae", "nope")


def test_labels_are_imported(bundle: Path, tmp_path: Path) -> None:
    """The second time nothing is done, and it says so."""
    path = tmp_path / "labels.csv"
    path.write_text("latent,label\n3,opening brackets\n")
    arguments = ("labels", "import", str(path), "--bundle", str(bundle), "--source", "hand")
    assert "1 label of 1 feature imported" in _run(*arguments)
    assert "were imported before" in _run(*arguments)
    opened = OpenBundle(list_bundles(open_store(str(bundle.parent)))[0])
    assert opened.table().labels([3])[3][0]["source"] == "hand"


def test_without_a_pipeline_beside_it_a_bundle_is_served_without_search_by_example(bundle: Path, tmp_path: Path) -> None:
    """A bundle that somebody sent must open on any machine."""
    config = make_config({"name": "other", "root": str(tmp_path / "elsewhere")})
    desk = make_desk(config, list_bundles(open_store(str(bundle.parent))), tmp_path / "notes")
    assert desk.examples == {}
    assert desk.notes == tmp_path / "notes"
    assert not (tmp_path / "elsewhere").exists()


def test_notes_lie_beside_the_pipeline_wherever_one_works(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Who starts the browser from another folder must find the same notes, and those of earlier releases are not lost in silence."""
    pipeline = tmp_path / "data" / "demo"
    shutil.copytree(bundle, pipeline / "6-web" / bundle.name)
    wanted = tmp_path / "data" / "feature-notes"
    for url in (tmp_path / "data", pipeline, pipeline / "6-web", pipeline / "6-web" / bundle.name):
        assert find_notes(find_bundles(str(url))) == wanted
    sent = shutil.copytree(bundle, tmp_path / "sent" / bundle.name)
    assert find_notes(find_bundles(str(sent))) == tmp_path / "sent" / "feature-notes"
    assert capsys.readouterr().out == ""
    with chdir(tmp_path):
        (tmp_path / "feature-notes").mkdir()
        (tmp_path / "feature-notes" / f"{bundle.name}.json").write_text("{}")
        assert find_notes(find_bundles(str(pipeline))) == wanted
    assert f"those in {tmp_path / 'feature-notes'} are not shown" in capsys.readouterr().out.replace("\n", "")


def test_a_token_comes_from_a_file_and_not_from_the_command(tmp_path: Path) -> None:
    """What is typed behind a command stands in `ps`, for everybody on the machine."""
    (tmp_path / "token").write_text("a long random text\n")
    assert read_token(tmp_path / "token") == "a long random text"
    (tmp_path / "empty").write_text("\n")
    for name in ("empty", "none"):
        with pytest.raises(InputError, match="Write a long random text into it"):
            read_token(tmp_path / name)
    assert "No such option" in _run("serve", "--token", "secret")
