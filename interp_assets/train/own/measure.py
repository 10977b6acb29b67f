"""A function of one's own, an SAE and the held-out rows become numbers: an artifact a function and SAE, and columns of a table.

    def half_norm(sae, blocks):                     blocks: pairs of raw rows in float32, what is encoded and what is reconstructed
        return {"half_norm": float(...)}            numbers by name: the column `my.half_norm` of a file `my.py`

The rows are those that `sae_evaluation` measures on. Neither trainings nor evaluations depend on it.
"""

import json
import math
from collections.abc import Iterator
from typing import Any, Final

from torch import Tensor

from interp_assets.errors import InterpError, OwnCodeError
from interp_assets.planning.config import SaeConfig
from interp_assets.planning.pipeline import Pipeline
from interp_assets.planning.progress import Advance, unheard
from interp_assets.planning.sections import Metric
from interp_assets.storage.lineage import Digests, create_current, find_current, trace
from interp_assets.storage.manifest import Produced
from interp_assets.storage.store import Store
from interp_assets.train.checkpoint import load_sae
from interp_assets.train.evaluate import iter_held_out_rows
from interp_assets.train.lineage import metric_lineage
from interp_assets.train.own.load import keep_code, open_metric
from interp_assets.train.refs import METRICS, metric_ref

_MAX_VALUES: Final = 64


class HeldOutBlocks:
    """The held-out rows of an SAE, from the first block on whenever they are asked for."""

    def __init__(self, pipeline: Pipeline, store: Store, config: SaeConfig, progress: Advance = unheard) -> None:
        self._rows, self._progress, self.n_rows = (pipeline, store, config), progress, 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield blocks of valid rows."""
        self.n_rows = 0
        for block in iter_held_out_rows(*self._rows):
            self._progress(block.n_rows)
            self.n_rows += len(block.x)
            if len(block.x):
                yield block.x.float(), block.y.float()


def measure_own(pipeline: Pipeline, store: Store, name: str, progress: Advance = unheard) -> list[Produced] | InterpError:
    """Measure an SAE by all functions of the configuration; return the artifacts, or what kept it from being measured."""
    try:
        return [_measure(pipeline, store, name, metric, progress) for metric in pipeline.config.metrics]
    except InterpError as error:
        return error


def _measure(pipeline: Pipeline, store: Store, name: str, metric: Metric, progress: Advance) -> Produced:
    keep_code(store, metric.code, metric.function)
    ref = metric_ref(pipeline, name, metric)
    kept = trace(Digests(store), [item for item in metric_lineage(pipeline, name) if item.ref == ref])
    if (manifest := find_current(store, ref, kept)) is not None:
        return Produced(ref, manifest, is_cached=True)
    blocks = HeldOutBlocks(pipeline, store, pipeline.config.sae(name), progress)
    found = open_metric(store, metric)(load_sae(pipeline, store, name), blocks)
    values = _check_values(metric, found)
    with create_current(store, ref, kept) as art:
        art.put(METRICS, (json.dumps(values, sort_keys=True, indent=1) + "\n").encode())
        art.facts |= {"n_rows": blocks.n_rows, "values": values}
    return art.produced


def _check_values(metric: Metric, found: Any) -> dict[str, float]:
    """Return what a function measured, by column. Raises `OwnCodeError` for anything but a few finite numbers by name."""
    if not isinstance(found, dict) or not 0 < len(found) <= _MAX_VALUES:
        raise OwnCodeError(f"{metric.function} has to return a dict of 1 to {_MAX_VALUES} numbers by name, and returned {type(found).__name__}.")
    values: dict[str, float] = {}
    for name, value in found.items():
        try:
            number = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise OwnCodeError(f"{metric.function} returned {name} = {value!r:.60}, which is no number.") from error
        if not math.isfinite(number):
            raise OwnCodeError(f"{metric.function} returned {name} = {number}, which is not finite.")
        values[f"{metric.prefix}.{name}"] = number
    return values
