"""A manifest is what makes an artifact exist: files are written first, `manifest.json` last.

    writer                                     reader
    1. stream the files, hashing each block    1. read manifest.json (its own seal, format, version, kind and id are checked)
    2. write manifest.json, create-only        2. read a range, widened to whole blocks, and compare each block's checksum

No manifest, no artifact: a crash between 1 and 2 leaves garbage that the next attempt overwrites. A published artifact is immutable;
its path carries its id, so a changed input makes a new artifact beside the old one.

The **artifact id** hashes the identity config and the ids of the inputs, so it is known before any work is done. The **digest** hashes
what the artifact holds; it is Dagster's data version: same inputs, same bytes, same digest. Times are not part of either.

The format is described in `docs/formats/manifest.md`.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from functools import cached_property, wraps
from typing import Any, Final, NamedTuple, ParamSpec

import xxhash

from interp_assets.errors import ArtifactCorruptError, ArtifactForeignError, ArtifactMissingError, ArtifactRaceError, StoreMissingError
from interp_assets.storage.foreign import parse_json
from interp_assets.storage.store import ByteSink, Store, check_path

P = ParamSpec("P")
FORMAT: Final = "interp-assets/manifest"
VERSIONS: Final = (1, 2)
"""Versions that are read. 2 may have `timed` files, and is written only where there are any."""
MANIFEST: Final = "manifest.json"
PLAN: Final = "plan.json"
CONFIGURATION: Final = "pipeline.json"
"""The two mutable files of a pipeline's folder (`planning/pipeline.py`), and no artifacts: the plan, and the configuration it was made from."""
BLOCK_BYTES: Final = 4 << 20
"""Default bytes per checksum: what one verified ranged read costs at least."""


class ArtifactRef(NamedTuple):
    """Where an artifact lies and what it is, known before it exists.

    `identity` holds all that its bytes depend on besides its inputs; `inputs` maps a role to the artifact id found there.
    """

    kind: str
    path: str
    artifact_id: str
    identity: dict[str, Any]
    inputs: dict[str, str]
    hook_point: str = ""
    """Of an artifact that holds the rows of one hook point: which. No part of the id, which has it in its identity or inputs."""


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One file of an artifact: its name, size, shape and the checksum of every block."""

    name: str
    n_bytes: int
    block_bytes: int
    checksums: list[str]
    """xxh3-128 of each block of `block_bytes`, as hexadecimal."""
    n_rows: int | None = None
    dtype: str | None = None
    shape: list[int] | None = None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The published description of one artifact."""

    kind: str
    artifact_id: str
    identity: dict[str, Any]
    inputs: dict[str, str]
    files: list[FileEntry]
    facts: dict[str, Any] = field(default_factory=dict)
    """Small results that later stages and people read (row counts, losses); they are part of the digest."""
    created: str = ""
    timed: list[str] = field(default_factory=list)
    """Names of the files that hold times of a run: verified like all others, but not part of the digest."""

    @cached_property
    def digest(self) -> str:
        """Hash of everything but the times: 32 hexadecimal digits."""
        content = as_plain(self)
        del content["created"]
        if content.pop("timed", None):
            content["files"] = [entry for entry in content["files"] if entry["name"] not in self.timed]
        return _hash_json(content)

    @property
    def n_bytes(self) -> int:
        """Size of all files."""
        return sum(entry.n_bytes for entry in self.files)

    def file(self, name: str) -> FileEntry:
        """Return the entry of a file. Raises `ArtifactCorruptError` when the artifact has no such file."""
        for entry in self.files:
            if entry.name == name:
                return entry
        raise ArtifactCorruptError(f"Artifact {self.artifact_id} ({self.kind}) lists no file {name!r}; it has {[f.name for f in self.files]}.")


_FIELDS: Final = tuple(each.name for each in fields(Manifest))


class Produced(NamedTuple):
    """What a stage answers for one artifact: where, what, and whether the work was already done."""

    ref: ArtifactRef
    manifest: Manifest
    is_cached: bool
    wall_s: float = 0.0
    is_whole: bool = True
    """Whether all of its work was done just now; that of a training that went on from a checkpoint was not."""


def timed(make: Callable[P, Produced]) -> Callable[P, Produced]:
    """Let what a stage answers say how long it took."""

    @wraps(make)
    def measure(*arguments: P.args, **named: P.kwargs) -> Produced:
        started_s = time.perf_counter()
        produced = make(*arguments, **named)
        return produced._replace(wall_s=time.perf_counter() - started_s)

    return measure


