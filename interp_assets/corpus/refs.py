"""Where token shards lie: the plan and the corpus configuration become artifact ids and paths."""

from collections.abc import Sequence
from typing import Any

from interp_assets.planning.config import PipelineConfig
from interp_assets.planning.pipeline import Pipeline, shard_key
from interp_assets.storage.manifest import ArtifactRef, combine_ids, make_ref

FOLDER = "1-corpus"
TOKEN_SHARD_VERSION = 2
"""Raise it when the same text would give other token shards."""


def token_shard_ref(pipeline: Pipeline, index: int) -> ArtifactRef:
    """Address the token shard of corpus shard `index`."""
    return pipeline.remember(("token shard", index), lambda: _token_shard_ref(pipeline, index))


def _token_shard_ref(pipeline: Pipeline, index: int) -> ArtifactRef:
    identity = {
        "code": TOKEN_SHARD_VERSION,
        "shard": index,
        "text": pipeline.source(index).fingerprint,
        "tokenizer": pipeline.plan.tokenizer_fingerprint,
        **pipeline.remember("token configuration", lambda: read_config(pipeline.config)),
    }
    return make_ref("token_shard", FOLDER, identity=identity, inputs={}, label=shard_key(index))


def token_ids(pipeline: Pipeline, indices: Sequence[int]) -> str:
    """Combine the ids of several token shards into one input id."""
    question = ("token_ids", tuple(indices))
    return pipeline.remember(question, lambda: combine_ids([token_shard_ref(pipeline, index).artifact_id for index in indices]))


def read_config(config: PipelineConfig) -> dict[str, Any]:
    """Return what the bytes of a token shard depend on of the configuration, besides the text itself."""
    read = config.corpus.model_dump(include={"text_field", "text_kind", "context_length", "contexts"})
    excluded = config.harvest.model_dump(include={"excluded_positions", "excluded_token_ids"}, exclude_defaults=True)
    return {**read, **({"excluded": excluded} if excluded else {})}
