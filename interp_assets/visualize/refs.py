"""Where the evidence for features lies: candidates, examples, windows and records of one SAE."""

from typing import Any, Final, Literal

from interp_assets.harvest.heads.refs import heads_of
from interp_assets.harvest.refs import activation_ids, activation_shard_ref
from interp_assets.planning.config import FeaturesConfig
from interp_assets.planning.pipeline import Pipeline, shard_index, shard_key
from interp_assets.planning.sections import CorpusConfig
from interp_assets.storage.lineage import Lineage
from interp_assets.storage.manifest import ArtifactRef, make_ref
from interp_assets.train.refs import evaluation_ref, imported_statistics, sae_ref
from interp_assets.visualize.packing import RECORD_VERSION

FOLDER = "5-features"
FEATURES_VERSION = 5
"""Raise it when the same SAE and activations would give other records, or evidence keeps other digests."""
TARGETS_VERSION = 1
"""Raise it when the same model, SAEs and text would give other terms of targets."""
Pass = Literal["candidates", "examples", "windows", "records"]
_UNREAD: Final[dict[Pass, set[str]]] = {
    "candidates": {"window", "n_intervals", "examples_per_interval", "gather", "top_k", "distinct_tokens"},
    "examples": {"window", "gather"},
    "windows": set(),
    "records": {"gather"},
}
"""Fields of the configuration that the bytes of a pass do not depend on."""


def candidates_ref(pipeline: Pipeline, sae: str, index: int, latent_slice: int) -> ArtifactRef:
    """Address pass A's output for one dataset shard and latent slice."""
    hook_point = pipeline.config.sae(sae).hook_point
    shard_id = activation_shard_ref(pipeline, hook_point, index).artifact_id
    inputs = {"sae": sae_ref(pipeline, sae).artifact_id, "activation_shard": shard_id, **imported_statistics(pipeline, sae, [hook_point])}
    identity = {**_identity(pipeline, "candidates"), "shard": index, "latent_slice": latent_slice}
    return make_ref(
        "feature_candidates", f"{FOLDER}/{sae}/candidates", identity=identity, inputs=inputs, label=f"{shard_key(index)}.{slice_key(latent_slice)}"
    )


def thresholds_ref(pipeline: Pipeline, sae: str, index: int) -> ArtifactRef:
    """Address what a pre-activation of each row of one dataset shard must exceed to fire, for a `topk` SAE; the same for all latent slices."""
    hook_point = pipeline.config.sae(sae).hook_point
    inputs = {"sae": sae_ref(pipeline, sae).artifact_id, "activation_shard": activation_shard_ref(pipeline, hook_point, index).artifact_id}
    identity = {"code": FEATURES_VERSION, "shard": index, "encode_dtype": pipeline.config.features.encode_dtype}
    return make_ref("row_thresholds", f"{FOLDER}/{sae}/thresholds", identity=identity, inputs=inputs, label=shard_key(index))


def examples_ref(pipeline: Pipeline, sae: str, latent_slice: int) -> ArtifactRef:
    """Address pass B's output for one latent slice."""
    identity = {**_identity(pipeline, "examples"), "latent_slice": latent_slice}
    return make_ref("feature_examples", f"{FOLDER}/{sae}/examples", identity=identity, inputs=_inputs(pipeline, sae), label=slice_key(latent_slice))


def windows_ref(pipeline: Pipeline, sae: str, index: int) -> ArtifactRef:
    """Address pass C's output for one dataset shard: how latents fire in the windows around their examples."""
    identity = {**_identity(pipeline, "windows"), "shard": index}
    return make_ref("example_activations", f"{FOLDER}/{sae}/windows", identity=identity, inputs=_inputs(pipeline, sae), label=shard_key(index))


def records_ref(pipeline: Pipeline, sae: str, latent_slice: int) -> ArtifactRef:
    """Address pass D's output for one latent slice: what a browser shows."""
    identity = {**_identity(pipeline, "records"), "latent_slice": latent_slice, "model": pipeline.plan.model_fingerprint, "record": RECORD_VERSION}
    identity |= read_roles(pipeline.config.corpus)
    inputs = {**_inputs(pipeline, sae), "evaluation": evaluation_ref(pipeline, sae).artifact_id}
    return make_ref("feature_records", f"{FOLDER}/{sae}/records", identity=identity, inputs=inputs, label=slice_key(latent_slice))


