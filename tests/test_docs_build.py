"""The generated pages are written for people: types have words, folders have captions, and what has none is noticed here."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from house import LAYERS
from pydantic import Field

from interp_assets.planning.identity import Name

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "docs" / "build.py"


@pytest.fixture(scope="module")
def script() -> Any:
    """Load `docs/build.py`, which is a script and no module of the package."""
    spec = importlib.util.spec_from_file_location("docs_build_for_tests", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (int, "whole number"),
        (Annotated[int, Field(ge=1, le=65536)], "whole number ≥ 1 and ≤ 65,536"),
        (Annotated[float, Field(gt=0)], "number > 0"),
        (bool, "true or false"),
        (Name, "name"),
        (list[Name], "list of names"),
        (Annotated[list[str], Field(min_length=1)], "list of one or more texts"),
        (tuple[str, ...], "list of texts"),
        (Literal["all", "candidates"], "`all` or `candidates`"),
        (list[Literal["a", "b"]], "list of `a` or `b`"),
        (int | str | None, "whole number or text or null"),
    ],
)
def test_every_type_has_words(script: Any, annotation: Any, words: str) -> None:
    """`list of Annotated` tells a newcomer nothing; pydantic's own classes that hold the bounds are looked into, too."""
    constraints = [item for given in getattr(annotation, "__metadata__", ()) for item in getattr(given, "metadata", [given])]
    found = script.kind_of(getattr(annotation, "__origin__", annotation), constraints) if constraints else script.kind_of(annotation)
    assert found == words


def test_a_type_without_words_stops_the_build(script: Any) -> None:
    """A new field with a type that nobody has named is noticed here, not by a reader."""
    with pytest.raises(TypeError, match="cannot name the type <class 'bytes'>"):
        script.kind_of(bytes)


def test_no_python_word_is_on_the_page(script: Any) -> None:
    """The whole page, each type cell of it."""
    rows = [line.split(" | ") for line in script.make_configuration().splitlines() if line.startswith("| `")]
    assert len(rows) > 60
    for row in rows:
        assert not {"Annotated", "Literal", "str", "int", "float", "bool", "NoneType", "Union"} & set(row[1].replace("`", "").split()), row


def test_every_folder_and_module_is_in_the_house(script: Any) -> None:
    """A new folder without a caption would be left out of the house and of the README, in silence."""
    modules = [path for folder in ("interp_assets", "resources") for path in (ROOT / folder).rglob("*.py") if path.name != "__init__.py"]
    assert {f"{path.parent.relative_to(ROOT)}/" for path in modules} == set(script.rooms())
    house = script.make_house()
    assert [path for path in modules if f"](../{path.relative_to(ROOT)}): " not in house] == []


def test_the_house_follows_the_arrows(script: Any) -> None:
    """The page says that arrows run down it: its order is that of the gate."""
    assert [room.split("/")[1] for room in script.rooms() if room.count("/") == 2] == [
        layer for layer in LAYERS if (ROOT / "interp_assets" / layer).is_dir()
    ]


def test_the_readme_has_a_line_for_each_folder(script: Any) -> None:
    """A person who reads only the table has seen every door."""
    table = script.make_readme("above\n<!-- rooms -->\nstale\n<!-- /rooms -->\nbelow\n")
    assert table.startswith("above\n<!-- rooms -->\n| folder |")
    assert table.endswith("<!-- /rooms -->\nbelow\n")
    assert "stale" not in table
    links = re.findall(r"\]\(([^)]+)\)", table)
    assert all((ROOT / link).exists() for link in links)
    assert {Path(link).name for link in links} == {path.name for path in (ROOT / "interp_assets").iterdir() if path.name[:2] != "__"} | {"resources"}


@pytest.mark.parametrize("text", ["no markers", "<!-- rooms -->\n and no end"])
def test_a_readme_without_a_place_for_the_table_stops_the_build(script: Any, text: str) -> None:
    """A marker that is lost in an edit must not freeze the table."""
    with pytest.raises(ValueError, match="no place for the table"):
        script.make_readme(text)


def test_the_asset_table_comes_from_the_records_alone() -> None:
    """Whoever reads the page needs no Dagster, and neither does what writes it; every axis has its word."""
    code = f"import runpy, sys; page = runpy.run_path({str(SCRIPT)!r})['make_assets'](); assert 'dagster' not in sys.modules; print(page)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    table = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| `")]
    rows = {row[0].strip("`"): row for row in table}
    assert [rows[name][2] for name in ("documents", "corpus_plan", "mixed_shards", "sae")] == ["shard", "-", "bucket", "experiment"]
    assert rows["features/demo/feature_candidates"][2] == "slice x shard"
    assert rows["features/demo/feature_records"][2:4] == ["slice", "spread"]
    assert rows["sae_evaluation"][3:5] == ["one run", "`sae`, `activations`, `activation_statistics`"]


def test_no_page_leads_nowhere() -> None:
    """Links to files and headings inside the repository: README, contributing, and all pages of the documentation."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "infra" / "README.md", *(ROOT / "docs").rglob("*.md")]
    broken = []
    for page in pages:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            path, _, heading = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            if "://" in link or link.startswith("data:"):
                continue
            if not target.exists() or (heading and heading not in _anchors(target)):
                broken.append(f"{page.relative_to(ROOT)}: {link}")
    assert broken == []


def _anchors(page: Path) -> set[str]:
    """Return the names of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