def make_ref(kind: str, folder: str, *, identity: Mapping[str, Any], inputs: Mapping[str, str], label: str, hook_point: str = "") -> ArtifactRef:
    """Compute an artifact's id and place it at `<folder>/<label>-<first 12 digits of the id>`."""
    artifact_id = _hash_json({"kind": kind, "identity": dict(identity), "inputs": dict(inputs)})
    return ArtifactRef(kind, f"{folder}/{label}-{artifact_id[:12]}", artifact_id, dict(identity), dict(inputs), hook_point)


def combine_ids(ids: Sequence[str]) -> str:
    """Hash the ids of a set of inputs, in order, into one input id."""
    return _hash_json(list(ids))


def data_version(manifests: Sequence[Manifest]) -> str:
    """Return the version of what several artifacts hold together: the digest of one, a hash of the digests of more, `nothing` for none."""
    if not manifests:
        return "nothing"
    return manifests[0].digest if len(manifests) == 1 else combine_ids([manifest.digest for manifest in manifests])


class ArtifactWriter:
    """Collects the files of one artifact. Made by `create_artifact`."""

    def __init__(self, store: Store, ref: ArtifactRef, *, is_there: bool = False) -> None:
        """Write below `ref.path`; when the artifact `is_there` already, hash what would be written and compare digests at the end."""
        self._store, self._ref, self._is_there = store, ref, is_there
        self._files: dict[str, FileEntry] = {}
        self._timed: dict[str, bytes] = {}
        self.facts: dict[str, Any] = {}
        self.manifest: Manifest | None = None
        self._is_anothers = is_there

    @contextmanager
    def open(
        self,
        name: str,
        *,
        n_rows: int | None = None,
        dtype: str | None = None,
        shape: Sequence[int] | None = None,
        block_bytes: int = BLOCK_BYTES,
    ) -> Iterator[ByteSink]:
        """Stream one file; it belongs to the artifact when the block ends without an error."""
        path = f"{self._ref.path}/{check_path(name)}"
        with nullcontext(_NullSink()) if self._is_there or name in self._timed else self._store.open_writer(path) as sink:
            hashing = _HashingSink(sink, block_bytes)
            yield hashing
        self._files[name] = FileEntry(
            name=name,
            n_bytes=hashing.n_bytes,
            block_bytes=block_bytes,
            checksums=hashing.finish(),
            n_rows=n_rows,
            dtype=dtype,
            shape=None if shape is None else list(shape),
        )

    def put(self, name: str, data: bytes, *, n_rows: int | None = None, block_bytes: int = BLOCK_BYTES, is_timed: bool = False) -> None:
        """Write one file that is already in memory. A file that `is_timed` holds times of this run and is not part of the digest.

        Such a file waits in memory for `publish`, because two writers of one artifact have different ones.
        """
        if is_timed:
            self._timed[name] = data
        with self.open(name, n_rows=n_rows, block_bytes=block_bytes) as sink:
            sink.write(data)

    def publish(self, created: datetime) -> Manifest:
        """Write the manifest, last and create-only. Raises `ArtifactRaceError` when other bytes were published meanwhile."""
        manifest = Manifest(
            kind=self._ref.kind,
            artifact_id=self._ref.artifact_id,
            identity=_plain(self._ref.identity),
            inputs=dict(self._ref.inputs),
            files=[self._files[name] for name in sorted(self._files)],
            facts=_plain(self.facts),
            created=created.isoformat(timespec="seconds"),
            timed=sorted(self._timed),
        )
        path = f"{self._ref.path}/{MANIFEST}"
        if not self._timed or not self._is_published():
            self._put_timed()
            if self._store.put(path, encode_manifest(manifest), create=True):
                return manifest
        winner = load_manifest(self._store, self._ref)
        if winner.digest != manifest.digest:
            raise ArtifactRaceError(
                f"Two writers published {self._store.url}/{self._ref.path} with different bytes (digest {winner.digest} is there, "
                f"ours is {manifest.digest}). Run `interp verify` on it; if it fails, delete the folder and materialize it once."
            )
        if self._is_there or self._are_whole(winner):
            self._is_anothers = True
            return winner
        self._put_timed()  # ours were written over the winner's: the manifest has to be ours as well
        self._store.put(path, encode_manifest(manifest))
        return manifest

    @property
    def produced(self) -> Produced:
        """What a stage answers when the artifact is written, or when another job has published it meanwhile."""
        assert self.manifest is not None
        return Produced(self._ref, self.manifest, is_cached=self._is_anothers)

    def _is_published(self) -> bool:
        try:
            load_manifest(self._store, self._ref)
        except (ArtifactMissingError, ArtifactCorruptError):
            return False
        return True

    def _put_timed(self) -> None:
        for name, data in self._timed.items():
            self._store.put(f"{self._ref.path}/{name}", data)

    def _are_whole(self, winner: Manifest) -> bool:
        try:
            for name in winner.timed:
                read_file(self._store, self._ref.path, winner, name)
        except ArtifactCorruptError:
            return False
        return True


