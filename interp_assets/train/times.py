"""The clock around the step loop becomes `times.json` of an SAE: how long its training took, and how much of that it waited for rows.

Times are no part of what an SAE is: the file is outside the artifact's digest, so the same inputs keep the same digest. They are added up
over interruptions, because each checkpoint carries them. Format: `docs/formats/sae.md`.
"""

import json
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from torch.profiler import record_function

from interp_assets.storage.manifest import Manifest, read_file
from interp_assets.storage.store import Store
from interp_assets.train.parallel import Ranks

TIMES: Final = "times.json"
WAIT: Final = "wait for rows"
"""Name of the profiled range in which the step loop waits for its reader."""
T = TypeVar("T")
_CLEAR: Final = Path("/proc/self/clear_refs")
_STATUS: Final = Path("/proc/self/status")


@dataclass
class TrainingTimes:
    """Where the time of one SAE's training went, in seconds, as the first rank saw it.

    Rates are made of the ordinary steps only: not of a process' first one, nor of those that compile a loop or that a profiler watches.
    """

    wall_s: float = 0.0
    """Of the step loop, in the steps that this SAE took part in."""
    n_rows: int = 0
    """Rows trained on in this time."""
    rated_s: float = 0.0
    """Of `wall_s`, in ordinary steps."""
    rated_rows: int = 0
    """Rows trained on in ordinary steps."""
    wait_s: float = 0.0
    """Of `rated_s`, waiting for rows."""
    step_s: float = 0.0
    """Of `rated_s`, in this SAE's own steps; the rest went to the SAEs that were trained beside it, to progress and to checkpoints."""

    def add(self, *, wall_s: float, wait_s: float, step_s: float, n_rows: int, is_rated: bool = True) -> None:
        """Add one step; one that is not `is_rated` counts for the total only."""
        self.wall_s += wall_s
        self.n_rows += n_rows
        if is_rated:
            self.rated_s += wall_s
            self.rated_rows += n_rows
            self.wait_s += wait_s
            self.step_s += step_s

    @property
    def rows_per_s(self) -> float | None:
        """Rows per second of the ordinary steps; None when there was no such step."""
        return self.rated_rows / self.rated_s if self.rated_s else None

    @property
    def input_wait_share(self) -> float | None:
        """Share of the ordinary steps' time that the loop waited for rows; None when there was no such step."""
        return self.wait_s / self.rated_s if self.rated_s else None

    def encode(self) -> bytes:
        """Return the JSON that a checkpoint carries."""
        return _json(asdict(self))


class WaitClock:
    """Measures how long a loop waits for its rows, and how long ago it started."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        """Start; `now` tells seconds."""
        self._now = now
        self._started_s = self._mark_s = now()
        self.wait_s = 0.0
        self.last_wait_s = 0.0

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start, without those that it was stopped."""
        return self._now() - self._started_s

    def lap(self) -> float:
        """Return the seconds since the last lap, without those that it was stopped."""
        before, self._mark_s = self._mark_s, self._now()
        return self._mark_s - before

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Count nothing that happens inside the block."""
        stopped_s = self._now()
        yield
        gone_s = self._now() - stopped_s
        self._started_s += gone_s
        self._mark_s += gone_s

    def each(self, items: Iterator[T]) -> Iterator[T]:
        """Yield the items, and count how long each one was waited for."""
        while True:
            started_s = self._now()
            with record_function(WAIT):
                item = next(items, None)
            self.last_wait_s = self._now() - started_s
            self.wait_s += self.last_wait_s
            if item is None:
                return
            yield item


def describe_times(times: TrainingTimes, ranks: Ranks, device: torch.device, n_together: int) -> bytes:
    """Return `times.json` of a finished training: its times, its rates and on what it ran."""
    return _json(
        {
            **asdict(times),
            "rows_per_s": times.rows_per_s,
            "step_rows_per_s": times.rated_rows / times.step_s if times.step_s else None,
            "input_wait_share": times.input_wait_share,
            "peak_memory_bytes": peak_memory_bytes(),
            "peak_device_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
            "n_together": n_together,
            "processes": ranks.size,
            "latent_processes": ranks.n_slices,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "threads": torch.get_num_threads(),
        }
    )


def parse_times(data: bytes) -> TrainingTimes:
    """Read what `TrainingTimes.encode` wrote. Raises `ValueError` when it is anything else."""
    content = json.loads(data)
    names = [item.name for item in fields(TrainingTimes)]
    if not isinstance(content, dict) or sorted(content) != sorted(names):
        raise ValueError(f"it should have {names}, and has {list(content)}")
    return TrainingTimes(**content)


def find_times(store: Store, path: str, manifest: Manifest) -> dict[str, Any]:
    """Return `times.json` of the SAE at `path`; nothing where its manifest lists none, as of earlier releases.

    Raises `ArtifactCorruptError` when the file is damaged.
    """
    if all(entry.name != TIMES for entry in manifest.files):
        return {}
    return json.loads(read_file(store, path, manifest, TIMES))


def forget_peaks(device: torch.device) -> None:
    """Let the peaks of memory begin here: the device's, and where the system can (Linux) the process'."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        _CLEAR.write_text("5")


def peak_memory_bytes() -> int:
    """Return the largest resident size of this process since `forget_peaks`; of all its life where the system can't forget (not Linux)."""
    with suppress(OSError, ValueError):
        (found,) = re.findall(r"^VmHWM:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
        return int(found) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, sort_keys=True, indent=1) + "\n").encode()
