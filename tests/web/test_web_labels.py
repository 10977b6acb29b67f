"""Labels reach a bundle with their provenance, are found by their words, and never come alone."""

import csv
import gzip
import io
import json
import sqlite3
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from synthetic_bundle import build_synthetic_bundle

from interp_assets.errors import InputError
from interp_assets.storage.store import Store
from interp_assets.web.labels import LabelSet, find_labels, import_labels
from interp_assets.web.notes import Notebook
from interp_assets.web.opened import OpenBundle, list_bundles
from interp_assets.web.table import Query

ROWS = [
    {"latent": 3, "label": "Opening of a function", "source": "gpt", "score": 0.41, "score_kind": "detection", "author": "model-a"},
    {"latent": 3, "label": "def at line start", "source": "gpt", "score": 0.83, "score_kind": "detection", "author": "model-a"},
    {"latent": 7, "label": "closing brackets", "source": "gpt", "score": None, "score_kind": None, "author": None},
    {"latent": 12, "label": "a dead one", "source": "hand", "score": None, "score_kind": None, "author": "M"},
]


@pytest.fixture
def bundle(memory_store: Store) -> OpenBundle:
    """Return an invented bundle of 20 features; 12 is dead."""
    build_synthetic_bundle(memory_store, n_features=20, n_documents=8)
    return OpenBundle(list_bundles(memory_store)[0])


def _write(folder: Path, kind: str, rows: list[dict]) -> Path:
    path = folder / f"labels.{kind}"
    if kind == "csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        path.write_text(text.getvalue(), encoding="utf-8")
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        data = "\n".join(json.dumps(row) for row in rows).encode()
        path.write_bytes(gzip.compress(data) if kind.endswith("gz") else data)
    return path


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl", "jsonl.gz"])
def test_every_format_gives_the_same_labels(bundle: OpenBundle, tmp_path: Path, kind: str) -> None:
    """The best scored label of a latent comes first; what was not scored has no score."""
    made = import_labels(bundle, _write(tmp_path, kind, ROWS))
    assert made.manifest.facts == {"n_labels": 4, "n_latents": 3, "file": f"labels.{kind}"}
    found = find_labels(bundle)[0].of([7, 3])
    assert [(label["latent"], label["text"], label["score"]) for label in found] == [
        (3, "def at line start", 0.83),
        (3, "Opening of a function", 0.41),
        (7, "closing brackets", None),
    ]
    assert {label["file"] for label in found} == {f"labels.{kind}"}
    assert found[0]["author"] == "model-a"
    assert found[0]["imported"] == made.manifest.created


def test_neuronpedia_explanations_are_read_under_their_own_names(bundle: OpenBundle, tmp_path: Path) -> None:
    """People have these files already."""
    row = {"modelId": "m", "layer": "2-s", "index": "5", "description": "loops", "typeName": "oai_token-act-pair", "explanationModelName": "gpt-4o"}
    import_labels(bundle, _write(tmp_path, "jsonl.gz", [row]))
    label = bundle.table().labels([5])[5][0]
    assert (label["text"], label["source"], label["author"], label["score"]) == ("loops", "oai_token-act-pair", "gpt-4o", None)


def test_importing_a_file_twice_changes_nothing(bundle: OpenBundle, tmp_path: Path) -> None:
    """The id follows from the file."""
    path = _write(tmp_path, "csv", ROWS)
    assert not import_labels(bundle, path).is_cached
    assert import_labels(bundle, path).is_cached
    assert len(find_labels(bundle)) == 1
    assert [place.name for place in list_bundles(bundle.place.store)] == [bundle.name]


def test_labels_are_listed_searched_and_sorted(bundle: OpenBundle, tmp_path: Path) -> None:
    """A word of a label finds its feature, alone and beside tokens; the list can stand in order of labels."""
    before = bundle.table()
    import_labels(bundle, _write(tmp_path, "csv", ROWS))
    table = OpenBundle(bundle.place).table()
    assert table.order(Query(text="label:brack")).tolist() == [7]
    assert table.order(Query(text='label:"line start"')).tolist() == [3]
    assert 3 in table.order(Query(text="line")).tolist()
    assert table.order(Query(text="label:ine")).tolist() == []  # words are found from their beginning
    assert table.order(Query("label")).tolist() == [12, 7, 3]
    assert table.order(Query("label", is_descending=True, life="live")).tolist() == [3, 7]
    row = table.page(Query("label"), 2, 1).rows[0]
    assert (row["latent"], row["label"]["text"], row["label"]["source"], row["label"]["score"]) == (3, "def at line start", "gpt", 0.83)
    assert table.rows([4])[0]["label"] is None
    with pytest.raises(InputError, match="Cannot sort by 'label'"):
        before.order(Query("label"))


