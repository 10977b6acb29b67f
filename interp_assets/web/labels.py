"""A file of labels becomes an artifact beside a bundle: what somebody or some model says that features mean, with who said it and how well it did.

    <folder of the bundle>/labels/<bundle>/<source>-<id>/labels.sqlite    labels(latent, text, source, score, score_kind, author), full-text index

Read are Parquet, CSV and JSON lines (`.jsonl`, also `.gz` and `.zst`) with these columns, and Neuronpedia's explanations under its own names:

    latent | index | feature       the latent
    label | description | text     what it means
    source | typeName              which method or model; else `--source`
    score, score_kind | scoreType  how well it predicts activations, and by which test
    author | explanationModelName  who or what wrote it

A label is never shown without its source, and "not scored" is shown where there is no score. Bad rows are named together, and nothing is
imported then. Ten million labels take about a minute and 1 GB; a search reads only the index's pages. SQLite wants a file, so a set in a bucket
is copied to a temporary one when it is first asked for. SQLite knows no checksums, so all bytes are verified once, at the first question; and a
manifest says nothing of who wrote it, so the tables must be exactly ours, and a query that takes more steps than the file's size explains is ended.
"""

import csv
import hashlib
import io
import logging
import math
import re
import shutil
import sqlite3
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from threading import Lock
from typing import Any, Final, NamedTuple, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from interp_assets.errors import ArtifactCorruptError, InputError, first_line
from interp_assets.storage.foreign import DAMAGE, check_parquet, mend_text, parse_json, unpack_gzip, unpack_zstd
from interp_assets.storage.manifest import MANIFEST, Manifest, Produced, create_artifact, find_manifest, make_ref, read_manifest, read_range
from interp_assets.storage.store import Store

KIND: Final = "feature_labels"
FOLDER: Final = "labels"
FILE: Final = "labels.sqlite"
MAX_TEXT: Final = 2000
MAX_LABELS: Final = 100_000_000
MAX_FILE_BYTES: Final = 4 << 30
"""Of a file after it is unpacked: ten million labels have about one."""
MAX_VALUE_BYTES: Final = 64 << 10
_NAMES: Final = {
    "latent": ("latent", "index", "feature"),
    "text": ("label", "description", "text"),
    "source": ("source", "typeName"),
    "score": ("score",),
    "score_kind": ("score_kind", "scoreType"),
    "author": ("author", "explanationModelName"),
}
_FIELDS: Final = "latent INTEGER NOT NULL, text TEXT NOT NULL, source TEXT NOT NULL, score REAL, score_kind TEXT, author TEXT"
_SCHEMA: Final = {
    ("table", "labels"): f"CREATE TABLE labels (id INTEGER PRIMARY KEY, {_FIELDS})",
    ("table", "words"): "CREATE VIRTUAL TABLE words USING fts5(text, content='labels', content_rowid='id', detail=full)",
    ("index", "by_latent"): "CREATE INDEX by_latent ON labels (latent)",
}
_LIMITS: Final = {sqlite3.SQLITE_LIMIT_LENGTH: 4 << 20, sqlite3.SQLITE_LIMIT_ATTACHED: 0, sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH: 0}
_STEPS: Final = 10_000_000
"""Instructions of SQLite that a query may take, whatever the file's size; and more for each byte of it, and how often they are counted."""
_STEPS_PER_BYTE: Final = 2
_STEPS_EACH: Final = 10_000
_logger = logging.getLogger(__name__)
_SHOWN_FAULTS: Final = 5
_PIECE: Final = 4 << 20
_BATCH_ROWS: Final = 4096


class Label(NamedTuple):
    """One statement about one latent."""

    latent: int
    text: str
    source: str
    score: float | None
    score_kind: str | None
    author: str | None


@runtime_checkable
class Labelled(Protocol):
    """What labels are about: an open bundle."""

    manifest: Manifest
    description: dict[str, Any]

    @property
    def place(self) -> Any:
        """Its store, its path and its name."""
        ...

    @property
    def name(self) -> str:
        """Its name."""
        ...


