"""Checks of feature evidence: every latent of a slice has its record."""

from collections.abc import Sequence

from interp_assets.planning.asset import Check, Verdict
from interp_assets.planning.pipeline import Pipeline
from interp_assets.storage.manifest import load_manifest
from interp_assets.storage.store import Store
from interp_assets.visualize.refs import records_ref, slice_bounds, slice_index


def records_complete(sae: str) -> Check:
    """Return the check of one SAE's records."""

    def verdict(pipeline: Pipeline, store: Store, keys: Sequence[str]) -> Verdict:
        counts = {}
        for key in keys:
            start, stop = slice_bounds(pipeline, sae, slice_index(key))
            entry = load_manifest(store, records_ref(pipeline, sae, slice_index(key))).file("records.bin")
            counts[key] = {"latents": stop - start, "records": entry.n_rows}
        sentences = [
            f"{key} of {sae} has {count['records']:,} records for {count['latents']:,} latents. Materialize this slice of feature_records again."
            for key, count in counts.items()
            if count["latents"] != count["records"]
        ]
        return Verdict(sentences, {"slices": counts})

    return Check("records_complete", "One record for every latent, dead ones too.", verdict)
