"""Where what is known of attention heads lies: tokens, candidates, examples, patterns and records, and what each is made from."""

from collections.abc import Sequence
from typing import Any, Final, Literal

from interp_assets.corpus.refs import token_shard_ref
from interp_assets.errors import ConfigError
from interp_assets.garcon.facts import ModelFacts, find_facts
from interp_assets.planning.asset import Axis
from interp_assets.planning.pipeline import Pipeline, shard_key
from interp_assets.planning.sections import HeadsConfig
from interp_assets.storage.lineage import Lineage
from interp_assets.storage.manifest import ArtifactRef, combine_ids, make_ref
from interp_assets.storage.seen import open_seen

FOLDER = "2-heads"
HEADS_VERSION = 2
"""Raise it when the same model and tokens would give other statistics, examples or patterns."""
PROMPT_VERSION = 2
"""Likewise for patterns over a prompt, and for what lies beside them."""
HEAD_RECORD_VERSION = 1
"""Version of a record's layout."""
Pass = Literal["candidates", "examples", "patterns", "records"]
_READ: Final[dict[Pass, set[str]]] = {
    "candidates": {"layers", "key_tokens"},
    "examples": {"layers", "key_tokens", "top_k", "n_intervals", "examples_per_interval"},
    "patterns": {"layers", "key_tokens", "top_k", "n_intervals", "examples_per_interval"},
    "records": {"layers", "key_tokens", "top_k", "n_intervals", "examples_per_interval"},
}
"""Fields of the configuration that the bytes of a pass depend on."""


def heads_of(pipeline: Pipeline) -> HeadsConfig:
    """Return the configuration of the heads. Raises `ConfigError` for a pipeline without."""
    if pipeline.config.heads is None:
        raise ConfigError(f"Pipeline {pipeline.config.name!r} shows no attention heads: its configuration has no section `heads`.")
    return pipeline.config.heads


def head_counts(pipeline: Pipeline) -> dict[int, int]:
    """Return the number of heads of each layer that is shown, in order; nothing where the model's heads cannot be shown (`find_obstacles`)."""
    heads, layers = model_heads(pipeline).heads, heads_of(pipeline).layers
    return {layer: n for layer, n in sorted(heads.items()) if layers == "all" or layer in layers}


def model_heads(pipeline: Pipeline) -> ModelFacts:
    """Return what is known of the subject model without its weights."""
    config = pipeline.config
    with open_seen() as seen:
        return pipeline.remember("model facts", lambda: find_facts(config.model, config.harvest.hook_points, seen))


def layer_key(layer: int) -> str:
    """Return the partition key of a layer's heads, for example `layer-005`."""
    return f"layer-{layer:03d}"


def layer_index(key: str) -> int:
    """Return the layer of a partition key."""
    return int(key.removeprefix("layer-"))


def head_shards(pipeline: Pipeline) -> list[int]:
    """Return the shards whose text is read, in order."""
    return list(pipeline.shard_indices[: heads_of(pipeline).max_shards])


HEAD_SHARDS: Final = Axis("shard", planned=lambda pipeline: [shard_key(index) for index in head_shards(pipeline)], registered="head shards")
LAYERS: Final = Axis("slice", planned=lambda pipeline: [layer_key(layer) for layer in head_counts(pipeline)], registered="head layers")
"""A head slice is one layer: its heads share queries' windows, keys' tokens and what is read."""


def tokens_ref(pipeline: Pipeline) -> ArtifactRef:
    """Address the tokens that masses are told apart by."""
    identity = {"code": HEADS_VERSION, "key_tokens": heads_of(pipeline).key_tokens}
    inputs = {"token_shard": token_shard_ref(pipeline, first_shard(pipeline)).artifact_id}
    return make_ref("head_tokens", FOLDER, identity=identity, inputs=inputs, label="tokens")


def first_shard(pipeline: Pipeline) -> int:
    """Return the shard whose most frequent tokens are told apart."""
    return pipeline.shard_indices[0]


def candidates_ref(pipeline: Pipeline, index: int) -> ArtifactRef:
    """Address what one corpus shard holds of all heads."""
    inputs = {"token_shard": token_shard_ref(pipeline, index).artifact_id, "tokens": tokens_ref(pipeline).artifact_id}
    identity = {**_identity(pipeline, "candidates"), "n_kept_top": heads_of(pipeline).n_kept_top, "shard": index}
    return make_ref("head_candidates", f"{FOLDER}/candidates", identity=identity, inputs=inputs, label=shard_key(index))


