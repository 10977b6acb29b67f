"""Exports have exactly the keys that the other tools read, and say nothing that the records do not."""

import gzip
import json
from pathlib import Path

import pytest
from synthetic_bundle import build_synthetic_bundle

from interp_assets.errors import ArtifactCorruptError, InputError
from interp_assets.storage.manifest import create_artifact, remove_artifact
from interp_assets.storage.store import Store, open_store
from interp_assets.visualize.packing import TokenOrder, pack_record
from interp_assets.web.columns import ROWS
from interp_assets.web.exports import FORMATS, export_bundle
from interp_assets.web.opened import OpenBundle, list_bundles

KEYS = json.loads((Path(__file__).parents[1] / "golden" / "export_keys.json").read_text())
"""Keys by format, from the other tools' own files."""


@pytest.fixture(scope="module")
def bundle() -> OpenBundle:
    """Return an invented bundle with one dead feature."""
    store = open_store("memory://exported")
    build_synthetic_bundle(store, n_features=14, n_documents=4)
    return OpenBundle(list_bundles(store)[0])


def _export(bundle: OpenBundle, name: str, store: Store) -> dict[str, bytes]:
    done = export_bundle(bundle, name, store)
    files = {item.path: store.get(item.path) for item in store.list()}
    assert (done.n_features, done.n_dead, done.n_files, done.n_bytes) == (13, 1, len(files), sum(map(len, files.values())))
    return files


def test_attribution_graph_features_have_the_keys_of_their_viewer(bundle: OpenBundle, memory_store: Store) -> None:
    """The front end of circuit-tracer reads one such JSON per feature."""
    files = _export(bundle, "attribution-graph", memory_store)
    feature = json.loads(files[f"features/{bundle.name}/3.json"])
    record = bundle.record(3)
    assert set(feature) == set(KEYS["attribution_graph"])
    assert feature["act_max"] == record["statistics"]["max"]
    assert feature["examples_quantiles"][0]["quantile_name"] == "Top activations"
    example = feature["examples_quantiles"][0]["examples"][0]
    assert set(example) == {"tokens_acts_list", "train_token_ind", "is_repeated_datapoint", "tokens"}
    assert len(example["tokens"]) == len(example["tokens_acts_list"])
    assert example["tokens_acts_list"][example["train_token_ind"]] == record["examples"]["top"][0]["activation"]


def test_neuronpedia_lines_have_the_keys_of_its_importer(bundle: OpenBundle, memory_store: Store) -> None:
    """Its importer reads JSONL, gzipped, a batch of 1,024 features per file."""
    files = _export(bundle, "neuronpedia", memory_store)
    folder = "exports/synthetic/2-synthetic"
    assert {f"{folder}/{name}.jsonl" for name in ("release", "model", "sourceset", "source")} <= set(files)
    features = [json.loads(line) for line in gzip.decompress(files[f"{folder}/features/batch-0.jsonl.gz"]).splitlines()]
    assert [feature["index"] for feature in features] == [str(latent) for latent in range(14) if latent != 12]
    assert set(features[0]) == set(KEYS["neuronpedia_feature"])
    activations = [json.loads(line) for line in gzip.decompress(files[f"{folder}/activations/batch-0.jsonl.gz"]).splitlines()]
    assert set(activations[0]) == set(KEYS["neuronpedia_activation"])
    assert len({activation["id"] for activation in activations}) == len(activations)
    for activation in activations:
        values = activation["values"]
        assert values[activation["maxValueTokenIndex"]] == activation["maxValue"] == max(values)
        assert values[activation["qualifyingTokenIndex"]] > 0
    assert any(activation["maxValueTokenIndex"] != activation["qualifyingTokenIndex"] for activation in activations)


def test_dashboard_batches_have_the_keys_of_their_reader(bundle: OpenBundle, memory_store: Store) -> None:
    """SAEDashboard marks the group of top examples with -1."""
    files = _export(bundle, "saedashboard", memory_store)
    batch = json.loads(files["batch-0.json"])
    assert set(batch) == {"model_id", "layer", "sae_set", "sae_id_suffix", "features"}
    assert batch["layer"] == 2
    feature = batch["features"][0]
    assert set(feature) == set(KEYS["saedashboard"])
    assert set(feature["activations"][0]) == {"bin_min", "bin_max", "bin_contains", "tokens", "values", "qualifying_token_index"}
    assert (feature["activations"][0]["bin_min"], feature["activations"][0]["bin_contains"]) == (-1, -1)
    assert json.loads(files["skipped_indexes.json"]) == {"skipped_indexes": [12]}
    assert "run_settings.json" in files


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_the_same_bundle_is_exported_to_the_same_bytes(bundle: OpenBundle, name: str) -> None:
    """An export can be compared with the last one."""
    assert _export(bundle, name, open_store("memory://a")) == _export(bundle, name, open_store("memory://b"))


def test_an_unknown_format_names_the_known_ones(bundle: OpenBundle, memory_store: Store) -> None:
    """Nothing is written then."""
    with pytest.raises(InputError, match="attribution-graph, neuronpedia, saedashboard"):
        export_bundle(bundle, "html", memory_store)
    assert list(memory_store.list()) == []


def test_records_are_read_one_by_one_and_checked(bundle: OpenBundle) -> None:
    """Python reads a feature as the page does: an index entry, one range."""
    assert bundle.record(13)["latent"] == 13
    with pytest.raises(InputError, match="There is no feature 14"):
        bundle.record(14)


def test_a_record_of_another_feature_is_refused(memory_store: Store) -> None:
    """Index and records that disagree would show evidence of the wrong feature."""
    made = build_synthetic_bundle(memory_store, n_features=3, n_documents=4)
    description = OpenBundle(list_bundles(memory_store)[0]).description
    bundle = OpenBundle(list_bundles(memory_store)[0])
    member = pack_record({**bundle.record(1), "latent": 7}, TokenOrder(bundle.vocabulary.order))
    vocabulary, rows = bundle.read("vocabulary.json"), bundle.read(ROWS)
    remove_artifact(memory_store, made.ref.path)
    with create_artifact(memory_store, made.ref) as art:
        art.put(ROWS, rows)
        art.put("bundle.json", json.dumps(description).encode())
        art.put("vocabulary.json", vocabulary)
        art.put("records/00000.bin", member * 3)
        art.put("records/00000.idx", b"".join((len(member) * i).to_bytes(8, "little") for i in range(4)))
    with pytest.raises(ArtifactCorruptError, match="feature 1 lies where feature 7 is"):
        OpenBundle(list_bundles(memory_store)[0]).record(1)
