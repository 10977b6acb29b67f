"""A Python text becomes what is true of each of its characters, by the language's own parser: kind of token, depth of blocks, docstring.

    kind        name, keyword, operator, number, string, comment; space where no token is
    depth       blocks around it, by indentation
    docstring   whether it stands in the docstring of a module, class or function

A text that this interpreter's `tokenize` or `ast` refuses has no labels. Which tokens of a model lie where, `train/probes/labels.py` tells.
"""

import ast
import io
import keyword
import tokenize
import warnings
from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

KINDS: Final = ("space", "name", "keyword", "operator", "number", "string", "comment")
_CODE: Final = {name: code for code, name in enumerate(KINDS)}
_OF_TOKEN: Final = {tokenize.OP: "operator", tokenize.NUMBER: "number", tokenize.STRING: "string", tokenize.COMMENT: "comment"}
_STARTS: Final = {number for name, number in vars(tokenize).items() if name in ("FSTRING_START", "TSTRING_START")}
_ENDS: Final = {number for name, number in vars(tokenize).items() if name in ("FSTRING_END", "TSTRING_END")}


class PythonLabels(NamedTuple):
    """What is true of each character of a text."""

    kind: NDArray[np.int8]
    """Place in `KINDS`."""
    depth: NDArray[np.int8]
    is_docstring: NDArray[np.bool_]


def label_python(text: str) -> PythonLabels | None:
    """Label each character of a text; None for a text that is no Python of this interpreter's version."""
    starts = np.cumsum([0, *(len(line) for line in io.StringIO(text))])
    found = PythonLabels(np.zeros(len(text), np.int8), np.zeros(len(text), np.int8), np.zeros(len(text), np.bool_))

    def place(row: int, column: int) -> int:
        return min(len(text), int(starts[min(row, len(starts)) - 1]) + column)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escapes
            tree = ast.parse(text)
        open_strings: list[tuple[int, int]] = []
        depth, changed = 0, 0
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            begin, end = place(*token.start), place(*token.end)
            if token.type in (tokenize.INDENT, tokenize.DEDENT):
                line = place(token.start[0], 0)  # the indentation belongs to the block
                found.depth[changed:line] = depth
                depth, changed = depth + (1 if token.type == tokenize.INDENT else -1), line
            elif token.type in _STARTS:
                open_strings.append(token.start)
            elif token.type in _ENDS:
                found.kind[place(*open_strings.pop()) : end] = _CODE["string"]  # with what is inside, as in versions that have no such tokens
            elif token.type == tokenize.NAME:
                found.kind[begin:end] = _CODE["keyword" if keyword.iskeyword(token.string) else "name"]
            elif token.type in _OF_TOKEN:
                found.kind[begin:end] = _CODE[_OF_TOKEN[token.type]]
        found.depth[changed:] = depth
    except (SyntaxError, tokenize.TokenError, ValueError, RecursionError, MemoryError):
        return None
    lines = io.StringIO(text).readlines()
    for node in _find_docstrings(tree):
        begin, end = (place(row, len(lines[row - 1].encode()[:column].decode())) for row, column in ((node.lineno, node.col_offset), _end_of(node)))
        found.is_docstring[begin:end] = True
    return found


def _find_docstrings(tree: ast.Module) -> Iterator[ast.expr]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node, clean=False) is not None:
            first = node.body[0]
            assert isinstance(first, ast.Expr)
            yield first.value


def _end_of(node: ast.expr) -> tuple[int, int]:
    assert node.end_lineno is not None
    assert node.end_col_offset is not None
    return node.end_lineno, node.end_col_offset
