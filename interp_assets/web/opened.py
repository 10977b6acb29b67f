"""Bundles in a store become opened bundles: checked, described, and read by verified ranges.

A bundle is found by its manifest. One that cannot be used (newer format, damaged) is still listed, with the reason, because a missing
entry explains nothing. Opening reads manifest and description; list, index and records stay where they are and are read by range.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from interp_assets.errors import ArtifactCorruptError, ArtifactError, ArtifactForeignError, ArtifactMissingError, InputError, InterpError
from interp_assets.storage.foreign import parse_json
from interp_assets.storage.manifest import MANIFEST, Manifest, read_file, read_manifest, read_range, read_ranges
from interp_assets.storage.store import Store, open_store
from interp_assets.visualize.packing import unpack_record
from interp_assets.web.attention import DESCRIPTION, INDEX, RECORDS
from interp_assets.web.attention import FORMAT as ATTENTION_FORMAT
from interp_assets.web.attention import KIND as ATTENTION_KIND
from interp_assets.web.attention import VERSION as ATTENTION_VERSION
from interp_assets.web.bundle import FORMAT, VERSION, decode_offsets
from interp_assets.web.columns import ROW, ROWS
from interp_assets.web.doses import DoseCurve, dose_file, read_doses
from interp_assets.web.labels import find_labels
from interp_assets.web.refs import FOLDER
from interp_assets.web.table import FeatureTable
from interp_assets.web.vocabulary import Vocabulary, decode_vocabulary

if TYPE_CHECKING:
    from interp_assets.garcon.patterns.view import Attention

KIND = "feature_bundle"
MAX_DESCRIPTION_BYTES = 16 << 20
_STREAM_BYTES = 1 << 20
_logger = logging.getLogger(__name__)


class BundlePlace(NamedTuple):
    """Where a bundle lies: a store and the folder in it."""

    store: Store
    path: str

    @property
    def name(self) -> str:
        """The folder's last part; it holds the artifact id, so it names this very bundle in addresses."""
        return self.path.rsplit("/", 1)[-1]


def find_bundles(url: str) -> list[BundlePlace]:
    """Find the bundles at a folder or `s3://` address: one bundle, a folder of bundles, a pipeline or a root of pipelines.

    Raises `ArtifactMissingError` when there is none.
    """
    parent, _, last = url.rstrip("/").rpartition("/")
    if last and not url.startswith("memory://"):
        beside = open_store(parent or ("/" if url.startswith("/") else "."))
        if beside.size(f"{last}/{MANIFEST}") is not None:
            return [BundlePlace(beside, last)]
    places = list_bundles(open_store(url))
    if not places:
        raise ArtifactMissingError(
            f"There is nothing to browse at {url}, neither a bundle of features nor one of attention heads. Materialize `feature_browser` or "
            "`attention_browser` (`interp run`), or name another folder."
        )
    return places


def list_bundles(store: Store) -> list[BundlePlace]:
    """List the bundles below a store, by path: those in `6-web` of a pipeline, or directly in the store's folder."""
    listed = list(_list_paths(store, FOLDER)) or list(_list_paths(store, ""))
    folders = (path.removesuffix(f"/{MANIFEST}") for path in listed if path.endswith(f"/{MANIFEST}"))
    return [BundlePlace(store, folder) for folder in sorted(folders) if "/" not in folder or folder.split("/")[-2] == FOLDER]


def _list_paths(store: Store, folder: str) -> Iterator[str]:
    """List what lies in a folder; of a local one also beside a link that leads nowhere, at which the store's own list stops."""
    root = store.local_path()
    if root is None:
        yield from (item.path for item in store.list(folder))
        return
    for parent, _, names in os.walk(root / folder):
        yield from ((Path(parent) / name).relative_to(root).as_posix() for name in names)


class _Part(BaseModel):
    model_config = ConfigDict(strict=True)


class _Sae(_Part):
    name: str
    artifact_id: str


class _Model(_Part):
    name: str


class _Records(_Part):
    per_file: Annotated[int, Field(ge=1, le=1 << 32)]
    repeat: Annotated[int, Field(ge=1, le=1 << 32)] | None


class _Columns(_Part):
    sortable: dict[str, str]
    numeric: dict[str, str]


class BundleKind(NamedTuple):
    """What tells one kind of bundle from another: the file that describes it, its format, and the asset that makes it."""

    file: str
    format: str
    version: int
    asset: str


