"""A folder or bucket becomes a list of faults: every block of every file of every artifact is read and compared with its manifest.

For each folder that holds a `manifest.json`: the manifest's own seal, its id (which must follow from its identity and inputs, and end the
folder's name), each file's presence, size and blocks, and files that it does not list. Files under a pipeline that belong to no artifact
are what an interrupted write left. All faults are collected; nothing is changed. Memory: one block.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Final, NamedTuple

from interp_assets.errors import InputError, InterpError
from interp_assets.storage.manifest import CONFIGURATION, MANIFEST, PLAN, FileEntry, Manifest, make_ref, read_manifest, read_range
from interp_assets.storage.store import ObjectInfo, Store, open_store

_LABEL_DIGITS: Final = 12
_ARTIFACT: Final = re.compile(r"-[0-9a-f]{12}$")
_PLAN: Final = re.compile(re.escape(PLAN.removesuffix(".json")) + r"(\.candidate-\d{6})?\.json")


class Place(NamedTuple):
    """Something in a store: the store, and the path in it."""

    store: Store
    path: str


class Fault(NamedTuple):
    """One thing that is wrong: the object's path in the store, and a predicate of it: what it is or does, and what to do."""

    path: str
    what: str


class Tree(NamedTuple):
    """The objects below a path, sorted into artifacts."""

    artifacts: dict[str, list[ObjectInfo]]
    """Folder of each artifact -> its objects, the manifest included."""
    strays: list[ObjectInfo]
    """Objects that belong to no artifact."""

    @property
    def n_bytes(self) -> int:
        """Size of all artifacts."""
        return sum(item.n_bytes for items in self.artifacts.values() for item in items)


def locate(address: str) -> Place:
    """Find what a person points at: a folder, or an s3:// address. Raises `InputError` when there is nothing."""
    address = address.rstrip("/")
    if "://" in address:
        parent, _, name = address.rpartition("/")
        bucket_is_whole = parent.endswith(":/")
        return Place(open_store(address), "") if bucket_is_whole else Place(open_store(parent), name)
    path = Path(address).expanduser().resolve()
    if path.is_file() and path.name == MANIFEST:
        path = path.parent
    if not path.is_dir():
        raise InputError(f"There is no folder {path}. Name an artifact's folder, or any folder above artifacts.")
    return Place(open_store(str(path.parent)), path.name)


def verify_tree(store: Store, prefix: str = "", progress: Callable[[int], None] | None = None) -> list[Fault]:
    """Verify every artifact below `prefix`, and return all faults; `progress` advances by bytes, up to `list_tree(...).n_bytes`."""
    tree = list_tree(store, prefix)
    faults = [fault for path in sorted(tree.artifacts) for fault in verify_artifact(store, path, tree.artifacts[path], progress)]
    return faults + [Fault(item.path, "belongs to no artifact: an interrupted write left it. The next run replaces it.") for item in tree.strays]


def list_tree(store: Store, prefix: str = "") -> Tree:
    """Sort the objects below `prefix` into artifacts.

    Plans and configurations, and what lies in folders whose names start with a dot, are left out.
    """
    objects = [item for item in store.list(prefix) if not _is_hidden(item.path, prefix)]
    folders = {item.path.rpartition("/")[0] for item in objects if item.path.rpartition("/")[2] == MANIFEST}
    artifacts: dict[str, list[ObjectInfo]] = {folder: [] for folder in folders}
    strays = []
    for item in objects:
        owner = next((folder for folder in map(str, PurePosixPath(item.path).parents) if folder in folders), None)
        if owner is not None:
            artifacts[owner].append(item)
        elif not _is_plan(item.path) and item.path.rpartition("/")[2] != CONFIGURATION:
            strays.append(item)
    return Tree(artifacts, sorted(strays))


def verify_artifact(store: Store, path: str, objects: list[ObjectInfo], progress: Callable[[int], None] | None = None) -> Iterator[Fault]:
    """Verify the artifact at `path`, of which `objects` are there; yield its faults."""
    try:
        manifest = read_manifest(store, path)
    except InterpError as error:
        yield _explain(store, f"{path}/{MANIFEST}", error)
        return
    yield from _verify_id(path, manifest)
    sizes = {item.path.removeprefix(f"{path}/"): item.n_bytes for item in objects}
    for entry in manifest.files:
        yield from _verify_file(store, path, manifest, entry, sizes.pop(entry.name, None), progress)
    del sizes[MANIFEST]
    for name in sorted(sizes):
        yield Fault(f"{path}/{name}", "is not listed in its manifest. Delete it.")


def _verify_id(path: str, manifest: Manifest) -> Iterator[Fault]:
    wanted = make_ref(manifest.kind, "", identity=manifest.identity, inputs=manifest.inputs, label="").artifact_id
    if manifest.artifact_id != wanted:
        yield Fault(f"{path}/{MANIFEST}", f"claims the id {manifest.artifact_id}; its identity and inputs give {wanted}. Materialize it again.")
    elif not path.endswith(f"-{wanted[:_LABEL_DIGITS]}"):
        yield Fault(path, f"holds {manifest.kind} {wanted[:_LABEL_DIGITS]}, which belongs into a folder that ends so. It was moved; move it back.")


def _verify_file(
    store: Store, path: str, manifest: Manifest, entry: FileEntry, n_bytes: int | None, progress: Callable[[int], None] | None
) -> Iterator[Fault]:
    where = f"{path}/{entry.name}"
    if n_bytes is None:
        yield Fault(where, "is missing, though its manifest lists it. Materialize its partition again.")
        return
    if n_bytes != entry.n_bytes:
        yield Fault(where, f"has {n_bytes:,} bytes, its manifest says {entry.n_bytes:,}. Materialize its partition again.")
    for start in range(0, min(entry.n_bytes, n_bytes), entry.block_bytes):
        stop = min(start + entry.block_bytes, entry.n_bytes)
        try:
            read_range(store, path, manifest, entry.name, start, stop - start)
        except InterpError as error:
            yield _explain(store, where, error)
            if n_bytes != entry.n_bytes:
                return
        if progress is not None:
            progress(stop - start)


def _explain(store: Store, path: str, error: InterpError) -> Fault:
    """Make a fault of an error, whose message may begin with the object's address."""
    return Fault(path, str(error).removeprefix(f"{store.url}/{path} ") if str(error).startswith(f"{store.url}/{path} ") else f"fails: {error}")


def _is_plan(path: str) -> bool:
    """Say whether a file that belongs to no artifact is a pipeline's plan, or a candidate's; that of a shuffle lies in an artifact's folder."""
    folder, _, name = path.rpartition("/")
    return bool(_PLAN.fullmatch(name)) and not _ARTIFACT.search(folder)


def _is_hidden(path: str, prefix: str) -> bool:
    return any(part.startswith(".") for part in path.removeprefix(prefix).split("/"))
