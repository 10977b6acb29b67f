"""Evidence is tied to the very SAE, rows and earlier evidence it was gathered with: what others left behind is redone or refused, never mixed in.

An artifact id names recipes and inputs. Two trainings of one recipe have one id, and on different devices different bytes, so each artifact
of this stage keeps the digest of the SAE it used (fact `sae_digest`), and a hash of the digests of all else that it was made from
(`made_from`): rows, tokens, candidates, examples, windows, the evaluation. The thresholds of a `topk` SAE, found on the way, have a fact of
their own (`thresholds_digest`). What is gone says nothing, but the SAE has to be there.
"""

from collections.abc import Sequence

from interp_assets.corpus.refs import token_shard_ref
from interp_assets.errors import ArtifactForeignError, ArtifactMissingError
from interp_assets.harvest.refs import activation_shard_ref, statistics_ref
from interp_assets.planning.pipeline import Pipeline
from interp_assets.planning.progress import choose_word
from interp_assets.storage.lineage import Digests, Lineage, is_kept, trace
from interp_assets.storage.manifest import ArtifactRef, Manifest, find_manifest
from interp_assets.storage.store import Store
from interp_assets.train.refs import evaluation_ref, sae_ref
from interp_assets.visualize.refs import candidates_ref, examples_ref, records_ref, thresholds_ref, windows_ref


def thresholds_lineage(pipeline: Pipeline, name: str, index: int) -> list[Lineage]:
    """Return what the thresholds of one dataset shard's rows keep."""
    return _made_from(pipeline, name, thresholds_ref(pipeline, name, index), _rows(pipeline, name, index))


def candidates_lineage(pipeline: Pipeline, name: str, index: int, latent_slice: int) -> list[Lineage]:
    """Return what pass A's output for one dataset shard and latent slice keeps."""
    ref, statistics = candidates_ref(pipeline, name, index, latent_slice), statistics_ref(pipeline, pipeline.config.sae(name).hook_point)
    return [*_made_from(pipeline, name, ref, [*_rows(pipeline, name, index), statistics]), _thresholds(pipeline, name, ref, index)]


def examples_lineage(pipeline: Pipeline, name: str, latent_slice: int) -> list[Lineage]:
    """Return what pass B's output for one latent slice keeps."""
    candidates = [candidates_ref(pipeline, name, index, latent_slice) for index in pipeline.shard_indices]
    return _made_from(pipeline, name, examples_ref(pipeline, name, latent_slice), [*candidates, *_tokens(pipeline)])


def windows_lineage(pipeline: Pipeline, name: str, index: int) -> list[Lineage]:
    """Return what pass C's output for one dataset shard keeps."""
    ref, slices = windows_ref(pipeline, name, index), range(pipeline.config.features.latent_slices)
    examples = pipeline.remember(("examples", name), lambda: [examples_ref(pipeline, name, latent_slice) for latent_slice in slices])
    candidates = [candidates_ref(pipeline, name, index, latent_slice) for latent_slice in slices]
    return [*_made_from(pipeline, name, ref, [*examples, *candidates, *_rows(pipeline, name, index)]), _thresholds(pipeline, name, ref, index)]


def records_lineage(pipeline: Pipeline, name: str, latent_slice: int) -> list[Lineage]:
    """Return what pass D's output for one latent slice keeps; windows keep the candidates of all slices."""
    windows = pipeline.remember(("windows", name), lambda: [windows_ref(pipeline, name, index) for index in pipeline.shard_indices])
    sources = [examples_ref(pipeline, name, latent_slice), *windows, *_tokens(pipeline), evaluation_ref(pipeline, name)]
    return _made_from(pipeline, name, records_ref(pipeline, name, latent_slice), sources)


def _made_from(pipeline: Pipeline, name: str, ref: ArtifactRef, sources: Sequence[ArtifactRef]) -> list[Lineage]:
    return [Lineage(ref, [sae_ref(pipeline, name)], "sae_digest"), Lineage(ref, sources, may_be_gone=True)]


def _thresholds(pipeline: Pipeline, name: str, ref: ArtifactRef, index: int) -> Lineage:
    return Lineage(ref, [thresholds_ref(pipeline, name, index)], "thresholds_digest", may_be_gone=True)


def _rows(pipeline: Pipeline, name: str, index: int) -> list[ArtifactRef]:
    return [activation_shard_ref(pipeline, pipeline.config.sae(name).hook_point, index), token_shard_ref(pipeline, index)]


def _tokens(pipeline: Pipeline) -> list[ArtifactRef]:
    return pipeline.remember("token shards", lambda: [token_shard_ref(pipeline, index) for index in pipeline.shard_indices])


def load_current(store: Store, evidence: Sequence[Sequence[Lineage]], known: Digests) -> list[Manifest]:
    """Read the manifests of evidence, each given by its lineage, that was made from what is there now.

    Raises `ArtifactMissingError` that names every partition that is missing, `ArtifactForeignError` for those made from other bytes.
    """
    refs = [lineages[0].ref for lineages in evidence]
    found = [find_manifest(store, ref) for ref in refs]
    missing = [ref for ref, manifest in zip(refs, found, strict=True) if manifest is None]
    if missing:
        raise ArtifactMissingError(
            f"{len(missing)} of {len(refs)} {refs[0].kind} {choose_word(len(refs), 'partition is', 'partitions are')} missing: {_labels(missing)}. "
            f"Materialize them first ({store.url})."
        )
    manifests = [manifest for manifest in found if manifest]
    is_current = [is_kept(manifest, trace(known, lineages)) for manifest, lineages in zip(manifests, evidence, strict=True)]
    stale = [ref for ref, current in zip(refs, is_current, strict=True) if not current]
    if stale:
        raise ArtifactForeignError(
            f"{len(stale)} of {len(refs)} {refs[0].kind} {choose_word(len(refs), 'partition comes', 'partitions come')} from an earlier training "
            f"of the SAE, or from rows or evidence that have other bytes now: {_labels(stale)}. Re-materialize them."
        )
    return manifests


def _labels(refs: Sequence[ArtifactRef]) -> str:
    return ", ".join(ref.path.rsplit("/", 1)[-1][:-13] for ref in refs)
