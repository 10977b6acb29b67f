"""Where the browser's bundles lie: of one SAE's features, and of a model's attention heads."""

from interp_assets.harvest.heads.refs import head_counts, heads_of, prompt_ref
from interp_assets.harvest.heads.refs import records_ref as head_records_ref
from interp_assets.planning.pipeline import Pipeline
from interp_assets.storage.manifest import ArtifactRef, combine_ids, make_ref
from interp_assets.visualize.refs import prompt_targets_ref, records_ref
from interp_assets.visualize.steering.refs import swept_refs

FOLDER = "6-web"
BUNDLE_VERSION = 7
"""Raise it when the same records would give another bundle."""

ATTENTION_VERSION = 2
"""Likewise for the bundle of heads."""


def bundle_ref(pipeline: Pipeline, sae: str) -> ArtifactRef:
    """Address the bundle that a browser opens by range requests. The names that it shows are in its id; in all others content is."""
    slices = range(pipeline.config.features.latent_slices)
    inputs = {"records": combine_ids([records_ref(pipeline, sae, latent_slice).artifact_id for latent_slice in slices])}
    config = pipeline.config
    if swept := swept_refs(pipeline, sae):
        inputs["doses"] = combine_ids([ref.artifact_id for ref in swept])
    shown = {"model": config.model.shown_name, "revision": config.model.revision, "corpus": config.corpus.source}
    return make_ref("feature_bundle", FOLDER, identity={"code": BUNDLE_VERSION, "shown": shown}, inputs=inputs, label=sae)


def attention_ref(pipeline: Pipeline) -> ArtifactRef:
    """Address the bundle of a pipeline's attention heads; as above, the names that it shows are in its id."""
    prompts = {name: prompt_ref(pipeline, name).artifact_id for name in heads_of(pipeline).prompts}
    prompts |= {f"{name}.targets": prompt_targets_ref(pipeline, name).artifact_id for name in heads_of(pipeline).explained}
    inputs = {"records": combine_ids([head_records_ref(pipeline, layer).artifact_id for layer in head_counts(pipeline)]), **prompts}
    config = pipeline.config
    shown = {"model": config.model.shown_name, "revision": config.model.revision, "corpus": config.corpus.source}
    return make_ref("attention_bundle", FOLDER, identity={"code": ATTENTION_VERSION, "shown": shown}, inputs=inputs, label="attention")
