"""The generated pages are written for people: types have words and bounds, and one that has no word stops the build."""

import importlib.util
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from interp_assets.planning.config import Name

SCRIPT = Path(__file__).parents[1] / "docs" / "build.py"


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
