"""The format pages of this stage, executed: their tables are the files' columns, their examples what the passes write."""

import gzip
import io
import json
import re
from pathlib import Path

import jsonschema
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import interp_assets.visualize.records
from interp_assets.planning.config import make_config
from interp_assets.planning.pipeline import Pipeline
from interp_assets.storage.manifest import read_file
from interp_assets.storage.tensors import load_tensors
from interp_assets.train.sae import Sae
from interp_assets.visualize.assets import make_assets
from interp_assets.visualize.candidates import find_candidates
from interp_assets.visualize.examples import select_examples
from interp_assets.visualize.packing import TokenOrder, pack_record, unpack_record
from interp_assets.visualize.refs import records_ref, windows_ref
from interp_assets.visualize.windows import fire_windows

PAGES = Path(__file__).parents[2] / "docs" / "formats"
TYPES = {"float": "float32", "double": "float64", "bool": "bool", "string": "string"}


def read_page(name):
    """Return a format page, its tables of columns by file, and its JSON examples."""
    text = (PAGES / name).read_text(encoding="utf-8")
    tables = {}
    for section in text.split("\n## ")[1:]:
        file = re.match(r"`([\w.]+\.parquet)`", section)
        if file:
            tables[file[1]] = re.findall(r"^\| `(\w+)` \| ([^|]+?) \|", section, re.MULTILINE)
    return text, tables, [json.loads(block) for block in re.findall(r"```json\n(.*?)```", text, re.DOTALL)]


def columns_of(table):
    """Return names and types of a table as pages write them."""

    def name(kind):
        if pa.types.is_list(kind):
            return f"list<{name(kind.value_type)}>"
        return {"float": "float", "double": "double"}.get(str(kind), str(kind))

    return [(field.name, name(field.type)) for field in table.schema]


def test_records_of_messages_alone_have_another_id(make_world):
    """They say who speaks; the bytes of all others, and of the passes before, are what they were."""
    world = make_world()
    content = world.pipeline.config.model_dump()
    content["corpus"] |= {"text_kind": "messages", "contexts": "per_document"}
    chat = Pipeline(make_config(content), world.pipeline.plan)
    content["corpus"] |= {"text_kind": "plain"}
    plain = Pipeline(make_config(content), world.pipeline.plan)
    refs = [[records_ref(pipeline, "demo", 0), windows_ref(pipeline, "demo", 0)] for pipeline in (plain, chat)]
    assert ["roles" in ref.identity for ref in (*refs[0], *refs[1])] == [False, False, True, False]
    versions = [{asset.key: asset.code_version for asset in make_assets(pipeline.config)} for pipeline in (plain, chat)]
    assert {key[-1] for key in versions[0] if versions[0][key] != versions[1][key]} == {"feature_records"}


@pytest.fixture
def page_world(make_world):
    """Publish the small world that the pages describe: eight rows of two dimensions, an encoder that copies them."""
    world = make_world("relu", sizes=(8,), d_in=2, d_sae=2, latent_slices=1, top_k=2, n_random=10, window=1, n_intervals=2, examples_per_interval=1)
    world.sae = Sae(kind="relu", W_enc=torch.eye(2), b_enc=torch.zeros(2), W_dec=torch.eye(2), b_dec=torch.zeros(2), threshold=torch.zeros(2), k=0)
    shard = world.shards[0]
    shard.contexts, shard.documents = np.repeat([0, 1], 4).astype(np.uint32), np.array([0] * 6 + [1] * 2, np.uint32)
    shard.valid = np.array([False, True, True, True, False, True, True, True])
    shard.rows = torch.tensor([[9, 9], [2, 0], [0, 1], [3, 0], [9, 9], [1, 0], [0, 0], [2, 4]]).bfloat16()
    return world.variant()


def read_rows(world, produced, name):
    """Return a Parquet file of an artifact, and its rows as a page lists them."""
    table = pq.read_table(io.BytesIO(read_file(world.store, produced.ref.path, produced.manifest, name)))
    return table, [list(row.values()) for row in table.to_pylist()]


def test_the_pages_of_the_passes_tell_what_the_files_hold(page_world):
    """A format page lives only if a test executes it."""
    world = page_world
    candidates = find_candidates(world.pipeline, world.store, world.sae, "demo", 0, 0)
    examples = select_examples(world.pipeline, world.store, "demo", 0)
    windows = fire_windows(world.pipeline, world.store, world.sae, "demo", 0)
    for page, produced in (("feature_candidates.md", candidates), ("feature_examples.md", examples), ("example_activations.md", windows)):
        text, tables, blocks = read_page(page)
        assert set(tables) == {entry.name for entry in produced.manifest.files if entry.name.endswith(".parquet")}
        expected = {}
        for name, described in tables.items():
            table, expected[name] = read_rows(world, produced, name)
            assert columns_of(table) == described, name
        if page != "example_activations.md":
            tensors = load_tensors(world.store, produced.ref.path, produced.manifest, "statistics.safetensors")
            expected["statistics.safetensors"] = {key: value.tolist() for key, value in tensors.items() if key != "histogram"}
        assert blocks[-1] == expected, json.dumps(expected)
        assert all(f"`{fact}`" in text for fact in produced.manifest.facts), produced.manifest.facts


def test_the_record_page_shows_a_valid_record_and_the_columns_of_the_table(make_world, run_passes, read_records):
    """The browser is written from this page."""
    text, tables, blocks = read_page("feature_record.md")
    schema = json.loads(Path(interp_assets.visualize.records.__file__).with_name("feature_record.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(blocks[0], schema)
    order = json.loads(re.search(r"tokens by frequency (\[.*?\])", text)[1])
    member = pack_record(blocks[0], TokenOrder(order))
    assert json.loads(gzip.decompress(member)) == blocks[1]
    assert unpack_record(member, order, "the page") == blocks[0]
    world = make_world()
    produced = run_passes(world)[0]
    table, _ = read_rows(world, produced, "features.parquet")
    assert columns_of(table) == tables["features.parquet"]
    record = read_records(world, produced)[0]
    assert list(record) == list(blocks[0])
    assert list(record["examples"]["top"][0]) == list(blocks[0]["examples"]["top"][0])
    assert [entry.name for entry in produced.manifest.files] == ["features.parquet", "records.bin", "records.idx", "tokens.order"]


def test_the_feature_table_agrees_with_the_records(make_world, run_passes, read_records):
    """A table that sorts by what the records do not say would mislead."""
    world = make_world("topk")
    for produced in run_passes(world):
        table, _ = read_rows(world, produced, "features.parquet")
        for row, record in zip(table.to_pylist(), read_records(world, produced), strict=True):
            assert (row["latent"], row["is_dead"], row["count"]) == (record["latent"], record["is_dead"], record["statistics"]["count"])
            assert (row["max"], float(f"{row['frequency']:.4g}")) == (record["statistics"]["max"], record["statistics"]["frequency"])
            peaks = [f"w{window['tokens'][window['peak']]}" for window in record["examples"]["top"]]
            assert row["top_tokens"] == list(dict.fromkeys(peaks))
            assert row["top_token"] == (peaks[0] if peaks else "")
            assert row["top_logits"] == [f"w{token_id}" for token_id, _ in record["logits"]["top"]]
            assert row["bottom_logits"] == [f"w{token_id}" for token_id, _ in record["logits"]["bottom"]]
            shown = [*record["examples"]["top"], *record["examples"]["random"], *(w for i in record["examples"]["intervals"] for w in i["examples"])]
            assert row["n_examples"] == len(shown)
