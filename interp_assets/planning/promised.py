"""What a pipeline's plan promises, and is not there although something that was made of it is: the faults that no artifact can tell of itself.

A folder without its manifest is no artifact, so nothing that lies in it is wrong. The plan knows it, though: every artifact of every partition
has a name before it exists. One that is missing is *not made yet* while nothing behind it is there; behind it, transitively, a made one says that
it was there once. Split files may go when what was made of them is there (`Asset.may_go`); then they are neither.
"""

from typing import NamedTuple

from interp_assets.errors import ArtifactError
from interp_assets.planning.pipeline import Pipeline
from interp_assets.planning.road import Partition, Road
from interp_assets.storage.manifest import MANIFEST, ArtifactRef, load_manifest
from interp_assets.storage.store import Store
from interp_assets.storage.verify import Fault


class Promised(NamedTuple):
    """How a pipeline's folder compares with its plan."""

    lost: list[Fault]
    """Artifacts that are missing under made ones, in the order of the data."""
    n_not_made: int
    """Partitions that nothing which is there needs: the next run makes them."""


def find_lost(road: Road, pipeline: Pipeline, store: Store) -> Promised:
    """Compare what is there with what the plan promises. Reads every manifest, and no data."""
    lost: list[Fault] = []
    needed_by: dict[Partition, str] = {}
    n_not_made = 0
    for asset in reversed(road.rest):
        for key in reversed(asset.partition_keys(pipeline)):
            try:
                refs = asset.artifacts(pipeline, store, key)
            except ArtifactError:  # not even their names are known before what they are made of is there
                n_not_made += 1
                continue
            missing = [ref for ref in refs if not _is_there(store, ref)]
            name, child = f"{asset.name} {key}".strip(), needed_by.get((asset.name, key))
            if missing and child and not asset.may_go:
                lost += [
                    Fault(ref.path, f"is not there, though {child} is, which needs it. The next run makes `{asset.name}` again.")
                    for ref in reversed(missing)
                ]
            elif missing and not child:
                n_not_made += 1
            if child or len(missing) < len(refs):
                for parent in road.parents(asset, pipeline, key):
                    needed_by.setdefault(parent, child if missing and child else name)
    return Promised(lost[::-1], n_not_made)


def _is_there(store: Store, ref: ArtifactRef) -> bool:
    """Say whether an artifact has a manifest; whether that one is sound is asked elsewhere."""
    try:
        load_manifest(store, ref)
    except ArtifactError:
        return store.size(f"{ref.path}/{MANIFEST}") is not None
    return True
