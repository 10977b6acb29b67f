"""Feature records become a bundle: nothing is lost, nothing depends on how the work was cut, and damage is named."""

import io
import json
from dataclasses import replace
from importlib.resources import files

import jsonschema
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from synthetic_bundle import build_synthetic_bundle, make_synthetic_records, make_synthetic_table, make_text
from transformers import PreTrainedTokenizerFast

from interp_assets.errors import ArtifactCorruptError, ArtifactMissingError
from interp_assets.planning.pipeline import Pipeline
from interp_assets.storage.manifest import create_artifact, read_file
from interp_assets.storage.store import Store, open_store
from interp_assets.train.refs import evaluation_ref
from interp_assets.visualize.packing import TokenOrder, pack_record
from interp_assets.visualize.refs import records_ref, slice_bounds
from interp_assets.web import bundle as bundle_module
from interp_assets.web.bundle import build_bundle, decode_offsets
from interp_assets.web.opened import OpenBundle, find_bundles, list_bundles

EVALUATION = {
    "n_rows": 500,
    "l0": 4.0,
    "fvu": 0.25,
    "ce_recovered": 0.9,
    "kl": 0.1,
    "dead_share": 0.06,
    "outlier_share": 0.01,
    "fvu_ordinary": 0.4,
    "l0_ordinary": 4.1,
    "ce_recovered_ordinary": 0.91,
    "fvu_outliers": 0.02,
    "l0_outliers": 2.0,
    "ce_recovered_outliers": None,
}
"""What an evaluation says of its SAE."""


def _write_upstream(pipeline: Pipeline, store: Store, *, drop_row: bool = False, other_order: int = -1) -> list[bytes]:
    """Write evaluation and record slices as the stages before would; return the gzip members of all latents."""
    d_sae = pipeline.config.sae("demo").d_sae
    with create_artifact(store, evaluation_ref(pipeline, "demo")) as art:
        art.put("metrics.json", b"{}")
        art.facts |= EVALUATION
    records = list(make_synthetic_records(n_features=d_sae, n_documents=8))
    vocabulary = make_text(0, 8).vocabulary
    members = [pack_record(record, TokenOrder(vocabulary.order)) for record in records]
    table = make_synthetic_table(vocabulary, records)
    for latent_slice in range(pipeline.config.features.latent_slices):
        first, last = slice_bounds(pipeline, "demo", latent_slice)
        part = table.slice(first, last - first - (1 if drop_row else 0))
        sink = io.BytesIO()
        pq.write_table(part, sink)
        with create_artifact(store, records_ref(pipeline, "demo", latent_slice)) as art:
            art.put("records.bin", b"".join(members[first:last]))
            art.put("records.idx", np.cumsum([0, *map(len, members[first:last])]).astype("<u8").tobytes())
            art.put("features.parquet", sink.getvalue())
            art.put("tokens.order", np.array(vocabulary.order, "<u4")[:: -1 if latent_slice == other_order else 1].tobytes())
            art.facts |= {"start": first, "stop": last, "n_live": 1, "n_rows": 2040, "logits_reason": None, "coactivation_rows": 100}
    return members


def _read_member(store: Store, bundle: OpenBundle, latent: int) -> bytes:
    per_file = bundle.description["records"]["per_file"]
    file = f"records/{latent // per_file:05d}"
    offsets = np.frombuffer(bundle.read(f"{file}.idx"), "<u8").astype(int)
    place = latent % per_file
    return b"".join(bundle.stream(f"{file}.bin", int(offsets[place]), int(offsets[place + 1] - offsets[place])))


def _with_slices(pipeline: Pipeline, n_slices: int) -> Pipeline:
    features = pipeline.config.features.model_copy(update={"latent_slices": n_slices})
    return replace(pipeline, config=pipeline.config.model_copy(update={"features": features}))


