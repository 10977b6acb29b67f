"""A bundle becomes the pictures of the documentation: a feature in a real browser, light and dark.

    python docs/screenshots.py data/pystdlib --feature 1837 --out docs/images

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

from interp_assets.web.opened import find_bundles
from interp_assets.web.server import make_app

FLAGS: Final = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run"]
FEATURE: Final = "article section"


class Shot(NamedTuple):
    """One picture: file name and colours."""

    name: str
    scheme: Literal["light", "dark"]


SHOTS: Final = [Shot("feature-page", "light"), Shot("feature-page-dark", "dark")]
SIZE: Final = (1280, 900)


def main() -> int:
    """Take the pictures."""
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
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=options.chromium, args=FLAGS)
        for shot in SHOTS:
            path = options.out / f"{shot.name}.png"
            _take(browser, f"http://127.0.0.1:{port}/#/{places[0].name}/{options.feature}", shot, path)
            sys.stdout.write(f"{path}\n")
        browser.close()
    server.should_exit = True
    return 0


def _take(browser: Browser, address: str, shot: Shot, path: Path) -> None:
    context = browser.new_context(viewport={"width": SIZE[0], "height": SIZE[1]}, color_scheme=shot.scheme)
    page = context.new_page()
    page.goto(address)
    page.wait_for_selector(FEATURE)
    page.wait_for_timeout(1500)  # names of neighbours come a moment later
    page.screenshot(path=path)
    context.close()


if __name__ == "__main__":
    raise SystemExit(main())