@contextmanager
def create_artifact(store: Store, ref: ArtifactRef, *, made_from: Sequence[Manifest] = (), replace: bool = False) -> Iterator[ArtifactWriter]:
    """Write an artifact: its manifest is published when the block ends, and nothing is when the block raises.

    What an earlier attempt, a damaged artifact or one made from other inputs left at the same path is removed first, manifest first.
    `made_from` are the manifests of inputs whose digests `find_made_from` shall compare. When another job has published the artifact
    meanwhile, it stays as it is: nothing is written, and the block's bytes are only compared with it (`ArtifactRaceError` when they differ).
    `replace` removes even a whole artifact.
    """
    is_there = not replace and find_made_from(store, ref, made_from) is not None
    if not is_there:
        remove_artifact(store, ref.path)
    writer = ArtifactWriter(store, ref, is_there=is_there)
    yield writer
    if made_from:
        writer.facts["made_from"] = combine_ids([manifest.digest for manifest in made_from])
    writer.manifest = writer.publish(datetime.now(UTC))


def remove_artifact(store: Store, path: str) -> None:
    """Delete an artifact, its manifest first so that no reader meets a half-deleted one."""
    store.delete([f"{path}/{MANIFEST}"])
    store.delete([item.path for item in store.list(path)])


def find_manifest(store: Store, ref: ArtifactRef) -> Manifest | None:
    """Return the artifact's manifest when the artifact exists, is what `ref` says and its files have their sizes; else None.

    This is the cheap test by which finished work is skipped: one small read and a listing, no data. Content is verified on every read.
    """
    try:
        manifest = load_manifest(store, ref)
    except (ArtifactMissingError, ArtifactCorruptError):
        return None
    sizes = {item.path: item.n_bytes for item in store.list(ref.path)}
    is_whole = all(sizes.get(f"{ref.path}/{entry.name}") == entry.n_bytes for entry in manifest.files)
    return manifest if is_whole else None


def find_made_from(store: Store, ref: ArtifactRef, inputs: Sequence[Manifest]) -> Manifest | None:
    """Return the artifact's manifest when it is whole and was made from inputs with these digests; else None.

    An id promises equal bytes only on one kind of device: an input that was made again elsewhere keeps its id and changes its digest.
    """
    manifest = find_manifest(store, ref)
    if manifest is None or not inputs:
        return manifest
    return manifest if manifest.facts.get("made_from") == combine_ids([item.digest for item in inputs]) else None


def load_manifest(store: Store, ref: ArtifactRef) -> Manifest:
    """Read and check the manifest of `ref`.

    Raises `ArtifactMissingError` when there is none, `ArtifactCorruptError` when it is damaged, and `ArtifactForeignError` when it is
    another artifact's.
    """
    manifest = read_manifest(store, ref.path)
    if (manifest.kind, manifest.artifact_id) != (ref.kind, ref.artifact_id):
        raise ArtifactForeignError(
            f"{store.url}/{ref.path} holds {manifest.kind} {manifest.artifact_id}, expected {ref.kind} {ref.artifact_id}: it was made by "
            "another pipeline or configuration. Move it away, or point `root` elsewhere."
        )
    return manifest


def read_manifest(store: Store, path: str) -> Manifest:
    """Read the manifest below `path`, whatever artifact it describes. Raises like `load_manifest`."""
    try:
        return store.parse(f"{path}/{MANIFEST}", decode_manifest)
    except StoreMissingError as error:
        raise ArtifactMissingError(f"There is no artifact at {store.url}/{path}: {MANIFEST} is missing. Materialize it first.") from error


def as_plain(manifest: Manifest) -> dict[str, Any]:
    """Return a manifest's fields for JSON, sharing its lists: `dataclasses.asdict` copies every checksum."""
    plain = {name: getattr(manifest, name) for name in _FIELDS} | {"files": [vars(entry) for entry in manifest.files]}
    if not manifest.timed:
        del plain["timed"]
    return plain


def encode_manifest(manifest: Manifest) -> bytes:
    """Serialise a manifest canonically, sealed with a checksum of itself."""
    version = VERSIONS[-1] if manifest.timed else VERSIONS[0]
    content = {"format": FORMAT, "version": version, "digest": manifest.digest, **as_plain(manifest)}
    return _json({**content, "seal": _hash_json(content)}, indent=1)


