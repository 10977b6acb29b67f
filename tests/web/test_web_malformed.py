"""Bundles come from elsewhere and may be wrong in any way: that one is broken, with the reason; the others are served, and nothing ends in 500."""

import asyncio
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from synthetic_bundle import build_synthetic_bundle

from interp_assets.errors import ArtifactCorruptError, StoreError
from interp_assets.storage.manifest import create_artifact, encode_manifest, make_ref, read_manifest
from interp_assets.storage.store import open_store
from interp_assets.web.opened import list_bundles
from interp_assets.web.server import make_app

VALUES = (None, True, -1, 0, 1 << 80, 1e308, "x", "\ud800", [], {}, [[]], {"a": None}, float("nan"), float("inf"))
ROUTES = (
    *("", "/features", "/features?sort=max&descending=true&life=live", "/features?q=def", "/features?filter=max>0", "/features?sort=nothing"),
    *("/rows?latent=0&latent=19", "/place?latent=3&sort=count", "/place?latent=3&q=def", "/labels?latent=3", "/notes", "/try?text=x"),
)
Edit = Callable[[Path], None]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a good bundle of twenty features."""
    root = tmp_path_factory.mktemp("good")
    made = build_synthetic_bundle(open_store(str(root)), n_features=20, n_documents=8)
    return root / made.ref.path


def ask_all(root: Path) -> list[tuple[str, int]]:
    """Ask every route of every damaged bundle, and check that the good one answers beside them."""
    app = make_app(list_bundles(open_store(str(root))), static=root / "none")
    damaged = sorted(path.name for path in (root / "6-web").iterdir() if path.name != "good")

    async def ask() -> list[tuple[str, int]]:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            listed = (await client.get("/api/bundles")).json()["bundles"]
            assert {item["name"] for item in listed} <= {*damaged, "good"}
            assert "error" not in next(item for item in listed if item["name"] == "good")
            for item in listed:
                if "error" in item:
                    assert item["error"]["what"]
            assert (await client.get("/api/bundles/good/features")).status_code == 200
            paths = [f"/api/bundles/{bad}{route}" for bad in damaged for route in ROUTES] + [
                f"/bundles/{bad}/{file}" for bad in damaged for file in FILES
            ]
            return [(path, (await client.get(path, headers={"Range": "bytes=0-9"})).status_code) for path in paths]

    return asyncio.run(ask())


FILES = ("bundle.json", "words.json", "vocabulary.json", "records/00000.bin", "records/00000.idx", "list/rows.bin", "search/postings.idx", "none")


def copies(good: Path, tmp_path: Path, n: int = 1) -> tuple[Path, list[Path]]:
    """Return a root with the good bundle, and copies of it to damage."""
    root = tmp_path / "root"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(good, root / "6-web" / "good")
    return root, [Path(shutil.copytree(good, root / "6-web" / f"bad-{i:02d}")) for i in range(n)]


def check(root: Path) -> None:
    """No answer of a damaged bundle is a 500."""
    assert not [(path, status) for path, status in ask_all(root) if status == 500]


def check_all(good: Path, tmp_path: Path, damages: Sequence[Edit]) -> None:
    """Damage a copy of the bundle in each of these ways, and check them beside each other, some in one server."""
    for start in range(0, len(damages), 40):
        edits = damages[start : start + 40]
        root, copied = copies(good, tmp_path, len(edits))
        for edit, bad in zip(edits, copied, strict=True):
            edit(bad)
        check(root)


def sealed(bad: Path, name: str, data: bytes) -> None:
    """Put other bytes into a bundle, with checksums and seal that agree: what whoever makes a bundle can do."""
    manifest = read_manifest(open_store(str(bad.parent)), bad.name)
    with create_artifact(open_store("memory://seal"), make_ref("feature_bundle", "x", identity={}, inputs={}, label="x"), replace=True) as art:
        art.put(name, data)
    assert art.manifest
    own = art.manifest.file(name)
    files = [
        replace(entry, n_bytes=own.n_bytes, block_bytes=own.block_bytes, checksums=own.checksums) if entry.name == name else entry
        for entry in manifest.files
    ]
    (bad / name).write_bytes(data)
    (bad / "manifest.json").write_bytes(encode_manifest(replace(manifest, files=files)))


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Name every place in a JSON document, the first of each list."""
    if path:
        yield path
    items = content.items() if isinstance(content, dict) else list(enumerate(content))[:1] if isinstance(content, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def changed(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Return a copy with another value at a place."""
    copy = json.loads(json.dumps(content))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    if value is KeyError and isinstance(inner, dict):
        del inner[path[-1]]
    else:
        inner[path[-1]] = None if value is KeyError else value
    return copy


def test_other_values_in_a_description_break_that_bundle_alone(good: Path, tmp_path: Path) -> None:
    """Each key of `bundle.json` away, and with a value of every other kind."""
    content = json.loads((good / "bundle.json").read_text())

    def others() -> Iterator[bytes]:
        for i, path in enumerate(place for place in places(content) if "distributions" not in place):
            for value in (KeyError, VALUES[i % len(VALUES)], VALUES[(i + 5) % len(VALUES)]):
                yield json.dumps(changed(content, path, value)).encode()

    check_all(good, tmp_path, [partial(sealed, name="bundle.json", data=data) for data in others()])


@pytest.mark.parametrize("name", ["words.json", "vocabulary.json", "list/rows.bin", "list/max.order", "search/postings.idx", "records/00000.idx"])
def test_other_bytes_in_a_file_break_that_bundle_alone(good: Path, tmp_path: Path, name: str) -> None:
    """Empty, short, long, of the highest numbers, of no numbers, and JSON of every other kind; sealed as if all were well."""
    data = (good / name).read_bytes()
    others = (b"", data[:-1], data[: len(data) // 2], data * 2, b"\xff" * len(data), bytes(len(data)), b"[" * 100_000, b"{}", b'{"words": [1]}')
    check_all(good, tmp_path, [partial(sealed, name=name, data=other) for other in others])


def test_another_manifest_breaks_that_bundle_alone(good: Path, tmp_path: Path) -> None:
    """Sizes below nothing and beyond all disks, no checksums, names that are numbers; sealed."""
    manifest = read_manifest(open_store(str(good.parent)), good.name)

    def others() -> Iterator[bytes]:
        for field in ("n_bytes", "block_bytes", "checksums", "name"):
            for value in VALUES:
                if value == "\ud800" or (isinstance(value, float) and not math.isfinite(value)):
                    continue  # no manifest can be sealed with these
                files = [replace(manifest.files[0]), *manifest.files[1:]]
                object.__setattr__(files[0], field, value)
                yield encode_manifest(replace(manifest, files=files))
        yield from (b"", b"[]", b"null", b"[" * 100_000, (good / "manifest.json").read_bytes()[:-9])

    check_all(good, tmp_path, [partial(_write_manifest, data=data) for data in others()])


def _write_manifest(bad: Path, data: bytes) -> None:
    (bad / "manifest.json").write_bytes(data)


def _as_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _as_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


@pytest.mark.parametrize("edit", [_as_pipe, _as_folder, _as_loop, Path.unlink, lambda path: path.chmod(0)])
@pytest.mark.parametrize("name", ["manifest.json", "bundle.json", "words.json", "list/rows.bin", "records/00000.bin"])
@pytest.mark.timeout(60)
def test_what_is_no_file_breaks_that_bundle_alone(good: Path, tmp_path: Path, name: str, edit: Edit) -> None:
    """A pipe that nobody writes to would hang the server at its start; a link to itself, a folder, a closed file."""
    root, (bad,) = copies(good, tmp_path)
    edit(bad / name)
    check(root)


def test_a_pipe_is_refused_by_every_way_of_reading(tmp_path: Path) -> None:
    """Reading it waits for ever."""
    store = open_store(str(tmp_path))
    os.mkfifo(tmp_path / "pipe")
    for read in (lambda: store.get("pipe"), lambda: store.get_ranges("pipe", [0], [4]), lambda: store.get_into("pipe", 0, memoryview(bytearray(4)))):
        with pytest.raises(StoreError, match="is a pipe"):
            read()


def test_a_manifest_whose_sizes_do_not_count_is_refused(good: Path, tmp_path: Path) -> None:
    """Memory is allocated, and ranges are cut, by these numbers."""
    _, (bad,) = copies(good, tmp_path)
    store = open_store(str(bad.parent))
    manifest = read_manifest(store, bad.name)
    object.__setattr__(manifest.files[0], "n_bytes", -4)
    (bad / "manifest.json").write_bytes(encode_manifest(manifest))
    with pytest.raises(ArtifactCorruptError, match="fields of a manifest"):
        read_manifest(store, bad.name)
