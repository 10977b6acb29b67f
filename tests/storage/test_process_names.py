"""A name tells a process from every later one with the same id, and what cannot be looked at is believed to run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from interp_assets.storage.process_names import NUMBER_DIGITS, may_run, may_run_number, name_process, number_process

NAME = name_process()
FIELDS = ("machine", "process_id", "started", "boot", "namespace")


def changed(**parts: str) -> str:
    """Return this process's name with some parts replaced."""
    return ":".join((dict(zip(FIELDS, NAME.split(":"), strict=True)) | parts).values())


def test_this_process_runs_and_one_that_ended_does_not() -> None:
    """The ordinary case: nothing has taken the id since."""
    source = "from interp_assets.storage.process_names import name_process; print(name_process())"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert may_run(NAME)
    assert not may_run(done.stdout.strip())


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="this system has no /proc")
def test_another_process_with_the_same_id_is_another_process() -> None:
    """After a reboot, or a container's restart, the ids are soon taken; a run would be believed alive for ever."""
    started = NAME.split(":")[2]
    assert not may_run(changed(started=str(int(started) + 1)))
    assert not may_run(changed(boot="of-yesterday"))
    assert may_run(changed(process_id="1", started=str(first_started())))  # another user's process is a process


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="this system has no /proc")
def test_a_process_of_another_namespace_is_gone_only_if_it_is_older_than_this_one() -> None:
    """A daemon in a container must not fail the live run of its host; a container that was started again has lost its processes."""
    ended = "4194304"  # above the largest id that Linux gives
    assert not may_run(changed(process_id=ended))
    assert may_run(changed(process_id=ended, namespace="1"))
    assert may_run(changed(process_id=ended, namespace="1", started=str(first_started())))
    assert not may_run(changed(process_id=ended, namespace="1", started=str(first_started() - 1)))


def test_what_cannot_be_known_is_believed_to_run() -> None:
    """A process of another machine that shares the history cannot be looked at, nor one whose start could not be read."""
    assert may_run("another-machine:1:2:3:4")
    assert may_run("")
    assert may_run(changed(process_id="none"))
    assert may_run(changed(started="", boot="", namespace=""))
    assert may_run(f"{NAME.split(':')[0]}:{os.getpid()}")  # a name of before names had more parts


def test_a_number_tells_the_same_as_a_name() -> None:
    """Names of files that are being written may hold digits only, or listings would show them."""
    number = number_process()
    assert number.isdecimal()
    assert len(number) == NUMBER_DIGITS == 46
    assert may_run_number(number)
    source = "from interp_assets.storage.process_names import number_process; print(number_process())"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert not may_run_number(done.stdout.strip())
    assert may_run_number("9" * NUMBER_DIGITS)
    if Path("/proc/self/stat").exists():
        assert not may_run_number(f"{int(number) + 1:0{NUMBER_DIGITS}d}"), "the same id, started a moment later"


def first_started() -> int:
    """Read when the first process of this namespace started, as ps does."""
    return int(Path("/proc/1/stat").read_text().rpartition(")")[2].split()[19])
