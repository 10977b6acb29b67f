"""Lists and notes are kept in one readable file, whole or not at all, and only for the server's own pages."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from synthetic_bundle import build_synthetic_bundle

from interp_assets.errors import ArtifactCorruptError, InputError
from interp_assets.storage.store import open_store
from interp_assets.web.guard import MAX_BODY_BYTES
from interp_assets.web.notes import MAX_NOTE, Notebook
from interp_assets.web.opened import list_bundles
from interp_assets.web.server import Desk, make_app


@pytest.fixture
def notebook(tmp_path: Path) -> Notebook:
    """Return an empty notebook."""
    return Notebook(tmp_path / "notes", "demo")


def test_a_change_is_one_latents_and_survives(notebook: Notebook, tmp_path: Path) -> None:
    """Two pages that write about different features both keep what they wrote."""
    assert notebook.read()["lists"] == {}
    assert not (tmp_path / "notes").exists()  # nothing is made before the first note
    notebook.change(3, " opens a function ", ["syntax", "odd", "syntax"])
    Notebook(tmp_path / "notes", "demo").change(1, "", ["odd"])
    content = Notebook(tmp_path / "notes", "demo").read()
    assert content["lists"] == {"odd": [3, 1], "syntax": [3]}
    assert content["notes"] == {"3": "opens a function"}
    notebook.change(3, "", ["syntax"])
    assert notebook.read() | {"file": ""} == {"file": "", "lists": {"odd": [1], "syntax": [3]}, "notes": {}}
    assert json.loads((tmp_path / "notes" / "demo.json").read_text())["format"] == "interp-assets/notes"
    assert sorted(path.name for path in (tmp_path / "notes").iterdir()) == ["demo.json", "demo.json.previous", "demo.lock"]
    assert json.loads((tmp_path / "notes" / "demo.json.previous").read_text())["notes"] == {"3": "opens a function"}


WRITE = """
import sys, pathlib
from interp_assets.web.notes import Notebook
notebook = Notebook(pathlib.Path(sys.argv[1]), "demo")
for latent in range(int(sys.argv[2]), 40, 2):
    notebook.change(latent, f"note {latent}", ["both"])
