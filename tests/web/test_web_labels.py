"""Labels reach a bundle with their provenance, are found by their words, and never come alone."""

import csv
import gzip
import io
import json
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from synthetic_bundle import build_synthetic_bundle

from interp_assets.errors import ArtifactCorruptError, InputError
from interp_assets.storage.manifest import ArtifactRef, create_artifact
from interp_assets.storage.store import Store, open_store
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


@pytest.mark.parametrize("data", [gzip.compress(b"{}" * 999, mtime=0)[:20], gzip.compress(b"x", mtime=0)[:10] + b"\xff" * 20, b"no gzip", b""])
def test_a_damaged_file_of_labels_is_named(bundle: OpenBundle, tmp_path: Path, data: bytes) -> None:
    """Whatever its format's library raises."""
    for name in ("labels.jsonl.gz", "labels.jsonl.zst", "labels.parquet", "labels.csv", "labels.jsonl"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=name):
            import_labels(bundle, tmp_path / name)


@pytest.fixture
def on_disk(tmp_path: Path) -> OpenBundle:
    """Return an invented bundle with labels, in a folder whose name a URI would misread."""
    store = open_store(str(tmp_path / "a#b?c%20d"))
    build_synthetic_bundle(store, n_features=20, n_documents=8)
    bundle = OpenBundle(list_bundles(store)[0])
    import_labels(bundle, _write(tmp_path, "csv", ROWS))
    return bundle


def _database(bundle: OpenBundle) -> Path:
    root = bundle.place.store.local_path()
    assert root is not None
    (path,) = root.rglob("labels.sqlite")
    return path


def _reseal(bundle: OpenBundle, data: bytes) -> LabelSet:
    """Publish other bytes as the bundle's labels, as a stranger could, and open them."""
    (old,) = find_labels(bundle)
    root = bundle.place.store.local_path()
    assert root is not None
    path, manifest = _database(bundle).parent.relative_to(root).as_posix(), old.manifest
    ref = ArtifactRef(manifest.kind, path, manifest.artifact_id, manifest.identity, manifest.inputs)
    with create_artifact(bundle.place.store, ref, replace=True) as art:
        art.put("labels.sqlite", data)
        art.facts |= manifest.facts
    return find_labels(bundle)[0]


def test_every_flipped_byte_of_labels_is_noticed(on_disk: OpenBundle) -> None:
    """SQLite has no checksums: 14 of 300 flips gave other labels without a word."""
    path, answers = _database(on_disk), find_labels(on_disk)[0].of(range(20))
    good = path.read_bytes()
    places = np.random.default_rng(0).integers(0, len(good), 60)
    for place in places.tolist():
        path.write_bytes(good[:place] + bytes([good[place] ^ 8]) + good[place + 1 :])
        with pytest.raises(ArtifactCorruptError, match="damaged in block"):
            find_labels(on_disk)[0].of(range(20))
    path.write_bytes(good)
    assert find_labels(on_disk)[0].of(range(20)) == answers


def test_labels_that_change_after_they_were_opened_are_verified_again(on_disk: OpenBundle) -> None:
    """A server runs for weeks."""
    opened, path = find_labels(on_disk)[0], _database(on_disk)
    assert opened.search("closing").tolist() == [7]
    good = path.read_bytes()
    path.write_bytes(good.replace(b"closing brackets", b"opening brackets"))
    with pytest.raises(ArtifactCorruptError, match="damaged in block"):
        opened.of([7])