def test_every_record_reaches_the_bundle_byte_for_byte(small_pipeline: Pipeline, memory_store: Store, tiny_tokenizer) -> None:
    """The browser opens what the feature pass wrote, found by division alone."""
    members = _write_upstream(small_pipeline, memory_store)
    made = build_bundle(small_pipeline, memory_store, "demo", tiny_tokenizer)
    bundle = OpenBundle(list_bundles(memory_store)[0])
    assert [_read_member(memory_store, bundle, latent) for latent in range(32)] == members
    table = pl.read_parquet(bundle.read("features.parquet"))
    assert table["latent"].to_list() == list(range(32))
    assert bundle.vocabulary.order == make_text(0, 8).vocabulary.order
    assert [bundle.record(latent) for latent in (0, 31)] == [record for i, record in enumerate(bundle.records()) if i in (0, 31)]
    assert made.manifest.facts["n_live"] == int((~table["is_dead"]).sum()) == bundle.description["n_live"]


def test_a_record_file_holds_a_fixed_number_of_latents(small_pipeline: Pipeline, memory_store: Store, tiny_tokenizer) -> None:
    """However the slices were cut, file and place of a latent follow by division."""
    members = iter([b"a", b"bb", b"", b"dddd", b"e"])
    with create_artifact(memory_store, evaluation_ref(small_pipeline, "demo")) as art:
        assert bundle_module._write_records(art, members, None, per_file=2) == (5, 8)
    stored = {item.path.rsplit("/", 1)[-1]: memory_store.get(item.path) for item in memory_store.list() if "records" in item.path}
    assert stored["00000.bin"] == b"abb"
    assert stored["00001.bin"] == b"dddd"
    assert stored["00002.idx"] == np.array([0, 1], "<u8").tobytes()


def test_same_records_give_the_same_bytes_however_they_were_sliced(small_pipeline: Pipeline, tiny_tokenizer) -> None:
    """A rebuilt bundle must leave everything downstream fresh, and slices are a matter of execution for its content."""
    digests = []
    for run, n_slices in enumerate((2, 2, 5)):
        store, pipeline = open_store(f"memory://{run}"), _with_slices(small_pipeline, n_slices)
        _write_upstream(pipeline, store)
        manifest = build_bundle(pipeline, store, "demo", tiny_tokenizer).manifest
        digests.append({entry.name: entry.checksums for entry in manifest.files if entry.name != "features.parquet"})
    assert digests[0] == digests[1] == digests[2]


def test_a_second_build_skips_the_work(small_pipeline: Pipeline, memory_store: Store, tiny_tokenizer) -> None:
    """Finished work is recognised by its manifest."""
    _write_upstream(small_pipeline, memory_store)
    assert not build_bundle(small_pipeline, memory_store, "demo", tiny_tokenizer).is_cached
    assert build_bundle(small_pipeline, memory_store, "demo", tiny_tokenizer).is_cached


def test_the_description_says_where_everything_comes_from(small_pipeline: Pipeline, memory_store: Store, tiny_tokenizer) -> None:
    """A feature without its model, hook point and quality of the SAE is worth little."""
    _write_upstream(small_pipeline, memory_store)
    build_bundle(small_pipeline, memory_store, "demo", tiny_tokenizer)
    description = OpenBundle(list_bundles(memory_store)[0]).description
    assert description["model"] == {"name": small_pipeline.config.model.name, "revision": "main", "fingerprint": "model"}
    assert description["hook_point"] == "resid_post.0"
    assert description["evaluation"] == {**EVALUATION, "norm_multiple": 10.0}
    assert description["tokens_scanned"] == 2040
    assert not description["is_synthetic"]


def test_missing_slices_are_an_error_that_says_what_to_do(small_pipeline: Pipeline, memory_store: Store, tiny_tokenizer) -> None:
    """A bundle of half the features would look like a whole one."""
    with pytest.raises(ArtifactMissingError, match=r"slice-000.*Materialize it first"):
        build_bundle(small_pipeline, memory_store, "demo", tiny_tokenizer)


def test_a_table_that_lacks_a_latent_is_refused(small_pipeline: Pipeline, memory_store: Store, tiny_tokenizer) -> None:
    """Row i of the table is latent i; a gap would show every later feature under a wrong number."""
    _write_upstream(small_pipeline, memory_store, drop_row=True)
    with pytest.raises(ArtifactCorruptError, match=r"features\.parquet should hold latents 0 to 16"):
        build_bundle(small_pipeline, memory_store, "demo", tiny_tokenizer)
    assert list_bundles(memory_store) == []


