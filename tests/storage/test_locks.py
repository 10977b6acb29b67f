"""One process at a time, and nobody waits for the dead."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from interp_assets.storage.locks import Holder, locked

HOLD = """
import sys, pathlib
from interp_assets.storage.locks import locked
with locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


def hold(path: Path) -> subprocess.Popen[str]:
    """Start a process that holds the lock until it reads a line or is killed."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("end", ["kill", "go on"])
def test_a_lock_is_waited_for_and_is_free_when_its_process_has_ended(tmp_path: Path, end: str) -> None:
    """A holder that was killed must not need a person to delete a file."""
    path, heard, slept = tmp_path / "folder" / "lock", [], []
    with hold(path) as process:

        def sleep(seconds: float) -> None:
            slept.append(seconds)
            if len(slept) == 3:
                process.kill() if end == "kill" else process.communicate("\n")
                process.wait()

        with locked(path, waits_for=heard.append, sleep=sleep):
            assert json.loads(path.read_text())["process_id"] == os.getpid()
    assert len(slept) == 3
    (said,) = heard  # once, however long it takes
    assert isinstance(said, Holder)
    assert said.process_id == process.pid
    assert f"process {process.pid} on " in said.describe()
    assert path.read_text() == ""


def test_where_nothing_can_be_locked_work_goes_on(tmp_path: Path) -> None:
    """A read-only folder must not stop somebody who only looks."""
    (tmp_path / "file").write_text("")
    with locked(tmp_path / "file" / "lock"):
        pass
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize("content", ["", "{", "[]", '{"process_id": "x"}', "\0" * 100])
def test_what_a_holder_wrote_may_be_anything(tmp_path: Path, content: str) -> None:
    """Old, foreign and half-written lines are no reason to fail."""
    path = tmp_path / "lock"
    heard = []
    with hold(path) as process:
        path.write_text(content)
        with locked(path, waits_for=heard.append, sleep=lambda _: process.kill() or process.wait()):
            assert json.loads(path.read_text())["process_id"] == os.getpid()
    assert heard == [None]
