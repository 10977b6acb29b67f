"""A server with invented bundles that browser tests visit, and what these ask of a page.

Without Chromium the tests are skipped with the reason, except where `CI` is set: there its absence is a failure. Pictures of the pages:
`python docs/screenshots.py`.
"""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import uvicorn
from chromium import Visit, skip_or_fail
from synthetic_bundle import build_synthetic_bundle
from synthetic_heads import build_synthetic_heads

from interp_assets.errors import InputError
from interp_assets.storage.manifest import create_artifact, make_ref
from interp_assets.storage.store import Store, open_store
from interp_assets.web.files import parse_range
from interp_assets.web.labels import import_labels
from interp_assets.web.opened import OpenBundle, list_bundles
from interp_assets.web.server import STATIC, Desk, make_app
from interp_assets.web.table import FeatureTable

NARROW = {"width": 390, "height": 844}
REPOSITORY = Path(__file__).parents[2]


class Site(NamedTuple):
    """A running server: its address, the names of its good bundles, and where they lie."""

    address: str
    name: str
    second: str
    sinks: str
    """Of an SAE that meets attention sinks: rows are left out and outliers, feature 2 fires where contexts begin, the map is of little worth."""
    store: Store
    heads: str
    """The bundle of attention heads."""

    def page(self, path: str = "") -> str:
        """Return the address of a page of the first bundle."""
        return self.page_of(self.name, path)

    def page_of(self, name: str, path: str = "") -> str:
        """Return the address of a page of a bundle."""
        return f"{self.address}/#/{name}{path}"

    def bundle(self, name: str = "") -> OpenBundle:
        """Open a bundle as the server does; the first unless another is named."""
        return OpenBundle(next(place for place in list_bundles(self.store) if place.name == (name or self.name)))


class Fixed:
    """Stands for model and SAE: feature 3 fires on the second token, feature 1 on all but the first."""

    def ask(self, text: str, latent: int | None = None) -> dict:
        """Answer the same for every text but one."""
        if text == "break":
            raise InputError("The text cannot be run.")
        features = [{"latent": 3, "max": 2.5, "activations": [[1, 2.5]]}, {"latent": 1, "max": 1.0, "activations": [[1, 0.5], [2, 1.0]]}]
        if latent not in (None, 1, 3):
            features.append({"latent": latent, "max": 0.0, "activations": []})
        return {"tokens": [0, 5, 6], "masked": [0], "l0": 1.5, "features": features, "by_token": [[], [[3, 2.5], [1, 0.5]], [[1, 1.0]]]}


@contextmanager
def serve_site(folder: Path) -> Iterator[Site]:
    """Serve invented bundles with the pages built from these sources: 300 features, 40 of two other SAEs, attention heads, a newer version."""
    built = subprocess.run([sys.executable, str(REPOSITORY / "frontend" / "build.py")], check=False, capture_output=True, text=True)
    if built.returncode:
        skip_or_fail(f"the pages cannot be built: {built.stderr.strip()}")
    store = open_store(str(folder / "served"))
    build_synthetic_bundle(store, n_features=300)
    build_synthetic_bundle(store, n_features=40, seed=1, sae="second")
    build_synthetic_bundle(store, n_features=40, seed=2, sae="sinks", has_sinks=True)
    heads = build_synthetic_heads(store).ref.path.rsplit("/", 1)[-1]
    with create_artifact(store, make_ref("feature_bundle", "6-web", identity={}, inputs={}, label="newer")) as art:
        art.put("bundle.json", json.dumps({"format": "interp-assets/feature-bundle", "version": 99}).encode())
    places = list_bundles(store)
    name, second, sinks = (next(place.name for place in places if place.name.startswith(sae)) for sae in ("synthetic", "second", "sinks"))
    labels = folder / "labels.csv"
    labels.write_text("latent,label,source,score\n4,<b>hostile</b> label,gpt,0.5\n9,Zebra,hand,\n4,worse label,gpt,0.1\n")
    import_labels(OpenBundle(next(place for place in places if place.name == name)), labels)
    (folder / "notes").mkdir()
    desk = Desk(folder / "notes", {name: Fixed(), sinks: Fixed()})
    server = uvicorn.Server(uvicorn.Config(make_app(places, static=STATIC, desk=desk), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield Site(f"http://127.0.0.1:{port}", name, second, sinks, store, heads)
    server.should_exit = True
    thread.join(10)


class RangeHandler(SimpleHTTPRequestHandler):
    """What any static host does: files, and single ranges of them."""

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if "Range" not in self.headers or not path.is_file():
            super().do_GET()
            return
        data = path.read_bytes()
        span = parse_range(self.headers["Range"], len(data))
        assert span
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {span.start}-{span.start + span.n_bytes - 1}/{len(data)}")
        self.send_header("Content-Length", str(span.n_bytes))
        self.end_headers()
        self.wfile.write(data[span.start : span.start + span.n_bytes])

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def serve_files(folder: Path) -> Iterator[str]:
    """Serve a folder as a static host would; gives its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(RangeHandler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def heading(visit: Visit) -> str:
    """Return the page's title."""
    return visit.page.locator("h1").inner_text()


def colour(visit: Visit, selector: str, name: str) -> str:
    """Return a computed property of the first element that matches."""
    return visit.page.locator(selector).first.evaluate(f"element => getComputedStyle(element).{name}")


def until(visit: Visit, expression: str) -> None:
    """Wait until `expression` holds in the page. Playwright's own way evaluates strings in the page, which our policy forbids."""
    for _ in range(600):
        if visit.page.evaluate(expression):
            return
        visit.page.wait_for_timeout(25)
    pytest.fail(f"never became true: {expression}")


def table_of(site: Site) -> FeatureTable:
    """Return the table of the first bundle."""
    return site.bundle().table()


def cosine_of(site: Site, *features: tuple[str, int]) -> float:
    """Compute a cosine from the rows that the bundles hold."""
    rows = []
    for name, latent in features:
        bundle = site.bundle(name)
        width = bundle.description["directions"]["width"]
        rows.append(np.frombuffer(bundle.read("map/directions.bin"), np.int8).reshape(-1, width)[latent].astype(float))
    return float(rows[0] @ rows[1] / np.linalg.norm(rows[0]) / np.linalg.norm(rows[1]))


def percent(share: float) -> str:
    """Write a share of a tenth of a percent or more as the pages do: two digits, or whole percents from 10 on."""
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:#.2g} %"


def fits(visit: Visit) -> bool:
    """Say whether nothing is wider than the window, once what follows its size has been drawn anew."""
    return visit.page.evaluate(
        """async () => {
            for (let i = 0; i < 60 && document.documentElement.scrollWidth > innerWidth; i++) await new Promise(go => setTimeout(go, 50));
            return document.documentElement.scrollWidth <= innerWidth;
        }"""
    )
