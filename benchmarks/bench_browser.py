"""The feature browser at sizes of up to ten million features: a real Chromium against `interp serve`, from a folder and from an S3 server.

    python benchmarks/bench_browser.py                                   small: 20,000 features, ends within 45 s on 2 cores
    python benchmarks/bench_browser.py --features 10000000 --root /data  the size of the goals; the bundle is made once (2 minutes, 3 GB) and kept
    python benchmarks/bench_browser.py --features 10000000 --root /data --s3    the same files from SeaweedFS on this machine
    python benchmarks/bench_browser.py --features 10000000 --root /data --static    the same files from a plain file server with ranges
    python benchmarks/bench_browser.py --heads                           pages of attention heads: CPU of the page's main thread, within 90 s
    python benchmarks/bench_browser.py --steer                           the panel Steer on the demo's data (`make demo SERVE=0` makes them): seconds

Sketch before code: a page of an unfiltered list is 0.4 kB of an order and 100 rows of 76 bytes. A filter reads its column and the order, 80 MB at
ten million, 20 ms at memory speed, and gathers a mask through the order, 50 ms. A search reads 4 bytes a posting. So everything below 2 s that is
asked for is bound by the browser and by HTTP, unless something holds the table or walks all rows in Python.

Features are invented (`tests/support/scale_bundle.py`): list, orders and index are as long as they say, records repeat. One JSON line a measurement:

    name, value, unit      the median over `--repeat` visits, each with an empty browser cache and its own browser context
    worst, goal            the slowest of them; what issue 6 asks for, null where it asks for nothing
    ours                   this project's value in the same comparison
    ratio_to_floor         engine lines: seconds / seconds of only reading the same column files; null for lines measured in the browser
    ratio_to_best_peer     engine lines: seconds of DuckDB on the same `features.parquet` / ours; above 1 is faster than DuckDB
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
from floors import report
from playwright.sync_api import Browser, Page, sync_playwright

from interp_assets.storage.store import open_store
from interp_assets.web.files import parse_range
from interp_assets.web.opened import OpenBundle, find_bundles
from interp_assets.web.server import STATIC, summarize
from interp_assets.web.table import Query

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run", "--disable-background-networking"]
ROW = ".row .latent a"
SUPPORT = str(Path(__file__).resolve().parents[1] / "tests" / "support")
SEARCHES = ("ber", "raised:quire", "in or")
SHIPPED = "builtin:pystdlib_gpt2"


class Line(NamedTuple):
    """One measurement."""

    name: str
    values: list[float]
    unit: str
    goal: float | None = None
    floor: float | None = None
    peer: float | None = None

    def show(self, context: dict[str, Any]) -> None:
        """Print it as JSON."""
        value = statistics.median(self.values)
        line = {
            "name": self.name,
            "value": round(value, 4),
            "worst": round(max(self.values), 4),
            "unit": self.unit,
            "goal": self.goal,
            "ours": round(value, 4),
            "ratio_to_floor": None if self.floor is None else round(value / self.floor, 2),
            "ratio_to_best_peer": None if self.peer is None else round(self.peer / value, 2),
            **context,
        }
        report(line)


class Server(NamedTuple):
    """A running `interp serve`."""

    process: subprocess.Popen[bytes]
    address: str

    def rss_mb(self) -> float:
        """Return the largest resident size so far."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


@contextmanager
def serving(what: Sequence[str], environment: dict[str, str]) -> Iterator[Server]:
    """Run the server in a process of its own."""
    command = [sys.executable, "-c", "from interp_assets.terminal.cli import main; main()", "serve", *what, "--port", "8600"]
    process = subprocess.Popen(command, env={**os.environ, **environment, "PYTHONUNBUFFERED": "1"}, stdout=subprocess.PIPE, stderr=sys.stderr)
    assert process.stdout
    try:
        words = (word for line in process.stdout for word in line.decode().split())
        address = next(word for word in words if word.startswith("http"))
        _wait_for(address)
        yield Server(process, address)
    finally:
        process.terminate()
        process.wait(20)


def _wait_for(address: str) -> None:
    for _ in range(600):
        try:
            urllib.request.urlopen(f"{address}/api/bundles", timeout=5).read()
        except urllib.error.URLError:
            time.sleep(0.1)
        else:
            return
    message = f"{address} does not answer"
    raise RuntimeError(message)