FEATURES: Final = BundleKind("bundle.json", FORMAT, VERSION, "feature_browser")
ATTENTION: Final = BundleKind(DESCRIPTION, ATTENTION_FORMAT, ATTENTION_VERSION, "attention_browser")


class _Layer(_Part):
    layer: int
    n_heads: Annotated[int, Field(ge=1, le=1 << 16)]


class _Prompt(_Part):
    name: str
    n_tokens: Annotated[int, Field(ge=1)]


class _AttentionDescription(_Part):
    """What every reader of a bundle of heads relies on."""

    pipeline: str
    model: _Model
    layers: Annotated[list[_Layer], Field(min_length=1)]
    heads: dict[str, list[float | None]]
    prompts: list[_Prompt]


class _Doses(_Part):
    version: Literal[1]
    latents: list[Annotated[int, Field(ge=0)]]


class _Description(_Part):
    """What every reader of a bundle relies on; pages read more of it."""

    pipeline: str
    hook_point: str
    d_sae: Annotated[int, Field(ge=1, le=1 << 32)]
    n_live: int
    sae: _Sae
    model: _Model
    records: _Records
    columns: _Columns
    doses: _Doses | None = None


class OpenFiles:
    """One bundle of any kind, opened. Reads are verified against the manifest."""

    def __init__(self, place: BundlePlace, manifest: Manifest, description: dict[str, Any]) -> None:
        self.name, self.place, self.manifest, self.description = place.name, place, manifest, description
        self._store, self._path = place

    @property
    def where(self) -> str:
        """Address for people and messages."""
        return f"{self._store.url}/{self._path}"

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The text of every token id."""
        return decode_vocabulary(read_file(self._store, self._path, self.manifest, "vocabulary.json"), f"{self.where}/vocabulary.json")

    def read(self, name: str) -> bytes:
        """Read a whole file of the bundle."""
        return read_file(self._store, self._path, self.manifest, name)

    def read_spans(self, name: str, starts: Sequence[int], lengths: Sequence[int]) -> list[bytes]:
        """Read several ranges of one file at once."""
        return read_ranges(self._store, self._path, self.manifest, name, starts, lengths)

    def stream(self, name: str, start: int, n_bytes: int) -> Iterator[bytes]:
        """Read a range of a file in verified pieces. The first is read before anything is answered, so a missing file is an error."""
        step = max(_STREAM_BYTES, self.manifest.file(name).block_bytes)
        stop = start + n_bytes
        while start < stop:
            piece = min(step - start % step, stop - start)
            yield read_range(self._store, self._path, self.manifest, name, start, piece)
            start += piece

    def size(self, name: str) -> int | None:
        """Return the size of a file, or None when the bundle has no such file."""
        return next((entry.n_bytes for entry in self.manifest.files if entry.name == name), None)

    def etag(self, name: str) -> str:
        """Return a strong validator: it changes exactly when the file's bytes do."""
        entry = self.manifest.file(name)
        return f'"{hashlib.blake2b(repr((entry.n_bytes, entry.checksums)).encode(), digest_size=12).hexdigest()}"'


