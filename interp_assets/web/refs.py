"""Where the browser's bundle of one SAE lies."""

from interp_assets.planning.pipeline import Pipeline
from interp_assets.storage.manifest import ArtifactRef, combine_ids, make_ref
from interp_assets.visualize.refs import records_ref

FOLDER = "6-web"
BUNDLE_VERSION = 7
"""Raise it when the same records would give another bundle."""


def bundle_ref(pipeline: Pipeline, sae: str) -> ArtifactRef:
    """Address the bundle that a browser opens by range requests. The names that it shows are in its id; in all others content is."""
    slices = range(pipeline.config.features.latent_slices)
    inputs = {"records": combine_ids([records_ref(pipeline, sae, latent_slice).artifact_id for latent_slice in slices])}
    config = pipeline.config
    shown = {"model": config.model.shown_name, "revision": config.model.revision, "corpus": config.corpus.source}
    return make_ref("feature_bundle", FOLDER, identity={"code": BUNDLE_VERSION, "shown": shown}, inputs=inputs, label=sae)
