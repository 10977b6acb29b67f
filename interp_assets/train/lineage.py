"""Whose digests SAEs and their evaluations keep: those of the rows, statistics and SAEs of their own hook points, and of no others.

    sae           shuffle certificates, which keep the digests of the mixed shards, and statistics; the SAE that a grown pipeline's starts from;
                  the file of an architecture of one's own
    evaluation    the SAE, the held-out activations, which keep those of their tokens, and statistics

An imported SAE depends on its folder alone. What is gone says nothing: a trained SAE does not fall when its rows are deleted.
"""

from interp_assets.harvest.refs import activation_shard_ref, statistics_ref
from interp_assets.planning.config import SaeConfig
from interp_assets.planning.pipeline import Pipeline
from interp_assets.shuffle.generations import before, has_grown
from interp_assets.shuffle.refs import certificate_ref
from interp_assets.storage.lineage import Lineage
from interp_assets.train.refs import code_ref, evaluation_ref, metric_ref, probes_ref, sae_ref


def hook_points_of(config: SaeConfig) -> list[str]:
    """List the hook points that an SAE reads or reconstructs, each once."""
    return list(dict.fromkeys((*config.sources, *config.targets)))


def sae_lineage(pipeline: Pipeline, name: str) -> Lineage:
    """Return what a trained SAE and its checkpoints keep; an imported one has no sources."""
    config, ref = pipeline.config.sae(name), sae_ref(pipeline, name)
    if config.imported:
        return Lineage(ref, [])
    hook_points = hook_points_of(config)
    sources = [address(pipeline, hook_point) for address in (certificate_ref, statistics_ref) for hook_point in hook_points]
    first = [sae_ref(before(pipeline), name)] if has_grown(pipeline) else []
    code = [code_ref(config.code.digest)] if config.code else []
    return Lineage(ref, sources + first + code, may_be_gone=True)


def metric_lineage(pipeline: Pipeline, name: str) -> list[Lineage]:
    """Return what the measurements by functions of one's own keep: the SAE's digest, the files' and those of the rows."""
    (of_sae, of_rows), found = evaluation_lineage(pipeline, name), list[Lineage]()
    for metric in pipeline.config.metrics:
        ref, code = metric_ref(pipeline, name, metric), [code_ref(metric.code.digest)] if metric.code else []
        found += [Lineage(ref, of_sae.sources), Lineage(ref, [*of_rows.sources, *code], "measured_on", may_be_gone=True)]
    return found


def probes_lineage(pipeline: Pipeline, name: str) -> list[Lineage]:
    """Return what the probes of an SAE keep: its digest, and those of the rows."""
    (of_sae, of_rows), ref = evaluation_lineage(pipeline, name), probes_ref(pipeline, name)
    return [Lineage(ref, of_sae.sources), Lineage(ref, of_rows.sources, "measured_on", may_be_gone=True)]


def evaluation_lineage(pipeline: Pipeline, name: str) -> list[Lineage]:
    """Return what an evaluation keeps: the SAE's digest, whatever has become of the rows that it was measured on."""
    ref, hook_points = evaluation_ref(pipeline, name), hook_points_of(pipeline.config.sae(name))
    rows = [activation_shard_ref(pipeline, hook_point, index) for hook_point in hook_points for index in pipeline.held_out_indices]
    statistics = [statistics_ref(pipeline, hook_point) for hook_point in hook_points]
    return [Lineage(ref, [sae_ref(pipeline, name)]), Lineage(ref, rows + statistics, "measured_on", may_be_gone=True)]
