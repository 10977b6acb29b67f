"""Where SAEs, their evaluations and the table of all of them lie, and what a row of a training curve is."""

from collections.abc import Iterable
from typing import Any, Final, NamedTuple

from interp_assets.harvest.refs import activation_ids, statistics_ref
from interp_assets.planning.pipeline import Pipeline
from interp_assets.planning.sections import Metric
from interp_assets.shuffle.generations import before, has_grown
from interp_assets.shuffle.refs import mixed_ids
from interp_assets.storage.manifest import ArtifactRef, combine_ids, make_ref

FOLDER = "4-sae"
CODE: Final = "code.py"
"""The file of an architecture of one's own, as it was when the configuration was read."""
TRAINING: Final = "training.parquet"
"""The logged steps of a training."""
MATCHES: Final = "matches.parquet"
"""The latents of SAEs beside their nearest in each other."""
PROBES: Final = "probes.parquet"
"""How well few latents of an SAE tell labels of rows."""
METRICS: Final = "metrics.json"
"""The measurements of an SAE, in the terms of SAEBench."""
MODEL_TOKENS: Final = 1 << 15
"""Token positions that the subject model is run on to measure an SAE."""
TRAIN_VERSION = 8
"""Raise it when the same rows would give other weights, or an SAE keeps other digests."""

OWN_VERSION = 1
"""Raise it when the same file of somebody's own architecture would give other weights."""

PICK_VERSION = 1
"""Raise it when an SAE of the TopK family would get other weights because other latents are picked."""

IMPORT_VERSION = 3
"""Raise it when the same folder would give other weights."""

EVALUATION_VERSION = 5
"""Raise it when the same SAE would be measured otherwise, or the measurement keeps other digests."""

METRIC_VERSION = 1
"""Raise it when the same function would be given other rows, or its measurements are kept otherwise."""

PROBE_VERSION = 1
"""Raise it when the same SAE and labels would be probed otherwise."""

SWEEP_VERSION = 3
"""Raise it when the table of the same SAEs would hold something else."""

MATCH_VERSION = 2
"""Raise it when the same SAEs would be matched otherwise."""


class LogRow(NamedTuple):
    """One logged step, over the global batch. One row of `training.parquet`."""

    step: int
    n_rows: int
    """Rows seen, this batch included."""
    loss: float
    mean_squared_error: float
    """Per dimension, in normalised units."""
    sparsity_loss: float
    auxk_loss: float
    l0: float
    fvu: float
    dead_share: float
    learning_rate: float
    gradient_norm: float


def code_ref(digest: str) -> ArtifactRef:
    """Address the bytes of a file with this SHA-256."""
    return make_ref("code", FOLDER, identity={"sha256": digest}, inputs={}, label="code")


def sae_ref(pipeline: Pipeline, name: str) -> ArtifactRef:
    """Address a trained SAE, or an imported one. In a pipeline that has grown a trained one starts from the SAE before."""
    return pipeline.remember(("sae_ref", name), lambda: _sae_ref(pipeline, name))


def evaluation_ref(pipeline: Pipeline, name: str) -> ArtifactRef:
    """Address the measurements of an SAE on the held-out shards."""
    config = pipeline.config.sae(name)
    inputs = {"sae": sae_ref(pipeline, name).artifact_id}
    for hook_point in dict.fromkeys((*config.sources, *config.targets)):
        suffix = "" if hook_point == config.hook_point else f".{hook_point}"
        inputs[f"held_out{suffix}"] = activation_ids(pipeline, hook_point, pipeline.held_out_indices)
    inputs |= imported_statistics(pipeline, name, (*config.sources, *config.targets))
    return make_ref("sae_evaluation", FOLDER, identity={"code": EVALUATION_VERSION}, inputs=inputs, label=f"{name}.evaluation")


