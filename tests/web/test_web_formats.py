"""The page of the bundle format is true: its tables and examples are compared with a bundle that was just written."""

import json
import re
import struct
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from synthetic_bundle import build_synthetic_bundle

from interp_assets.planning.config import FeaturesConfig
from interp_assets.storage.store import open_store
from interp_assets.web.bundle import FORMAT, RECORDS_PER_FILE, VERSION
from interp_assets.web.columns import NO_WORD, ROW, VALUES
from interp_assets.web.opened import OpenBundle, list_bundles
from interp_assets.web.search import COLUMNS
from interp_assets.web.vocabulary import decode_vocabulary

PAGE = (Path(__file__).parents[2] / "docs" / "formats" / "feature_bundle.md").read_text(encoding="utf-8")
EXAMPLES = [json.loads(text) for text in re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> OpenBundle:
    """Return a small bundle in a folder."""
    store = open_store(str(tmp_path_factory.mktemp("page")))
    build_synthetic_bundle(store, n_features=3, n_documents=4, has_sinks=True)
    return OpenBundle(list_bundles(store)[0])


def _keys(section: str) -> set[str]:
    """Return the names in the first column of the table below a heading."""
    rows = re.findall(r"^\| (`[^|]+) \|", PAGE.split(f"## `{section}`")[1].split("\n## ")[0], re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def test_the_page_lists_the_files_of_a_bundle(bundle: OpenBundle) -> None:
    """A file that no page explains is a file that nobody can read in five years."""
    for entry in bundle.manifest.files:
        name = re.sub(r"^doses/[0-9]+", "doses/<latent>", re.sub(r"[0-9]{5}", "NNNNN", entry.name))
        assert f"`{re.sub(r'^list/(?!rows)[a-z_]+[.]', 'list/<column>.', name)}`" in PAGE


def test_the_page_explains_every_key_of_the_description(bundle: OpenBundle) -> None:
    """The example, the table and the file have the same keys."""
    example = EXAMPLES[0]
    assert set(example) == set(bundle.description) == _keys("bundle.json")
    assert (example["format"], example["version"]) == (FORMAT, VERSION)
    for key in ("model", "evaluation", "corpus", "records"):
        assert set(example[key]) == set(bundle.description[key])
    assert example["records"]["per_file"] == RECORDS_PER_FILE
    assert set(example["features"]) <= set(FeaturesConfig().model_dump(exclude={"saes", "latent_slices"}))


def test_the_vocabulary_of_the_page_can_be_read(bundle: OpenBundle) -> None:
    """Two tokens of the example make one character."""
    vocabulary = decode_vocabulary(json.dumps(EXAMPLES[1]).encode(), "the page")
    assert (vocabulary.raw[2] + vocabulary.raw[3]).decode() == "\u2192"
    assert set(EXAMPLES[1]) == set(json.loads(bundle.read("vocabulary.json")))


def test_the_page_gives_the_layout_of_a_row(bundle: OpenBundle) -> None:
    """Other programs may read the list's files, too."""
    fields = re.findall(r"^\| (\d+) \| `(\w+)` \| `([^`]+)` \|", PAGE, re.MULTILINE)
    assert ROW.fields
    layout = [(str(ROW.fields[name][1]), name, _type(ROW.fields[name][0])) for name in ROW.names or ()]
    assert fields == layout
    assert f"{ROW.itemsize} bytes" in PAGE
    assert f"{NO_WORD:#X}".replace("0X", "0x") in PAGE
    row = np.frombuffer(bundle.read("list/rows.bin"), ROW)[1]
    words = json.loads(bundle.read("words.json"))["words"]
    table = pl.read_parquet(bundle.read("features.parquet")).row(1, named=True)
    assert [words[number] for number in row["top_logits"]] == table["top_logits"][:4]
    assert np.frombuffer(bundle.read("list/max.bin"), VALUES["max"])[1] == table["max"]


def _type(dtype: np.dtype) -> str:
    return f"{dtype.base.kind}{dtype.base.itemsize}" + (f" x {dtype.shape[0]}" if dtype.shape else "")


def test_the_lists_of_the_index_lie_where_the_page_says(bundle: OpenBundle) -> None:
    """List 3 w + c holds the latents that have word w in column c."""
    entries = np.frombuffer(bundle.read("search/postings.idx"), "<u8").tolist()
    postings = bundle.read("search/postings.bin")
    words = json.loads(bundle.read("words.json"))["words"]
    table = pl.read_parquet(bundle.read("features.parquet")).to_dicts()
    assert len(entries) == 3 * len(words) + 1
    for column, name in enumerate(("top_tokens", "top_logits", "bottom_logits")):
        assert f"`{COLUMNS[column]}`" in PAGE
        for number, word in enumerate(words):
            entry, stop = entries[3 * number + column], entries[3 * number + column + 1] >> 2
            latent, latents = 0, []
            for step, *_ in struct.iter_unpack("<" + "BHI"[entry & 3], postings[entry >> 2 : stop]):
                latent += step
                latents += [latent] if step != (255, 65535, None)[entry & 3] else []
            assert latents == [row["latent"] for row in table if word in row[name]]