def _one(labels: LabelSet, text: str) -> list[int]:
    return labels.search(text).tolist()


@pytest.mark.parametrize("text", ['"', "'; DROP TABLE labels; --", "a AND", "NEAR(", "*", "text:x", "\x00", "-", "(("])
def test_hostile_searches_of_labels_never_break(bundle: OpenBundle, tmp_path: Path, text: str) -> None:
    """Search text is a phrase, never an expression."""
    import_labels(bundle, _write(tmp_path, "csv", ROWS))
    assert set(_one(find_labels(bundle)[0], text)) <= {3, 7, 12}


def test_bad_rows_are_named_together_and_nothing_is_imported(bundle: OpenBundle, tmp_path: Path) -> None:
    """Half an import would look like a whole one."""
    good = {"latent": 1, "label": "fine", "source": "s", "score": 0.5}
    bad = [
        {**good, "latent": 20},
        {**good, "latent": "x"},
        {**good, "label": " "},
        {**good, "score": "high"},
        {**good, "source": ""},
        {**good, "score": "nan"},
    ]
    with pytest.raises(InputError, match="has 6 bad rows") as caught:
        import_labels(bundle, _write(tmp_path, "csv", [good, *bad]))
    for text in (
        "row 2: there is no latent 20, the SAE has 20",
        "row 3: 'x' is no latent",
        "row 4: a label has 1 to",
        "row 5: 'high' is no score",
        "give --source",
    ):
        assert text in str(caught.value)
    assert "give --source, and 1 more" in str(caught.value)
    assert find_labels(bundle) == []


def test_a_file_that_is_none_is_refused(bundle: OpenBundle, tmp_path: Path) -> None:
    """The message says what is read."""
    path = tmp_path / "labels.txt"
    path.write_text("x")
    with pytest.raises(InputError, match=r"\.parquet, \.csv, \.jsonl"):
        import_labels(bundle, path)
    empty = tmp_path / "labels.jsonl"
    empty.write_text("")
    with pytest.raises(InputError, match="holds no labels"):
        import_labels(bundle, empty)
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR")
    with pytest.raises(InputError, match=r"cannot be read as \.parquet"):
        import_labels(bundle, broken)


PAGE = (Path(__file__).parents[2] / "docs" / "formats" / "feature_labels.md").read_text(encoding="utf-8")


def test_the_page_of_the_format_is_true(bundle: OpenBundle, tmp_path: Path) -> None:
    """Other programs may read labels and notes."""
    made = import_labels(bundle, _write(tmp_path, "csv", ROWS))
    (tmp_path / "copy.sqlite").write_bytes(bundle.place.store.get(f"{made.ref.path}/labels.sqlite"))
    connection = sqlite3.connect(tmp_path / "copy.sqlite")
    columns = [row[1] for row in connection.execute("PRAGMA table_info(labels)")]
    connection.close()
    assert ", ".join(f"`{name}`" for name in columns) in PAGE
    assert all(f"`{key}`" in PAGE for key in made.manifest.facts)
    example = json.loads(PAGE.split("```json")[1].split("```")[0])
    (tmp_path / "demo.json").write_text(json.dumps(example))
    assert Notebook(tmp_path, "demo").read()["lists"] == {"to check": [40, 7]}


def test_labels_that_somebody_cut_off_are_read_and_odd_rows_named(bundle: OpenBundle, tmp_path: Path) -> None:
    """Half a surrogate pair is valid JSON and no text; a row that is a list, or a score beyond any number, is a bad row and no bug of ours."""
    path = tmp_path / "labels.jsonl"
    path.write_bytes(b'{"latent": 3, "label": "cut \\ud83d off", "source": "\\udc00"}\n')
    import_labels(bundle, path)
    assert (find_labels(bundle)[0].of([3])[0]["text"], find_labels(bundle)[0].of([3])[0]["source"]) == ("cut \ufffd off", "\ufffd")
    path.write_bytes(b'[1]\n7\n{"latent": 3, "label": "x", "source": "s", "score": 1' + b"0" * 400 + b"}\n")
    with pytest.raises(InputError, match=r"3 bad rows: row 1: it is a list, not names and values; row 2: it is a int.*; row 3: 1000.* is no score"):
        import_labels(bundle, path)


@pytest.mark.parametrize("data", [gzip.compress(b"{}" * 999)[:20], gzip.compress(b"x")[:10] + b"\xff" * 20, b"no gzip", b""])
def test_a_damaged_file_of_labels_is_named(bundle: OpenBundle, tmp_path: Path, data: bytes) -> None:
    """Whatever its format's library raises."""
    for name in ("labels.jsonl.gz", "labels.jsonl.zst", "labels.parquet", "labels.csv", "labels.jsonl"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=name):
            import_labels(bundle, tmp_path / name)
