"""The state of a store becomes a few listings: which artifacts are there is asked once a folder, not once an artifact.

A pipeline of 10,000 shards has as many manifests an asset. Whoever asks for all of them (what is missing? what will be made?) lists each stage's
folder once, 1,000 objects a request, and knows which exist. What a manifest says has to be read once; from a bucket it is noted, by the tag that
the listing shows with it, so the next question reads only what has changed. A listing is as old as its first question: make a new one after work.
"""

import threading
import zlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from interp_assets.errors import StoreMissingError
from interp_assets.storage.manifest import MANIFEST
from interp_assets.storage.seen import SeenFiles
from interp_assets.storage.store import ObjectInfo, Store

_QUESTION = "manifest"
_KEPT_BYTES = 64 << 20
"""Of manifests that are held in memory, because several ask for them: those of some ten thousand shards."""


def list_store(store: Store, notes: SeenFiles) -> "ListedStore":
    """Return a store as it is now. Notes serve where it is a bucket: a file is read as fast as a note of it."""
    return ListedStore(store, notes if store.url.startswith("s3://") else None)


class ListedStore(Store):
    """A store as it was when it was listed; what is no manifest, and all that is written, goes to the store itself."""

    def __init__(self, store: Store, notes: SeenFiles | None = None) -> None:
        """List nothing yet. `notes` keeps what manifests say between processes."""
        vars(self).update(vars(store))
        self._store, self._notes, self._lock = store, notes, threading.Lock()
        self._objects: dict[str, ObjectInfo] = {}
        self._files: defaultdict[str, list[ObjectInfo]] = defaultdict(list)
        self._folders: defaultdict[str, set[str]] = defaultdict(set)
        self._listed: set[str] = set()
        self._kept: dict[str, bytes] = {}
        self._n_kept = 0

    def get(self, path: str) -> bytes:
        """Read a whole object; a manifest that the listing has not is not asked for. Raises `StoreMissingError`."""
        if path.rpartition("/")[2] != MANIFEST or "/" not in path:
            return self._store.get(path)
        if path in self._kept:
            return self._kept[path]
        self._look(path)
        found = self._objects.get(path)
        if found is None:
            raise StoreMissingError(f"There is no {self.url}/{path}.")
        data = self._read(path, found)
        self._n_kept += len(data)
        if self._n_kept <= _KEPT_BYTES:
            self._kept[path] = data
        return data

    def _read(self, path: str, found: ObjectInfo) -> bytes:
        if not self._notes or not found.tag:
            return self._store.get(path)
        name, stamp = Path(f"{self.url}/{path}"), f"{found.tag} {found.n_bytes}"
        with self._lock:
            noted = self._notes.recall(name, stamp, _QUESTION)
        if noted is not None:
            return zlib.decompress(noted)
        data = self._store.get(path)
        with self._lock:
            self._notes.keep(name, stamp, _QUESTION, zlib.compress(data, 1))
        return data

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """List the objects under a folder, as they were."""
        if not prefix:
            yield from self._store.list()
            return
        self._look(prefix)
        due = [prefix]
        while due:
            folder = due.pop()
            yield from self._files.get(folder, ())
            due += self._folders.get(folder, ())

    def _look(self, path: str) -> None:
        """List the folder of a stage, the first time."""
        top = path.partition("/")[0]
        with self._lock:
            if top not in self._listed:
                self._list_folder(top)
                self._listed.add(top)

    def _list_folder(self, top: str) -> None:
        for item in self._store.list(top):
            self._objects[item.path] = item
            folder = item.path.rpartition("/")[0]
            self._files[folder].append(item)
            while "/" in folder and folder not in self._folders[above := folder.rpartition("/")[0]]:
                self._folders[above].add(folder)
                folder = above
