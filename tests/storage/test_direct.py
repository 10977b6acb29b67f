"""Bytes that go past the page cache are the bytes that were given, whatever their length and alignment."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interp_assets.storage.direct import ALIGNMENT, PIECE_BYTES, DirectWriter, Workspace, allocate, borrow_piece, give_back, read_into, remove_remains
from interp_assets.storage.process_names import number_process


@pytest.fixture(scope="module")
def data() -> bytes:
    """Return three pieces and a little more of random bytes."""
    return os.urandom(3 * PIECE_BYTES + 12_345)


@pytest.fixture(scope="module")
def file(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write them through the writer."""
    path = tmp_path_factory.mktemp("direct") / "file"
    write(path, data, 700_001)
    return path


def write(path: Path, data: bytes, step: int) -> None:
    """Stream `data` in steps that fit nothing."""
    writer = DirectWriter(path)
    for start in range(0, len(data), step):
        writer.write(memoryview(data)[start : start + step])
    writer.close()


@pytest.mark.parametrize("n_bytes", [0, 1, ALIGNMENT, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 2 * PIECE_BYTES, 2 * PIECE_BYTES + ALIGNMENT])
def test_a_file_of_any_length_is_whole(tmp_path: Path, data: bytes, n_bytes: int) -> None:
    """The last piece is padded and the file cut again: every border of that is a length here. Nothing else stays in the folder."""
    write(tmp_path / "x", data[:n_bytes], 1_000_003)
    assert (tmp_path / "x").read_bytes() == data[:n_bytes]
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@settings(max_examples=60, deadline=None)
@given(start=st.integers(0, 3 * PIECE_BYTES), n_bytes=st.integers(0, 100_000), shift=st.sampled_from([0, 1, 4095]), is_aligned=st.booleans())
def test_any_range_is_read_as_it_was_written(file: Path, data: bytes, start: int, n_bytes: int, shift: int, is_aligned: bool) -> None:
    """Direct where everything is aligned, ordinary elsewhere, and both at the end of a file."""
    start = start // ALIGNMENT * ALIGNMENT if is_aligned else start
    out = memoryview(allocate(n_bytes + shift))[shift : shift + n_bytes]
    expected = data[start : start + n_bytes]
    assert read_into(file, start, out) == len(expected)
    assert out[: len(expected)] == expected


def test_a_read_past_the_end_says_how_much_there_was(file: Path, data: bytes) -> None:
    """The store turns a short read into an error."""
    out = memoryview(allocate(PIECE_BYTES))
    start = len(data) // ALIGNMENT * ALIGNMENT
    assert read_into(file, start, out) == len(data) - start
    assert read_into(file, len(data) + ALIGNMENT, out) == 0


def test_an_aborted_file_leaves_nothing_and_its_pieces_serve_again(tmp_path: Path, data: bytes) -> None:
    """A piece that was given back twice would be written by two files at once."""
    for _ in range(3):
        writer = DirectWriter(tmp_path / "x")
        writer.write(data)
        writer.abort()
        writer.abort()
    assert list(tmp_path.iterdir()) == []
    borrowed = [borrow_piece() for _ in range(12)]
    assert len({id(piece) for piece in borrowed}) == 12
    for piece in borrowed:
        give_back(piece)


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path, data: bytes) -> None:
    """Its file is large and no listing shows it; that of a writer which still works must stay."""
    program = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom interp_assets.storage.direct import DirectWriter, PIECE_BYTES\n"
        "writer = DirectWriter(Path(sys.argv[1]))\nwriter.write(bytes(2 * PIECE_BYTES))\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path / "x")], check=False).returncode == -9
    assert len(list(tmp_path.glob("x#*"))) == 1
    working = DirectWriter(tmp_path / "x")
    working.write(data)
    write(tmp_path / "x", data, 1 << 20)
    assert len(list(tmp_path.glob("x#*"))) == 1, "the working writer's"
    working.close()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_what_another_machine_left_is_removed_when_a_week_has_passed(tmp_path: Path) -> None:
    """On a shared disk nobody can ask for its writer; a process here with the same id says nothing about it."""
    own = number_process()
    stranger = f"{(int(own[:5]) + 1) % 10**5:05d}{own[5:]}"
    of_yesterday = f"{own[:5]}{(int(own[5:11]) + 1) % 10**6:06d}{own[11:]}"
    for name in (f"x#{own}000000", f"x#{stranger}000000", f"x#{of_yesterday}000000"):
        (tmp_path / name).write_bytes(b"part")
    remove_remains(tmp_path / "x")
    assert {path.name for path in tmp_path.iterdir()} == {f"x#{own}000000", f"x#{stranger}000000"}, (
        "this process runs; this machine's last boot is over"
    )
    os.utime(tmp_path / f"x#{stranger}000000", (time.time() - 8 * 24 * 3600,) * 2)
    remove_remains(tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == [f"x#{own}000000"]


def test_a_workspace_lends_the_same_memory_again() -> None:
    """That is its whole use; two jobs at once are a mistake of ours."""
    space = Workspace()
    with space.lend(10_000) as first:
        first[:] = 7
        with pytest.raises(AssertionError, match="one job at a time"), space.lend(10):
            pass
    with space.lend(5_000) as second:
        assert (second == 7).all()
        assert len(second) == 5_000
    with space.lend(1 << 20) as larger:
        assert len(larger) == 1 << 20
        assert isinstance(larger, np.ndarray)
