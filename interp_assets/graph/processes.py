"""Dagster's UI as a child process: started in a session of its own, stopped when this process ends, its output kept in a file.

A direct child in its own session that may be interrupted obeys SIGINT and takes its code servers and daemon with it (`ui.py`). So SIGINT is
what it gets, however this process ends:

    Ctrl-C, SIGTERM, SIGHUP    `DagsterUi`, a context manager, stops it and waits; what is left of its group is killed
    SIGKILL, a crash           on Linux the kernel tells it (PR_SET_PDEATHSIG); elsewhere it goes on, and `ps` finds it

No process of it runs what lies in the current directory: the safe path, which the environment names, holds for children of children too.
Source: prctl(2).
"""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Final

from interp_assets.graph.jobs import open_instance
from interp_assets.planning.config import PipelineConfig
from interp_assets.train.launch import SAFE_PATH

_STOP_S: Final = 20
"""Seconds to leave Dagster for an orderly end before it is killed."""
_LOOK_S: Final = 1.0
_ENDING: Final = (signal.SIGTERM, signal.SIGHUP)
"""Signals that end a process without a word; SIGINT raises `KeyboardInterrupt` already."""
_ATTACHED: Final = """
import ctypes, os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGINT)
    if os.getppid() != int(sys.argv[1]):
        sys.exit()
os.execv(sys.argv[2], sys.argv[2:])
"""
"""What a child does before it becomes Dagster: it may be interrupted, is interrupted when its parent dies, and does not start when it has."""


class DagsterUi:
    """A running UI and daemon. A context manager: it is stopped at the end, by whatever the end comes."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, log: Path) -> None:
        """Hold a started process."""
        self._process, self.url, self.log = process, url, log
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "DagsterUi":  # noqa: PYI034 - beartype, which checks in tests, cannot read Self
        """Return itself: the process runs already. Signals that would end this process now raise `SystemExit` first.

        What this process ignores (SIGHUP under `nohup`) stays ignored.
        """
        self._handlers = {number: signal.signal(number, _leave) for number in _ENDING if signal.getsignal(number) is not signal.SIG_IGN}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop the process and what it has started."""
        for number in self._handlers:
            signal.signal(number, signal.SIG_IGN)  # a second one would leave what the first one stops
        self.stop()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def wait(self) -> None:
        """Wait until the process ends by itself.

        Now and then this thread looks up: a signal that another thread was handed would wait for ever beside a call that blocks.
        """
        while self._process.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_LOOK_S)

    def stop(self) -> None:
        """Ask for an end, and enforce it after `_STOP_S`, for all that was started."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_S)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def _leave(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)


def start_dagster(config: PipelineConfig, config_path: Path | None, port: int) -> DagsterUi:
    """Start Dagster's webserver and daemon for a pipeline on the loopback address. Ready in about ten seconds."""
    with open_instance(config) as instance:
        home = Path(instance.root_directory)
    log = home / "dagster-dev.log"
    environment = {**os.environ, "DAGSTER_HOME": str(home), "INTERP_ROOT": config.root, "DAGSTER_DISABLE_TELEMETRY": "1", **SAFE_PATH}
    if config_path is not None:
        environment["INTERP_CONFIG"] = str(config_path.resolve())
    start = [sys.executable, "-P", "-c", _ATTACHED, str(os.getpid())]
    command = [*start, sys.executable, "-P", "-m", "interp_assets.graph.ui", "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 - our own interpreter
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
        )
    return DagsterUi(process, f"http://127.0.0.1:{port}", log)
