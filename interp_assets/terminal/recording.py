"""A command that works on a pipeline is heard to its end, and what it did is kept in the pipeline's history (`planning/history.py`)."""

import hashlib
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from interp_assets.errors import InterpError, StoreError
from interp_assets.planning.config import PipelineConfig
from interp_assets.planning.history import begin_entry, save_entry, save_plan_aside
from interp_assets.planning.pipeline import load_pipeline, open_pipeline_store
from interp_assets.planning.progress import AssetReport, Progress
from interp_assets.storage.store import Store

_PACKAGE: Final = Path(__file__).parents[1]
_GIT_S: Final = 5.0
_GIT: Final = ("git", "-c", "core.fsmonitor=false", "-c", "diff.external=", "-c", "core.quotePath=false")
_MAX_IDS: Final = 256
"""Artifact ids of one asset that an entry names; of more it has the hash of all."""


class Recorder:
    """What is known so far of a command."""

    def __init__(self, config: PipelineConfig, store: Store, entry: dict[str, Any]) -> None:
        """`recorded` makes it."""
        self._config, self._store, self.entry = config, store, entry
        self._reports: list[AssetReport] = []

    def add(self, report: AssetReport) -> None:
        """Hear what was done for one asset."""
        self._reports.append(report)

    def finish(self, status: str, error: str, seconds: float, progress: Progress | None) -> None:
        """Write what came of it."""
        self.entry |= {"status": status, "error": error, "seconds": round(seconds, 3)}
        self.entry["plan"] = save_plan_aside(self._store, self._config.execution.plan)
        self.entry["assets"] = [self._describe(report, progress) for report in self._reports]
        save_entry(self._store, self.entry)

    def _describe(self, report: AssetReport, progress: Progress | None) -> dict[str, Any]:
        """Return what was done for an asset, and which artifacts that were."""
        made, found = self._ids(report)
        expected = (progress.expected_s if progress else {}).get(report.name, 0.0)
        return {
            "name": report.name,
            "n_made": report.n_made,
            "n_reused": report.n_reused,
            "failed": list(report.failed),
            "waiting": list(report.waiting),
            "stopped": list(report.stopped),
            "seconds": round(report.wall_s, 3),
            "forecast_s": round(expected, 3),
            "bytes": report.n_bytes,
            "made": made,
            "reused": found,
        }

    def _ids(self, report: AssetReport) -> tuple[Any, Any]:
        from interp_assets.graph.stages import make_road  # noqa: PLC0415 - a try has none

        made: dict[str, list[str]] = {}
        found: dict[str, list[str]] = {}
        with suppress(InterpError):  # a plan that cannot be read has no ids
            pipeline = load_pipeline(self._config, self._store)
            asset = make_road(self._config).get(tuple(report.name.split("/")))
            for key in asset.partition_keys(pipeline):
                if asset.plan or key in {*report.failed, *report.waiting, *report.stopped}:
                    continue
                ids = [ref.artifact_id for ref in asset.artifacts(pipeline, self._store, key)]
                (made if key in report.made else found)[key] = ids
        return _shorten(made), _shorten(found)


@contextmanager
def recorded(config: PipelineConfig, note: str = "", progress: Progress | None = None) -> Iterator[Recorder]:
    """Keep what the block does in the history of a pipeline, whatever ends it. `progress` knows what partitions were expected to take."""
    store, started_s = open_pipeline_store(config), time.monotonic()
    entry = begin_entry(sys.argv[1:], note)
    entry |= {"config": config.model_dump(mode="json"), "code": describe_code(config), "machine": describe_machine()}
    recorder = Recorder(config, store, entry)
    save_entry(store, entry)
    try:
        yield recorder
    except BaseException as error:
        status = "failed" if isinstance(error, Exception) else "interrupted"
        with suppress(StoreError):  # the first error is the one that counts
            recorder.finish(status, str(error) or type(error).__name__, time.monotonic() - started_s, progress)
        raise
    recorder.finish("done", "", time.monotonic() - started_s, progress)


def describe_code(config: PipelineConfig) -> dict[str, Any]:
    """Return which code runs: this package's version and the hash of its sources, own files of the configuration, and both repositories."""
    named = [*((sae.architecture, sae.code) for sae in config.saes), *((metric.function, metric.code) for metric in config.metrics)]
    files = {name.rpartition(":")[0]: code.digest for name, code in named if code}
    told = {"version": metadata.version("interp-assets"), "sources": hash_sources(), "files": files}
    return told | {"package": _describe_repository(_PACKAGE), "folder": _describe_repository(Path.cwd())}


def describe_machine() -> dict[str, Any]:
    """Return what this runs on."""
    told = {"name": platform.node(), "system": platform.platform(), "cpus": os.cpu_count(), "python": platform.python_version()}
    return told | {name: metadata.version(name) for name in ("torch", "numpy", "transformers")}


@cache
def hash_sources() -> str:
    """Hash all modules of this package, by name and content."""
    paths = sorted(_PACKAGE.rglob("*.py"))
    return _hash(b"".join(f"{path.relative_to(_PACKAGE).as_posix()}\0".encode() + path.read_bytes() for path in paths))


def _describe_repository(folder: Path) -> dict[str, str] | None:
    """Return commit, and the hash of what differs from it (empty where nothing does), of the repository that a folder lies in; None without one."""
    commit = _ask_git(folder, "rev-parse", "HEAD")
    changes = _ask_git(folder, "diff", "--no-ext-diff", "--no-textconv", "HEAD") if commit else None
    return {"commit": commit.decode().strip(), "dirty": _hash(changes) if changes else ""} if commit and changes is not None else None


def _ask_git(folder: Path, *words: str) -> bytes | None:
    try:
        done = subprocess.run([*_GIT, "-C", str(folder), *words], capture_output=True, timeout=_GIT_S, check=False)  # noqa: S603 - git, and words of ours
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _shorten(ids: Mapping[str, Sequence[str]]) -> Any:
    """Return ids by partition, or where they are many their number and hash."""
    flat = [each for partition in ids.values() for each in partition]
    return dict(ids) if len(flat) <= _MAX_IDS else {"n": len(flat), "hash": _hash("".join(flat).encode())}


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
