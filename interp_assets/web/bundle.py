"""Feature records of all latent slices become one bundle: the folder that a browser opens by range requests.

    bundle.json        what the bundle is about: model, hook point, SAE, its quality, sizes, where the records lie
    features.parquet   one row of statistics per latent, in order of latent (the slices' tables, one after the other)
    list/, words.json  the same statistics as a list reads them: values, orders, rows (`columns.py`)
    search/            inverted index of tokens and logits (`search.py`)
    map/               decoder directions in two dimensions, in tiles, and as they are (`map.py`)
    records/NNNNN.bin  the records of 4,096 latents: independent gzip members of JSON
    records/NNNNN.idx  u64 offsets into it, one more than there are records
    vocabulary.json    the text of every token id, and the ids by frequency
    doses/N.json       what steering by latent N did, where that was swept (`doses.py`)

Steps: copy the slices' gzip members, byte for byte, into files of a fixed number of latents, so that a page finds a record by division
and not by a table; collect the tables' tokens; join the tables, sort every column, index the tokens. The work is one read and one write of the
records, at bounded memory. Nothing in the bundle tells when it was made: same records, same bytes. The format is
`docs/formats/feature_bundle.md`.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from interp_assets.corpus.refs import token_shard_ref
from interp_assets.errors import ArtifactCorruptError
from interp_assets.harvest.refs import OUTLIER_MULTIPLE
from interp_assets.planning.pipeline import Pipeline
from interp_assets.storage.manifest import (
    ArtifactWriter,
    Manifest,
    Produced,
    create_artifact,
    find_made_from,
    find_manifest,
    load_manifest,
    read_file,
    read_ranges,
    timed,
)
from interp_assets.storage.store import ByteSink, Store
from interp_assets.train.refs import evaluation_ref, sae_ref
from interp_assets.visualize.packing import ORDER, RECORD_VERSION
from interp_assets.visualize.refs import records_ref, slice_bounds
from interp_assets.visualize.steering.refs import edits_of, recipes_of, search_edits, swept_refs
from interp_assets.visualize.tables import SinkFile
from interp_assets.web.clusters import write_clusters
from interp_assets.web.columns import WORDS, ListFacts, ListWriter, collect_words, encode_words
from interp_assets.web.doses import DoseCurve, describe_dose, write_doses
from interp_assets.web.map import Layout, embed_directions, measure_kept, place_points, write_directions, write_map
from interp_assets.web.refs import bundle_ref
from interp_assets.web.search import write_index
from interp_assets.web.vocabulary import Vocabulary, encode_vocabulary, make_vocabulary

FORMAT: Final = "interp-assets/feature-bundle"
VERSION: Final = 3
RECORDS_PER_FILE: Final = 4096
"""Latents per record file; the browser keeps the 32 KiB index of each file it has touched."""
RECORD_BLOCK_BYTES: Final = 256 << 10
"""Bytes per checksum of a record file: what opening one feature reads from the store at most, for blocks it does not straddle."""
_COPY_BYTES: Final = 8 << 20
_EVALUATED: Final = (
    *("n_rows", "l0", "fvu", "ce_recovered", "kl", "dead_share", "outlier_share"),
    *("fvu_ordinary", "l0_ordinary", "ce_recovered_ordinary", "fvu_outliers", "l0_outliers", "ce_recovered_outliers"),
)


class BundleContent(NamedTuple):
    """Everything that goes into a bundle, as streams."""

    description: dict[str, Any]
    tables: Callable[[], Iterable[pa.Table]]
    """Called twice: for the words, then for the rows."""
    records: Iterable[bytes]
    vocabulary: Vocabulary
    layout: Layout | None = None
    """Where the latents stand on the map; without one there is none."""
    directions: NDArray[np.float32] | None = None
    """Decoder rows `[d_sae, d_in]`, by which any two features are compared."""
    doses: Mapping[int, Sequence[DoseCurve]] = {}
    """Dose curves of some latents."""


@timed
def build_bundle(pipeline: Pipeline, store: Store, sae_name: str, tokenizer: Any, *, progress: Callable[[int], None] | None = None) -> Produced:
    """Build the bundle of one SAE from its records; `progress` is advanced by latents.

    `tokenizer` is the Hugging Face tokenizer of the corpus. Raises `ArtifactMissingError` when a slice has no records yet, and
    `ArtifactCorruptError` when table, index and records disagree.
    """
    ref = bundle_ref(pipeline, sae_name)
    refs = [records_ref(pipeline, sae_name, latent_slice) for latent_slice in range(pipeline.config.features.latent_slices)]
    inputs = [load_manifest(store, source) for source in [*refs, evaluation_ref(pipeline, sae_name), *swept_refs(pipeline, sae_name)]]
    existing = find_made_from(store, ref, inputs)
    if existing:
        return Produced(ref, existing, is_cached=True)
    sources = [_Source(store, ref.path, inputs[i], *slice_bounds(pipeline, sae_name, i)) for i, ref in enumerate(refs)]
    W_dec = _read_directions(pipeline, store, sae_name)
    content = BundleContent(
        _describe(pipeline, store, sae_name, [source.manifest for source in sources]),
        lambda: (_read_table(source) for source in sources),
        (member for source in sources for member in _read_records(source)),
        make_vocabulary(tokenizer, _read_order(sources)),
        embed_directions(W_dec) if W_dec is not None else None,
        W_dec,
        _read_curves(pipeline, store, sae_name),
    )
    with create_artifact(store, ref, made_from=inputs) as art:
        write_bundle(art, content, progress=progress)
    return art.produced


def write_bundle(art: ArtifactWriter, content: BundleContent, *, progress: Callable[[int], None] | None = None) -> None:
    """Write the files of a bundle. Tables and records must come in order of latent and count `description["d_sae"]` each."""
    description, d_sae = content.description, int(content.description["d_sae"])
    n_records, record_bytes = _write_records(art, content.records, progress)
    words = collect_words(content.tables())
    listed = ListWriter(art, words)
    with art.open("features.parquet", n_rows=d_sae) as sink:
        table = _TableWriter(sink)
        write_index(art, listed.write(table.write(content.tables())), len(words))
    if (n_records, table.n_rows) != (int(description["records"].get("repeat") or d_sae), d_sae):
        raise ArtifactCorruptError(
            f"The SAE has {d_sae:,} latents, its slices {n_records:,} records and {table.n_rows:,} table rows. Re-materialize feature_records."
        )
    art.put(WORDS, encode_words(words))
    facts = listed.finish()
    description = {"format": FORMAT, "version": VERSION, **description, **facts.described()}
    description["map"] = _write_map(art, content, facts, words.to_pylist()) if content.layout else None
    description["directions"] = write_directions(art, content.directions) if content.directions is not None else None
    if content.doses:
        description["doses"] = write_doses(art, content.doses)
    art.put("vocabulary.json", encode_vocabulary(content.vocabulary))
    art.put("bundle.json", (json.dumps(description, indent=1) + "\n").encode())
    art.facts |= {
        "d_sae": d_sae,
        "n_live": facts.n_live,
        "record_bytes": record_bytes,
        "is_synthetic": bool(description["is_synthetic"]),
        "sae": description["sae"]["name"],
        "model": description["model"]["name"],
        "hook_point": description["hook_point"],
    }


def _write_map(art: ArtifactWriter, content: BundleContent, facts: ListFacts, texts: list[str]) -> dict[str, Any]:
    """Write points and clusters of the map; return what `bundle.json` says of it."""
    assert content.layout
    points = place_points(content.layout, facts.frequency)
    kept = measure_kept(content.layout, content.directions, points["latent"]) if content.directions is not None else None
    clusters = write_clusters(art, points["x"], points["y"], facts.words[points["latent"]], texts)
    return {**write_map(art, content.layout, points), **clusters, "neighbours": kept}


def _read_directions(pipeline: Pipeline, store: Store, sae_name: str) -> NDArray[np.float32] | None:
    """Read the decoder rows, where the SAE is still there: a bundle can be made from records alone."""
    from interp_assets.train.checkpoint import read_sae  # noqa: PLC0415 - torch; the server imports this module for its formats

    ref = sae_ref(pipeline, sae_name)
    manifest = find_manifest(store, ref)
    return read_sae(store, ref.path, manifest).W_dec.numpy() if manifest else None


def _read_curves(pipeline: Pipeline, store: Store, sae_name: str) -> dict[int, list[DoseCurve]]:
    """Read the dose curves of an SAE's latents: of recipes in their order, then those that a search found."""
    from interp_assets.visualize.steering.curves import clamped_latent, read_curve  # noqa: PLC0415 - torch, as above
    from interp_assets.visualize.steering.search import fresh_prompts, read_search  # noqa: PLC0415 - torch, as above

    steering = pipeline.config.steering
    if steering is None:
        return {}
    found: dict[int, list[DoseCurve]] = {}
    drawn: dict[str, Any] = steering.model_dump(include={"new_tokens", "temperature"})
    for recipe in recipes_of(steering, sae_name):
        edits = edits_of(pipeline, recipe)
        curve = describe_dose(read_curve(pipeline, store, recipe), recipe, edits, prompts=steering.prompts, **drawn)
        found.setdefault(clamped_latent(edits), []).append(curve)
    if steering.search:
        search = read_search(pipeline, store, sae_name)
        roles = dict(search.candidates.select("latent", "role").iter_rows())
        for latent, dose in search.doses.items():
            edits = search_edits(pipeline, sae_name, latent)
            curve = describe_dose(dose, f"found: {roles[latent]}", edits, prompts=fresh_prompts(steering.prompts), **drawn)
            found.setdefault(latent, []).append(curve)
    return found