def metric_ref(pipeline: Pipeline, name: str, metric: Metric) -> ArtifactRef:
    """Address what a function of one's own measured of an SAE on the held-out shards."""
    evaluation = evaluation_ref(pipeline, name)
    inputs = {role: digest for role, digest in evaluation.inputs.items() if role == "sae" or role.startswith("held_out")}
    identity = {"code": METRIC_VERSION, "function": metric.function, "sha256": metric.code.digest if metric.code else ""}
    return make_ref("sae_metric", FOLDER, identity=identity, inputs=inputs, label=f"{name}.{metric.function.replace(':', '.')}")


def probes_ref(pipeline: Pipeline, name: str) -> ArtifactRef:
    """Address how well few latents of an SAE tell labels of held-out rows."""
    probes = pipeline.config.probes
    assert probes
    evaluation = evaluation_ref(pipeline, name)
    inputs = {role: digest for role, digest in evaluation.inputs.items() if role == "sae" or role.startswith("held_out")}
    identity = {"code": PROBE_VERSION, "seed": pipeline.config.seed, **probes.identity()}
    return make_ref("sae_probes", FOLDER, identity=identity, inputs=inputs, label=f"{name}.probes")


def imported_statistics(pipeline: Pipeline, name: str, hook_points: Iterable[str]) -> dict[str, str]:
    """Return the statistics, as inputs, that an imported SAE is measured and shown with; the id of a trained one covers them already."""
    if not pipeline.config.sae(name).imported:
        return {}
    return {f"statistics.{hook_point}": statistics_ref(pipeline, hook_point).artifact_id for hook_point in dict.fromkeys(hook_points)}


def sweep_ref(pipeline: Pipeline) -> ArtifactRef:
    """Address the table of all SAEs of the pipeline."""
    names = [config.name for config in pipeline.config.saes]
    inputs = {"evaluations": combine_ids([evaluation_ref(pipeline, name).artifact_id for name in names])}
    return make_ref("sweep", FOLDER, identity={"code": SWEEP_VERSION, "saes": names}, inputs=inputs, label="sweep")


def matches_ref(pipeline: Pipeline) -> ArtifactRef:
    """Address the latents of the configured SAEs beside their nearest in each other."""
    matches = pipeline.config.matches
    assert matches
    sources = dict.fromkeys(point for name in matches.saes for point in pipeline.config.sae(name).sources)
    inputs = {f"sae.{name}": sae_ref(pipeline, name).artifact_id for name in matches.saes}
    inputs |= {f"held_out.{point}": activation_ids(pipeline, point, pipeline.held_out_indices) for point in sources}
    return make_ref("sae_matches", FOLDER, identity={"code": MATCH_VERSION, **matches.model_dump()}, inputs=inputs, label="matches")


def _sae_ref(pipeline: Pipeline, name: str) -> ArtifactRef:
    config = pipeline.config.sae(name)
    identity: dict[str, Any] = {"sae": config.identity()}
    if renamed := {name: alias for name, alias in pipeline.plan.hook_aliases.items() if name in (*config.sources, *config.targets)}:
        identity["hook_aliases"] = renamed
    if config.imported:
        return make_ref("sae", FOLDER, identity={"code": IMPORT_VERSION, **identity}, inputs={}, label=name)
    identity |= {"code": TRAIN_VERSION, "seed": pipeline.config.seed}
    if config.is_own:
        identity["own"] = OWN_VERSION
    elif config.architecture.endswith("topk"):
        identity["pick"] = PICK_VERSION
    inputs: dict[str, str] = {}
    for hook_point in dict.fromkeys((*config.sources, *config.targets)):
        suffix = "" if hook_point == config.hook_point else f".{hook_point}"
        inputs[f"mixed_shards{suffix}"] = mixed_ids(pipeline, hook_point)
        inputs[f"statistics{suffix}"] = statistics_ref(pipeline, hook_point).artifact_id
    if has_grown(pipeline):
        inputs["warm_start"] = sae_ref(before(pipeline), name).artifact_id
    return make_ref("sae", FOLDER, identity=identity, inputs=inputs, label=name)