def import_labels(bundle: Labelled, path: Path, *, source: str | None = None) -> Produced:
    """Write the labels of a file beside the bundle that they are about.

    `source` names the method for rows that do not. Raises `InputError`, naming the first bad rows, for a latent that the SAE does not have, an empty
    label, a score that is no number and a missing source.
    """
    data = path.read_bytes()
    described = {"bundle": bundle.manifest.artifact_id, "bundle_digest": bundle.manifest.digest}
    identity = {**described, "file": hashlib.blake2b(data, digest_size=16).hexdigest(), "source": source}
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", source or path.name.split(".")[0]) or "labels"
    place = bundle.place
    folder = f"{place.path.rsplit('/', 1)[0]}/{FOLDER}" if "/" in place.path else FOLDER
    ref = make_ref(KIND, f"{folder}/{place.name}", identity=identity, inputs={"bundle": bundle.manifest.artifact_id}, label=name)
    existing = find_manifest(place.store, ref)
    if existing:
        return Produced(ref, existing, is_cached=True, wall_s=0)
    labels = _check(_read_rows(path, data), bundle.description["d_sae"], source, path)
    content = _build(labels)
    with create_artifact(place.store, ref) as art:
        art.put(FILE, content, n_rows=len(labels))
        art.facts |= {"n_labels": len(labels), "n_latents": len({label.latent for label in labels}), "file": mend_text(path.name)}
    assert art.manifest
    return Produced(ref, art.manifest, is_cached=False, wall_s=0)


def _read_rows(path: Path, data: bytes) -> Iterator[Any]:
    name = path.name.lower()
    try:
        if name.endswith(".parquet"):
            yield from _read_parquet(data)
        elif name.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")):
            unpack = unpack_gzip if name.endswith(".gz") else unpack_zstd
            text = data if name.endswith(".jsonl") else unpack(data, MAX_FILE_BYTES)
            yield from (parse_json(line, MAX_VALUE_BYTES) for line in text.splitlines() if line.strip())
        elif name.endswith(".csv"):
            yield from csv.DictReader(io.StringIO(data.decode("utf-8-sig")))
        else:
            raise InputError(f"{path} is no file of labels: .parquet, .csv, .jsonl, .jsonl.gz and .jsonl.zst are read.")
    except (*DAMAGE, pa.ArrowException, csv.Error) as error:
        raise InputError(f"{path} cannot be read as {path.suffix} ({first_line(error)}).") from error


