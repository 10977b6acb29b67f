"""Where activation shards and their statistics lie."""

from collections.abc import Sequence
from typing import Any, Final

from interp_assets.corpus.refs import token_shard_ref
from interp_assets.planning.config import PipelineConfig
from interp_assets.planning.pipeline import Pipeline, shard_key
from interp_assets.storage.manifest import ArtifactRef, combine_ids, make_ref

FOLDER = "2-activations"
OUTLIER_MULTIPLE: Final = 10.0
"""A row is an outlier where its norm exceeds so many times the median: ordinary rows are within 3 of it, attention sinks 30 to 1,000 times above."""
ACTIVATION_SHARD_VERSION = 3
"""Raise it when the same tokens would give other activations, or other statistics of them."""


TRUTH_VERSION = 1
"""Raise it when the same seeds would give other planted rows: of them `ACTIVATION_SHARD_VERSION` too."""


def activation_shard_ref(pipeline: Pipeline, hook_point: str, index: int) -> ArtifactRef:
    """Address the activations of one corpus shard at one hook point."""
    return pipeline.remember(("activation shard", hook_point, index), lambda: _activation_shard_ref(pipeline, hook_point, index))


def _activation_shard_ref(pipeline: Pipeline, hook_point: str, index: int) -> ArtifactRef:
    identity = {
        "code": ACTIVATION_SHARD_VERSION,
        "model": pipeline.plan.model_fingerprint,
        "hook_point": hook_point,
        "shard": index,
        **read_dtypes(pipeline.config),
    }
    inputs = {"token_shard": token_shard_ref(pipeline, index).artifact_id}
    return make_ref(
        "activation_shard", f"{FOLDER}/{hook_folder(hook_point)}", identity=identity, inputs=inputs, label=shard_key(index), hook_point=hook_point
    )


def read_dtypes(config: PipelineConfig) -> dict[str, Any]:
    """Return what the bytes of an activation shard depend on of the configuration, besides its inputs and hook point."""
    return {"model_dtype": config.model.dtype, "dtype": config.harvest.dtype}


def statistics_ref(pipeline: Pipeline, hook_point: str) -> ArtifactRef:
    """Address the merged statistics of one hook point over the training shards."""
    return pipeline.remember(("statistics_ref", hook_point), lambda: _statistics_ref(pipeline, hook_point))


def truth_ref(pipeline: Pipeline) -> ArtifactRef:
    """Address the features that planted rows are made of."""
    identity = {"code": TRUTH_VERSION, "planting": pipeline.plan.model_fingerprint}
    return make_ref("planted_truth", FOLDER, identity=identity, inputs={}, label="planted_truth")


def activation_ids(pipeline: Pipeline, hook_point: str, indices: Sequence[int]) -> str:
    """Combine the ids of several activation shards into one input id."""
    question = ("activation_ids", hook_point, tuple(indices))
    return pipeline.remember(question, lambda: combine_ids([activation_shard_ref(pipeline, hook_point, index).artifact_id for index in indices]))


def hook_folder(hook_point: str) -> str:
    """Return a folder name for a hook point: `module:model.layers.3` becomes `module_model.layers.3`."""
    return "".join(char if char.isalnum() or char in "._-" else "_" for char in hook_point)


def _statistics_ref(pipeline: Pipeline, hook_point: str) -> ArtifactRef:
    inputs = {"activation_shards": activation_ids(pipeline, hook_point, pipeline.train_indices)}
    identity = {"code": 1, "hook_point": hook_point}
    return make_ref(
        "activation_statistics", f"{FOLDER}/{hook_folder(hook_point)}", identity=identity, inputs=inputs, label="statistics", hook_point=hook_point
    )
