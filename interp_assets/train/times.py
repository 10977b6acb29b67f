"""The clock around the step loop becomes `times.json` of an SAE: how long its training took, and how much of that it waited for rows.

Times are no part of what an SAE is: the file is outside the artifact's digest, so the same inputs keep the same digest. They are added up
over interruptions, because each checkpoint carries them. Format: `docs/formats/sae.md`.
"""

import json
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final, TypeVar

import torch
from torch.profiler import record_function

from interp_assets.errors import ArtifactError
from interp_assets.manifest import Manifest, read_file
from interp_assets.store import Store
from interp_assets.train.parallel import Ranks

TIMES: Final = "times.json"
WAIT: Final = "wait for rows"
"""Name of the profiled range in which the step loop waits for its reader."""
T = TypeVar("T")


@dataclass
class TrainingTimes:
    """Where the time of one SAE's training went, in seconds, as the first rank saw it."""

    wall_s: float = 0.0
    """Of the step loop, in the steps that this SAE took part in."""
    wait_s: float = 0.0
    """Of these, waiting for rows."""
    step_s: float = 0.0
    """Of these, in this SAE's own steps; the rest went to the SAEs that were trained beside it, to progress and to checkpoints."""
    n_rows: int = 0
    """Rows trained on in this time."""

    def add(self, *, wall_s: float, wait_s: float, step_s: float, n_rows: int) -> None:
        """Add one step."""
        self.wall_s += wall_s
        self.wait_s += wait_s
        self.step_s += step_s
        self.n_rows += n_rows

    @property
    def input_wait_share(self) -> float:
        """Share of the wall time that the step loop waited for rows."""
        return self.wait_s / self.wall_s if self.wall_s else 0.0

    def encode(self) -> bytes:
        """Return the JSON that a checkpoint carries."""
        return _json(asdict(self))


class WaitClock:
    """Measures how long a loop waits for its rows, and how long ago it started."""

    def __init__(self) -> None:
        """Start."""
        self._started_s = self.mark_s = time.perf_counter()
        self.wait_s = 0.0
        self.last_wait_s = 0.0

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._started_s

    def lap(self) -> float:
        """Return the seconds since the last lap."""
        before, self.mark_s = self.mark_s, time.perf_counter()
        return self.mark_s - before

    def each(self, items: Iterator[T]) -> Iterator[T]:
        """Yield the items, and count how long each one was waited for."""
        while True:
            started_s = time.perf_counter()
            with record_function(WAIT):
                item = next(items, None)
            self.last_wait_s = time.perf_counter() - started_s
            self.wait_s += self.last_wait_s
            if item is None:
                return
            yield item


def describe_times(times: TrainingTimes, ranks: Ranks, device: torch.device, n_together: int) -> bytes:
    """Return `times.json` of a finished training: its times, its rates and on what it ran."""
    return _json(
        {
            **asdict(times),
            "rows_per_s": times.n_rows / times.wall_s if times.wall_s else 0.0,
            "step_rows_per_s": times.n_rows / times.step_s if times.step_s else 0.0,
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
    """Read what `TrainingTimes.encode` wrote."""
    return TrainingTimes(**json.loads(data))


def find_times(store: Store, path: str, manifest: Manifest) -> dict[str, Any]:
    """Return `times.json` of the SAE at `path`; nothing where it has none, as SAEs of earlier releases."""
    try:
        return json.loads(read_file(store, path, manifest, TIMES))
    except ArtifactError:
        return {}


def peak_memory_bytes() -> int:
    """Return the largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, sort_keys=True, indent=1) + "\n").encode()
