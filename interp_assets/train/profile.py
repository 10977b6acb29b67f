"""A window of training steps becomes a table of where their time went, their memory peak, and a trace file for a timeline viewer.

torch.profiler watches some steps after a warm-up, on the first rank. Its events are added up three ways:

    phases        the ranges that loop and trainer name: waiting for rows, normalising, each SAE's loss, collectives, update, checkpoints
    groups        own time of every operation, by kind; what a phase spends outside of torch (NumPy, Numba, Python) is one of them
    operations    the most expensive ones

Own times of operations on a GPU overlap with the host's: both columns are given, and neither is a sum to the wall time there.
Watching changes no number: weights are the same bit for bit, which a test holds. `trace.json.gz` opens in Perfetto or chrome://tracing.
"""

import gzip
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from interp_assets.compute.products import PRODUCT
from interp_assets.storage.manifest import ArtifactWriter
from interp_assets.train.times import WAIT, peak_memory_bytes

PROFILE: Final = "profile.json"
TRACE: Final = "trace.json.gz"
NORMALIZE: Final = "normalise"
LOSS: Final = "loss and gradients"
COLLECTIVE: Final = "sum over ranks"
UPDATE: Final = "update"
CHECKPOINT: Final = "checkpoint"
PHASES: Final = (WAIT, NORMALIZE, LOSS, COLLECTIVE, UPDATE, CHECKPOINT)
"""Names of the ranges; they do not overlap."""

_STANDARD_ERROR: Final = 2
_REMARKS: Final = (b"Memory block of unknown size was allocated before the profiling started", b"SyncActivityProfilerHandler")
_WARM_UP_STEPS: Final = 10
_N_OPERATIONS: Final = 15
_OUTSIDE: Final = "outside torch (NumPy, Numba, Python)"
_GROUPS: Final[tuple[tuple[str, tuple[str, ...]], ...]] = (
    ("communication", ("c10d::", "gloo:", "nccl:", "record_param_comms")),
    ("optimizer", ("Optimizer.", "aten::_fused_adam")),
    (
        "matrix products",
        ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::matmul", "aten::linear", "aten::addmv", "aten::mv", PRODUCT),
    ),
    ("sparse products", ("aten::_embedding_bag", "aten::embedding", "aten::index_add")),
    (
        "sort, select, gather",
        (
            *("aten::topk", "aten::sort", "aten::nonzero", "aten::index", "aten::gather", "aten::scatter", "aten::bincount", "aten::cumsum"),
            *("aten::masked", "aten::take", "aten::where", "aten::unique", "aten::searchsorted"),
        ),
    ),
    ("copies and memory", ("aten::copy_", "aten::clone", "aten::cat", "aten::empty", "aten::fill_", "aten::zero_", "aten::resize_", "Mem", "cuda")),
    ("reductions", ("aten::sum", "aten::norm", "aten::linalg_vector_norm", "aten::amax", "aten::amin", "aten::max", "aten::min", "aten::mean")),
)
"""The first group with a prefix that fits takes an operation; other ones are elementwise."""


class Profile(NamedTuple):
    """What a watched window of steps showed."""

    summary: dict[str, Any]
    """What `profile.json` says."""
    trace: bytes
    """`trace.json.gz`."""


def save_profile(art: ArtifactWriter, seen: Profile, *, first: str, is_first: bool) -> None:
    """Write a run's profile into the artifact of one of its SAEs; the trace goes into the first one only, at the path `first`."""
    content = {**seen.summary, "trace": f"{first}/{TRACE}"}
    art.put(PROFILE, (json.dumps(content, sort_keys=True, indent=1) + "\n").encode(), is_timed=True)
    if is_first:
        art.put(TRACE, seen.trace, is_timed=True)


