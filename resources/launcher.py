"""A run becomes a process of this machine, as Dagster does it, and a run whose process is gone becomes a failed one, so that it can be tried again.

Dagster's own launcher cannot be asked whether a run is alive: after a power cut, or a kill of daemon and code server together, its runs
stay "started" for ever, hold their places in the queue and in the pools, and a backfill waits for them for ever. This one answers from
what is known of a run:

    launched by a code server     the server that started it is asked for the runs it has; one that does not answer has none
    run by `interp`               a tag names its process (storage/process_names.py); this machine's process table answers. Earlier versions wrote
                                  it under another name, which is read too; those before them none, and their runs are left alone

Dagster asks every `poll_interval_seconds`, and only about runs that have started: one that was killed while it started is not asked about,
it fails after `start_timeout_seconds`. Runs of `interp` fail and are not tried again: Dagster does not know how to start them.

A code server that was killed alone may leave a run behind that goes on: it is then run twice. That is safe, because artifacts are
published once and whole. Launchers of clusters (Kubernetes, ECS, Ray) have checks of their own and do not need this.
"""

import json
from typing import Any, Final

import grpc
from dagster import DagsterRun
from dagster._core.errors import DagsterUserCodeUnreachableError
from dagster._core.launcher import CheckRunHealthResult, DefaultRunLauncher, WorkerStatus
from dagster._core.storage.tags import GRPC_INFO_TAG, HIDDEN_TAG_PREFIX
from dagster._grpc.client import DagsterGrpcClient
from dagster._grpc.types import GetCurrentRunsResult
from dagster._serdes import deserialize_value

from interp_assets.storage.process_names import may_run

PROCESS_TAG: Final = f"{HIDDEN_TAG_PREFIX}interp_process"
"""For machines only: the UI shows no tag of this prefix."""
EARLIER_TAG: Final = "interp/process"
"""The same in histories of earlier versions, whose runs would else count as alive for ever."""


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
        name = run.tags.get(PROCESS_TAG) or run.tags.get(EARLIER_TAG, "")
        if not may_run(name):
            return CheckRunHealthResult(WorkerStatus.FAILED, f"The process that executed this run is gone ({name}).")
        return CheckRunHealthResult(WorkerStatus.RUNNING)


def _runs_of(address: dict[str, Any]) -> list[str] | None:
    """List the runs that a code server executes; none when there is no server, None when it does not answer in time."""
    client = DagsterGrpcClient(address.get("port"), address.get("socket"), address.get("host", "localhost"), use_ssl=address.get("use_ssl", False))
    try:
        return list(deserialize_value(client.get_current_runs(), GetCurrentRunsResult).current_runs)
    except DagsterUserCodeUnreachableError as error:
        is_gone = isinstance(error.__cause__, grpc.RpcError) and error.__cause__.code() == grpc.StatusCode.UNAVAILABLE
        return [] if is_gone else None