class RangeFiles(SimpleHTTPRequestHandler):
    """What any static host does: files, and single ranges of them, over connections that stay open."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answer a range, or the whole file."""
        path = Path(self.translate_path(self.path))
        if "Range" not in self.headers or not path.is_file():
            super().do_GET()
            return
        span = parse_range(self.headers["Range"], path.stat().st_size)
        assert span
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {span.start}-{span.start + span.n_bytes - 1}/{path.stat().st_size}")
        self.send_header("Content-Length", str(span.n_bytes))
        self.end_headers()
        with path.open("rb") as file:
            file.seek(span.start)
            self.wfile.write(file.read(span.n_bytes))

    def log_message(self, *_: object) -> None:  # pyright: ignore[reportIncompatibleMethodOverride] - nothing is said, whatever is given
        """Say nothing."""


@contextmanager
def serving_files(site: Path, url: str) -> Iterator[str]:
    """Lay out a site as `interp export site` does, with links instead of copies, and serve it as files."""
    shutil.copytree(STATIC, site)
    (site / "bundles").mkdir()
    places = find_bundles(url)
    for place in places:
        (site / "bundles" / place.name).symlink_to(Path(url, place.path).resolve())
    (site / "site.json").write_text(json.dumps({"mode": "static", "bundles": [summarize(OpenBundle(place)) for place in places]}))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(RangeFiles, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()


class Visit:
    """One browser context, empty at first; it counts what was asked for."""

    def __init__(self, browser: Browser) -> None:
        self.context = browser.new_context(viewport={"width": 1280, "height": 900})
        self.page: Page = self.context.new_page()
        self.ranges: list[Any] = []
        self.page.on("request", lambda request: self.ranges.append(request) if "range" in request.headers else None)

    def close(self) -> None:
        """Forget everything."""
        self.context.close()

    def timed(self, act: Callable[[], Any], shown: str) -> float:
        """Return the seconds from `act` until `shown` holds in the page, looked at before every frame."""
        watch = f"""() => new Promise((done) => {{
            const start = performance.now();
            const isOver = () => ({shown}) || performance.now() - start > 30000;
            const look = () => isOver() ? done(performance.now() - start) : requestAnimationFrame(look);
            look();
        }})"""
        start = time.perf_counter()
        act()
        self.page.evaluate(watch)
        return time.perf_counter() - start


def measure_pages(browser: Browser, address: str, name: str, repeat: int, searches: Sequence[str] = SEARCHES) -> list[Line]:
    """Visit the pages as people do, every time with an empty cache."""
    keys = ("paint", "sort", "filter_sort", "open", "open_whole", "open_requests", "open_bytes", "deep_link", "map", "map_points")
    found: dict[str, list[float]] = {key: [] for key in keys}
    found |= {f"search {text}": [] for text in searches}
    for visit_number in range(repeat):
        visit = Visit(browser)
        page = visit.page
        base = f"{address}/#/{name}"
        has_row = f"document.querySelector('{ROW}') !== null"
        found["paint"].append(visit.timed(lambda page=page, base=base: page.goto(base, wait_until="commit"), has_row))
        _settle(visit)

        def shows(address: str, visit: Visit = visit) -> float:
            """Change the list, and wait until the number of matches and the first row have changed with it."""
            page = visit.page
            done = (
                "document.querySelector('[role=table]')?.dataset.query === location.hash && document.querySelector('.row .latent a, .none') !== null"
            )
            return visit.timed(lambda: page.evaluate(f"location.replace({json.dumps(address)})"), done)

        bound = 1 + visit_number / 7  # another query every time: nothing is kept by the server
        found["sort"].append(shows(f"#/{name}?sort=max&desc=1"))
        found["filter_sort"].append(shows(f"#/{name}?sort=mean&desc=1&filter=max%3E%3D{bound:.3f}&filter=frequency%3C0.01"))
        for text in searches:
            found[f"search {text}"].append(shows(f"#/{name}?q={text.replace(' ', '+')}&filter=max%3E%3D{bound / 100:.4f}"))
        _settle(visit)
        visit.ranges.clear()
        latent = 3000 + 17 * visit_number
        seconds = visit.timed(
            lambda page=page, latent=latent: page.evaluate(f"location.hash = '#/{name}/{latent}'"),
            f"document.querySelector('h1')?.textContent.includes('{latent}') && document.querySelector('[data-item] .peak, .gist') !== null",
        )
        found["open"].append(seconds)
        found["open_whole"].append(seconds + visit.timed(lambda: None, "document.querySelector('.column.context section') !== null"))
        found["open_requests"].append(len(visit.ranges))
        found["open_bytes"].append(sum(int(request.response().header_value("content-length")) for request in visit.ranges) / 1024)
        visit.close()
        visit = Visit(browser)
        drawn = "Number(document.querySelector('canvas')?.dataset.points) > 0"
        found["map"].append(visit.timed(lambda visit=visit, base=base: visit.page.goto(f"{base}/map", wait_until="commit"), drawn))
        _settle(visit)
        found["map_points"].append(float(visit.page.locator("canvas").get_attribute("data-points") or 0))
        visit.close()
        visit = Visit(browser)
        target = f"{base}/{9_000 + visit_number}"
        shown = "document.querySelector('[data-item] .peak, .gist') !== null"
        found["deep_link"].append(visit.timed(lambda visit=visit, target=target: visit.page.goto(target, wait_until="commit"), shown))
        visit.close()
    return [
        Line("first list paint", found["paint"], "s", 1),
        Line("sort by max, falling", found["sort"], "s", 2),
        Line("two filters and sort by mean", found["filter_sort"], "s", 2),
        *(Line(f"search {text!r} with one filter", found[f"search {text}"], "s", 3) for text in searches),
        Line("open a feature: title, numbers, strongest examples", found["open"], "s", 0.1),
        Line("open a feature: everything", found["open_whole"], "s"),
        Line("range requests of opening a feature", found["open_requests"], "requests", 1),
        Line("bytes of opening a feature", found["open_bytes"], "KiB", 64),
        Line("open a feature by its address, from nothing", found["deep_link"], "s"),
        Line("first points of the map, from nothing", found["map"], "s"),
        Line("points of the whole map on the screen", found["map_points"], "points", 1_000_000),
    ]


def measure_heads(browser: Browser, address: str, names: dict[int, str], repeat: int) -> list[Line]:
    """Draw what pages of attention heads draw; the unit is CPU of the page's main thread, all of it: script, layout, painting, garbage."""
    found: dict[str, list[float]] = {key: [] for key in ("thumbs 12", "thumbs 20", "patterns", "script", "open", "hover", "tokens", "tiles", "loop")}
    for _ in range(repeat):
        for side in (12, 20):
            visit = Visit(browser)
            visit.page.goto(f"{address}/#/{names[side]}/heads", wait_until="networkidle")
            cpu = _MainThread(visit)
            count = f"document.querySelectorAll('.layer button').length === {side * side} && document.querySelector('.reading tbody tr') !== null"
            visit.page.set_viewport_size({"width": 1280, "height": 4000})  # all of them in view
            visit.timed(lambda visit=visit, side=side: visit.page.evaluate(f"location.hash = '#/{names[side]}/prompt/short'"), count)
            _settle(visit)
            before = cpu.read_ms()
            visit.page.evaluate("document.documentElement.dataset.theme === 'dark' ? 0 : document.querySelector('[title^=Light]').click()")
            visit.page.wait_for_timeout(300)
            found[f"thumbs {side}"].append(cpu.read_ms() - before)
            visit.close()
        visit = Visit(browser)
        visit.page.goto(f"{address}/#/{names[12]}/heads", wait_until="networkidle")
        cpu = _MainThread(visit)
        before = cpu.read_ms()
        visit.page.evaluate(f"location.hash = '#/{names[12]}/prompt/double?head=0.5'")
        visit.page.wait_for_selector(".tokens [data-place='1300']")
        _settle(visit)
        found["open"].append(cpu.read_ms() - before)
        before = cpu.read_ms()
        visit.page.evaluate("() => { let sum = 0; for (let i = 0; i < 2e7; i++) sum += Math.sqrt(i % 1024); return sum; }")
        found["loop"].append(cpu.read_ms() - before)
        visit.page.goto(f"{address}/#/{names[12]}/prompt/half?head=0.0", wait_until="networkidle")
        before, script = cpu.read_ms(), cpu.read_ms("ScriptDuration")
        for head in range(1, 12):
            visit.page.keyboard.press("l")
            visit.timed(lambda: None, f"document.querySelector('.frame canvas')?.getAttribute('aria-label')?.includes('head 0.{head}:') && true")
        _settle(visit)
        found["patterns"].append((cpu.read_ms() - before) * 12 / 11)
        found["script"].append((cpu.read_ms("ScriptDuration") - script) * 12 / 11)
        for path, key in (("half", "hover"), ("double", "tokens")):
            visit.page.goto(f"{address}/#/{names[12]}/prompt/{path}?head=0.5", wait_until="networkidle")
            visit.page.wait_for_selector(".tokens [data-place='300'], .tokens [data-place='1300']")
            visit.page.wait_for_timeout(300)
            spans = visit.page.locator(".tokens span[data-place]")
            n = spans.count()
            boxes = [spans.nth(i).bounding_box() for i in range(0, min(n, 240), 12)]
            before = cpu.read_ms()
            for box in filter(None, boxes):
                visit.page.mouse.move(box["x"] + 2, box["y"] + 4)
                visit.page.wait_for_timeout(30)
            found[key].append((cpu.read_ms() - before) / len(boxes))
        visit.close()
        visit = Visit(browser)
        visit.page.goto(f"{address}/#/{names[1]}/prompt/long?head=0.0&q=8000&k=7990", wait_until="networkidle")
        visit.page.wait_for_selector(".frame canvas[data-level='5']")
        cpu = _MainThread(visit)
        before = cpu.read_ms()
        visit.page.keyboard.press("+")
        visit.page.wait_for_selector(".frame canvas[data-level='4']")
        _settle(visit)
        found["tiles"].append(cpu.read_ms() - before)
        visit.close()
    return [
        Line("12 patterns of 512 x 512, one after the other: scripts", found["script"], "ms CPU", 60),
        Line("12 patterns of 512 x 512, one after the other: all of the page, tokens, table, layout and painting", found["patterns"], "ms CPU"),
        Line("144 thumbnails drawn anew", found["thumbs 12"], "ms CPU", 60),
        Line("400 thumbnails drawn anew", found["thumbs 20"], "ms CPU", 170),
        Line("open a prompt of 2,048 tokens, of which 1,024 are written out, over 144 heads", found["open"], "ms CPU", 100),
        Line("hover a token of 512", found["hover"], "ms CPU", 16),
        Line("hover a token of 1,024 of 2,048", found["tokens"], "ms CPU", 16),
        Line("a level of a pattern of 8,192 tokens", found["tiles"], "ms CPU", 30),
        Line("for comparison of runs: 20 million square roots", found["loop"], "ms CPU"),
    ]


class _MainThread:
    """CPU of a page's main thread."""

    def __init__(self, visit: Visit) -> None:
        self._session = visit.context.new_cdp_session(visit.page)
        self._session.send("Performance.enable", {"timeDomain": "threadTicks"})

    def read_ms(self, of: str = "TaskDuration") -> float:
        """Return it so far, in milliseconds; of scripts alone, `ScriptDuration`."""
        metrics = {metric["name"]: metric["value"] for metric in self._session.send("Performance.getMetrics")["metrics"]}
        return 1000 * metrics[of]


WRITE = """() => new Promise((done) => {
    const [start, seen] = [performance.now(), {}];
    document.querySelector('section[aria-label=Steer] button.run').click();
    const look = () => {
        for (const name of ['Default', 'Steered']) {
            if (!seen[name] && document.querySelector(`section[aria-label=${name}] p.mono`)?.textContent) seen[name] = performance.now() - start;
        }
        if ((seen.Default && seen.Steered) || performance.now() - start > 30000) done(seen);
        else requestAnimationFrame(look);
    };
    requestAnimationFrame(look);  // by then the texts of the last run are gone
})"""
ASK = """async ([address, body]) => {
    const start = performance.now();
    const answer = await fetch(address, {method: 'POST', headers: {'content-type': 'application/json'}, body});
    await answer.body.getReader().read();
    return performance.now() - start;
}"""


def measure_steering(browser: Browser, address: str, repeat: int) -> list[Line]:
    """Have the page write under a feature, and ask the same server for the same text without edits."""
    listed = json.loads(urllib.request.urlopen(f"{address}/api/bundles").read())["bundles"]
    name = max((bundle for bundle in listed if bundle["kind"] == "features"), key=lambda bundle: bundle["created"])["name"]
    latent = json.loads(urllib.request.urlopen(f"{address}/api/bundles/{name}").read())["doses"]["latents"][0]
    visit, asked = Visit(browser), []
    page = visit.page
    page.on("request", lambda request: asked.append(request) if request.url.endswith("/generate") else None)
    done = "document.querySelector('section[aria-label=Steered] svg[aria-label^=feature]') !== null"
    steered = f"{address}/#/{name}/{latent}?steer={latent}%3A10&prompt=import%20os%0A&new=32"
    visit.timed(lambda: page.goto(steered, wait_until="commit"), done)
    plain = json.dumps({**json.loads(asked[0].post_data), "edits": [], "compare": False})
    found: dict[str, list[float]] = {name: [] for name in ("Steered", "Default", "plain", "extra")}
    for _ in range(repeat):
        seen = page.evaluate(WRITE)
        visit.timed(lambda: None, done)
        seen["plain"] = page.evaluate(ASK, [asked[0].url, plain])
        _settle(visit)
        for what, value in {**seen, "extra": seen["Steered"] - seen["plain"]}.items():
            found[what].append(value)
    visit.close()
    return [
        Line("first steered token on the screen, from the click", found["Steered"], "ms"),
        Line("first token of the default beside it", found["Default"], "ms"),
        Line("first token of a text without edits in the page, from the request", found["plain"], "ms"),
        Line("what steering adds to the first token", found["extra"], "ms", 150),
    ]


def _settle(visit: Visit) -> None:
    visit.page.wait_for_load_state("networkidle")


def measure_engine(url: str, folder: Path) -> list[Line]:
    """Time the list's engine alone beside DuckDB on the same table, one new query each."""
    bundle = OpenBundle(find_bundles(url)[0])
    parquet = next(folder.glob("6-web/*/features.parquet"))
    lines = []
    ours, floor, peer = [], [], []
    for i in range(3):
        table, bound = bundle.table().__class__(bundle), 1 + i / 9
        start = time.perf_counter()
        page = table.page(Query("mean", True, "live", (f"max>={bound}", "frequency<0.01")), 0, 100)
        ours.append(time.perf_counter() - start)
        start = time.perf_counter()
        for name in ("list/mean.order", "list/max.bin", "list/frequency.bin"):
            bundle.read(name)
        floor.append(time.perf_counter() - start)
        start = time.perf_counter()
        query = f"select latent from '{parquet}' where max >= {bound}::float and frequency < 0.01 and not is_dead order by mean desc, latent desc"
        rows = duckdb.execute(f"with kept as ({query}) select latent, (select count(*) from kept) from kept limit 100").fetchall()
        peer.append(time.perf_counter() - start)
        assert (rows[0][1], [row[0] for row in rows]) == (page.n_matches, [row["latent"] for row in page.rows])
    lines.append(Line("engine: two filters and sort", ours, "s", None, statistics.median(floor), statistics.median(peer)))
    ours, peer = [], []
    for text in SEARCHES[:2]:
        start = time.perf_counter()
        n_matches = bundle.table().page(Query(text=text), 0, 100).n_matches
        ours.append(time.perf_counter() - start)
        column, _, piece = text.rpartition(":")
        lists = ["top_logits"] if column else ["top_tokens", "top_logits", "bottom_logits"]
        where = " or ".join(f"contains(lower(array_to_string({name}, chr(7))), '{piece}')" for name in lists)
        start = time.perf_counter()
        counted = duckdb.execute(f"select count(*) from '{parquet}' where {where}").fetchall()[0][0]
        peer.append(time.perf_counter() - start)
        assert counted == n_matches, (text, counted, n_matches)
    lines.append(Line("engine: search", ours, "s", None, None, statistics.median(peer)))
    return lines


def describe_sizes(url: str) -> list[Line]:
    """Weigh the bundle."""
    bundle = OpenBundle(find_bundles(url)[0])
    n, repeat = bundle.description["d_sae"], bundle.n_records
    records = sum(entry.n_bytes for entry in bundle.manifest.files if entry.name.startswith("records/"))
    return [
        Line("bytes of a record, 70 examples of 65 tokens, dead ones included", [records / repeat], "bytes", 8192),
        Line("bytes of everything else, for each feature", [(bundle.manifest.n_bytes - records) / n], "bytes", 1024),
    ]


def main() -> int:
    """Measure everything, and print a line for each."""
    parser = argparse.ArgumentParser(description="Measure the feature browser in Chromium.")
    parser.add_argument("--features", type=int, default=20_000)
    parser.add_argument("--root", type=Path, help="where the bundle is kept; default: a temporary folder")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one visit")
    parser.add_argument("--s3", action="store_true", help="serve the same files from SeaweedFS")
    parser.add_argument("--static", action="store_true", help="serve the same files from a plain file server with ranges, without `interp serve`")
    parser.add_argument("--heads", action="store_true", help="pages of attention heads instead")
    parser.add_argument(
        "--steer", action="store_true", help="measure the panel Steer alone, with the demo's data under INTERP_ROOT and the shipped model"
    )
    options = parser.parse_args()
    options.repeat = 1 if options.quick else options.repeat
    if options.steer:
        with sync_playwright() as driver, serving(["--model", SHIPPED], {}) as server:
            browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
            for line in measure_steering(browser, server.address, options.repeat):
                line.show({"model": SHIPPED, "cores": os.cpu_count()})
            browser.close()
        return 0
    sys.path.insert(0, SUPPORT)
    from scale_bundle import build_scale_bundle  # noqa: PLC0415 # pyright: ignore[reportMissingImports] - tests/support is no package

    if options.heads:
        return _main_heads(options.repeat)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.root or Path(temporary)) / f"features-{options.features}"
        start = time.perf_counter()
        made = build_scale_bundle(open_store(str(folder)), n_features=options.features, pool=512 if options.features < 1_000_000 else 4096)
        name, source = made.ref.path.rsplit("/", 1)[-1], "s3" if options.s3 else "static" if options.static else "folder"
        context = {"features": options.features, "from": source, "cores": os.cpu_count()}
        if not made.is_cached:
            Line("make the invented bundle", [time.perf_counter() - start], "s").show(context)
        environment, url, s3 = {}, str(folder), None
        if options.static:
            with sync_playwright() as driver, serving_files(Path(temporary) / "site", url) as address:
                browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
                for line in measure_pages(browser, address, name, options.repeat, SEARCHES[:2]):
                    line.show(context)
                browser.close()
            return 0
        if options.s3:
            s3, url = _upload(folder, made.ref.path, Path(temporary))
            environment = s3.environment
        try:
            with sync_playwright() as driver, serving([url], environment) as server:
                browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
                for line in measure_pages(browser, server.address, name, options.repeat):
                    line.show(context)
                browser.close()
                Line("resident memory of the server, largest", [server.rss_mb()], "MB", 500).show(context)
            if not options.s3:
                for line in [*describe_sizes(url), *measure_engine(url, folder)]:
                    line.show(context)
        finally:
            if s3:
                s3.stop()
    return 0


