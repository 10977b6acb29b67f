"""Checks of attention heads: every row's attention is counted once, and every head has its record."""

from collections.abc import Sequence
from typing import Final

import numpy as np

from interp_assets.harvest.heads.refs import candidates_ref, head_counts, layer_index, records_ref
from interp_assets.planning.asset import Check, Verdict
from interp_assets.planning.pipeline import Pipeline, shard_index
from interp_assets.storage.manifest import load_manifest
from interp_assets.storage.store import Store

MASS_SLACK: Final = 2.0**-20
"""Of a row: what rounding the mass in each of 20 bins of distances can miss."""


def _mass_conserved(pipeline: Pipeline, store: Store, keys: Sequence[str]) -> dict[str, Verdict]:
    from interp_assets.harvest.heads.candidates import load_statistics  # noqa: PLC0415 - torch

    verdicts = {}
    for key in keys:
        ref = candidates_ref(pipeline, shard_index(key))
        manifest = load_manifest(store, ref)
        wrong, worst = [], 0.0
        for layer in head_counts(pipeline):
            statistics = load_statistics(store, ref, manifest, layer)
            missing = np.abs(statistics.missing_mass()) / 2.0**24 / np.maximum(1, statistics.sum_of("rows"))
            worst = max(worst, float(missing.max(initial=0.0)))
            wrong += [
                f"attention of head {layer}.{head} in {key} misses the number of rows by {missing[head]:.2g} a row, at most {MASS_SLACK:.2g} is "
                "rounding: its mask was misread. Report this model."
                for head in np.flatnonzero(missing > MASS_SLACK).tolist()
            ]
        verdicts[key] = Verdict(wrong, {"worst_miss": worst, "limit": MASS_SLACK})
    return verdicts


def _records_complete(pipeline: Pipeline, store: Store, keys: Sequence[str]) -> dict[str, Verdict]:
    verdicts = {}
    for key in keys:
        n_heads = head_counts(pipeline)[layer_index(key)]
        n_records = load_manifest(store, records_ref(pipeline, layer_index(key))).file("records.bin").n_rows or 0
        sentence = f"{key} has {n_records:,} records for {n_heads:,} heads. Materialize this slice of head_records again."
        verdicts[key] = Verdict([] if n_records == n_heads else [sentence], {"heads": n_heads, "records": n_records})
    return verdicts


MASS_CONSERVED: Final = Check("mass_conserved", "Masses by distance, and a learned sink's, add up to one a row.", _mass_conserved, blocks=True)
RECORDS_COMPLETE: Final = Check("records_complete", "One record for every head.", _records_complete)
