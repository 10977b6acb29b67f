"""Two local models become the names of the tensors in which they differ, read one tensor at a time."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from interp_assets.errors import InterpError
from interp_assets.garcon.locate import fingerprint_model, locate_model
from interp_assets.planning.config import ModelConfig

_SHOWN: Final = 4


def describe_weights(a: ModelConfig, b: ModelConfig, fingerprints: tuple[str, str]) -> str:
    """Name the tensors that two models do not share; nothing where either is not a folder, or not as it was when it was planned."""
    try:
        folders = [locate_model(model).folder for model in (a, b)]
        if folders[0] is None or folders[1] is None or (fingerprint_model(a), fingerprint_model(b)) != fingerprints:
            return ""
        names = _find_changed(folders[0], folders[1])
    except (InterpError, OSError, ValueError, KeyError):
        return ""  # it is a hint: the cause itself is known
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}" if names else "config.json alone"


def _find_changed(a: Path, b: Path) -> list[str]:
    """Return the names of tensors that are not the same in two folders."""
    import torch  # noqa: PLC0415 - takes seconds, and most comparisons do without
    from safetensors import safe_open  # noqa: PLC0415 - as above

    with ExitStack() as stack:
        held: list[dict[str, Any]] = []
        for folder in (a, b):
            files = [stack.enter_context(safe_open(path, "pt")) for path in sorted(folder.glob("*.safetensors"))]
            held.append({name: file for file in files for name in file.keys()})  # noqa: SIM118 - it is no mapping
        one_sided = held[0].keys() ^ held[1].keys()
        both = held[0].keys() & held[1].keys()
        changed = [name for name in both if not torch.equal(held[0][name].get_tensor(name), held[1][name].get_tensor(name))]
    return sorted([*one_sided, *changed])
