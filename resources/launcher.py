"""A run becomes a process of this machine, as Dagster does it, and a run whose process is gone becomes a failed one, so that it can be tried again.

Dagster's own launcher cannot be asked whether a run is alive: after a power cut, or a kill of daemon and code server together, its runs
stay "started" for ever, hold their places in the queue and in the pools, and a backfill waits for them for ever. This one answers from
what is known of a run:

    launched by a code server     the server that started it is asked for the runs it has; one that does not answer has none
    run by `interp`               the tag `interp/process` names machine and process id; on this machine the process table answers

A code server that was killed alone may leave a run behind that goes on: it is then run twice. That is safe, because artifacts are
published once and whole. Launchers of clusters (Kubernetes, ECS, Ray) have checks of their own and do not need this.
"""

import json
import os
import socket
from typing import Any, Final

import grpc
from dagster import DagsterRun
from dagster._core.errors import DagsterUserCodeUnreachableError
from dagster._core.launcher import CheckRunHealthResult, DefaultRunLauncher, WorkerStatus
from dagster._core.storage.tags import GRPC_INFO_TAG
from dagster._grpc.client import DagsterGrpcClient
from dagster._grpc.types import GetCurrentRunsResult
from dagster._serdes import deserialize_value

PROCESS_TAG: Final = "interp/process"


def name_process() -> str:
    """Return `<machine>:<process id>` of this process, for the tags of runs that it executes itself."""
    return f"{socket.gethostname()}:{os.getpid()}"


class LocalRunLauncher(DefaultRunLauncher):
    """Dagster's default launcher, which can also say whether a run is alive."""

    @property
    def supports_check_run_worker_health(self) -> bool:
        """Let run monitoring ask."""
        return True

    def check_run_worker_health(self, run: DagsterRun) -> CheckRunHealthResult:
        """Say whether a run's process is there; a run that nothing is known of is believed to be."""
        if GRPC_INFO_TAG in run.tags:
            runs = _runs_of(json.loads(run.tags[GRPC_INFO_TAG]))
            if runs is None or run.run_id in runs:
                return CheckRunHealthResult(WorkerStatus.RUNNING)
            return CheckRunHealthResult(WorkerStatus.FAILED, "The code server that started this run is gone, or does not have it any more.")
        machine, _, process_id = run.tags.get(PROCESS_TAG, "").rpartition(":")
        if machine == socket.gethostname() and not _is_alive(int(process_id)):
            return CheckRunHealthResult(WorkerStatus.FAILED, f"The process {process_id} that executed this run is gone.")
        return CheckRunHealthResult(WorkerStatus.RUNNING)


def _runs_of(address: dict[str, Any]) -> list[str] | None:
    """List the runs that a code server executes; none when there is no server, None when it does not answer in time."""
    client = DagsterGrpcClient(address.get("port"), address.get("socket"), address.get("host", "localhost"), use_ssl=address.get("use_ssl", False))
    try:
        return list(deserialize_value(client.get_current_runs(), GetCurrentRunsResult).current_runs)
    except DagsterUserCodeUnreachableError as error:
        is_gone = isinstance(error.__cause__, grpc.RpcError) and error.__cause__.code() == grpc.StatusCode.UNAVAILABLE
        return [] if is_gone else None


def _is_alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
