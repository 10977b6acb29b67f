"""The SAEs of a configuration are trained on the first rows of the mixed shards and compared, in seconds and without becoming part of the pipeline.

Steps, losses and schedules are those of a training of so many rows; L0, FVU and dead share are then measured on the rows that follow. What is kept
is one artifact of two tables, `tries/`, which nothing refers to: `interp gc` lists it.
"""

import io
from collections.abc import Mapping
from typing import Final, NamedTuple

import polars as pl

from interp_assets.errors import ArtifactMissingError, InputError, InterpError
from interp_assets.planning.config import SaeConfig
from interp_assets.planning.pipeline import Pipeline
from interp_assets.shuffle.refs import mixed_ids
from interp_assets.storage.manifest import create_artifact, make_ref
from interp_assets.storage.store import Store
from interp_assets.train.loop import OnFailure, OnMetrics, train_briefly
from interp_assets.train.refs import LogRow

FOLDER: Final = "tries"
TABLE: Final = "try.parquet"
CURVES: Final = "curves.parquet"
_LEAST_STEPS: Final = 10


class Tried(NamedTuple):
    """What a try came to."""

    table: pl.DataFrame
    """A row an SAE: name, L0, FVU and dead share on rows that it was not trained on, loss at the end, rows and seconds."""
    failed: Mapping[str, InterpError]
    path: str
    """Where the tables lie in the store."""


def try_saes(pipeline: Pipeline, store: Store, n_rows: int, on_metrics: OnMetrics | None = None, on_failure: OnFailure | None = None) -> Tried:
    """Train all SAEs but imported ones on `n_rows` rows each. Raises `InputError` where there are no mixed rows yet, or no SAE is left."""
    arms = [shorten_training(config, n_rows) for config in pipeline.config.saes if not config.imported]
    short = Pipeline(pipeline.config.model_copy(update={"saes": arms}), pipeline.plan)
    failed: dict[str, InterpError] = {}

    def drop(name: str, error: InterpError) -> None:
        failed[name] = error
        if on_failure is not None:
            on_failure(name, error)

    try:
        found = train_briefly(short, store, [arm.name for arm in arms], on_metrics, drop)
    except ArtifactMissingError as error:
        message = f"Pipeline {pipeline.config.name!r} has no mixed rows to try SAEs on yet. Make them: interp run --select +shuffle_certificate"
        raise InputError(message) from error
    if not found and failed:
        raise next(iter(failed.values()))
    rows = [
        (name, item.measures.l0, item.measures.fvu, item.measures.dead_share, item.log[-1].loss, item.log[-1].n_rows, item.wall_s)
        for name, item in found.items()
    ]
    table = pl.DataFrame(rows, schema=["name", "l0", "fvu", "dead_share", "train_loss", "n_rows", "seconds"], orient="row")
    curves = [
        pl.DataFrame(item.log, schema=list(LogRow._fields), orient="row").insert_column(0, pl.lit(name).alias("name")) for name, item in found.items()
    ]
    points = sorted({name for arm in arms for name in (*arm.sources, *arm.targets)})
    identity = {"saes": [arm.identity() for arm in arms], "seed": pipeline.config.seed}
    ref = make_ref("try", FOLDER, identity=identity, inputs={name: mixed_ids(pipeline, name) for name in points}, label="try")
    with create_artifact(store, ref, replace=True) as art:
        for name, frame in ((TABLE, table), (CURVES, pl.concat(curves))):
            buffer = io.BytesIO()
            frame.write_parquet(buffer)
            art.put(name, buffer.getvalue(), n_rows=frame.height, is_timed=True)
        art.facts["failed"] = {name: str(error) for name, error in failed.items()}
    return Tried(table, failed, ref.path)


def shorten_training(config: SaeConfig, n_rows: int) -> SaeConfig:
    """Return an SAE's configuration for so many rows: at least ten steps, and latents that count as dead in proportion."""
    batch_rows = min(config.batch_rows, max(1, n_rows // _LEAST_STEPS))
    share = n_rows / config.n_rows
    dead = max(batch_rows, min(config.dead_after_rows, round(config.dead_after_rows * share)))
    return config.model_copy(update={"n_rows": n_rows, "batch_rows": batch_rows, "dead_after_rows": dead})