class OpenBundle(OpenFiles):
    """One feature bundle, opened."""

    def __init__(self, place: BundlePlace) -> None:
        """Read manifest and description. Raises `ArtifactError` when this release cannot show the bundle."""
        manifest = read_manifest(place.store, place.path)
        where = f"{place.store.url}/{place.path}"
        if manifest.kind != KIND:
            raise ArtifactForeignError(f"{where} holds a {manifest.kind}, not a {KIND}. Name the folder of a bundle.")
        super().__init__(place, manifest, read_description(place, manifest, FEATURES))
        self._check()
        self._lock = Lock()
        self._table: FeatureTable | None = None

    def table(self) -> FeatureTable:
        """Return the table of statistics with its search index."""
        with self._lock:
            if self._table is None:
                self._table = FeatureTable(self, find_labels(self))
            return self._table

    @cached_property
    def _order(self) -> NDArray[np.uint32]:
        return np.asarray(self.vocabulary.order, np.uint32)

    def record(self, latent: int) -> dict[str, Any]:
        """Read one feature record. Raises `InputError` for a latent that the SAE does not have, `ArtifactCorruptError` for a damaged one."""
        per_file, d_sae = self.description["records"]["per_file"], self.description["d_sae"]
        if not 0 <= latent < d_sae:
            raise InputError(f"There is no feature {latent:,} in {self.where}: it has {d_sae:,}, from 0.")
        stored = latent % self.n_records
        name, place = f"records/{stored // per_file:05d}", stored % per_file
        start, stop = np.frombuffer(read_range(self._store, self._path, self.manifest, f"{name}.idx", 8 * place, 16), "<u8").tolist()
        return self._decode(read_range(self._store, self._path, self.manifest, f"{name}.bin", start, stop - start), latent, name)

    def doses(self, latent: int) -> list[DoseCurve]:
        """Read the dose curves of a latent; none where it was not swept. Raises `ArtifactCorruptError` for a file that holds none."""
        if latent not in (self.description.get("doses") or {"latents": []})["latents"]:
            return []
        name = dose_file(latent)
        return read_doses(self.read(name), latent, f"{self.where}/{name}").curves

    def records(self) -> Iterator[dict[str, Any]]:
        """Read all feature records in order, a file of them at a time (about 30 MB)."""
        per_file, d_sae = self.description["records"]["per_file"], self.description["d_sae"]
        for first in range(0, d_sae, per_file):
            stored = first % self.n_records
            name, n_records = f"records/{stored // per_file:05d}", min(per_file, self.n_records - stored)
            offsets = decode_offsets(self.read(f"{name}.idx"), n_records, f"{self.where}/{name}.idx").tolist()
            data = self.read(f"{name}.bin")
            for place, (start, stop) in enumerate(pairwise(offsets[: d_sae - first + 1])):
                yield self._decode(data[start:stop], first + place, name)

    def _decode(self, member: bytes, latent: int, name: str) -> dict[str, Any]:
        record = unpack_record(member, self._order, f"{self.where}/{name}.bin, feature {latent},")
        found = record["latent"]
        if found != latent % self.n_records:
            raise ArtifactCorruptError(f"{self.where}/{name}.idx says that feature {latent} lies where feature {found} is. Materialize it again.")
        return {**record, "latent": latent}

    @property
    def n_records(self) -> int:
        """Records that are stored: as many as latents, except in invented bundles that repeat theirs."""
        return int(self.description["records"]["repeat"] or self.description["d_sae"])

    def _check(self) -> None:
        where = f"{self.where}/{FEATURES.file}"
        described = _validate(_Description, self.description, where, FEATURES.asset)
        if unknown := [latent for latent in (described.doses.latents if described.doses else ()) if latent >= described.d_sae]:
            what = f"{where} has dose curves of latent {unknown[0]:,}, and the SAE {described.d_sae:,} latents"
            raise ArtifactCorruptError(f"{what}. Materialize `feature_browser` again.")
        n_bytes = self.size(ROWS)
        if n_bytes != described.d_sae * ROW.itemsize or not 0 <= described.n_live <= described.d_sae:
            raise ArtifactCorruptError(
                f"{where} speaks of {described.d_sae:,} latents, {described.n_live:,} of them alive, and the rows of its list have {n_bytes} bytes. "
                "Materialize `feature_browser` again."
            )


