"""A pipeline and this machine become what is missing for it, before any work: devices, room on the disk, and memory.

    room      what the forecast says will be written, against what is free on the disk of `root`; what a bucket has is not known
    memory    what the largest job of each asset holds, by the forecast, against all that this machine or container has; not where it lies on a GPU,
              in a task of a cluster, or is not known
    devices   `execution.device`, and on CUDA one for each of `execution.processes`; where tasks go to a cluster, its nodes are asked when they come

A forecast of rows that are not counted yet may be wrong by some tenths, so a run looks again when they are.
"""

import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from interp_assets.corpus.sizes import are_counted
from interp_assets.errors import InputError, PlanError
from interp_assets.graph.fanout import ADDRESS_VARIABLE
from interp_assets.planning.asset import Asset
from interp_assets.planning.config import ExecutionConfig
from interp_assets.planning.machine import PROCESS_BYTES
from interp_assets.planning.pipeline import Pipeline
from interp_assets.planning.progress import format_bytes
from interp_assets.planning.road import Road
from interp_assets.planning.schedule import Line, make_schedule
from interp_assets.shuffle.choice import foresee
from interp_assets.storage.lineage import Digests
from interp_assets.storage.store import Store


def check_machine(road: Road, pipeline: Pipeline, store: Store, assets: Sequence[Asset], known: Digests | None = None) -> None:
    """Raise `PlanError` with all that this machine lacks to make what is missing of some assets. `known` is what was looked at, and is filled."""
    if not assets:
        return
    keys = {asset.key for asset in assets}
    foreseen = foresee(pipeline, store)
    lines = make_schedule(road, foreseen, store, {}, 1, known if foreseen is pipeline else None)
    lines = [line for line in lines if line.key in keys]
    if found := find_lacks(road, pipeline, store, lines):
        raise PlanError("\n".join(found))


def find_lacks(road: Road, pipeline: Pipeline, store: Store, lines: Sequence[Line], memory_bytes: int | None = None) -> list[str]:
    """Say what this machine lacks for what a forecast says is missing; `memory_bytes`: what it has, all of it by default."""
    is_accelerated = any(road.get(line.key).needs.accelerator for line in lines if line.n_missing)
    is_here = _names_devices(pipeline) and ADDRESS_VARIABLE not in os.environ
    found = [_explain_device(pipeline.config.execution) if is_accelerated and is_here else "", _explain_room(pipeline, store, lines)]
    memory_bytes = machine_bytes() if memory_bytes is None else memory_bytes
    if memory_bytes is not None:
        found += [
            _explain_memory(road.get(line.key), line, memory_bytes)
            for line in lines
            if line.n_missing and PROCESS_BYTES + line.job_bytes > memory_bytes and _is_held_here(road.get(line.key), pipeline)
        ]
    return [sentence for sentence in found if sentence]


def _is_held_here(asset: Asset, pipeline: Pipeline) -> bool:
    """Tell whether what a job of an asset holds lies in this machine's memory: not in a GPU's, nor in that of a cluster's node."""
    if asset.can_spread and ADDRESS_VARIABLE in os.environ:
        return False
    if not asset.needs.accelerator:
        return True
    from interp_assets.garcon.device import choose_device  # noqa: PLC0415 - as below

    try:
        return choose_device(pipeline.config.execution.device).type == "cpu"
    except InputError:
        return False  # which is said already


def _explain_memory(asset: Asset, line: Line, memory_bytes: int) -> str:
    needed, there = format_bytes(PROCESS_BYTES + line.job_bytes), format_bytes(memory_bytes)
    lightens = f"{asset.lightens[0].upper()}{asset.lightens[1:]}, or run" if asset.lightens else "Run"
    return f"{line.name} needs about {needed} of memory in its largest job, and this machine has {there}. {lightens} it where there is more."


def _names_devices(pipeline: Pipeline) -> bool:
    execution = pipeline.config.execution
    return execution.device in ("cuda", "mps") or execution.processes > 1


def _explain_room(pipeline: Pipeline, store: Store, lines: Sequence[Line]) -> str:
    free, written_bytes = free_bytes(pipeline.config.root), sum(line.written_bytes for line in lines)
    if free is None or free >= written_bytes:
        return ""
    largest = ", ".join(
        f"{line.name} {format_bytes(line.written_bytes)}" for line in sorted(lines, key=lambda line: -line.written_bytes)[:3] if line.written_bytes
    )
    counted = "" if are_counted(pipeline, store) else " Rows are estimated from the text: `interp run --select token_shards` counts them first."
    return (
        f"{pipeline.config.root} has {format_bytes(free)} free, and {format_bytes(written_bytes)} will be written ({largest}). Name another `root`, "
        f"free some space (`interp gc` lists what nothing refers to), or lower what is made: less text, fewer harvest.hook_points.{counted}"
    )


def _explain_device(execution: ExecutionConfig) -> str:
    import torch  # noqa: PLC0415 - takes seconds, and a plan for this machine's own devices does without

    from interp_assets.garcon.device import choose_device  # noqa: PLC0415 - as above

    try:
        device = choose_device(execution.device)
    except InputError as error:
        return f"{error} Set it to auto, or run where there is one."
    n_devices = torch.cuda.device_count() if device.type == "cuda" else execution.processes
    if n_devices < execution.processes:
        return (
            f"execution.processes is {execution.processes}, each with a GPU of its own, and this machine shows {n_devices}. Set it to {n_devices}, "
            "or execution.device to cpu."
        )
    return ""


def machine_bytes(memory: Path = Path("/proc/meminfo"), group: Path = Path("/sys/fs/cgroup/memory.max")) -> int | None:
    """Return all the memory of this machine, or of the container that this is; None where nobody tells."""
    found: list[int] = []
    with suppress(OSError, ValueError, StopIteration):
        found.append(int(next(line for line in memory.read_text().splitlines() if line.startswith("MemTotal:")).split()[1]) << 10)
    with suppress(OSError, ValueError):  # a group without a limit says `max`
        found.append(int(group.read_text()))
    return min(found, default=None)


def free_bytes(root: str) -> int | None:
    """Return the free bytes of the disk that a local root lies on, or will; None for buckets and memory."""
    if "://" in root:
        return None
    folder = Path(root).expanduser().absolute()
    return shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free
