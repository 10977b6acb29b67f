"""The standard library as a corpus: one order, one split, nothing empty."""

from itertools import islice
from pathlib import Path

import pytest

from interp_assets.corpus.stdlib import is_held_out, is_test_source, iter_stdlib_documents


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """Make a library folder with one file of each kind the corpus has to judge."""
    files = {
        "zlib_helper.py": b"z = 1\n",
        "abc.py": b"a = 1\n",
        "json/decoder.py": b"d = 1\r\n",
        "json/copy_of_abc.py": b"a = 1\n",
        "json/blank.py": b" \n\n",
        "encodings/cp999.py": b"# generated from 'CP999.TXT' with gencodec.py.\n",
        "latin.py": b"# -*- coding: latin-1 -*-\n# \xe9\n",
        "notes.txt": b"not Python\n",
        "test/test_abc.py": b"import abc\n",
        "asyncio/tests/test_loop.py": b"import asyncio\n",
        "site-packages/numpy.py": b"n = 1\n",
        "dist-packages/apt.py": b"a = 2\n",
        "__pycache__/abc.py": b"c = 1\n",
    }
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path


def test_the_library_comes_first_and_its_tests_after_it(library: Path) -> None:
    """A caller who stops early, or an interpreter without tests, must see a prefix of the same order."""
    expected = [("abc.py", "a = 1\n"), ("json/decoder.py", "d = 1\n"), ("zlib_helper.py", "z = 1\n")]
    tests = [("asyncio/tests/test_loop.py", "import asyncio\n"), ("test/test_abc.py", "import abc\n")]
    assert list(iter_stdlib_documents(library)) == expected + tests
    assert list(iter_stdlib_documents(library, with_tests=False)) == expected


def test_two_walks_of_this_interpreter_agree_and_have_no_empty_document() -> None:
    """Everything downstream takes its identity from this order."""
    first = list(islice(iter_stdlib_documents(), 300))
    assert first == list(islice(iter_stdlib_documents(), 300))
    assert len({source for source, _ in first}) == len(first) > 100
    assert all(text.strip() for _, text in first)
    assert not any("site-packages" in source or "\\" in source for source, _ in first)


def test_held_out_documents_never_change_sides() -> None:
    """The rule is frozen: a model trained last year must not have seen what is held out today."""
    sources = ["statistics.py", "turtle.py", "socket.py", "asyncio/runners.py", "abc.py", "json/decoder.py", "typing.py"]
    assert [source for source in sources if is_held_out(source)] == sources[:4]


def test_about_three_percent_of_paths_are_held_out() -> None:
    """A split that is far off its promise would starve evaluation or training."""
    held_out = sum(is_held_out(f"package/module_{i}.py") for i in range(20_000))
    assert 500 <= held_out <= 700


def test_only_folders_make_a_document_a_test() -> None:
    """`test.py` in a package is library code; a file below `tests/` is not."""
    assert is_test_source("test/test_abc.py")
    assert is_test_source("idlelib/idle_test/mock_idle.py")
    assert not is_test_source("unittest/test.py")