def test_slices_that_name_tokens_differently_are_refused(small_pipeline: Pipeline, memory_store: Store, tiny_tokenizer) -> None:
    """Records hold ranks of tokens: another order would show other words, and nobody would notice."""
    _write_upstream(small_pipeline, memory_store, other_order=1)
    with pytest.raises(ArtifactCorruptError, match="name tokens by different orders"):
        build_bundle(small_pipeline, memory_store, "demo", tiny_tokenizer)


def test_an_index_that_is_cut_or_falls_is_refused() -> None:
    """Offsets decide which bytes are shown as which feature."""
    good = np.array([0, 3, 9], "<u8")
    assert decode_offsets(good.tobytes(), 2, "here").tolist() == [0, 3, 9]
    for bad in (good[:2].tobytes(), good.tobytes()[:-1], np.array([0, 9, 3], "<u8").tobytes(), np.array([1, 3, 9], "<u8").tobytes()):
        with pytest.raises(ArtifactCorruptError, match="here should hold 3 rising offsets"):
            decode_offsets(bad, 2, "here")


def test_bundles_are_found_from_any_folder_above(tmp_path) -> None:
    """`interp serve` takes the bundle, its folder, the pipeline or the root."""
    made = build_synthetic_bundle(open_store(str(tmp_path / "root" / "demo")), n_features=3, n_documents=4)
    for folder in ("root", "root/demo", "root/demo/6-web", f"root/demo/{made.ref.path}"):
        places = find_bundles(str(tmp_path / folder))
        assert [place.name for place in places] == [made.ref.path.split("/")[-1]]
        assert OpenBundle(places[0]).manifest.digest == made.manifest.digest
    with pytest.raises(ArtifactMissingError, match="neither a bundle of features nor one of attention heads"):
        find_bundles(str(tmp_path / "empty"))


def test_a_synthetic_bundle_is_marked_and_repeatable() -> None:
    """Invented features must never be taken for real ones."""
    made = [build_synthetic_bundle(open_store(f"memory://{run}"), n_features=14, n_documents=4) for run in range(2)]
    assert made[0].manifest.digest == made[1].manifest.digest
    assert made[0].manifest.facts["is_synthetic"]


def test_synthetic_records_keep_the_schema_and_agree_with_themselves() -> None:
    """Tests of pages are worth something only if the records could be real ones."""
    schema = json.loads(files("interp_assets.visualize").joinpath("feature_record.schema.json").read_text(encoding="utf-8"))
    for record in make_synthetic_records(n_features=14, n_documents=4):
        jsonschema.validate(record, schema)
        statistics, examples = record["statistics"], record["examples"]
        assert record["is_dead"] == (statistics["count"] == 0) == (not examples["top"])
        assert sum(statistics["histogram"]["counts"]) == statistics["count"]
        windows = [*examples["top"], *examples["random"], *(window for part in examples["intervals"] for window in part["examples"])]
        for window in windows:
            assert dict(map(tuple, window["activations"]))[window["peak"]] == window["activation"] <= statistics["max"]


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer of a few pieces."""
    from tokenizers import Tokenizer, decoders, models

    backend = Tokenizer(models.BPE({"a": 0, "\u0120def": 1, "\u010a": 2, "\u00e2": 3}, []))
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|bos|>")


def test_tables_of_all_slices_keep_their_columns(small_pipeline: Pipeline, memory_store: Store, tiny_tokenizer) -> None:
    """The page and the exports read the columns that docs/formats/feature_record.md names."""
    _write_upstream(small_pipeline, memory_store)
    made = build_bundle(small_pipeline, memory_store, "demo", tiny_tokenizer)
    data = read_file(memory_store, made.ref.path, made.manifest, "features.parquet")
    schema = pq.read_schema(pa.BufferReader(data))
    assert {"latent", "is_dead", "frequency", "max", "top_tokens", "top_logits"} <= set(schema.names)
