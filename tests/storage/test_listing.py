"""The state of a store is read by listings, not by one request an artifact."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from interp_assets.errors import StoreMissingError
from interp_assets.storage.listing import ListedStore
from interp_assets.storage.manifest import ArtifactRef, create_artifact, find_manifest, make_ref
from interp_assets.storage.seen import SeenFiles
from interp_assets.storage.store import ObjectInfo, Store
from interp_assets.storage.traffic import METER, Traffic


def make_refs(n: int) -> list[ArtifactRef]:
    """Address some artifacts in two folders."""
    return [make_ref("toy", f"1-toys/{i % 2}", identity={"toy": i}, inputs={}, label=f"toy-{i:06d}") for i in range(n)]


def fill(store: Store, refs: list[ArtifactRef]) -> None:
    """Make these artifacts."""
    for ref in refs:
        with create_artifact(store, ref) as art:
            art.put("rows", ref.path.encode(), n_rows=1)


def look(store: Store, refs: list[ArtifactRef]) -> tuple[list[str | None], Traffic]:
    """Return the digests of artifacts and what asking for them took."""
    before = METER.total()
    found = [find_manifest(store, ref) for ref in refs]
    return [manifest.digest if manifest else None for manifest in found], METER.total().since(before)


@pytest.mark.parametrize("n", [40, 400])
def test_what_is_there_costs_a_listing_and_what_it_says_is_read_once(memory_store: Store, tmp_path: Path, n: int) -> None:
    """Ten thousand shards are ten pages of a listing; a second process reads no manifest that has not changed."""
    refs = make_refs(n)
    fill(memory_store, refs[: n // 2])
    plain, _ = look(memory_store, refs)
    with SeenFiles(tmp_path / "notes.sqlite") as notes:
        found, took = look(ListedStore(memory_store, notes), refs)
        assert found == plain
        assert (took.gets, took.puts) == (n // 2, 1)
    with SeenFiles(tmp_path / "notes.sqlite") as notes:
        found, took = look(ListedStore(memory_store, notes), refs)
        assert found == plain
        assert (took.gets, took.puts) == (0, 1)
    memory_store.delete([f"{refs[0].path}/rows"])
    fill(memory_store, refs[n // 2 : n // 2 + 1])
    with SeenFiles(tmp_path / "notes.sqlite") as notes:
        found, took = look(ListedStore(memory_store, notes), refs)
        assert found == look(memory_store, refs)[0]
        assert found[0] is None  # a manifest whose file is gone is no artifact, noted or not
        assert took.gets == 1


def test_an_artifact_that_is_made_again_is_read_again(memory_store: Store, tmp_path: Path) -> None:
    """A note of other bytes under the same id would call stale data current."""
    (ref,) = make_refs(1)
    digests = []
    for content in (b"once", b"then"):
        with create_artifact(memory_store, ref, replace=True) as art:
            art.put("rows", content, n_rows=1)
        with SeenFiles(tmp_path / "notes.sqlite") as notes:
            digests += look(ListedStore(memory_store, notes), [ref])[0]
    assert digests[1:] == look(memory_store, [ref])[0]
    assert digests[0] != digests[1]


def test_a_listed_store_is_as_old_as_its_first_question_and_writes_through(local_store: Store) -> None:
    """Whoever has made something asks anew; all but manifests is read from the store itself."""
    listed, refs = ListedStore(local_store), make_refs(3)
    fill(local_store, refs[:1])
    assert find_manifest(listed, refs[0])
    fill(local_store, refs[1:2])
    assert find_manifest(listed, refs[1]) is None
    assert find_manifest(ListedStore(local_store), refs[1])
    listed.put("plan.json", b"{}")
    assert listed.get("plan.json") == local_store.get("plan.json") == b"{}"
    with pytest.raises(StoreMissingError, match="There is no"):
        listed.get("1-toys/none/manifest.json")
    names = {item.path for item in listed.list("1-toys")}
    assert names == {f"{refs[0].path}/{name}" for name in ("manifest.json", "rows")}
    assert {item.path for item in listed.list("1-toys/0")} == names
    assert all(isinstance(item, ObjectInfo) for item in listed.list())


def test_who_looks_for_long_lets_others_write_their_notes(tmp_path: Path) -> None:
    """A run holds its notes open for hours; another command waits for its turn for seconds, and then goes on without any."""
    place = tmp_path / "notes.sqlite"
    with SeenFiles(place) as notes, closing(sqlite3.connect(place, timeout=0.0)) as other:
        notes.keep(Path("s3://b/manifest.json"), "tag", "manifest", b"said")
        other.execute("INSERT INTO notes VALUES ('other', '', '', '')")
        other.commit()
        assert notes.recall(Path("s3://b/manifest.json"), "tag", "manifest") == b"said"