@pytest.mark.parametrize(
    "statements",
    [
        [
            "DROP INDEX by_latent",
            "DROP TABLE labels",
            "CREATE VIEW labels AS WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x FROM c) SELECT x id FROM c",
        ],
        ["CREATE VIEW more AS SELECT 1"],
        ["CREATE TRIGGER more AFTER INSERT ON labels BEGIN SELECT 1; END"],
        ["DROP TABLE words", "CREATE VIRTUAL TABLE words USING fts4(text)"],
        ["CREATE VIRTUAL TABLE words_more USING rtree(id, a, b)"],
        ["DROP INDEX by_latent", "CREATE INDEX by_latent ON labels (abs(latent))"],
    ],
)
def test_tables_that_are_not_ours_are_not_asked(on_disk: OpenBundle, tmp_path: Path, statements: list[str]) -> None:
    """A view may never end, and a virtual table is code: a manifest only says that the bytes are those that somebody wrote."""
    (tmp_path / "crafted").write_bytes(_database(on_disk).read_bytes())
    with closing(sqlite3.connect(tmp_path / "crafted", isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(statement)
    with pytest.raises(ArtifactCorruptError, match="its tables are not those of a file of labels"):
        _reseal(on_disk, (tmp_path / "crafted").read_bytes()).order()


@pytest.mark.parametrize("value", ["20", "-1", "'x'", "1e300", "x'00'"])
def test_values_that_are_no_labels_are_refused(on_disk: OpenBundle, tmp_path: Path, value: str) -> None:
    """SQLite keeps any type in any column; a page must get a sentence, not an answer 500."""
    (tmp_path / "crafted").write_bytes(_database(on_disk).read_bytes())
    with closing(sqlite3.connect(tmp_path / "crafted", isolation_level=None)) as connection:
        connection.execute(f"UPDATE labels SET latent = {value}, text = x'ff' WHERE latent = 7")
        connection.execute("UPDATE labels SET text = x'ff' WHERE latent = 3")
    crafted = _reseal(on_disk, (tmp_path / "crafted").read_bytes())
    with pytest.raises(ArtifactCorruptError, match="latents that the SAE does not have"):
        crafted.order()
    with pytest.raises(ArtifactCorruptError, match="what it says of latent 3 is no label"):
        crafted.of([3])


def test_an_index_that_never_ends_is_left(on_disk: OpenBundle) -> None:
    """Seven levels of pages that all point to the next one hold 10^15 entries in 40 kB: the steps are counted, and the query ends."""
    data = bytearray(_database(on_disk).read_bytes())
    with closing(sqlite3.connect(_database(on_disk))) as connection:
        (root,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'by_latent'").fetchone()
    size, n_pages, n_cells, depth = int.from_bytes(data[16:18], "big"), len(data) // 4096, 150, 7
    assert size == 4096
    leaf = bytes(data[(root - 1) * size : root * size])

    def interior(child: int) -> bytes:
        cell = child.to_bytes(4, "big") + bytes([5, 3, 1, 1, 5, 1])
        start = size - n_cells * len(cell)
        header = bytes([2, 0, 0]) + n_cells.to_bytes(2, "big") + start.to_bytes(2, "big") + b"\0" + child.to_bytes(4, "big")
        places = b"".join((start + i * len(cell)).to_bytes(2, "big") for i in range(n_cells))
        return (header + places).ljust(start, b"\0") + cell * n_cells

    data[(root - 1) * size : root * size] = interior(n_pages + 1)
    for level in range(1, depth):
        data += interior(n_pages + level + 1)
    data += leaf
    data[28:32] = (len(data) // size).to_bytes(4, "big")
    with pytest.raises(ArtifactCorruptError, match=r"cannot be read \(interrupted\)"):
        _reseal(on_disk, bytes(data)).order()


def test_labels_of_a_bundle_that_was_made_again_with_other_bytes_are_left_out(on_disk: OpenBundle, caplog: pytest.LogCaptureFixture) -> None:
    """An SAE that is trained again elsewhere keeps its id, and latent 7 means something else."""
    store, path = on_disk.place
    old = on_disk.manifest
    ref = ArtifactRef(old.kind, path, old.artifact_id, old.identity, old.inputs)
    files = {entry.name: on_disk.read(entry.name) for entry in old.files}
    with create_artifact(store, ref, replace=True) as art:
        for name, data in files.items():
            art.put(name, data, block_bytes=1 << 16)
        art.facts |= old.facts
    again = OpenBundle(on_disk.place)
    assert find_labels(again) == []
    assert "Import them again" in caplog.text