def decode_manifest(data: bytes, where: str) -> Manifest:
    """Parse and check a manifest; `where` names it in messages. Raises `ArtifactCorruptError` or `ArtifactForeignError`."""
    try:
        content = parse_json(data)
        found = (content["format"], content["version"])
    except (ValueError, TypeError, KeyError) as error:
        raise ArtifactCorruptError(f"{where} is not a manifest (truncated or damaged). Re-materialize its partition.") from error
    if found[0] != FORMAT or found[1] not in VERSIONS:
        raise ArtifactForeignError(
            f"{where} is {found[0]!r} version {found[1]!r}; this release reads {FORMAT!r} versions {VERSIONS}. Upgrade interp-assets."
        )
    try:
        seal = content.pop("seal")
        is_sealed = seal == _hash_json(content) and data == _json({**content, "seal": seal}, indent=1)
        fields = {key: value for key, value in content.items() if key not in ("format", "version", "digest", "files")}
        manifest = Manifest(files=[_read_entry(entry) for entry in content["files"]], **fields)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactCorruptError(f"{where} lacks or exceeds the fields of a manifest ({error}). Re-materialize its partition.") from error
    if not is_sealed:
        raise ArtifactCorruptError(f"{where} differs from its own seal: a byte has changed. Re-materialize its partition.")
    for entry in manifest.files:
        check_path(entry.name)
    return manifest


