"""An artifact keeps the digests of what it was made from, and is out of date when these have other digests now.

An id promises equal bytes on one kind of device only: what was made again elsewhere may keep its id and change its digest. Which artifacts'
digests one keeps, and as which fact, is its lineage, and the same for all who ask: its maker, who skips work that is done, and the road,
which says what is due. Digests are taken before anything is read: what changes meanwhile makes the result out of date, never wrongly current.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Final, NamedTuple

from interp_assets.errors import ArtifactError
from interp_assets.storage.manifest import (
    ArtifactRef,
    ArtifactWriter,
    Manifest,
    combine_ids,
    create_artifact,
    find_manifest,
    load_manifest,
    remove_artifact,
)
from interp_assets.storage.store import Store

MADE_FROM: Final = "made_from"
_READERS: Final = 4


class Lineage(NamedTuple):
    """The artifacts whose digests an artifact keeps as one fact, combined."""

    ref: ArtifactRef
    sources: Sequence[ArtifactRef]
    fact: str = MADE_FROM
    may_be_gone: bool = False
    """Whether sources may be deleted afterwards: one that is gone says nothing of what was made."""


class Digests:
    """Digests of the artifacts of a store, each read once."""

    def __init__(self, store: Store) -> None:
        """Read nothing yet."""
        self.store = store
        self._found: dict[str, str | ArtifactError] = {}
        self.changing: set[str] = set()
        """Paths of artifacts that will have another digest once all that is due is made (`planning/road.py`)."""
        self.versions: dict[tuple[tuple[str, ...], str], str | None] = {}
        """Data versions of partitions that were asked for, by asset and key (`planning/road.py`)."""

    def of(self, refs: Sequence[ArtifactRef]) -> list[str]:
        """Return the digests of some artifacts. Raises what reading the first one that cannot be read raised."""
        unread = [ref for ref in refs if ref.path not in self._found]
        if len(unread) > 1:
            with ThreadPoolExecutor(_READERS) as readers:
                self._found.update(zip((ref.path for ref in unread), readers.map(self._read, unread), strict=True))
        elif unread:
            self._found[unread[0].path] = self._read(unread[0])
        digests = []
        for ref in refs:
            found = self._found[ref.path]
            if isinstance(found, ArtifactError):
                raise found
            digests.append(found)
        return digests

    def note(self, path: str, digest: str) -> None:
        """Take a digest that was just read."""
        self._found[path] = digest

    def _read(self, ref: ArtifactRef) -> str | ArtifactError:
        try:
            return load_manifest(self.store, ref).digest
        except ArtifactError as error:
            return error


def trace(digests: Digests, lineages: Sequence[Lineage]) -> dict[str, str]:
    """Return the facts that an artifact with these lineages keeps, as its sources are now; those of which one is gone and may be are left out.

    Raises `ArtifactMissingError` and its like for a source that has to be there.
    """
    kept: dict[str, str] = {}
    for lineage in lineages:
        if not lineage.sources:
            continue
        try:
            kept[lineage.fact] = combine(digests.of(lineage.sources), lineage.fact)
        except ArtifactError:
            if not lineage.may_be_gone:
                raise
    return kept


def combine(digests: Sequence[str], fact: str) -> str:
    """Return the value of a fact: the digest itself where it is called so (`sae_digest`), else a hash of all."""
    return digests[0] if fact.endswith("_digest") else combine_ids(digests)


def is_kept(manifest: Manifest, kept: Mapping[str, str]) -> bool:
    """Say whether an artifact was made from sources with these digests."""
    return all(manifest.facts.get(fact) == value for fact, value in kept.items())


def find_current(store: Store, ref: ArtifactRef, kept: Mapping[str, str]) -> Manifest | None:
    """Return the artifact's manifest when it is whole and was made from sources with these digests; else None."""
    manifest = find_manifest(store, ref)
    return manifest if manifest and is_kept(manifest, kept) else None


@contextmanager
def create_current(store: Store, ref: ArtifactRef, kept: Mapping[str, str]) -> Iterator[ArtifactWriter]:
    """Write an artifact that keeps these digests; what was made from others in its place is removed first."""
    if find_manifest(store, ref) and not find_current(store, ref, kept):
        remove_artifact(store, ref.path)
    with create_artifact(store, ref) as art:
        yield art
        art.facts |= kept