def examples_ref(pipeline: Pipeline, layer: int) -> ArtifactRef:
    """Address the merged statistics and chosen examples of one layer's heads."""
    identity = {**_identity(pipeline, "examples"), "layer": layer}
    return make_ref("head_examples", f"{FOLDER}/examples", identity=identity, inputs=_all_candidates(pipeline), label=layer_key(layer))


def patterns_ref(pipeline: Pipeline, index: int) -> ArtifactRef:
    """Address the rows of the pattern around the examples that lie in one corpus shard."""
    identity = {**_identity(pipeline, "patterns"), "shard": index}
    return make_ref("example_patterns", f"{FOLDER}/patterns", identity=identity, inputs=_all_candidates(pipeline), label=shard_key(index))


def records_ref(pipeline: Pipeline, layer: int) -> ArtifactRef:
    """Address the records of one layer's heads."""
    identity = {**_identity(pipeline, "records"), "layer": layer, "record": HEAD_RECORD_VERSION}
    return make_ref("head_records", f"{FOLDER}/records", identity=identity, inputs=_all_candidates(pipeline), label=layer_key(layer))


def prompt_ref(pipeline: Pipeline, name: str) -> ArtifactRef:
    """Address the patterns over one configured prompt."""
    config, plan = pipeline.config, pipeline.plan
    identity = {
        "code": PROMPT_VERSION,
        "model": plan.model_fingerprint,
        "model_dtype": config.model.dtype,
        "tokenizer": plan.tokenizer_fingerprint,
        "layers": heads_of(pipeline).layers,
        "text": heads_of(pipeline).prompt(name).text,
    }
    return make_ref("prompt_patterns", f"{FOLDER}/prompts", identity=identity, inputs={}, label=name)


def tokens_lineage(pipeline: Pipeline) -> list[Lineage]:
    """Return what the tokens keep."""
    return [Lineage(tokens_ref(pipeline), [token_shard_ref(pipeline, first_shard(pipeline))])]


def candidates_lineage(pipeline: Pipeline, index: int) -> list[Lineage]:
    """Return what the candidates of one shard keep."""
    return [Lineage(candidates_ref(pipeline, index), [token_shard_ref(pipeline, index), tokens_ref(pipeline)])]


def examples_lineage(pipeline: Pipeline, layer: int) -> list[Lineage]:
    """Return what the examples of one layer keep."""
    return [Lineage(examples_ref(pipeline, layer), _candidates(pipeline))]


def patterns_lineage(pipeline: Pipeline, index: int) -> list[Lineage]:
    """Return what the patterns of one shard keep."""
    examples = [examples_ref(pipeline, layer) for layer in head_counts(pipeline)]
    return [Lineage(patterns_ref(pipeline, index), [*examples, token_shard_ref(pipeline, index)])]


def records_lineage(pipeline: Pipeline, layer: int) -> list[Lineage]:
    """Return what the records of one layer keep."""
    patterns = [patterns_ref(pipeline, index) for index in head_shards(pipeline)]
    return [Lineage(records_ref(pipeline, layer), [examples_ref(pipeline, layer), *patterns, *_tokens(pipeline), tokens_ref(pipeline)])]


def read_heads(heads: HeadsConfig, which: Pass) -> dict[str, Any]:
    """Return what the bytes of one pass depend on of the configuration of the heads."""
    return heads.model_dump(include=_READ[which])


def _identity(pipeline: Pipeline, which: Pass) -> dict[str, Any]:
    config = pipeline.config
    return {
        "code": HEADS_VERSION,
        "model": pipeline.plan.model_fingerprint,
        "model_dtype": config.model.dtype,
        "seed": config.seed,
        "heads": read_heads(heads_of(pipeline), which),
    }


def _all_candidates(pipeline: Pipeline) -> dict[str, str]:
    return {"candidates": pipeline.remember("head candidates", lambda: combine_ids([ref.artifact_id for ref in _candidates(pipeline)]))}


def _candidates(pipeline: Pipeline) -> Sequence[ArtifactRef]:
    return pipeline.remember("head candidate refs", lambda: [candidates_ref(pipeline, index) for index in head_shards(pipeline)])


def _tokens(pipeline: Pipeline) -> Sequence[ArtifactRef]:
    return pipeline.remember("head token shards", lambda: [token_shard_ref(pipeline, index) for index in head_shards(pipeline)])
