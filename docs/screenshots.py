"""A bundle becomes the pictures of the documentation: the pages in a real browser, light and dark, wide and narrow.

    python docs/screenshots.py data/pystdlib --feature 17 --out docs/images

Needs Chromium (`apt-get install --no-install-recommends chromium`) and the built pages (`python frontend/build.py`).
"""

import argparse
import sys
import threading
import time
from pathlib import Path
from typing import Final, NamedTuple

import uvicorn
from playwright.sync_api import Browser, sync_playwright

from interp_assets.web.opened import find_bundles
from interp_assets.web.server import make_app

FLAGS: Final = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run"]
FEATURE: Final = "article section"
ROWS: Final = ".row .context"


class Shot(NamedTuple):
    """One picture: file name, part of the address after the bundle, what must be there first, colours, size of the window."""

    name: str
    path: str
    wait_for: str
    scheme: str
    width: int
    height: int


def main() -> int:
    """Take all pictures."""
    parser = argparse.ArgumentParser(description="Take pictures of the feature browser.")
    parser.add_argument("bundle", help="a bundle, or a folder above it")
    parser.add_argument("--feature", type=int, default=0, help="which feature to show")
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
    shots = [
        Shot("feature-page", f"/{options.feature}", FEATURE, "light", 1280, 900),
        Shot("feature-page-dark", f"/{options.feature}", FEATURE, "dark", 1280, 900),
        Shot("feature-page-narrow", f"/{options.feature}", FEATURE, "light", 390, 844),
        Shot("feature-list", "", ROWS, "light", 1280, 900),
        Shot("feature-list-dark", "", ROWS, "dark", 1280, 900),
        Shot("feature-list-narrow", "", ROWS, "light", 390, 844),
    ]
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=options.chromium, args=FLAGS)
        for shot in shots:
            path = options.out / f"{shot.name}.png"
            _take(browser, f"http://127.0.0.1:{port}/#/{places[0].name}{shot.path}", shot, path)
            sys.stdout.write(f"{path}\n")
        browser.close()
    server.should_exit = True
    return 0


def _take(browser: Browser, address: str, shot: Shot, path: Path) -> None:
    context = browser.new_context(viewport={"width": shot.width, "height": shot.height}, color_scheme="dark" if shot.scheme == "dark" else "light")
    page = context.new_page()
    page.goto(address)
    page.wait_for_selector(shot.wait_for)
    page.wait_for_timeout(1500)  # names of neighbours and examples of the rows come a moment later
    page.screenshot(path=path)
    context.close()


if __name__ == "__main__":
    raise SystemExit(main())
