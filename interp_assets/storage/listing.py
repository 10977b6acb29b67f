"""The state of a store becomes a few listings: which artifacts are there is asked once a folder, not once an artifact.

A pipeline of 10,000 shards has as many manifests an asset. Whoever asks for all of them (what is missing? what will be made?) lists each stage's
folder once, 1,000 objects a request, and knows which exist. What a manifest says has to be read once; from a bucket it is noted, by the tag that
the listing shows with it, so the next question reads only what has changed. A listing is as old as its first question: make a new one after work.

Reading a manifest is cheap beside parsing it and checking its seal, so a process does that once for all its listings (the plan's, the forecast's,
the run's): by an object's tag in a bucket, and by a file's stamp in a folder, which counts under the rule of `seen.py`. Other stores have neither.
"""

import threading
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, TypeVar

from interp_assets.errors import StoreMissingError
from interp_assets.storage.manifest import MANIFEST
from interp_assets.storage.seen import SETTLED_NS, SeenFiles, stamp_file
from interp_assets.storage.store import ObjectInfo, Store

T = TypeVar("T")
_QUESTION: Final = "manifest"
_KEPT_BYTES: Final = 64 << 20
"""Of manifests whose content is held in memory, in three times as much: those of some twenty thousand shards."""


def list_store(store: Store, notes: SeenFiles) -> "ListedStore":
    """Return a store as it is now; one that is listed already is as it was. Notes serve where it is a bucket: a file is read as fast as a note."""
    if isinstance(store, ListedStore):
        return store
    return ListedStore(store, notes if store.url.startswith("s3://") else None)


class _Parsed:
    """What was parsed of objects, by name and stamp; of too many the oldest go."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[str, int, Any]] = {}
        self._n_bytes = 0
        self._lock = threading.Lock()

    def find(self, name: str, stamp: str) -> Any:
        """Return what was parsed of an object that had this stamp, or None."""
        found = self._found.get(name)
        return found[2] if found and found[0] == stamp else None

    def keep(self, name: str, stamp: str, n_bytes: int, value: object) -> None:
        """Hold what was parsed of `n_bytes`."""
        with self._lock:
            self._drop(name)
            self._found[name] = stamp, n_bytes, value
            self._n_bytes += n_bytes
            while self._n_bytes > _KEPT_BYTES:
                self._drop(next(iter(self._found)))

    def clear(self) -> None:
        """Hold nothing."""
        with self._lock:
            self._found.clear()
            self._n_bytes = 0

    def _drop(self, name: str) -> None:
        _, n_bytes, _ = self._found.pop(name, ("", 0, None))
        self._n_bytes -= n_bytes


_SHARED: Final = _Parsed()
"""What this process has parsed of objects whose stamps tell every change."""


def forget_parsed() -> None:
    """Parse everything anew, as a fresh process does: for who measures that."""
    _SHARED.clear()


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
        self._parsed = _Parsed()

    def get(self, path: str) -> bytes:
        """Read a whole object; a manifest that the listing has not is not asked for. Raises `StoreMissingError`."""
        if path.rpartition("/")[2] != MANIFEST or "/" not in path:
            return self._store.get(path)
        return self._read(path, self._find(path))

    def parse(self, path: str, parse: Callable[[bytes, str], T]) -> T:
        """Return what a whole object says; of a manifest that is asked once, and `parse` always has to be the same. Raises like it and `get`."""
        if path.rpartition("/")[2] != MANIFEST or "/" not in path:
            return self._store.parse(path, parse)
        if (known := self._parsed.find(path, "")) is not None:
            return known
        found, where = self._find(path), f"{self.url}/{path}"
        stamp = self._stamp(path, found)
        value = _SHARED.find(where, stamp) if stamp else None
        if value is None:
            value = parse(self._read(path, found), where)
            if stamp and stamp == self._stamp(path, found):
                _SHARED.keep(where, stamp, found.n_bytes, value)
        self._parsed.keep(path, "", found.n_bytes, value)
        return value

    def _find(self, path: str) -> ObjectInfo:
        self._look(path)
        if path not in self._objects:
            raise StoreMissingError(f"There is no {self.url}/{path}.")
        return self._objects[path]

    def _stamp(self, path: str, found: ObjectInfo) -> str:
        """Return what tells an object from a changed one; nothing where that is uncertain, as of a file that changed just now."""
        local = self.local_path(path)
        if local is None:
            return f"{found.tag} {found.n_bytes}" if found.tag and self.url.startswith("s3://") else ""
        try:
            stamp, changed_ns = stamp_file(local)
        except OSError:
            return ""
        return stamp if time.time_ns() - changed_ns >= SETTLED_NS else ""

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
