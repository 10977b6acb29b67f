"""Logged steps become runs of Weights & Biases, a run an SAE, offline unless WANDB_API_KEY or WANDB_MODE says otherwise: `wandb sync` sends them."""

import os
from collections.abc import Mapping
from typing import Any

from interp_assets.train.trackers.track import Told


class _Wandb:
    def __init__(self, told: Told) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # which it reads when it is imported; else its own errors go out, offline too
        import wandb  # noqa: PLC0415 # pyright: ignore[reportMissingImports] - an extra

        self._told, self._wandb = told, wandb
        self._mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        self._runs: dict[str, Any] = {}

    def log(self, sae: str, n_rows: int, numbers: Mapping[str, float]) -> None:
        if sae not in self._runs:
            self._told.folder.mkdir(parents=True, exist_ok=True)
            self._runs[sae] = self._wandb.init(
                project=self._told.pipeline,
                name=sae,
                group=self._told.ids[sae],
                config=dict(self._told.configs[sae]),
                dir=str(self._told.folder),
                mode=self._mode,
                reinit="create_new",  # others are open beside it
                settings=self._wandb.Settings(silent=True, console="off"),
            )
        self._runs[sae].log(dict(numbers), step=n_rows)

    def close(self) -> None:
        for run in self._runs.values():
            run.finish()


open_tracker = _Wandb
