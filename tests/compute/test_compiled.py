"""Compiled code that is kept on disk is never older than what it was compiled from."""

import ast
import subprocess
import sys
from pathlib import Path

from interp_assets.compute.compiled import SHARED, digest_of

PACKAGE = Path(SHARED[0]).parents[1]
PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from interp_assets.compute.coarse import least
from interp_assets.compute.compiled import compiled, n_compilations
import numpy as np
from interp_assets.visualize.kernels import _flag_rows
one = np.ones(128, np.float32)
flags = np.zeros(128, np.uint8)
_flag_rows(np.full(8 * 128, 5, np.int32), (one, one, one, one, one), (one[:8], one[:8], one[:8], one[:8]), flags)
print(int(flags.sum()), n_compilations())
"""


def run(folder: Path) -> list[int]:
    """Run a compiled loop of a copy of the package; return what it finds, and how many loops were compiled for it."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(folder)], capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    return [int(word) for word in done.stdout.split()]


def test_a_change_of_a_shared_file_reaches_code_that_was_kept(tmp_path: Path) -> None:
    """A loop whose callee has changed would go on with the old one, after an upgrade too; the bound of a coarse product would be another's."""
    for path in PACKAGE.rglob("*.py"):
        copy = tmp_path / "interp_assets" / path.relative_to(PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    (found, compiled), (again, compiled_again) = run(tmp_path), run(tmp_path)
    assert found == again == 255 * 128
    assert compiled > 0
    assert compiled_again == 0
    coarse = tmp_path / "interp_assets" / "compute" / "coarse.py"
    text = coarse.read_text()
    assert text.count("    return (level - offset) * unit") == 1
    coarse.write_text(text.replace("    return (level - offset) * unit", "    return np.float32(1e30) + (level - offset) * unit"))
    assert run(tmp_path)[0] == 0


def test_functions_that_loops_of_other_files_call_are_in_shared_files() -> None:
    """Otherwise the stamp would not cover them. Loops are called from plain Python as well, which needs no stamp."""
    compiled = {path: _compiled_names(path) for path in PACKAGE.rglob("*.py")}
    for path, loops in compiled.items():
        for module, name in _imports(path):
            source = PACKAGE.parent / Path(*module.split(".")).with_suffix(".py")
            if source in SHARED or source not in compiled or name not in compiled[source]:
                continue
            calls = [call for loop in loops.values() for call in ast.walk(loop) if isinstance(call, ast.Name) and call.id == name]
            assert not calls, f"{path} compiles a call of {name}: add {source} to interp_assets.compute.compiled.SHARED"


def test_the_digest_is_that_of_the_content(tmp_path: Path) -> None:
    """Two files that differ in one byte have two digests."""
    (tmp_path / "a").write_text("x"), (tmp_path / "b").write_text("y")
    assert digest_of([tmp_path / "a"]) != digest_of([tmp_path / "b"])
    assert digest_of([tmp_path / "a"]) == digest_of([tmp_path / "a"])


def _compiled_names(path: Path) -> dict[str, ast.AST]:
    """Return the loops of a file by name: decorated functions; and, without a body, what `intrinsic` or `overload` made."""
    found: dict[str, ast.AST] = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and any(
            isinstance(mark, ast.Name) and mark.id in ("compiled", "reordered") for mark in node.decorator_list
        ):
            found[node.name] = node
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == "intrinsic":
            found[getattr(node.target, "id", "")] = ast.Pass()
    return found


def _imports(path: Path) -> list[tuple[str, str]]:
    """Return module and name of what a file imports from this package."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom) and node.module]
    return [(str(node.module), alias.name) for node in nodes if str(node.module).startswith("interp_assets.") for alias in node.names]