def _main_heads(repeat: int) -> int:
    from synthetic_heads import build_many_heads  # noqa: PLC0415 # pyright: ignore[reportMissingImports] - tests/support is no package

    with tempfile.TemporaryDirectory() as temporary:
        store = open_store(temporary)
        prompts = {12: {"short": 64, "half": 512, "double": 2048}, 20: {"short": 64}, 1: {"long": 8192}}
        names = {side: build_many_heads(store, side=side, prompts=each).ref.path.rsplit("/", 1)[-1] for side, each in prompts.items()}
        with sync_playwright() as driver, serving([temporary], {}) as server:
            browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
            for line in measure_heads(browser, server.address, names, repeat):
                line.show({"cores": os.cpu_count()})
            browser.close()
    return 0


def _upload(folder: Path, path: str, temporary: Path) -> tuple[Any, str]:
    """Start SeaweedFS and copy the bundle into a bucket."""
    from s3_server import start_s3_server  # noqa: PLC0415 # pyright: ignore[reportMissingImports] - tests/support is no package

    server = start_s3_server(temporary / "s3", ("bundles",))
    os.environ.update(server.environment)
    source, target = open_store(str(folder)), open_store("s3://bundles/big")
    manifest = OpenBundle(find_bundles(str(folder))[0]).manifest
    for entry in manifest.files:
        if entry.name != "features.parquet":
            with target.open_writer(f"{path}/{entry.name}") as sink:
                for start in range(0, entry.n_bytes, 32 << 20):
                    (data,) = source.get_ranges(f"{path}/{entry.name}", [start], [min(32 << 20, entry.n_bytes - start)])
                    sink.write(data)
    target.put(f"{path}/manifest.json", source.get(f"{path}/manifest.json"))
    return server, "s3://bundles/big"


if __name__ == "__main__":
    raise SystemExit(main())
