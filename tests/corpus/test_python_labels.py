"""What is true of each character of a Python text, by hand."""

from interp_assets.corpus.python_labels import KINDS, PythonLabels, label_python

TEXT = '''"""Top ä."""
import os  # why


class A:
    \'\'\'Doc.\'\'\'

    def f(self, x=0x1f):
        return f"{x!r} and {os.sep}" + "s"


y = A
'''


def of(found: PythonLabels, piece: str, place: int = 0) -> tuple[set[str], set[int], set[bool]]:
    """Return the labels of the characters of a piece of the text, found from `place` on."""
    start = TEXT.index(piece, place)
    span = slice(start, start + len(piece))
    return {KINDS[code] for code in found.kind[span].tolist()}, set(found.depth[span].tolist()), set(found.is_docstring[span].tolist())


def test_every_character_has_its_kind_depth_and_docstring() -> None:
    """Strings with code in them are strings, on every version of Python; docstrings are those that `ast` takes for such, behind any letters."""
    found = label_python(TEXT)
    assert found is not None
    assert of(found, '"""Top ä."""') == ({"string"}, {0}, {True})
    assert of(found, "import") == ({"keyword"}, {0}, {False})
    assert of(found, "os") == ({"name"}, {0}, {False})
    assert of(found, "# why") == ({"comment"}, {0}, {False})
    assert of(found, "'''Doc.'''") == ({"string"}, {1}, {True})
    assert of(found, "    def") == ({"space", "keyword"}, {1}, {False})
    assert of(found, "0x1f") == ({"number"}, {1}, {False})
    assert of(found, "=0x"[:1], TEXT.index("x=")) == ({"operator"}, {1}, {False})
    assert of(found, "return") == ({"keyword"}, {2}, {False})
    assert of(found, 'f"{x!r} and {os.sep}"') == ({"string"}, {2}, {False})
    assert of(found, '"s"') == ({"string"}, {2}, {False})
    assert of(found, "y = A") == ({"name", "space", "operator"}, {0}, {False})


def test_what_is_no_python_has_no_labels() -> None:
    """Prose, an older Python, a file that ends in the middle."""
    assert [label_python(text) for text in ("once upon a time", "print 1\n", "def f(:\n", "x = (", "\0")] == [None] * 5
    empty = label_python("")
    assert empty is not None
    assert len(empty.kind) == 0
