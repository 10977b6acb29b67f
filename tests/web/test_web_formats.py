"""The page of the bundle format is true: its tables and examples are compared with a bundle that was just written."""

import json
import re
import sqlite3
from pathlib import Path

import pytest

from interp_assets.config import FeaturesConfig
from interp_assets.store import open_store
from interp_assets.web.bundle import FORMAT, RECORDS_PER_FILE, VERSION
from interp_assets.web.opened import OpenBundle, list_bundles
from interp_assets.web.search import COLUMNS
from interp_assets.web.synthetic import build_synthetic_bundle
from interp_assets.web.vocabulary import decode_vocabulary

PAGE = (Path(__file__).parents[2] / "docs" / "formats" / "feature_bundle.md").read_text(encoding="utf-8")
EXAMPLES = [json.loads(text) for text in re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> OpenBundle:
    """Return a small bundle in a folder."""
    store = open_store(str(tmp_path_factory.mktemp("page")))
    build_synthetic_bundle(store, n_features=3, n_documents=4)
    return OpenBundle(list_bundles(store)[0])


def _keys(section: str) -> set[str]:
    """Return the names in the first column of the table below a heading."""
    rows = re.findall(r"^\| (`[^|]+) \|", PAGE.split(f"## `{section}`")[1].split("\n## ")[0], re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def test_the_page_lists_the_files_of_a_bundle(bundle: OpenBundle) -> None:
    """A file that no page explains is a file that nobody can read in five years."""
    for entry in bundle.manifest.files:
        assert f"`{re.sub(r'[0-9]{5}', 'NNNNN', entry.name)}`" in PAGE


def test_the_page_explains_every_key_of_the_description(bundle: OpenBundle) -> None:
    """The example, the table and the file have the same keys."""
    example = EXAMPLES[0]
    assert set(example) == set(bundle.description) == _keys("bundle.json")
    assert (example["format"], example["version"]) == (FORMAT, VERSION)
    for key in ("model", "evaluation", "corpus", "records"):
        assert set(example[key]) == set(bundle.description[key])
    assert example["records"]["per_file"] == RECORDS_PER_FILE
    assert set(example["features"]) == set(FeaturesConfig().model_dump(exclude={"saes", "latent_slices"}))


def test_the_vocabulary_of_the_page_can_be_read(bundle: OpenBundle) -> None:
    """Two tokens of the example make one character."""
    vocabulary = decode_vocabulary(json.dumps(EXAMPLES[1]).encode(), "the page")
    assert (vocabulary.raw[2] + vocabulary.raw[3]).decode() == "\u2192"
    assert set(EXAMPLES[1]) == set(json.loads(bundle.read("vocabulary.json")))


def test_the_index_has_the_tables_of_the_page(bundle: OpenBundle, tmp_path: Path) -> None:
    """Other programs may open the index, too."""
    path = tmp_path / "search.sqlite"
    path.write_bytes(bundle.read("search.sqlite"))
    connection = sqlite3.connect(path)
    columns = {table: {row[1] for row in connection.execute(f"PRAGMA table_info({table})")} for table in ("words", "features")}
    connection.close()
    assert _keys("search.sqlite") == set(columns)
    assert columns == {"words": {"id", "text", "folded"}, "features": set(COLUMNS)}
    assert all(f"`{name}`" in PAGE for names in columns.values() for name in names)
