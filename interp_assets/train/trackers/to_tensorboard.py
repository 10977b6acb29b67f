"""Logged steps become TensorBoard's event files, a folder an SAE: `tensorboard --logdir data/tracks/<pipeline>/tensorboard`."""

from collections.abc import Mapping
from typing import Any

from interp_assets.train.trackers.track import Told


class _TensorBoard:
    def __init__(self, told: Told) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - an extra

        self._told, self._make = told, SummaryWriter
        self._writers: dict[str, Any] = {}

    def log(self, sae: str, n_rows: int, numbers: Mapping[str, float]) -> None:
        if sae not in self._writers:
            self._writers[sae] = self._make(str(self._told.folder / "tensorboard" / self._told.ids[sae]))
            lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in self._told.configs[sae].items())]
            self._writers[sae].add_text("configuration", "\n".join(lines))
        for name, value in numbers.items():
            self._writers[sae].add_scalar(name, value, n_rows)

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


open_tracker = _TensorBoard
