"""Bundles become the pictures of the documentation: a feature and an attention head in a real browser, light and dark.

    python docs/screenshots.py data/pystdlib --feature 1837 --head 3.3 --out docs/images

Needs Chromium (`apt-get install --no-install-recommends chromium`) and the built pages (`python frontend/build.py`).
"""

import argparse
import sys
import threading
import time
from pathlib import Path
from typing import Final, Literal, NamedTuple

import uvicorn
from playwright.sync_api import Browser, sync_playwright

from interp_assets.web.opened import BundlePlace, OpenAttention, find_bundles, open_any
from interp_assets.web.server import make_app

FLAGS: Final = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run"]


class Shot(NamedTuple):
    """One picture: file name, colours, the address after the bundle's, and what is waited for."""

    name: str
    scheme: Literal["light", "dark"]
    path: str
    wait_for: str


SIZE: Final = (1280, 900)


def main() -> int:
    """Take the pictures."""
    parser = argparse.ArgumentParser(description="Take pictures of the feature browser.")
    parser.add_argument("bundle", help="a bundle, or a folder above some")
    parser.add_argument("--feature", type=int, default=0, help="which feature to show, where there is a bundle of features")
    parser.add_argument("--head", default="0.0", help="which attention head to show, where there is a bundle of heads")
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    options = parser.parse_args()
    places = find_bundles(options.bundle)
    server = uvicorn.Server(uvicorn.Config(make_app(places), port=0, log_level="warning"))
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.02)
    port = server.servers[0].sockets[0].getsockname()[1]
    options.out.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=options.chromium, args=FLAGS)
        for place in places:
            for shot in _shots(place, options.feature, options.head):
                path = options.out / f"{shot.name}.png"
                _take(browser, f"http://127.0.0.1:{port}/#/{place.name}/{shot.path}", shot, path)
                sys.stdout.write(f"{path}\n")
        browser.close()
    server.should_exit = True
    return 0


def _shots(place: BundlePlace, feature: int, head: str) -> list[Shot]:
    if isinstance(open_any(place), OpenAttention):
        name, path, wait_for = "attention-head", f"heads/{head}", "article"
    else:
        name, path, wait_for = "feature-page", str(feature), "article section"
    return [Shot(name, "light", path, wait_for), Shot(f"{name}-dark", "dark", path, wait_for)]


def _take(browser: Browser, address: str, shot: Shot, path: Path) -> None:
    context = browser.new_context(viewport={"width": SIZE[0], "height": SIZE[1]}, color_scheme=shot.scheme)
    page = context.new_page()
    page.goto(address)
    page.wait_for_selector(shot.wait_for)
    page.wait_for_timeout(1500)  # names of neighbours come a moment later
    page.screenshot(path=path)
    context.close()


if __name__ == "__main__":
    raise SystemExit(main())
