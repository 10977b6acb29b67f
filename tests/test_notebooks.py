"""The notebooks of `examples/` run from top to bottom with the shipped model, end with a picture, and show what they show now."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script() -> Any:
    """Load `docs/notebooks.py`, which is a script and no module of the package."""
    spec = importlib.util.spec_from_file_location("docs_notebooks_for_tests", ROOT / "docs" / "notebooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))


def test_there_are_four_and_each_ends_with_a_picture() -> None:
    """An empty folder must not pass, and a notebook without outputs shows nothing where it is only looked at."""
    assert len(NOTEBOOKS) == 4
    for path in NOTEBOOKS:
        last = json.loads(path.read_text(encoding="utf-8"))["cells"][-1]
        drawn = "".join(last["outputs"][-1]["data"]["text/html"])
        assert drawn.count("background-color:rgba") > 10, path.name


@pytest.mark.parametrize("path", NOTEBOOKS[:3], ids=lambda path: path.stem)
def test_a_notebook_shows_what_it_shows_now(path: Path, script: Any) -> None:
    """Outputs that are committed go stale otherwise; numbers may differ by rounding. `make notebooks` writes them anew."""
    assert script.find_difference(json.loads(path.read_text(encoding="utf-8")), script.run(path)) == ""


def test_a_stale_output_is_noticed(script: Any) -> None:
    """The comparison itself can fail: by a number, by a word, by an output too many."""

    def show(text: str) -> dict[str, Any]:
        return {"cells": [{"cell_type": "code", "outputs": [{"output_type": "stream", "text": [text]}]}]}

    assert script.find_difference(show("loss 3.20"), show("loss  3.2145")) == ""
    assert "shows 4.2; 3.2 is written" in script.find_difference(show("loss 3.2"), show("loss 4.2"))
    assert "cell 0 shows" in script.find_difference(show("loss 3.2"), show("cost 3.2"))
    assert "cell 0 shows" in script.find_difference(show("loss 3.2"), {"cells": [{"cell_type": "code", "outputs": []}]})