def _read_entry(content: dict[str, Any]) -> FileEntry:
    """Make an entry whose sizes can be counted with. Raises `ValueError`."""
    entry = FileEntry(**content)
    sizes = (entry.n_bytes, entry.block_bytes)
    if any(type(size) is not int for size in sizes) or not 0 <= entry.n_bytes < 1 << 62 or not 0 < entry.block_bytes < 1 << 62:
        raise ValueError(f"{entry.name!r:.80} has {entry.n_bytes!r:.80} bytes in blocks of {entry.block_bytes!r:.80}")
    n_blocks = -(-entry.n_bytes // entry.block_bytes)
    if not isinstance(entry.checksums, list) or len(entry.checksums) != n_blocks:
        raise ValueError(f"{entry.name!r:.80} has not {n_blocks:,} checksums")
    return entry


class FilePart(NamedTuple):
    """Bytes [start, start + n_bytes) of one file of an artifact, and the checksums of the blocks around them.

    All that a verified read of the part needs: a job that reads a range of each of a thousand files need not hold a thousand manifests.
    """

    path: str
    """The file, relative to the store."""
    start: int
    n_bytes: int
    file_bytes: int
    block_bytes: int
    first_block: int
    checksums: list[str]


def file_part(path: str, entry: FileEntry, start: int, n_bytes: int) -> FilePart:
    """Take what a read of `n_bytes` from `start` needs out of a manifest's entry; `path` is the artifact's. The range must lie in the file."""
    assert 0 <= start <= start + n_bytes <= entry.n_bytes, f"{entry.name}: bytes {start} + {n_bytes} of {entry.n_bytes}"
    first, last = start // entry.block_bytes, math.ceil((start + n_bytes) / entry.block_bytes)
    return FilePart(f"{path}/{entry.name}", start, n_bytes, entry.n_bytes, entry.block_bytes, first, entry.checksums[first:last])


def read_part(store: Store, part: FilePart, scratch: memoryview) -> memoryview:
    """Read and verify a part that is read once; the view that is returned may lie in `scratch`, which must hold its whole blocks.

    Raises `ArtifactCorruptError`, naming the block.
    """
    first, last = part.start // part.block_bytes, math.ceil((part.start + part.n_bytes) / part.block_bytes)
    wide = first * part.block_bytes
    n_wide = min(last * part.block_bytes, part.file_bytes) - wide
    where = f"{store.url}/{part.path}"
    try:
        data = store.get_into(part.path, wide, scratch[:n_wide])
    except StoreMissingError as error:
        raise ArtifactCorruptError(f"{where} is gone, though its manifest lists it. Re-materialize its partition.") from error
    _verify_blocks(data, part.checksums[first - part.first_block : last - part.first_block], first, part.block_bytes, where)
    return data[part.start - wide : part.start - wide + part.n_bytes]


def read_file(store: Store, path: str, manifest: Manifest, name: str) -> bytes:
    """Read a whole file of the artifact at `path` and verify every block. Raises `ArtifactCorruptError`, naming the block."""
    entry = manifest.file(name)
    return read_range(store, path, manifest, name, 0, entry.n_bytes)


def read_range(store: Store, path: str, manifest: Manifest, name: str, start: int, n_bytes: int) -> bytes:
    """Read and verify `n_bytes` from `start` of one file of the artifact at `path`."""
    return read_ranges(store, path, manifest, name, [start], [n_bytes])[0]


def read_ranges(store: Store, path: str, manifest: Manifest, name: str, starts: Sequence[int], lengths: Sequence[int]) -> list[bytes]:
    """Read several ranges of one file, each widened to whole blocks whose checksums are compared.

    Costs at most two extra blocks per range. Raises `ArtifactCorruptError` for a wrong block and for a range past the end.
    """
    entry = manifest.file(name)
    where = f"{store.url}/{path}/{name}"
    for start, length in zip(starts, lengths, strict=True):
        if start < 0 or length < 0 or start + length > entry.n_bytes:
            raise ArtifactCorruptError(f"{where} has {entry.n_bytes:,} bytes by its manifest; bytes {start:,} to {start + length:,} were asked for.")
    firsts = [start // entry.block_bytes for start in starts]
    wide_starts = [first * entry.block_bytes for first in firsts]
    ends = [math.ceil((start + length) / entry.block_bytes) * entry.block_bytes for start, length in zip(starts, lengths, strict=True)]
    wide_lengths = [max(0, min(end, entry.n_bytes) - wide) for end, wide in zip(ends, wide_starts, strict=True)]
    try:
        parts = _get_nonempty(store, f"{path}/{name}", wide_starts, wide_lengths)
    except StoreMissingError as error:
        raise ArtifactCorruptError(f"{where} is gone, though its manifest lists it. Re-materialize its partition.") from error
    for first, part in zip(firsts, parts, strict=True):
        _verify_blocks(part, entry.checksums[first : first + 1 + len(part) // entry.block_bytes], first, entry.block_bytes, where)
    return [
        part if (wide, len(part)) == (start, length) else part[start - wide : start - wide + length]
        for part, wide, start, length in zip(parts, wide_starts, starts, lengths, strict=True)
    ]


def _get_nonempty(store: Store, path: str, starts: Sequence[int], lengths: Sequence[int]) -> list[bytes]:
    wanted = [i for i, length in enumerate(lengths) if length]
    found = store.get_ranges(path, [starts[i] for i in wanted], [lengths[i] for i in wanted]) if wanted else []
    parts = dict(zip(wanted, found, strict=True))
    return [parts.get(i, b"") for i in range(len(lengths))]


def _verify_blocks(data: bytes | memoryview, checksums: Sequence[str], first_block: int, block_bytes: int, where: str) -> None:
    """Compare the blocks from `first_block` on with their checksums. Raises `ArtifactCorruptError`, naming the first that differs."""
    view = memoryview(data)
    for i in range(math.ceil(len(data) / block_bytes)):
        found, block = xxhash.xxh3_128_hexdigest(view[i * block_bytes : (i + 1) * block_bytes]), first_block + i
        if found != checksums[i]:
            raise ArtifactCorruptError(
                f"{where} is damaged in block {block} (bytes {block * block_bytes:,} and following): checksum {found}, "
                f"the manifest says {checksums[i]}. Delete its folder and re-materialize the partition."
            )


class _NullSink:
    """Takes bytes that need not be written."""

    def write(self, data: bytes | memoryview) -> None:
        pass


class _HashingSink:
    """Passes bytes on and hashes them block by block."""

    def __init__(self, target: ByteSink, block_bytes: int) -> None:
        self.n_bytes = 0
        self._target, self._block_bytes = target, block_bytes
        self._hash = xxhash.xxh3_128()
        self._checksums: list[str] = []

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        self._target.write(view)
        while len(view):
            room = self._block_bytes - self.n_bytes % self._block_bytes
            piece = view[:room]
            self._hash.update(piece)
            self.n_bytes += len(piece)
            view = view[len(piece) :]
            if self.n_bytes % self._block_bytes == 0:
                self._close_block()

    def finish(self) -> list[str]:
        if self.n_bytes % self._block_bytes:
            self._close_block()
        return self._checksums

    def _close_block(self) -> None:
        self._checksums.append(self._hash.hexdigest())
        self._hash.reset()


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    """Return `value` as JSON would give it back, so that a written and a read manifest have one digest."""
    return json.loads(_json(value))


def _json(value: Any, indent: int | None = None) -> bytes:
    separators = (",", ":") if indent is None else (",", ": ")
    return json.dumps(value, sort_keys=True, indent=indent, separators=separators, ensure_ascii=False, allow_nan=False).encode()


def _hash_json(value: Any) -> str:
    return hashlib.blake2b(_json(value), digest_size=16).hexdigest()