class OpenAttention(OpenFiles):
    """The bundle of a model's attention heads, opened."""

    def __init__(self, place: BundlePlace) -> None:
        """Read manifest and description. Raises `ArtifactError` when this release cannot show the bundle."""
        manifest = read_manifest(place.store, place.path)
        super().__init__(place, manifest, read_description(place, manifest, ATTENTION))
        where = f"{self.where}/{ATTENTION.file}"
        described = _validate(_AttentionDescription, self.description, where, ATTENTION.asset)
        places = [(layer.layer, head) for layer in described.layers for head in range(layer.n_heads)]
        columns, n_bytes = described.heads, self.size(INDEX)
        named = list(zip(columns.get("layer", []), columns.get("head", []), strict=False))
        if named != places or {len(column) for column in columns.values()} != {len(places)} or n_bytes != 8 * (len(places) + 1):
            raise ArtifactCorruptError(
                f"{where} speaks of {len(places):,} heads, and its columns of {len(named):,}; the index of their records has {n_bytes} bytes. "
                "Materialize `attention_browser` again."
            )

    def head_names(self) -> list[str]:
        """List the heads, such as `5.3`, in the order of their records."""
        columns = self.description["heads"]
        return [f"{layer}.{head}" for layer, head in zip(columns["layer"], columns["head"], strict=True)]

    def head(self, name: str) -> dict[str, Any]:
        """Read one head's record. Raises `InputError` with what there is, and `ArtifactCorruptError` for a damaged one."""
        from interp_assets.harvest.heads.records import unpack_head_record  # noqa: PLC0415 - torch; a server sends files and unpacks none

        names = self.head_names()
        if name not in names:
            raise InputError(f"There is no head {name!r:.40} in {self.where}; there are {', '.join(names[:8])}{' and more' if names[8:] else ''}.")
        place = names.index(name)
        start, stop = np.frombuffer(self.read_spans(INDEX, [8 * place], [16])[0], "<u8").tolist()
        member = self.read_spans(RECORDS, [start], [max(0, stop - start)])[0]
        record = unpack_head_record(member, f"{self.where}/{RECORDS}, head {name},")
        if (record["layer"], record["head"]) != tuple(map(int, name.split("."))):
            raise ArtifactCorruptError(f"{self.where}/{INDEX} says that head {name} lies where another is. Materialize `attention_browser` again.")
        return record

    def prompt(self, name: str) -> "Attention":
        """Read the patterns over one prompt. Raises `InputError` with the prompts there are, `ArtifactCorruptError` for damaged ones."""
        from interp_assets.harvest.heads.prompts import FILES, unpack_prompt  # noqa: PLC0415 - as above

        names = [prompt["name"] for prompt in self.description["prompts"]]
        if name not in names:
            raise InputError(f"There is no prompt {name!r:.40} in {self.where}; there are {names}.")
        return unpack_prompt({file: self.read(f"prompts/{name}/{file}") for file in FILES}, f"{self.where}/prompts/{name}")


def read_description(place: BundlePlace, manifest: Manifest, kind: "BundleKind") -> dict[str, Any]:
    """Read the file that says what a bundle holds. Raises `ArtifactForeignError` for another version, `ArtifactCorruptError` for none."""
    where = f"{place.store.url}/{place.path}/{kind.file}"
    try:
        n_bytes = min(manifest.file(kind.file).n_bytes, MAX_DESCRIPTION_BYTES + 1)
        data = read_range(place.store, place.path, manifest, kind.file, 0, n_bytes)
        content = parse_json(data, MAX_DESCRIPTION_BYTES)
        found = (content["format"], content["version"])
        json.dumps([manifest.created, content], ensure_ascii=False, allow_nan=False).encode()  # as it will be sent
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ArtifactCorruptError(f"{where} describes no bundle ({error}). Materialize `{kind.asset}` again.") from error
    if found != (kind.format, kind.version):
        is_older = isinstance(found[1], int) and found[1] < kind.version
        step = f"Materialize `{kind.asset}` again." if is_older else "Upgrade interp-assets."
        raise ArtifactForeignError(f"{where} is {found[0]!r} version {found[1]}; this release reads version {kind.version}. {step}")
    return content


_Described = TypeVar("_Described", bound=BaseModel)


def _validate(model: type[_Described], content: dict[str, Any], where: str, asset: str) -> _Described:
    try:
        return model.model_validate(content)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()[:3])
        raise ArtifactCorruptError(f"{where} lacks what a bundle needs ({faults}). Materialize `{asset}` again.") from error


class BrokenBundle(NamedTuple):
    """A bundle that cannot be shown, and why."""

    name: str
    reason: str


def open_any(place: BundlePlace) -> OpenBundle | OpenAttention:
    """Open a bundle of either kind. Raises `ArtifactError` when this release cannot show it."""
    is_attention = read_manifest(place.store, place.path).kind == ATTENTION_KIND
    return OpenAttention(place) if is_attention else OpenBundle(place)


def open_bundle(place: BundlePlace) -> OpenBundle | OpenAttention | BrokenBundle:
    """Open a bundle, or keep the reason why it cannot be."""
    try:
        return open_any(place)
    except ArtifactError as error:
        return BrokenBundle(place.name, str(error))
    except InterpError as error:
        return BrokenBundle(place.name, f"{error} Is the store reachable?")
    except Exception as error:  # whatever else is wrong with one bundle, the others are served
        _logger.warning("The bundle %s cannot be opened", place.name, exc_info=True)
        return BrokenBundle(place.name, f"It cannot be opened ({type(error).__name__}: {error}). Run `interp verify` on its folder.")
