"""Dagster's UI as a child: it ends with the process that opened it, and that process ends by the signals that may end it."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from interp_assets.graph.processes import DagsterUi

ENDING = (signal.SIGTERM, signal.SIGHUP)


@pytest.fixture
def handlers() -> Iterator[None]:
    """Put this process's signals back as they were."""
    before: dict[signal.Signals, Any] = {number: signal.getsignal(number) for number in ENDING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def _start() -> tuple[DagsterUi, subprocess.Popen[bytes]]:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    return DagsterUi(child, "", Path()), child


def _hang_up_and_end(child: subprocess.Popen[bytes]) -> None:
    os.kill(os.getpid(), signal.SIGHUP)
    assert child.poll() is None
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.usefixtures("handlers")
def test_a_hangup_that_nohup_ignores_ends_nothing() -> None:
    """`nohup interp dev &` is how a person leaves it running on a server, and logs out; SIGTERM still ends it."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ui, child = _start()
    with pytest.raises(SystemExit) as ended, ui:
        _hang_up_and_end(child)
    assert ended.value.code == 128 + signal.SIGTERM
    assert child.poll() is not None
    assert [signal.getsignal(number) for number in ENDING] == [signal.SIG_DFL, signal.SIG_IGN]


@pytest.mark.usefixtures("handlers")
def test_a_hangup_ends_the_child_too() -> None:
    """A terminal that is closed must leave no webserver behind."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    ui, child = _start()
    with pytest.raises(SystemExit) as ended, ui:
        os.kill(os.getpid(), signal.SIGHUP)
    assert ended.value.code == 128 + signal.SIGHUP
    assert child.poll() is not None
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