def slice_key(latent_slice: int) -> str:
    """Return the partition key of a latent slice, for example `slice-003`."""
    return f"slice-{latent_slice:03d}"


def slice_index(key: str) -> int:
    """Return the latent slice of a partition key."""
    return int(key.removeprefix("slice-"))


def split_grid_key(key: str) -> tuple[int, int]:
    """Return latent slice and dataset shard of a partition key."""
    latent_slice, _, shard = key.partition("|")
    return slice_index(latent_slice), shard_index(shard)


def features_key(sae: str, name: str) -> tuple[str, ...]:
    """Return the asset key of one of an SAE's feature assets, for example `features/demo/feature_records`."""
    return ("features", sae, name)


def slice_bounds(pipeline: Pipeline, sae: str, latent_slice: int) -> tuple[int, int]:
    """Return the latents [start, stop) of a slice; slices differ by at most one latent in size."""
    d_sae, n_slices = pipeline.config.sae(sae).d_sae, pipeline.config.features.latent_slices
    return latent_slice * d_sae // n_slices, (latent_slice + 1) * d_sae // n_slices


def read_features(features: FeaturesConfig, which: Pass) -> dict[str, Any]:
    """Return what the bytes of one pass depend on of the configuration of the features."""
    read = features.model_dump(exclude={"saes", *_UNREAD[which]})
    return {**read, "n_kept_top": features.n_kept_top} if which == "candidates" else read


def read_roles(corpus: CorpusConfig) -> dict[str, int]:
    """Return what the bytes of records depend on besides where the text is messages: the number of the way in which roles are told."""
    return {"roles": 1} if corpus.text_kind == "messages" else {}


def _identity(pipeline: Pipeline, which: Pass) -> dict[str, object]:
    """Return what a pass's bytes depend on; the same for every partition."""
    config = pipeline.config
    return pipeline.remember(
        ("identity of features", which), lambda: {"code": FEATURES_VERSION, "seed": config.seed, "features": read_features(config.features, which)}
    )


def _inputs(pipeline: Pipeline, sae: str) -> dict[str, str]:
    """Return the ids of all that an SAE's features are made from; to go through all shards for each of them took the square of their number."""

    def collect() -> dict[str, str]:
        hook_point = pipeline.config.sae(sae).hook_point
        shards = activation_ids(pipeline, hook_point, pipeline.shard_indices)
        return {"sae": sae_ref(pipeline, sae).artifact_id, "activation_shards": shards, **imported_statistics(pipeline, sae, [hook_point])}

    return pipeline.remember(("inputs of features", sae), collect)


def prompt_targets_ref(pipeline: Pipeline, name: str) -> ArtifactRef:
    """Address what adds to the targets of one configured prompt of the heads."""
    config, plan, prompt = pipeline.config, pipeline.plan, heads_of(pipeline).prompt(name)
    identity = {
        "code": TARGETS_VERSION,
        "model": plan.model_fingerprint,
        "model_dtype": config.model.dtype,
        "tokenizer": plan.tokenizer_fingerprint,
        "layers": heads_of(pipeline).layers,
        "prompt": prompt.model_dump(),
    }
    inputs = {f"sae.{sae}": sae_ref(pipeline, sae).artifact_id for sae, _ in prompt.wanted}
    return make_ref("prompt_targets", f"{FOLDER}/prompts", identity=identity, inputs=inputs, label=name)


def prompt_targets_lineage(pipeline: Pipeline, name: str) -> list[Lineage]:
    """Return what the targets of one prompt keep."""
    saes = dict.fromkeys(sae for sae, _ in heads_of(pipeline).prompt(name).wanted)
    return [Lineage(prompt_targets_ref(pipeline, name), [sae_ref(pipeline, sae) for sae in saes])]
