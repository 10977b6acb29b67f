"""Run the notebooks of `examples/notebooks` from top to bottom and write what their cells show (`make notebooks`).

    python docs/notebooks.py                    those that need nothing but this package
    python docs/notebooks.py --pipeline data/pystdlib    and the one about a pipeline's data, on what `make demo` has made

Cells run in order in one namespace. What is printed, and the value of a last expression as text and HTML, become the cell's outputs, as Jupyter
would write them; so no Jupyter is needed here, and a test runs the same code and compares.
"""

import argparse
import ast
import contextlib
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

NOTEBOOKS: Final = Path(__file__).parent.parent / "examples" / "notebooks"
PIPELINE: Final = "../../data/pystdlib"
"""What a notebook opens that is about a pipeline's data; another one may be put in its place while it is run."""
_FILLING: Final = re.compile(r"[ ─═]+")
"""What makes a table's column as wide as its numbers."""
_NUMBER: Final = re.compile(r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


def list_notebooks() -> list[Path]:
    """Return the notebooks in their order."""
    return sorted(NOTEBOOKS.glob("*.ipynb"))


def run(path: Path, pipeline: str = PIPELINE) -> dict[str, Any]:
    """Return a notebook with the outputs of its cells made anew."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    names: dict[str, Any] = {}
    number = 0
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            number += 1
            cell["execution_count"] = number
            cell["outputs"] = list(_outputs("".join(cell["source"]).replace(PIPELINE, pipeline), names, number, path.name))
    return notebook


def write(path: Path, notebook: dict[str, Any]) -> None:
    """Write a notebook as Jupyter does, but for the order of keys."""
    path.write_text(json.dumps(notebook, ensure_ascii=False, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def find_difference(committed: dict[str, Any], made: dict[str, Any]) -> str:
    """Return the first output that is not what its cell shows now, or nothing. Numbers may differ by rounding: by a twentieth of their size."""
    for number, (old, new) in enumerate(zip(committed["cells"], made["cells"], strict=True)):
        before, after = (json.dumps(cell.get("outputs", []), ensure_ascii=False, sort_keys=True) for cell in (old, new))
        words = [_FILLING.sub(" ", _NUMBER.sub("0", text)) for text in (before, after)]
        if words[0] != words[1]:
            first = next((i for i, (a, b) in enumerate(zip(*words, strict=False)) if a != b), min(map(len, words)))
            return f"cell {number} shows {words[1][max(0, first - 40) : first + 80]!r}; {words[0][max(0, first - 40) : first + 80]!r} is written"
        for a, b in zip(map(float, _NUMBER.findall(before)), map(float, _NUMBER.findall(after)), strict=True):
            if abs(a - b) > 0.05 * max(abs(a), abs(b)) + 1e-3:
                return f"cell {number} shows {b}; {a} is written"
    return ""


def _outputs(source: str, names: dict[str, Any], number: int, where: str) -> Iterator[dict[str, Any]]:
    """Run a cell and yield what it prints, and its last expression."""
    tree = ast.parse(source, f"{where}, cell {number}")
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) and not source.rstrip().endswith(";") else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, f"{where}, cell {number}", "exec"), names)  # noqa: S102 - our own notebooks
        value = eval(compile(ast.Expression(last.value), where, "eval"), names) if isinstance(last, ast.Expr) else None  # noqa: S307 - as above
    if printed.getvalue():
        yield {"output_type": "stream", "name": "stdout", "text": _lines(printed.getvalue())}
    if value is not None:
        data = {"text/plain": _lines(repr(value))}
        if hasattr(value, "_repr_html_"):
            data["text/html"] = _lines(value._repr_html_())
        yield {"output_type": "execute_result", "execution_count": number, "metadata": {}, "data": data}


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", help="folder, s3:// address or YAML of a pipeline that is whole")
    pipeline = parser.parse_args().pipeline
    for path in list_notebooks():
        if not pipeline and PIPELINE in path.read_text(encoding="utf-8"):
            sys.stderr.write(f"{path.name} is left as it is: name a pipeline (--pipeline)\n")
        else:
            write(path, run(path, pipeline or PIPELINE))


if __name__ == "__main__":
    main()
