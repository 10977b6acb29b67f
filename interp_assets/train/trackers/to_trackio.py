"""Logged steps become runs of trackio, a project a pipeline, in a database beside it unless TRACKIO_DIR says otherwise: `trackio show`."""

import os
from collections.abc import Mapping
from contextvars import Context
from typing import Any

from interp_assets.train.trackers.track import Told


class _Trackio:
    def __init__(self, told: Told) -> None:
        os.environ.setdefault("TRACKIO_DIR", str((told.folder / "trackio").resolve()))  # which it reads when it is imported
        import trackio  # noqa: PLC0415 # pyright: ignore[reportMissingImports] - an extra

        self._told, self._trackio = told, trackio
        self._runs: dict[str, Any] = {}

    def log(self, sae: str, n_rows: int, numbers: Mapping[str, float]) -> None:
        if sae not in self._runs:
            told = {"project": self._told.pipeline, "name": self._told.ids[sae], "config": dict(self._told.configs[sae])}
            # In a context of its own: trackio ends the run that it finds in this one.
            self._runs[sae] = Context().run(lambda: self._trackio.init(**told, embed=False, resume="allow"))
        self._runs[sae].log(dict(numbers), step=n_rows)

    def close(self) -> None:
        for run in self._runs.values():
            run.finish()


open_tracker = _Trackio
