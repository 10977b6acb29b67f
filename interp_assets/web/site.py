"""Bundles become a folder that any static host can serve: the built pages, the bundles' files, and `site.json`.

    index.html, assets/     the pages, as `interp serve` sends them
    site.json               {"mode": "static", "bundles": [...]}: tells the pages that no server answers
    bundles/<name>/...      the files of each bundle, unchanged, its manifest included
    sweeps/<name>.json      what the SAEs of each pipeline are compared by

The pages then sort, filter, search and open features by range requests alone. What needs a server is off there, and the pages say so: search by
example, labels and notes. A host has to answer `Range` requests (nginx, Apache, S3 and all object stores do; Python's `http.server` does not).
The pages check nothing there: `interp verify <folder>/bundles` does.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from interp_assets.errors import ConfigError
from interp_assets.storage.manifest import MANIFEST
from interp_assets.storage.store import Store
from interp_assets.web.comparison import describe_comparison, find_pipelines
from interp_assets.web.opened import BundlePlace, open_any
from interp_assets.web.server import STATIC, summarize

_PIECE: Final = 16 << 20


class SiteExport(NamedTuple):
    """What was written."""

    n_files: int
    n_bytes: int


def export_site(
    places: Sequence[BundlePlace],
    out: Store,
    *,
    pipelines: Mapping[str, Store] | None = None,
    static: Path = STATIC,
    progress: Callable[[int], None] | None = None,
) -> SiteExport:
    """Write pages, bundles and comparisons of SAEs into `out`; `progress` is advanced by bytes. `pipelines`: folders that no bundle lies in.

    Raises `ConfigError` when the pages are not built, and `ArtifactError` for a bundle that cannot be read.
    """
    if not (static / "index.html").exists():
        raise ConfigError(f"There are no built pages in {static}. Run `python frontend/build.py`, then export again.")
    bundles = [(place, open_any(place)) for place in places]
    n_files, n_bytes = 0, 0
    for path in sorted(path for path in static.rglob("*") if path.is_file()):
        out.put(path.relative_to(static).as_posix(), path.read_bytes())
        n_files, n_bytes = n_files + 1, n_bytes + path.stat().st_size
    for place, bundle in bundles:
        for entry in bundle.manifest.files:
            with out.open_writer(f"bundles/{bundle.name}/{entry.name}") as sink:
                for start in range(0, entry.n_bytes, _PIECE):
                    for piece in bundle.stream(entry.name, start, min(_PIECE, entry.n_bytes - start)):
                        sink.write(piece)
                        if progress:
                            progress(len(piece))
            n_files, n_bytes = n_files + 1, n_bytes + entry.n_bytes
        out.put(f"bundles/{bundle.name}/{MANIFEST}", place.store.get(f"{place.path}/{MANIFEST}"))
    compared = {**find_pipelines(places), **(pipelines or {})}
    for name, store in compared.items():
        data = json.dumps(describe_comparison(store), allow_nan=False).encode()
        out.put(f"sweeps/{name}.json", data)
        n_files, n_bytes = n_files + 1, n_bytes + len(data)
    site = {"mode": "static", "bundles": [summarize(bundle) for _, bundle in bundles], "sweeps": list(compared)}
    out.put("site.json", json.dumps(site).encode())
    return SiteExport(n_files + len(bundles) + 1, n_bytes)
