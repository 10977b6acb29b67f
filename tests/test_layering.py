"""The tail is what hurts: no file, function or class outgrows its reader.

The limits are those of `docs/style.md`. An entry in `ALLOWED` carries its reason.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(path for folder in ("interp_assets", "resources") for path in (ROOT / folder).rglob("*.py"))
MAX_FILE, MAX_FUNCTION, MAX_CLASS, MAX_PARAMETERS = 600, 70, 300, 8
ALLOWED: dict[str, str] = {
    "interp_assets/visualize/fused_kernel.py:encode_and_append": "a Triton kernel is handed every pointer and size it touches",
    "interp_assets/compute/fused_kernels.py:fire_pass": "a Triton kernel is handed every pointer and size it touches",
    "interp_assets/compute/fused_kernels.py:pull_pass": "a Triton kernel is handed every pointer and size it touches",
    "interp_assets/compute/fused_kernels.py:open_pass": "a Triton kernel is handed every pointer and size it touches",
    "interp_assets/compute/fused_kernels.py:close_pass": "a Triton kernel is handed every pointer and size it touches",
}
"""`file:name` -> why it may exceed a limit."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def _names(path: Path) -> Iterator[tuple[str, ast.AST]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, Function | ast.ClassDef):
            yield f"{path.relative_to(ROOT)}:{node.name}", node


def _is_command_line(path: Path) -> bool:
    return path.name in ("cli.py", "__main__.py")


def test_there_are_files_to_check() -> None:
    """A moved package must not turn this test into a no-op."""
    assert len(FILES) > 20


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_stays_readable(path: Path) -> None:
    """Length of file, functions and classes; number of parameters; no print, bare except, mutable default or postponed annotations."""
    text = path.read_text(encoding="utf-8")
    faults = []
    if len(text.splitlines()) > MAX_FILE:
        faults.append(f"{len(text.splitlines())} lines in the file")
    for name, node in _names(path):
        if name in ALLOWED:
            continue
        assert isinstance(node, Function | ast.ClassDef)
        n_lines = (node.end_lineno or 0) - node.lineno + 1
        if isinstance(node, ast.ClassDef):
            if n_lines > MAX_CLASS:
                faults.append(f"{name}: {n_lines} lines in the class")
            continue
        if n_lines > MAX_FUNCTION:
            faults.append(f"{name}: {n_lines} lines in the function")
        parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        n_parameters = len([p for p in parameters if p.arg not in ("self", "cls")])
        if n_parameters > MAX_PARAMETERS and not _is_command_line(path):
            faults.append(f"{name}: {n_parameters} parameters")
        faults += [
            f"{name}: mutable default"
            for default in (*node.args.defaults, *node.args.kw_defaults)
            if isinstance(default, ast.List | ast.Dict | ast.Set)
        ]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            faults.append(f"line {node.lineno}: bare except")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print" and not _is_command_line(path):
            faults.append(f"line {node.lineno}: print")
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            faults.append(f"line {node.lineno}: from __future__ import")
        if isinstance(node, ast.Import) and any(alias.name in ("pickle", "dill", "cloudpickle") for alias in node.names):
            faults.append(f"line {node.lineno}: pickle")
    assert not faults, "\n".join(faults)


def test_packages_have_empty_inits() -> None:
    """Importing a stage must import nothing else."""
    full = [str(path.relative_to(ROOT)) for path in FILES if path.name == "__init__.py" and path.read_text().strip()]
    assert not full


def test_every_module_opens_with_a_sentence() -> None:
    """The sentence becomes the module's caption in the README tree."""
    without = []
    for path in FILES:
        if path.name != "__init__.py":
            lines = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()
            if not lines or not lines[0].endswith((".", ":", "?")):
                without.append(str(path.relative_to(ROOT)))
    assert not without


def test_nothing_speaks_of_the_machine_it_was_written_on() -> None:
    """Absolute home or work folders in sources are somebody's machine."""
    named = [
        f"{path.relative_to(ROOT)}: {word}"
        for folder in ("interp_assets", "resources", "tests", "docs", "examples", "benchmarks")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".md", ".yaml", ".toml") and path != Path(__file__)
        for word in ("/root/", "/work/", "/home/")
        if word in path.read_text(encoding="utf-8")
    ]
    assert not named
