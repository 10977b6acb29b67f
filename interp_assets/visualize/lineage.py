"""Evidence is tied to the very SAE it was gathered with: what another training left behind is redone or refused, never mixed in.

An artifact id names the SAE's recipe and inputs. Two trainings of one recipe have one id, and on different devices different bytes, so
each artifact of this stage also keeps the digest of the SAE it used (fact `sae_digest`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from interp_assets.errors import ArtifactForeignError, ArtifactMissingError, InputError
from interp_assets.planning.pipeline import Pipeline
from interp_assets.storage.manifest import ArtifactRef, ArtifactWriter, Manifest, create_artifact, find_manifest, load_manifest, remove_artifact
from interp_assets.storage.store import Store
from interp_assets.train.refs import sae_ref
from interp_assets.train.sae import Sae


def sae_digest(pipeline: Pipeline, store: Store, name: str) -> str:
    """Return the digest of the trained SAE called `name`. Raises `ArtifactMissingError` before it is trained."""
    return load_manifest(store, sae_ref(pipeline, name)).digest


def check_sae(pipeline: Pipeline, sae: Sae, name: str) -> None:
    """Raise `InputError` when `sae` is not the SAE that the configuration describes."""
    config = pipeline.config.sae(name)
    expected = (pipeline.d_in(config.hook_point), config.d_sae)
    if (sae.d_in, sae.d_sae) != expected:
        raise InputError(
            f"SAE {name!r} is {sae.d_in} x {sae.d_sae} (d_in x d_sae), the configuration and hook point {config.hook_point} say "
            f"{expected[0]} x {expected[1]}: it was trained for another hook point or size. Train it again."
        )


def find_current(store: Store, ref: ArtifactRef, digest: str) -> Manifest | None:
    """Return the manifest of finished work that used the SAE with this digest; None when there is none or it used another."""
    manifest = find_manifest(store, ref)
    return manifest if manifest and manifest.facts.get("sae_digest") == digest else None


@contextmanager
def create_current(store: Store, ref: ArtifactRef, digest: str) -> Iterator[ArtifactWriter]:
    """Write an artifact that used the SAE with this digest; what an earlier training left in its place is removed first."""
    if find_manifest(store, ref) and not find_current(store, ref, digest):
        remove_artifact(store, ref.path)
    with create_artifact(store, ref) as art:
        yield art
        art.facts["sae_digest"] = digest


def load_current(store: Store, refs: Sequence[ArtifactRef], digest: str) -> list[Manifest]:
    """Read the manifests of all `refs`, made with the SAE of this digest.

    Raises `ArtifactMissingError` that names every partition that is missing, `ArtifactForeignError` for those made with another training.
    """
    found = [find_manifest(store, ref) for ref in refs]
    missing = [ref for ref, manifest in zip(refs, found, strict=True) if manifest is None]
    if missing:
        raise ArtifactMissingError(
            f"{len(missing)} of {len(refs)} {refs[0].kind} partition(s) are missing: {_labels(missing)}. Materialize them first ({store.url})."
        )
    manifests = [manifest for manifest in found if manifest]
    stale = [ref for ref, manifest in zip(refs, manifests, strict=True) if manifest.facts.get("sae_digest") != digest]
    if stale:
        raise ArtifactForeignError(
            f"{len(stale)} of {len(refs)} {refs[0].kind} partition(s) come from an earlier training of the SAE: {_labels(stale)}. "
            "The checkpoint is newer; re-materialize them."
        )
    return manifests


def _labels(refs: Sequence[ArtifactRef]) -> str:
    return ", ".join(ref.path.rsplit("/", 1)[-1][:-13] for ref in refs)