class _Source(NamedTuple):
    """The records of one latent slice: where they are, and their latents [first, last)."""

    store: Store
    path: str
    manifest: Manifest
    first: int
    last: int


def _describe(pipeline: Pipeline, store: Store, sae_name: str, slices: list[Manifest]) -> dict[str, Any]:
    config, sae = pipeline.config, pipeline.config.sae(sae_name)
    quality = load_manifest(store, evaluation_ref(pipeline, sae_name)).facts
    return {
        "is_synthetic": False,
        "pipeline": config.name,
        "model": {"name": config.model.shown_name, "revision": config.model.revision, "fingerprint": pipeline.plan.model_fingerprint},
        "hook_point": sae.hook_point,
        "d_in": pipeline.d_in(sae.hook_point),
        "d_sae": sae.d_sae,
        "sae": {"name": sae_name, "artifact_id": sae_ref(pipeline, sae_name).artifact_id, "config": sae.described()},
        "evaluation": {**{key: quality.get(key) for key in _EVALUATED}, "norm_multiple": OUTLIER_MULTIPLE},
        "corpus": {"source": config.corpus.source, "n_shards": len(pipeline.plan.shards), **_describe_excluded(pipeline, store)},
        "tokens_scanned": slices[0].facts["n_rows"],
        "coactivation_rows": slices[0].facts.get("coactivation_rows"),
        "logits_reason": slices[0].facts.get("logits_reason"),
        "features": config.features.model_dump(exclude={"saes", "latent_slices", "gather"}),
        "records": {"version": RECORD_VERSION, "per_file": RECORDS_PER_FILE, "n_files": -(-sae.d_sae // RECORDS_PER_FILE), "repeat": None},
    }


def _describe_excluded(pipeline: Pipeline, store: Store) -> dict[str, Any]:
    """Return which rows the configuration leaves out, and how many these are; nothing where it leaves out none."""
    excluded = pipeline.config.harvest.model_dump(include={"excluded_positions", "excluded_token_ids"}, exclude_defaults=True)
    if not excluded:
        return {}
    counts = [load_manifest(store, token_shard_ref(pipeline, index)).facts.get("n_excluded", 0) for index in pipeline.shard_indices]
    return {**excluded, "n_excluded": sum(counts)}


def _read_table(source: _Source) -> pa.Table:
    table = pq.read_table(pa.BufferReader(read_file(source.store, source.path, source.manifest, "features.parquet")))
    wanted = np.arange(source.first, source.last)
    if not np.array_equal(table["latent"].to_numpy(), wanted):
        raise ArtifactCorruptError(
            f"{source.store.url}/{source.path}/features.parquet should hold latents {source.first:,} to {source.last:,}, one row each and in "
            f"order; it has {table.num_rows:,} rows. Re-materialize this slice of feature_records."
        )
    return table


def _read_order(sources: list[_Source]) -> list[int]:
    """Read the tokens by frequency, which are the same for all slices. Raises `ArtifactCorruptError` when they are not."""
    if len({tuple(source.manifest.file(ORDER).checksums) for source in sources}) > 1:
        raise ArtifactCorruptError("The slices of feature_records name tokens by different orders. Materialize all slices of feature_records again.")
    return np.frombuffer(read_file(sources[0].store, sources[0].path, sources[0].manifest, ORDER), "<u4").tolist()


def _read_records(source: _Source) -> Iterator[bytes]:
    """Yield the gzip members of a slice in order, reading some megabytes at a time."""
    where = f"{source.store.url}/{source.path}/records.idx"
    offsets = decode_offsets(read_file(source.store, source.path, source.manifest, "records.idx"), source.last - source.first, where)
    first = 0
    while first < len(offsets) - 1:
        last = max(first + 1, int(np.searchsorted(offsets, offsets[first] + _COPY_BYTES, side="right")) - 1)
        start, stop = int(offsets[first]), int(offsets[last])
        data = read_ranges(source.store, source.path, source.manifest, "records.bin", [start], [stop - start])[0]
        for i in range(first, last):
            yield data[int(offsets[i]) - start : int(offsets[i + 1]) - start]
        first = last


def decode_offsets(data: bytes, n_records: int, where: str) -> NDArray[np.int64]:
    """Parse an index of record offsets. Raises `ArtifactCorruptError` when it is not `n_records` + 1 rising numbers from 0."""
    offsets = np.frombuffer(data, "<u8").astype(np.int64) if len(data) % 8 == 0 else np.empty(0, np.int64)
    if len(offsets) != n_records + 1 or offsets[0] != 0 or (np.diff(offsets) < 0).any():
        raise ArtifactCorruptError(f"{where} should hold {n_records + 1:,} rising offsets from 0; it has {len(data):,} bytes. Re-materialize it.")
    return offsets


def _write_records(
    art: ArtifactWriter, records: Iterable[bytes], progress: Callable[[int], None] | None, per_file: int = RECORDS_PER_FILE
) -> tuple[int, int]:
    """Write record files of `per_file` records; return the number of records and their bytes."""
    members = iter(records)
    n_records, n_bytes, file_index = 0, 0, 0
    pending = next(members, None)
    while pending is not None:
        offsets = [0]
        with art.open(f"records/{file_index:05d}.bin", block_bytes=RECORD_BLOCK_BYTES) as sink:
            while pending is not None and len(offsets) <= per_file:
                sink.write(pending)
                offsets.append(offsets[-1] + len(pending))
                pending = next(members, None)
        art.put(f"records/{file_index:05d}.idx", np.asarray(offsets, "<u8").tobytes(), n_rows=len(offsets) - 1)
        n_records, n_bytes, file_index = n_records + len(offsets) - 1, n_bytes + offsets[-1], file_index + 1
        if progress:
            progress(len(offsets) - 1)
    return n_records, n_bytes


class _TableWriter:
    """Appends the slices' tables to one Parquet file and hands them on."""

    def __init__(self, sink: ByteSink) -> None:
        self._sink = sink
        self.n_rows = 0

    def write(self, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """Write every table when it is asked for."""
        writer = None
        for table in tables:
            if writer is None:
                writer = pq.ParquetWriter(SinkFile(self._sink), table.schema, compression="zstd")
            writer.write_table(table, row_group_size=1 << 16)
            self.n_rows += table.num_rows
            yield table
        if writer:
            writer.close()
