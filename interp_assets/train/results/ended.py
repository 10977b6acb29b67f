"""A training that ended before its SAE was one becomes a record: what ended it, at which step, and what was logged up to then.

`4-sae/<name>.ended-<id>/`: the log as `training.parquet`, and facts. It says nothing once the SAE is there, and `interp gc` lists it. The last
checkpoint lies where trainings look for it, so that the same training goes on from there. Format: `docs/formats/sae.md`.
"""

import io
import math
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import polars as pl

from interp_assets.planning.config import SaeConfig
from interp_assets.storage.manifest import ArtifactRef, create_artifact, find_manifest, make_ref, read_file, read_manifest
from interp_assets.storage.store import Store
from interp_assets.train.refs import FOLDER, TRAINING, LogRow
from interp_assets.train.sweep import NO_CURVES

ENDED: Final = "ended"
KIND: Final = "sae_ended"
FAILED: Final = "failed"
STOPPED: Final = "stopped"
_LAST: Final = ("step", "n_rows", "loss", "l0", "fvu", "dead_share")
"""Of the last logged step, what facts say."""


class Ended(NamedTuple):
    """A training that ended early."""

    config: SaeConfig
    sae: ArtifactRef
    """What it would have become."""
    facts: dict[str, Any]


def ended_ref(sae: ArtifactRef, name: str) -> ArtifactRef:
    """Address the record of a training that ended."""
    return make_ref(KIND, FOLDER, identity={"code": 1}, inputs={"sae": sae.artifact_id}, label=f"{name}.{ENDED}")


def save_ended(store: Store, sae: ArtifactRef, name: str, log: Sequence[LogRow], *, status: str, why: str) -> None:
    """Write what became of a training; a record of an earlier attempt goes."""
    with create_artifact(store, ended_ref(sae, name), replace=True) as art:
        table = io.BytesIO()
        pl.DataFrame(log, schema=NO_CURVES.drop("name").schema, orient="row").write_parquet(table)
        art.put(TRAINING, table.getvalue(), n_rows=len(log))
        last = log[-1]._asdict() if log else {}
        art.facts |= {"status": status, "why": why, **{name: last[name] for name in _LAST if math.isfinite(last.get(name, math.nan))}}


def find_ended(store: Store, sae: ArtifactRef, config: SaeConfig) -> Ended | None:
    """Return the record of a training that ended; None where there is none."""
    manifest = find_manifest(store, ended_ref(sae, config.name))
    return Ended(config, sae, dict(manifest.facts)) if manifest else None


def read_ended_log(store: Store, item: Ended) -> pl.DataFrame:
    """Read what was logged, with the name of the SAE."""
    path = ended_ref(item.sae, item.config.name).path
    log = pl.read_parquet(io.BytesIO(read_file(store, path, read_manifest(store, path), TRAINING)))
    return log.select(pl.lit(item.config.name).alias("name"), *LogRow._fields)
