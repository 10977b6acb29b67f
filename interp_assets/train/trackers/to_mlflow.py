"""Logged steps become runs of MLflow, an experiment a pipeline: in a SQLite file beside it, unless MLFLOW_TRACKING_URI names a server."""

import os
import time
from collections.abc import Mapping
from typing import Any

from interp_assets.train.trackers.track import Told


class _Mlflow:
    def __init__(self, told: Told) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # which it reads when it is imported; else it reports its use over the network
        from mlflow import MlflowClient  # noqa: PLC0415 # pyright: ignore[reportMissingImports] - an extra
        from mlflow.entities import Metric, Param  # noqa: PLC0415 # pyright: ignore[reportMissingImports] - as above

        told.folder.mkdir(parents=True, exist_ok=True)
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{told.folder.resolve()}/mlflow.db"
        self._told, self._metric, self._param = told, Metric, Param
        self._client: Any = MlflowClient(tracking_uri=uri)
        found = self._client.get_experiment_by_name(told.pipeline)
        where = None if os.environ.get("MLFLOW_TRACKING_URI") else (told.folder.resolve() / "mlartifacts").as_uri()
        self._experiment = found.experiment_id if found else self._client.create_experiment(told.pipeline, artifact_location=where)
        self._runs: dict[str, str] = {}

    def log(self, sae: str, n_rows: int, numbers: Mapping[str, float]) -> None:
        params = []
        if sae not in self._runs:
            run = self._client.create_run(self._experiment, run_name=sae, tags={"artifact": self._told.ids[sae]})
            self._runs[sae] = run.info.run_id
            params = [self._param(name, str(value)) for name, value in self._told.configs[sae].items()]
        now = int(time.time() * 1000)
        self._client.log_batch(self._runs[sae], metrics=[self._metric(name, value, now, n_rows) for name, value in numbers.items()], params=params)

    def close(self) -> None:
        for run in self._runs.values():
            self._client.set_terminated(run)


open_tracker = _Mlflow