def _read_parquet(data: bytes) -> Iterator[dict[str, Any]]:
    """Yield the rows of a Parquet file some at a time. A long text that is stored once and meant by every row is noticed before it is repeated."""
    plain = pq.ParquetFile(io.BytesIO(data))
    check_parquet(plain.metadata, rows=MAX_LABELS, n_bytes=MAX_FILE_BYTES)
    texts = [field.name for field in plain.schema_arrow if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)]
    wanted = [name for names in _NAMES.values() for name in names if name in plain.schema_arrow.names]
    for batch in pq.ParquetFile(io.BytesIO(data), read_dictionary=texts).iter_batches(_BATCH_ROWS, columns=wanted):
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            values = column.dictionary if isinstance(column, pa.DictionaryArray) else column
            if values.nbytes and (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
                longest = max(pc.call_function("binary_length", [values]).to_pylist(), key=lambda n: n or 0, default=0) or 0
                if longest > MAX_VALUE_BYTES:
                    raise ValueError(f"column {name} holds a text of {longest:,} bytes, and {MAX_VALUE_BYTES:,} are allowed")
        yield from batch.to_pylist()


def _check(rows: Iterable[Any], d_sae: int, source: str | None, path: Path) -> list[Label]:
    labels, faults = [], []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            faults.append(f"row {number}: it is a {type(row).__name__}, not names and values")
            continue
        given = {field: next((row[name] for name in names if row.get(name) not in (None, "")), None) for field, names in _NAMES.items()}
        fault, label = _make_label(given, d_sae, source)
        if label is None:
            faults.append(f"row {number}: {fault}")
        else:
            labels.append(label)
    if faults:
        more = f", and {len(faults) - _SHOWN_FAULTS:,} more" if len(faults) > _SHOWN_FAULTS else ""
        raise InputError(f"{path} has {len(faults):,} bad rows: {'; '.join(faults[:_SHOWN_FAULTS])}{more}. Nothing was imported.")
    if not labels:
        raise InputError(f"{path} holds no labels. Columns that are read: {', '.join(' or '.join(names) for names in _NAMES.values())}.")
    return labels


def _make_label(given: dict[str, Any], d_sae: int, source: str | None) -> tuple[str, Label | None]:
    try:
        latent = int(str(given["latent"]))
    except ValueError:
        return f"{given['latent']!r:.40} is no latent", None
    text = str(given["text"] or "").strip()
    if not 0 <= latent < d_sae:
        return f"there is no latent {latent:,}, the SAE has {d_sae:,}", None
    if not text or len(text) > MAX_TEXT:
        return f"a label has 1 to {MAX_TEXT:,} characters, this one {len(text):,}", None
    origin = given["source"] or source
    if not origin:
        return "no source is named; give --source", None
    try:
        score = None if given["score"] is None else float(given["score"])
    except (TypeError, ValueError, OverflowError):
        return f"{given['score']!r:.40} is no score", None
    if score is not None and not math.isfinite(score):
        return f"{score} is no score", None
    kind, author = (None if given[name] is None else str(given[name]) for name in ("score_kind", "author"))
    return "", Label(latent, text, str(origin), score, kind, author)


def _build(labels: list[Label]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / FILE
        connection = sqlite3.connect(path, isolation_level=None)
        try:
            connection.execute("PRAGMA journal_mode = OFF")
            connection.execute("PRAGMA synchronous = OFF")
            connection.execute(_SCHEMA["table", "labels"])
            connection.execute(_SCHEMA["table", "words"])
            connection.execute("BEGIN")
            insert = "INSERT INTO labels (latent, text, source, score, score_kind, author) VALUES (?, ?, ?, ?, ?, ?)"
            connection.executemany(insert, sorted(labels, key=_best_first))
            connection.execute("INSERT INTO words (words) VALUES ('rebuild')")
            connection.execute("COMMIT")
            connection.execute(_SCHEMA["index", "by_latent"])
            connection.execute("VACUUM")
        finally:
            connection.close()
        return path.read_bytes()


def _best_first(label: Label) -> tuple[int, bool, float, str]:
    return label.latent, label.score is None, -(label.score or 0.0), label.text


class LabelSet:
    """One imported file of labels, opened read-only. Its bytes are verified before SQLite sees them, and again when the file has changed."""

    def __init__(self, store: Store, path: str, manifest: Manifest, n_latents: int) -> None:
        """Read nothing yet; the SAE has `n_latents`."""
        self._store, self._path, self.manifest, self._n_latents = store, path, manifest, n_latents
        self._copied: Path | None = None
        self._verified: tuple[int, ...] = ()
        self._lock = Lock()

    @property
    def name(self) -> str:
        """The folder's last part."""
        return self._path.rsplit("/", 1)[-1]

    def of(self, latents: Iterable[int]) -> list[dict[str, Any]]:
        """Return the labels of some latents, the best scored of each first, with all that is known of where they come from."""
        numbers = [int(latent) for latent in latents]
        return self._answer(f"WHERE latent IN ({','.join('?' * len(numbers))})", numbers)

    def all(self) -> list[dict[str, Any]]:
        """Return all labels, by latent, the best scored of each first, with all that is known of where they come from."""
        return self._answer("", [])

    def _answer(self, condition: str, values: list[int]) -> list[dict[str, Any]]:
        fields = "latent, text, source, score, score_kind, author"
        rows = self._ask(f"SELECT {fields} FROM labels {condition} ORDER BY id", values)  # noqa: S608 - question marks only
        origin = {"set": self.name, "file": str(self.manifest.facts.get("file", "")), "imported": self.manifest.created}
        return [{**self._check_label(Label(*row))._asdict(), **origin} for row in rows]

    def search(self, text: str) -> NDArray[np.uint32]:
        """Return the latents with a label that has a word beginning with `text`; several words must stand side by side."""
        phrase = text.replace('"', '""').strip()
        if not re.search(r"\w", phrase):
            return np.empty(0, np.uint32)
        return self._ask_latents("SELECT labels.latent FROM words JOIN labels ON labels.id = words.rowid WHERE words MATCH ?", [f'"{phrase}"*'])

    def order(self) -> NDArray[np.uint32]:
        """Return the labelled latents, sorted by their best label."""
        query = "SELECT latent FROM labels WHERE id IN (SELECT min(id) FROM labels GROUP BY latent) ORDER BY text COLLATE NOCASE, latent"
        return self._ask_latents(query, [])

    def _ask_latents(self, query: str, values: list[Any]) -> NDArray[np.uint32]:
        found = [row[0] for row in self._ask(query, values)]
        if not all(type(latent) is int and 0 <= latent < self._n_latents for latent in found):
            raise self._refuse("it names latents that the SAE does not have")
        return np.array(found, np.uint32)

    def _check_label(self, label: Label) -> Label:
        texts, optional = (label.text, label.source), (label.score_kind, label.author)
        is_sound = all(isinstance(text, str) for text in texts) and all(text is None or isinstance(text, str) for text in optional)
        if not is_sound or not (label.score is None or (isinstance(label.score, float) and math.isfinite(label.score))):
            raise self._refuse(f"what it says of latent {label.latent} is no label")
        return label

    def _ask(self, query: str, values: list[Any]) -> list[tuple[Any, ...]]:
        try:
            with closing(self._connect()) as connection:
                return connection.execute(query, values).fetchall()
        except sqlite3.Error as error:
            raise self._refuse(str(error)) from error

    def _connect(self) -> sqlite3.Connection:
        """Open the database as what a stranger may have made: nothing in it is run or written, and no query takes for ever."""
        with self._lock:
            path = self._local_file()
            facts = path.stat()
            stamp = (facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)
            is_new = stamp != self._verified
            if is_new and self._copied is None:
                for start, n_bytes in self._pieces():
                    read_range(self._store, self._path, self.manifest, FILE, start, n_bytes)
            connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True, check_same_thread=False)
            try:
                for limit, value in _LIMITS.items():
                    connection.setlimit(limit, value)
                for setting in ("trusted_schema = OFF", "query_only = ON", "cell_size_check = ON", "mmap_size = 0"):
                    connection.execute(f"PRAGMA {setting}")
                steps_left = iter(range((_STEPS + _STEPS_PER_BYTE * facts.st_size) // _STEPS_EACH))
                connection.set_progress_handler(lambda: next(steps_left, None) is None, _STEPS_EACH)
                if is_new:
                    self._check_schema(connection)
            except BaseException:
                connection.close()
                raise
            self._verified = stamp
            return connection

    def _check_schema(self, connection: sqlite3.Connection) -> None:
        """Raise `ArtifactCorruptError` for tables, views, triggers and virtual tables that no file of labels has."""
        found = {(kind, name): str(sql) for kind, name, sql in connection.execute("SELECT type, name, sql FROM sqlite_master LIMIT 100")}
        own = {key: sql for key, sql in found.items() if key in _SCHEMA}
        others = {key: sql for key, sql in found.items() if key not in _SCHEMA}
        parts = {("table", f"words_{part}") for part in ("data", "idx", "docsize", "config")}
        if own != _SCHEMA or set(others) != parts or not all(re.match(r"CREATE TABLE '?words_", sql) for sql in others.values()):
            raise self._refuse("its tables are not those of a file of labels")

    def _refuse(self, reason: str) -> ArtifactCorruptError:
        where = f"{self._store.url}/{self._path}/{FILE}"
        return ArtifactCorruptError(f"The labels {where} cannot be read ({reason}). Delete the folder and import the file again.")

    def _pieces(self) -> Iterator[tuple[int, int]]:
        size = self.manifest.file(FILE).n_bytes
        return ((start, min(_PIECE, size - start)) for start in range(0, size, _PIECE))

    def _local_file(self) -> Path:
        local = self._store.local_path(f"{self._path}/{FILE}")
        if local is not None:
            return local
        if self._copied is None:
            copied = Path(tempfile.mkdtemp(prefix="interp-labels-"))
            weakref.finalize(self, shutil.rmtree, copied, ignore_errors=True)
            with (copied / FILE).open("wb") as file:
                for start, n_bytes in self._pieces():
                    file.write(read_range(self._store, self._path, self.manifest, FILE, start, n_bytes))
            self._copied = copied
        return self._copied / FILE


def find_labels(bundle: Labelled) -> list[LabelSet]:
    """Find the label sets that were imported for a bundle, oldest first. Raises `ArtifactCorruptError` for a damaged one.

    Those of other bytes under the bundle's id (it was made again, of an SAE that was trained again) are left out, with a warning.
    """
    store, path = bundle.place
    folder = f"{path.rsplit('/', 1)[0]}/{FOLDER}" if "/" in path else FOLDER
    found = [item.path.removesuffix(f"/{MANIFEST}") for item in store.list(f"{folder}/{bundle.name}") if item.path.endswith(f"/{MANIFEST}")]
    sets = [LabelSet(store, path, read_manifest(store, path), bundle.description["d_sae"]) for path in found]
    ours = [item for item in sets if item.manifest.kind == KIND and item.manifest.inputs.get("bundle") == bundle.manifest.artifact_id]
    current = [item for item in ours if item.manifest.identity.get("bundle_digest", bundle.manifest.digest) == bundle.manifest.digest]
    for item in ours:
        if item not in current:
            _logger.warning("The labels %s were imported before %s was made again, and are left out. Import them again.", item.name, bundle.name)
    return sorted(current, key=lambda item: (item.manifest.created, item.name))
