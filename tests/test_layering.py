"""The tail is what hurts: no file, function or class outgrows its reader.

The limits are those of `docs/style.md`. An entry in `ALLOWED` carries its reason.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import grimp
import pytest
from house import LAYERS

from interp_assets.graph.stages import make_road
from interp_assets.planning.config import make_config

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


ROOMS, FILES_IN_A_ROOM, FILES_IN_TRAIN = 14, 30, 25


def names_of_the_road() -> dict[str, str]:
    """Return, by the name of an asset or a stage, the stage it belongs to: those of a pipeline with every kind of asset."""
    road = make_road(make_config({"shuffle": {"passes": 4, "fan_out": 2}}))
    assets = {asset.key[-1]: asset.stage for asset in (*road, *road.outside)}
    return assets | {asset.name: asset.stage for asset in road} | {stage: stage for stage in assets.values()}


def compared_names(text: str, path: Path, names: dict[str, str]) -> list[str]:
    """List the places of a file where something is compared with the name of another stage, or of an asset of another stage."""
    own = path.relative_to(ROOT).parts[1]
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Compare) and not (isinstance(node.left, ast.Attribute) and node.left.attr == "task"):  # an SAE's task may be `sae`
            literals: list[ast.AST] = [item for item in (node.left, *node.comparators) if not isinstance(item, ast.Subscript)]
        elif isinstance(node, ast.MatchValue):
            literals = [node.value]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("startswith", "endswith"):
            literals = list(node.args)
        else:
            continue
        words = [item.value for literal in literals for item in ast.walk(literal) if isinstance(item, ast.Constant) and isinstance(item.value, str)]
        found += [f"{path.relative_to(ROOT)}:{node.lineno} asks for {word!r}" for word in words if names.get(word, own) != own]
    return found


def test_nothing_outside_a_stage_asks_for_it_by_name() -> None:
    """A new asset is one record in its stage: a central place that compares names would be a second one."""
    names = names_of_the_road()
    assert {"token_shards", "shuffle_pass_3", "feature_browser", "train"} <= set(names)
    assert [place for path in FILES for place in compared_names(path.read_text(encoding="utf-8"), path, names)] == []


@pytest.mark.parametrize("line", ["asset.name == 'sae'", "asset.stage in ('train', 'nowhere')", "asset.key[-1].startswith('activations')"])
def test_a_comparison_with_a_name_is_found(line: str) -> None:
    """The gate itself can fail; inside the stage the same line is fine."""
    names = names_of_the_road()
    assert compared_names(line, ROOT / "interp_assets" / "planning" / "example.py", names)
    if "activations" not in line:
        assert not compared_names(line, ROOT / "interp_assets" / "train" / "example.py", names)


def test_arrows_run_one_way() -> None:
    """A stage sees only the stages before it and what serves all; imports inside functions count."""
    graph = grimp.build_graph("interp_assets", cache_dir=None)
    assert {path.name.removesuffix(".py") for path in (ROOT / "interp_assets").iterdir() if path.name[:2] != "__"} == set(LAYERS)
    found = graph.find_illegal_dependencies_for_layers(layers=LAYERS, containers={"interp_assets"})
    assert [(item.importer, item.imported) for item in found] == []


def test_the_house_has_few_rooms() -> None:
    """`ls interp_assets` is the architecture: a person takes it in at a glance."""
    entries = [path.name for path in (ROOT / "interp_assets").iterdir() if path.name not in ("__pycache__", "__init__.py")]  # that one is empty
    assert len(entries) <= ROOMS, sorted(entries)


def test_no_room_is_a_corridor() -> None:
    """A folder of more files hides a part that deserves a name."""
    folders = {path.parent for path in FILES}
    counts = {str(folder.relative_to(ROOT)): len(list(folder.glob("*.py"))) for folder in folders}
    assert {folder: n for folder, n in counts.items() if n > FILES_IN_A_ROOM} == {}
    assert counts["interp_assets/train"] <= FILES_IN_TRAIN


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
    """The sentence becomes the module's line in `docs/house.md`."""
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


BOTH = re.compile(r"\w\(s\)")


def test_no_message_says_shards_in_brackets() -> None:
    """`1 shard(s)` leaves to the reader what `format_count` says: 1 shard, 2 shards."""
    texts = [
        (path.relative_to(ROOT / "interp_assets").as_posix(), node.value)
        for path in sorted((ROOT / "interp_assets").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    assert len(texts) > 1000
    assert {path for path, text in texts if BOTH.search(text)} == set()
