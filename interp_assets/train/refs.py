"""Where SAEs and their evaluations lie."""

from interp_assets.harvest.refs import activation_ids, statistics_ref
from interp_assets.manifest import ArtifactRef, make_ref
from interp_assets.pipeline import Pipeline
from interp_assets.shuffle.generations import before, has_grown
from interp_assets.shuffle.refs import mixed_ids

FOLDER = "4-sae"
TRAIN_VERSION = 1
"""Raise it when the same rows would give other weights."""


def sae_ref(pipeline: Pipeline, name: str) -> ArtifactRef:
    """Address a trained SAE. In a pipeline that has grown it starts from the SAE before."""
    config = pipeline.config.sae(name)
    identity = {"code": TRAIN_VERSION, "seed": pipeline.config.seed, "sae": config.model_dump()}
    inputs = {"mixed_shards": mixed_ids(pipeline, config.hook_point), "statistics": statistics_ref(pipeline, config.hook_point).artifact_id}
    if has_grown(pipeline):
        inputs["warm_start"] = sae_ref(before(pipeline), name).artifact_id
    return make_ref("sae", FOLDER, identity=identity, inputs=inputs, label=name)


def evaluation_ref(pipeline: Pipeline, name: str) -> ArtifactRef:
    """Address the measurements of an SAE on the held-out shards."""
    hook_point = pipeline.config.sae(name).hook_point
    inputs = {"sae": sae_ref(pipeline, name).artifact_id, "held_out": activation_ids(pipeline, hook_point, pipeline.held_out_indices)}
    return make_ref("sae_evaluation", FOLDER, identity={"code": 1}, inputs=inputs, label=f"{name}.evaluation")
