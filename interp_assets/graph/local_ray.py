"""The devices or cores of this machine become workers of a Ray that starts with a run and ends with it.

Each worker has one of Ray's CPUs, which here is an equal share of the cores: so many threads it computes with. Memory is what is free when the
run begins, and Ray gives out no more, so the workers of an asset that takes much are fewer. Its node has a loopback address; Ray's servers listen
on all that the machine has, and answer only who knows a token that is drawn anew for each process. All its processes end with this one, however
it ends.
"""

import logging
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import chdir, contextmanager
from functools import cache
from typing import Final

from interp_assets.errors import ConfigError
from interp_assets.graph.fanout import ADDRESS_VARIABLE, TRUSTED
from interp_assets.graph.workers import dismiss_crew
from interp_assets.planning.config import ExecutionConfig

_OBJECT_BYTES: Final = 80_000_000
"""What Ray may hold of messages, which are small."""
_ADDRESS: Final = "127.0.0.2" if sys.platform == "linux" else "127.0.0.1"
"""Loopback; for 127.0.0.1 Ray takes the address by which others reach this machine, but elsewhere it is the only one that is there."""
_THREADS: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")


@contextmanager
def local_cluster(execution: ExecutionConfig) -> Iterator[None]:
    """Start Ray where several workers are asked for and no cluster is named. Raises `ConfigError` where it is not installed."""
    n_workers = 1 if os.environ.get(ADDRESS_VARIABLE) else count_workers(execution)
    shut_down = _start(execution, n_workers) if n_workers > 1 else lambda: None
    try:
        yield
    finally:
        try:
            dismiss_crew()
        finally:
            shut_down()


def count_workers(execution: ExecutionConfig) -> int:
    """Return how many workers are meant: `auto` is one a GPU, and without one (or told to use the CPU) one a core."""
    if execution.workers != "auto":
        return execution.workers
    return _count_gpus(execution) or _count_cores()


def _count_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _count_gpus(execution: ExecutionConfig) -> int:
    if execution.device in ("cpu", "mps"):
        return 0
    import torch  # noqa: PLC0415 - takes seconds, and one worker does without

    return torch.cuda.device_count()


def _start(execution: ExecutionConfig, n_workers: int) -> Callable[[], None]:
    """Start Ray, and return what ends it."""
    if sys.modules.get("ray") and os.environ.get("RAY_AUTH_TOKEN") != _token():
        raise ConfigError(
            "Ray was imported in this process before its token could be set, so that it would answer everybody. Begin the run in a process of its "
            "own (`interp run --workers`), or start a cluster and name it in RAY_ADDRESS."
        )
    os.environ.update({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": _token(), "RAY_USAGE_STATS_ENABLED": "0"})  # read when Ray is imported
    try:
        import ray  # noqa: PLC0415 - only where several workers are asked for
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"execution.workers is {execution.workers!r}, and Ray, which starts them, is not installed: pip install 'interp-assets[ray]', or set it "
            "to 1."
        ) from error
    import torch  # noqa: PLC0415 - as above

    from interp_assets.garcon.spread import free_bytes_of  # noqa: PLC0415 - as above

    threads = str(max(1, _count_cores() // n_workers))
    with _environment(dict.fromkeys(_THREADS, threads)), chdir(TRUSTED):  # Ray puts the current directory first on its workers' module path
        ray.init(
            address="local",
            num_cpus=n_workers,
            num_gpus=_count_gpus(execution),
            object_store_memory=_OBJECT_BYTES,
            include_dashboard=False,
            _memory=free_bytes_of(torch.device("cpu")),
            log_to_driver=False,
            logging_level=logging.ERROR,
            _node_ip_address=_ADDRESS,
        )
    return ray.shutdown


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Hand variables to the processes that are started here, and to nothing later."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@cache
def _token() -> str:
    """Return the word of this process; Ray reads it once."""
    return secrets.token_hex(32)
