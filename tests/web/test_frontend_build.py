"""The pages are built when their sources change, and only then; what is built loads nothing from elsewhere."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
STATIC = REPOSITORY / "interp_assets" / "web" / "static"


@pytest.fixture(scope="module")
def script():
    """Load `frontend/build.py`, which is a script and no module of the package."""
    spec = importlib.util.spec_from_file_location("frontend_build_for_tests", REPOSITORY / "frontend" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_are_current_only_with_the_hash_of_their_sources(script, tmp_path: Path) -> None:
    """A build that stopped half-way has no stamp, so it is never taken for a finished one."""
    assert not script.is_current(tmp_path, "abc")
    (tmp_path / "index.html").touch()
    (tmp_path / script.STAMP).write_text(json.dumps({"sources": "abc"}))
    assert script.is_current(tmp_path, "abc")
    assert not script.is_current(tmp_path, "abd")
    (tmp_path / script.STAMP).write_text("{")
    assert not script.is_current(tmp_path, "abc")


def test_the_hash_covers_what_the_build_reads(script) -> None:
    """Tests and notes do not rebuild the pages; a style sheet or the lock file does."""
    names = {path.relative_to(script.HERE).as_posix() for pattern in script.SOURCES for path in script.HERE.glob(pattern) if path.is_file()}
    assert {"package-lock.json", "index.html", "vite.config.ts", "src/main.ts", "src/app.css", "src/pages/FeaturePage.svelte"} <= names
    assert not [name for name in names if name.startswith(("node_modules", "tests"))]


def test_the_lock_file_names_no_host(script) -> None:
    """It must install from whatever registry a person uses."""
    lock = json.loads((script.HERE / "package-lock.json").read_text())
    assert lock["packages"]
    for name, package in lock["packages"].items():
        assert "resolved" not in package, name
        assert not name or package.get("link") or package["integrity"].startswith("sha512-")


def test_built_pages_load_nothing_from_elsewhere() -> None:
    """They work offline: no address of another host in style sheets and HTML, and in scripts only those that are never fetched."""
    if not (STATIC / "index.html").exists():
        pytest.skip("the pages are not built: python frontend/build.py")
    known = {"http://www.w3.org", "https://svelte.dev"}  # namespaces of SVG and the like, and links in messages of errors
    for path in STATIC.rglob("*"):
        if path.suffix in (".html", ".css", ".js"):
            text = path.read_text(encoding="utf-8")
            found = set(re.findall(r"https?://[A-Za-z0-9.-]+", text))
            assert found <= (known if path.suffix == ".js" else set()), path.name
            assert "url(//" not in text
    html = (STATIC / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=", html), "the security policy forbids anything inline"
