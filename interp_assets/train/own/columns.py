"""What functions of one's own and probes measured, and how much of a planted truth was found, becomes columns of a table, without torch."""

from typing import Final

import polars as pl

from interp_assets.planning.pipeline import Pipeline
from interp_assets.storage.manifest import find_manifest
from interp_assets.storage.store import Store
from interp_assets.train.refs import evaluation_ref, metric_ref, probes_ref

RECOVERY: Final = ("mcc", "uniqueness", "precision", "recall", "f1")
"""What an evaluation tells of planted rows: `truth/recovery.py`."""


def add_metrics(pipeline: Pipeline, store: Store, table: pl.DataFrame) -> pl.DataFrame:
    """Add to a table of SAEs, by their names, what functions of one's own have measured of them; null where they have not."""
    has_any = bool(pipeline.config.metrics or pipeline.config.probes) or pipeline.config.corpus.is_planted
    found = {name: read_metrics(pipeline, store, name) for name in table["name"].to_list()} if has_any else {}
    columns = list(dict.fromkeys(column for values in found.values() for column in values))
    added = [pl.Series(column, [found[name].get(column) for name in table["name"].to_list()], pl.Float64()) for column in columns]
    return table.with_columns(added)


def read_metrics(pipeline: Pipeline, store: Store, name: str) -> dict[str, float]:
    """Return what functions of one's own have measured of an SAE of the configuration; nothing of another one."""
    if name not in {sae.name for sae in pipeline.config.saes}:
        return {}
    manifests = [find_manifest(store, metric_ref(pipeline, name, metric)) for metric in pipeline.config.metrics]
    values = {column: value for manifest in manifests if manifest for column, value in manifest.facts["values"].items()}
    probes = find_manifest(store, probes_ref(pipeline, name)) if pipeline.config.probes else None
    values |= probes.facts["values"] if probes else {}
    evaluation = find_manifest(store, evaluation_ref(pipeline, name)) if pipeline.config.corpus.is_planted else None
    return {f"planted.{column}": evaluation.facts[column] for column in RECOVERY} | values if evaluation else values