class StepProfiler:
    """Watches `n_steps` steps of a loop, from some steps after its first one on. 0 watches nothing."""

    def __init__(self, n_steps: int, steps: range, device: torch.device) -> None:
        """Plan the window inside `steps`: late enough to be warm, early enough to be whole."""
        n_steps = min(n_steps, len(steps))
        first = min(steps.start + _WARM_UP_STEPS, steps.stop - n_steps)
        self.window = range(first, first + n_steps)
        """The steps that are watched."""
        self._device = device
        self._profiler: profile | None = None
        self._started_s = 0.0
        self.result: Profile | None = None

    def before(self, step: int) -> None:
        """Start to watch when the window begins: to be called before the rows of `step` are waited for."""
        if step not in self.window[:1]:
            return
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._device.type == "cuda" else [])]
        self._profiler = profile(activities=activities, profile_memory=True, acc_events=True)
        with _unheard():
            unknown = torch.empty(1)
            self._profiler.start()
            del unknown
        self._started_s = time.perf_counter()

    def after(self, step: int) -> None:
        """Stop when the window ends: to be called after `step`."""
        if self._profiler is None or step + 1 != self.window.stop:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        wall_s = time.perf_counter() - self._started_s
        self._profiler.stop()
        self.result = _summarize(self._profiler, wall_s, self.window, self._device)
        self._profiler = None

    def close(self) -> None:
        """Stop also when an error ended the loop inside the window: torch has one profiler, and the next training needs it."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None


@contextmanager
def _unheard() -> Iterator[None]:
    """Drop torch's two remarks about a profiler that starts; write what else comes to standard error meanwhile when the block ends.

    The profiler names itself on standard error unless `KINETO_LOG_LEVEL` says not to. The first memory that is freed inside the window and
    was taken before gets a warning from C++, every thousandth gets another; both are no fault: the caller frees some inside the block.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    sys.stderr.flush()
    kept = os.dup(_STANDARD_ERROR)
    try:
        with tempfile.TemporaryFile() as heard:
            os.dup2(heard.fileno(), _STANDARD_ERROR)
            try:
                yield
            finally:
                os.dup2(kept, _STANDARD_ERROR)
                heard.seek(0)
                lines = [line for line in heard if not any(remark in line for remark in _REMARKS)]
                os.write(_STANDARD_ERROR, b"".join(lines))
    finally:
        os.close(kept)


def group_of(operation: str) -> str:
    """Return the group that an operation's time is added to."""
    if operation in PHASES:
        return WAIT if operation == WAIT else _OUTSIDE
    for group, prefixes in _GROUPS:
        if operation.startswith(prefixes):
            return group
    return "elementwise and other"


def _summarize(profiler: profile, wall_s: float, steps: range, device: torch.device) -> Profile:
    averages = [event for event in profiler.key_averages() if event.key != "[memory]"]
    phases = {event.key: event for event in averages if event.key in PHASES}
    groups: dict[str, list[float]] = {}
    for event in averages:
        own = groups.setdefault(group_of(event.key), [0.0, 0.0])
        own[0] += event.self_cpu_time_total / 1e6
        own[1] += event.self_device_time_total / 1e6
    trace = _export(profiler)
    shares = [_share(name, phases[name].cpu_time_total / 1e6, wall_s, calls=phases[name].count) for name in PHASES if name in phases]
    shares.append(_share("other", max(0.0, wall_s - sum(item["s"] for item in shares)), wall_s, calls=len(steps)))
    operations = sorted(averages, key=lambda event: -max(event.self_cpu_time_total, event.self_device_time_total))[:_N_OPERATIONS]
    summary: dict[str, Any] = {
        "steps": [steps.start, steps.stop],
        "wall_s": wall_s,
        "phases": shares,
        "groups": [
            _share(name, cpu_s, wall_s, device_s=device_s) for name, (cpu_s, device_s) in sorted(groups.items(), key=lambda item: -max(item[1]))
        ],
        "operations": [
            {
                "name": event.key,
                "calls": event.count,
                "cpu_s": event.self_cpu_time_total / 1e6,
                "device_s": event.self_device_time_total / 1e6,
                "allocated_bytes": event.self_cpu_memory_usage + event.self_device_memory_usage,
            }
            for event in operations
        ],
        "memory": {
            "process_peak_bytes": peak_memory_bytes(),
            "device_peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
            "window_peak_bytes": _window_peak(trace),
        },
    }
    packed = gzip.compress(json.dumps(trace, separators=(",", ":")).encode(), compresslevel=6, mtime=0)
    return Profile(summary, packed)


def _share(name: str, seconds: float, wall_s: float, **more: Any) -> dict[str, Any]:
    return {"name": name, "s": seconds, "share": seconds / wall_s if wall_s else 0.0, **more}


def _export(profiler: profile) -> dict[str, Any]:
    """Return the trace as plain data, without the machine's name and temporary paths. torch writes to a file's path only."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace = json.loads(path.read_bytes())
    return {key: value for key, value in trace.items() if key not in ("host_name", "traceName", "trace_id")}


def _window_peak(trace: dict[str, Any]) -> int:
    """Return how far torch's tensors grew above what was there when the window began, in bytes."""
    held = [event["args"].get("Total Allocated", 0) for event in trace["traceEvents"] if event.get("name") == "[memory]"]
    return max(0, *held) if held else 0
