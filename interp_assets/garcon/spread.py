"""A model that is larger than one device is spread over several, main memory and the disk; and what a load takes is known before it begins.

Who lies where is decided by accelerate, once, at load (`device_map`): `auto` fills the accelerators, then main memory, then the disk. Its hooks
bring a module's input, and weights that lie elsewhere, to where the module computes; what is read at a hook point lies there too. A weight that is
on the disk is a name without numbers (PyTorch's `meta` device) until it is read through its hook.
"""

import difflib
import importlib.util
import json
import logging
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

from interp_assets.errors import InputError

DeviceMap = Literal["auto"] | Mapping[str, int | str]
"""`auto`, or a device for each module's path: a number for an accelerator, `cpu` or `disk`."""
_ITEM_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}
_SHARE: Final = 0.95
"""Of what is free, what a load may take: the rest is for the activations of a small forward."""
_logger = logging.getLogger(__name__)


def spread_options(device_map: DeviceMap, folder: str) -> dict[str, Any]:
    """Return what `from_pretrained` is told; what must be written anew for the disk goes to `folder`. Raises `InputError` without accelerate."""
    if importlib.util.find_spec("accelerate") is None:
        raise InputError("device_map takes accelerate, which is not installed: pip install 'interp-assets[big]', or leave device_map out.")
    return {"device_map": device_map if isinstance(device_map, str) else dict(device_map), "offload_folder": folder}


def check_map(net: nn.Module, device_map: DeviceMap) -> None:
    """Raise `InputError` for names in a map that are no module of the network: what was meant lies somewhere else."""
    if isinstance(device_map, str):
        return
    known = {name for name, _ in net.named_modules()} | {name for name, _ in net.named_parameters()}
    if unknown := sorted(set(device_map) - known):
        near = difflib.get_close_matches(unknown[0], known, 3, 0.4)
        raise InputError(f"device_map names {unknown[0]!r}, which is no module of the model. Near: {', '.join(near) or 'none'}.")


def device_of(module: nn.Module) -> torch.device:
    """Return where a module computes: where its weight lies, or where accelerate brings it."""
    parameter = next(module.parameters())
    if parameter.device.type == "meta":
        hook: Any = getattr(module, "_hf_hook", None)
        for each in getattr(hook, "hooks", [hook]):
            if getattr(each, "execution_device", None) is not None:
                return torch.device(each.execution_device)
    return parameter.device


@contextmanager
def weights_here(module: nn.Module) -> Iterator[None]:
    """Let a module's own weights be read while this is open, also those that lie on the disk."""
    hook = getattr(module, "_hf_hook", None)
    if hook is None or not any(parameter.is_meta for parameter in module.parameters(recurse=False)):
        yield
        return
    from accelerate.utils import align_module_device  # noqa: PLC0415 - an extra, and there is no such hook without it

    with align_module_device(module, torch.device("cpu")):
        yield


def count_weights(folder: Path) -> int:
    """Count the numbers in a folder's safetensors files, by their headers alone."""
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            (n_bytes,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(n_bytes, 100 << 20)))
        for name, entry in header.items():
            if name != "__metadata__":
                total += int(torch.Size(entry["shape"]).numel())
    return total


def check_memory(name: str, n_weights: int, dtype: str, device: torch.device, free_bytes: int | None) -> str:
    """Say what a load will take, and log it. Raises `InputError` where that is more than is free, with what to do."""
    needed = n_weights * _ITEM_BYTES[dtype]
    known = "" if free_bytes is None else f"; {device.type} has {_gb(free_bytes)} free"
    said = f"{name}: {n_weights:,} weights in {dtype} take {_gb(needed)}{known}."
    if free_bytes is not None and needed > _SHARE * free_bytes:
        smaller = f"load it in bfloat16 ({_gb(2 * n_weights)}), " if dtype == "float32" and 2 * n_weights <= _SHARE * free_bytes else ""
        raise InputError(f"{said} It does not fit: {smaller}spread it with device_map 'auto', or take a machine with more.")
    _logger.info("Loading %s", said)
    return said


def free_bytes_of(device: torch.device) -> int | None:
    """Return the memory that is free on a device; None where nobody tells."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    found = [_available(Path("/proc/meminfo")), _within_group(Path("/sys/fs/cgroup"))]
    return min((n_bytes for n_bytes in found if n_bytes is not None), default=None)


def _available(path: Path) -> int | None:
    try:
        line = next(line for line in path.read_text().splitlines() if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    return int(line.split()[1]) << 10


def _within_group(folder: Path) -> int | None:
    """Return what a container may still take: its limit less what it holds, without what could be given back."""
    try:
        limit, used = (folder / "memory.max").read_text().strip(), int((folder / "memory.current").read_text())
        kept = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return None if limit == "max" else int(limit) - used + int(kept.get("inactive_file", 0))


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:,.2f} GB"


def read_parameter(module: nn.Module, name: str) -> Tensor | None:
    """Return a parameter of a module, a copy on the CPU if it lies on the disk; None where there is none."""
    value = getattr(module, name, None)
    if value is None or not value.is_meta or getattr(module, "_hf_hook", None) is None:
        return value
    with weights_here(module):
        return getattr(module, name).detach().clone()
