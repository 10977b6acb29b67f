"""The state of a store is read by listings, not by one request an artifact."""

import os
import sqlite3
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest

from interp_assets.errors import StoreMissingError
from interp_assets.storage.listing import _KEPT_BYTES, ListedStore, _Parsed
from interp_assets.storage.manifest import ArtifactRef, create_artifact, find_manifest, make_ref
from interp_assets.storage.seen import SETTLED_NS, SeenFiles, stamp_file
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


class CountingStore(Store):
    """A store that counts what is read of it."""

    def __init__(self, store: Store) -> None:
        """Wrap a store."""
        vars(self).update(vars(store))
        self.read: Counter[str] = Counter()

    def get(self, path: str) -> bytes:
        """Read and count."""
        self.read[path] += 1
        return super().get(path)


def settle(path: Path) -> None:
    """Wait until a file has not changed for as long as another change could bear the same time."""
    while time.time_ns() - stamp_file(path)[1] < SETTLED_NS:
        time.sleep(0.05)


def test_a_manifest_of_a_folder_is_read_once_for_all_listings_until_it_changes(local_store: Store) -> None:
    """The plan, the forecast and the run look one after the other; a damaged, a replaced and a deleted artifact must not count as there."""
    store, refs = CountingStore(local_store), make_refs(4)
    fill(local_store, refs)
    paths = [f"{ref.path}/manifest.json" for ref in refs]
    files = [found for path in paths if (found := local_store.local_path(path))]
    early = ListedStore(store)
    assert all(find_manifest(early, ref) for ref in refs for _ in range(3))
    assert store.read == Counter(paths)  # once a listing, even of files that changed just now
    settle(files[-1])
    assert all(find_manifest(listed, ref) for listed in (ListedStore(store), ListedStore(store)) for ref in refs)
    assert store.read == Counter(paths * 2)  # once for all later ones

    before = files[0].stat()
    files[0].write_bytes(files[0].read_bytes().replace(b'"rows"', b'"rowz"'))
    os.utime(files[0], ns=(before.st_atime_ns, before.st_mtime_ns))  # of the same size and time
    with create_artifact(local_store, refs[1], replace=True) as art:
        art.put("rows", b"other bytes", n_rows=1)
    local_store.delete([paths[2]])
    listed = ListedStore(store)
    found = [find_manifest(listed, ref) for ref in refs]
    assert [manifest and manifest.digest for manifest in found] == look(local_store, refs)[0]
    assert [manifest is not None for manifest in found] == [False, True, False, True]
    assert store.read == Counter(paths * 2 + paths[:2])


def test_what_is_held_of_manifests_is_bounded() -> None:
    """A server that looks at many pipelines must not grow for ever: the oldest go, and what is held in an object's place is the newest."""
    parsed = _Parsed()
    for i in range(5):
        parsed.keep(f"{i}", "then", _KEPT_BYTES // 3, i)
    assert [parsed.find(f"{i}", "then") for i in range(5)] == [None, None, 2, 3, 4]
    parsed.keep("4", "now", _KEPT_BYTES // 3, 5)
    assert [parsed.find("4", "then"), parsed.find("4", "now"), parsed.find("2", "then")] == [None, 5, 2]


def test_who_looks_for_long_lets_others_write_their_notes(tmp_path: Path) -> None:
    """A run holds its notes open for hours; another command waits for its turn for seconds, and then goes on without any."""
    place = tmp_path / "notes.sqlite"
    with SeenFiles(place) as notes, closing(sqlite3.connect(place, timeout=0.0)) as other:
        notes.keep(Path("s3://b/manifest.json"), "tag", "manifest", b"said")
        other.execute("INSERT INTO notes VALUES ('other', '', '', '')")
        other.commit()
        assert notes.recall(Path("s3://b/manifest.json"), "tag", "manifest") == b"said"