"""


def test_two_servers_on_one_folder_keep_what_each_wrote(notebook: Notebook, tmp_path: Path) -> None:
    """With one temporary name and a lock inside each process, one's rename met the other's half-written file."""
    writers = [subprocess.Popen([sys.executable, "-c", WRITE, str(tmp_path / "notes"), str(first)]) for first in range(2)]
    assert [writer.wait() for writer in writers] == [0, 0]
    content = notebook.read()
    assert content["notes"] == {str(latent): f"note {latent}" for latent in range(40)}
    assert sorted(content["lists"]["both"]) == list(range(40))
    assert not list((tmp_path / "notes").glob("*.tmp"))


def test_a_damaged_file_is_not_lost_for_good(notebook: Notebook, tmp_path: Path) -> None:
    """The message names the copy that can be put back."""
    notebook.change(1, "first", [])
    notebook.change(1, "second", [])
    (tmp_path / "notes" / "demo.json").write_text("{")
    with pytest.raises(ArtifactCorruptError, match=r"The last good copy is .*demo\.json\.previous\."):
        notebook.change(1, "third", [])
    (tmp_path / "notes" / "demo.json.previous").replace(tmp_path / "notes" / "demo.json")
    assert notebook.read()["notes"] == {"1": "first"}


def test_what_is_too_long_is_refused_and_changes_nothing(notebook: Notebook) -> None:
    """A file of notes stays one that a person can read."""
    notebook.change(1, "kept", ["a"])
    before = notebook.read()
    for note, lists, text in (
        ("x" * (MAX_NOTE + 1), [], "at most 10,000"),
        ("", ["y" * 61], "1 to 60 characters"),
        ("", [" "], "1 to 60 characters"),
    ):
        with pytest.raises(InputError, match=text):
            notebook.change(1, note, lists)
    with pytest.raises(InputError, match="At most 100 lists"):
        notebook.change(1, "", [f"list {i}" for i in range(101)])
    assert notebook.read() == before


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"format": "interp-assets/notes", "version": 1}', '{"format": "x", "version": 2, "lists": {}, "notes": {}}']
)
def test_a_file_that_is_none_is_never_overwritten(notebook: Notebook, tmp_path: Path, content: str) -> None:
    """Somebody edited it by hand, and made a mistake."""
    (tmp_path / "notes").mkdir()
    path = tmp_path / "notes" / "demo.json"
    path.write_text(content)
    for act in (notebook.read, lambda: notebook.change(1, "new", [])):
        with pytest.raises(ArtifactCorruptError, match=r"demo\.json"):
            act()
    assert path.read_text() == content


@pytest.fixture
def client(tmp_path: Path) -> TestClient:
    """Return a client of a server that keeps notes."""
    store = open_store(str(tmp_path / "store"))
    build_synthetic_bundle(store, n_features=20, n_documents=4)
    app = make_app(list_bundles(store), static=tmp_path, desk=Desk(notes=tmp_path / "notes"))
    client = TestClient(app, base_url="http://127.0.0.1:8420", raise_server_exceptions=False)
    client.headers["Origin"] = "http://127.0.0.1:8420"
    return client


def _address(client: TestClient, rest: str) -> str:
    return f"/api/bundles/{client.get('/site.json').json()['bundles'][0]['name']}{rest}"


def test_a_list_of_ones_own_filters_the_list(client: TestClient) -> None:
    """Lists are for going back to."""
    for latent in (7, 2):
        assert client.put(_address(client, f"/notes/{latent}"), json={"note": "", "lists": ["mine & yours"]}).status_code == 200
    page = client.get(_address(client, "/features"), params={"list": "mine & yours", "sort": "latent", "descending": "true"}).json()
    assert ([row["latent"] for row in page["rows"]], page["n_matches"]) == ([7, 2], 2)
    place = client.get(_address(client, "/place"), params={"list": "mine & yours", "latent": 2}).json()
    assert (place["position"], place["next"]) == (0, 7)
    missing = client.get(_address(client, "/features"), params={"list": "none"})
    assert (missing.status_code, "There is no list called 'none'" in missing.json()["error"]["what"]) == (400, True)


@pytest.mark.parametrize(
    ("headers", "status"), [({"Origin": "http://evil.example"}, 403), ({"Origin": "null"}, 403), ({"Host": "evil.example"}, 421)]
)
def test_no_foreign_page_can_write(client: TestClient, headers: dict[str, str], status: int, tmp_path: Path) -> None:
    """A form on any site could send a request; it must change nothing."""
    assert client.put(_address(client, "/notes/1"), json={"note": "x"}, headers=headers).status_code == status
    assert not (tmp_path / "notes").exists()


def test_bodies_are_bounded_and_checked(client: TestClient) -> None:
    """A body of unknown or great length is refused before it is read."""
    address = _address(client, "/notes/1")
    assert client.put(address, content=b"x" * (MAX_BODY_BYTES + 1)).status_code == 413
    assert client.put(address, content=iter([b"{}"])).status_code == 413
    assert client.put(address, json={"note": 3}).status_code == 400
    for half in (b'{"note": "cut \\ud83d off"}', b'{"note": "", "lists": ["\\udc00"]}', b'{"note": "\xed\xa0\x80"}', b"\xff"):
        assert client.put(address, content=half, headers={"content-type": "application/json"}).status_code in (200, 400), half
    assert client.put(_address(client, "/notes/20"), json={"note": "x"}).json()["error"]["what"].startswith("There is no feature 20")
    assert client.put(_address(client, "/notes/-1"), json={"note": "x"}).status_code == 400


def test_a_server_without_a_folder_says_so(tmp_path: Path) -> None:
    """Programs that embed the server decide whether anything is written."""
    store = open_store(str(tmp_path / "store"))
    build_synthetic_bundle(store, n_features=3, n_documents=4)
    client = TestClient(make_app(list_bundles(store), static=tmp_path), base_url="http://127.0.0.1:8420", raise_server_exceptions=False)
    assert client.get(_address(client, "/notes")).json() == {"file": None, "lists": {}, "notes": {}}
    refused = client.put(_address(client, "/notes/1"), json={"note": "x"})
    assert "--notes" in refused.json()["error"]["what"]
