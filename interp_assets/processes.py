"""Dagster's UI as a child process: started in a session of its own, stopped with SIGINT, its output kept in a file.

`dagster dev` ignores SIGTERM for a while and, as a shell's background job, SIGINT too; a direct child in its own session obeys SIGINT
and takes its code server and daemon with it.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Final

from interp_assets.config import PipelineConfig
from interp_assets.jobs import open_instance

_STOP_S: Final = 20
"""Seconds to leave Dagster for an orderly end before it is killed."""


class DagsterUi:
    """A running `dagster dev`. A context manager: it is stopped at the end."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, log: Path) -> None:
        """Hold a started process."""
        self._process, self.url, self.log = process, url, log

    def __enter__(self) -> "DagsterUi":  # noqa: PYI034 - beartype, which checks in tests, cannot read Self
        """Return itself: the process runs already."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop the process and what it has started."""
        self.stop()

    def wait(self) -> None:
        """Wait until the process ends by itself."""
        self._process.wait()

    def stop(self) -> None:
        """Ask for an end, and enforce it after `_STOP_S`."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()


def start_dagster(config: PipelineConfig, config_path: Path | None, port: int) -> DagsterUi:
    """Start Dagster's webserver and daemon for a pipeline on the loopback address. Ready in about ten seconds."""
    with open_instance(config) as instance:
        home = Path(instance.root_directory)
    log = home / "dagster-dev.log"
    environment = {**os.environ, "DAGSTER_HOME": str(home), "INTERP_ROOT": config.root, "DAGSTER_DISABLE_TELEMETRY": "1"}
    if config_path is not None:
        environment["INTERP_CONFIG"] = str(config_path.resolve())
    command = [sys.executable, "-m", "dagster", "dev", "-m", "interp_assets.definitions", "--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 - our own interpreter
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
        )
    return DagsterUi(process, f"http://127.0.0.1:{port}", log)
