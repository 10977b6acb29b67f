"""Checks of feature evidence: every latent of a slice has its record."""

from interp_assets.planning.asset import Check, Verdict
from interp_assets.planning.pipeline import Pipeline
from interp_assets.storage.manifest import load_manifest
from interp_assets.storage.store import Store
from interp_assets.visualize.refs import records_ref, slice_bounds, slice_index


def records_complete(sae: str) -> Check:
    """Return the check of one SAE's records."""

    def judge(pipeline: Pipeline, store: Store, key: str) -> Verdict:
        start, stop = slice_bounds(pipeline, sae, slice_index(key))
        n_records = load_manifest(store, records_ref(pipeline, sae, slice_index(key))).file("records.bin").n_rows or 0
        sentence = f"{key} of {sae} has {n_records:,} records for {stop - start:,} latents. Materialize this slice of feature_records again."
        return Verdict([] if n_records == stop - start else [sentence], {"latents": stop - start, "records": n_records})

    return Check(
        "records_complete",
        "One record for every latent, dead ones too.",
        lambda pipeline, store, keys: {key: judge(pipeline, store, key) for key in keys},
    )
