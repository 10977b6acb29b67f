"""Sources: whole documents to shards, fingerprints that follow the text, and every bad file named at once."""

import gzip
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from planned import plan_sources

from interp_assets.corpus.sources import iter_documents, survey_sources
from interp_assets.errors import ConfigError, InputError
from interp_assets.planning.sections import CorpusConfig
from interp_assets.storage.seen import SeenFiles


def _config(path: Path, **fields: object) -> CorpusConfig:
    return CorpusConfig.model_validate({"source": "files", "path": str(path), "shard_bytes": 40, **fields})


def _read_all(config: CorpusConfig) -> list[tuple[str, str]]:
    return [document for shard in plan_sources(config, 0) for document in iter_documents(config, shard)]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Make a folder with one file of each kind."""
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / ".hidden").write_text("never read")
    (folder / "a.txt").write_text("alpha " * 5)
    (folder / "b.py").write_bytes("\ufeffβeta = 'ü'\r\n".encode())
    rows = [{"text": f"line {i} " * 3} for i in range(6)]
    (folder / "c.jsonl").write_text("\n".join(json.dumps(row) for row in rows[:3]) + "\n\n" + json.dumps({"text": None}) + "\n")
    with gzip.open(folder / "d.jsonl.gz", "wt") as file:
        file.write("\n".join(json.dumps(row) for row in rows[3:]))
    pq.write_table(pa.table({"text": [f"row {i} " * 4 for i in range(7)], "n": list(range(7))}), folder / "deep" / "e.parquet", row_group_size=3)
    return folder


def test_every_document_is_read_once_and_in_order(texts: Path) -> None:
    """Shards must hold the whole corpus, whatever the formats."""
    found = _read_all(_config(texts))
    assert [name for name, _ in found] == [
        "a.txt",
        "b.py",
        *(f"c.jsonl:{i}" for i in (1, 2, 3)),
        *(f"d.jsonl.gz:{i}" for i in (1, 2, 3)),
        *(f"deep/e.parquet:{i}" for i in range(7)),
    ]
    assert dict(found)["b.py"] == "βeta = 'ü'\r\n"
    assert dict(found)["d.jsonl.gz:2"] == "line 4 " * 3
    assert dict(found)["deep/e.parquet:5"] == "row 5 " * 4


def test_shards_are_filled_by_whole_documents(texts: Path) -> None:
    """A shard reaches `shard_bytes` and no more documents are added; the last may be smaller."""
    config = _config(texts)
    shards = plan_sources(config, 0)
    for shard in shards:
        sizes = [len(text.encode()) for _, text in iter_documents(config, shard)]
        assert (shard.n_documents, shard.n_bytes) == (len(sizes), sum(sizes))
        assert sum(sizes[:-1]) < 40
        assert sum(sizes) >= 40 or shard is shards[-1]
    assert len(plan_sources(_config(texts, max_shards=2), 0)) == 2


def test_a_single_file_is_a_corpus(texts: Path) -> None:
    """`path` may be a file."""
    assert len(_read_all(_config(texts / "c.jsonl"))) == 3


def test_a_changed_file_changes_one_shard(texts: Path) -> None:
    """All other shards, and all that was made of them, stay valid."""
    before = plan_sources(_config(texts), 0)
    (texts / "a.txt").write_text("omega " * 5)
    after = plan_sources(_config(texts), 0)
    assert [old.fingerprint == new.fingerprint for old, new in zip(before, after, strict=True)] == [False, *[True] * (len(before) - 1)]
    with pytest.raises(InputError, match="shard-000000 has changed since it was planned"):
        list(iter_documents(_config(texts), before[0]))


def test_a_later_file_leaves_earlier_shards_alone(texts: Path) -> None:
    """Files land later, under later names: the sensor must add shards, not remake them."""
    before = plan_sources(_config(texts), 0)
    (texts / "z.txt").write_text("new " * 30)
    after = plan_sources(_config(texts), 0)
    assert [shard.fingerprint for shard in after[: len(before) - 1]] == [shard.fingerprint for shard in before[:-1]]


def test_fingerprints_do_not_depend_on_the_folders_place(texts: Path, tmp_path: Path) -> None:
    """Two machines keep their data in different places."""
    moved = tmp_path / "elsewhere"
    before = plan_sources(_config(texts), 0)
    texts.rename(moved)
    assert plan_sources(_config(moved), 0) == before


def test_files_without_text_are_skipped_and_named(texts: Path) -> None:
    """An empty `__init__.py` is what every folder of sources holds: it must not refuse the corpus, nor move the shards of the others."""
    before = plan_sources(_config(texts), 0)
    (texts / "__init__.py").touch()
    (texts / "blank.txt").write_text(" \n")
    (texts / "null.jsonl").write_text('{"text": ""}\n{"text": null}\n\n')
    (texts / "zero.jsonl").touch()
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), texts / "rows.parquet")
    found = survey_sources(_config(texts), 0, (), SeenFiles(None))
    assert found.shards == before
    assert found.empty_files == ["__init__.py", "blank.txt", "null.jsonl", "rows.parquet", "zero.jsonl"]


@pytest.mark.parametrize("name", ["broken.parquet", "broken.jsonl.gz"])
def test_a_file_of_no_bytes_that_must_have_a_header_is_no_empty_file(texts: Path, name: str) -> None:
    """A download that broke off at once would lose its text with one line among many."""
    (texts / name).touch()
    with pytest.raises(InputError, match=rf"{name}: has 0 bytes, which no \.\w+ file has: a download that broke off\? Fetch it again"):
        plan_sources(_config(texts), 0)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="this system has no user ids")
def test_a_folder_that_cannot_be_listed_is_named_with_the_other_problems() -> None:
    """One subfolder of another user's is an everyday trouble of shared disks, and no bug of ours. Root may list all, and becomes somebody."""
    program = (
        "import os, sys\n"
        "from interp_assets.planning.config import CorpusConfig\n"
        "from interp_assets.corpus.sources import survey_sources\n"
        "from interp_assets.storage.seen import SeenFiles\n"
        "from interp_assets.errors import InputError\n"
        "b'x'.decode('utf-8-sig')  # whoever it becomes may not load our Python's modules\n"
        "if os.geteuid() == 0: os.setuid(54321)\n"
        "try: survey_sources(CorpusConfig(source='files', path=sys.argv[1], shard_bytes=40), 0, (), SeenFiles(None).__enter__())\n"
        "except InputError as error: print(error)\n"
    )
    with tempfile.TemporaryDirectory() as folder:  # pytest's own is closed to others
        texts = Path(folder)
        texts.chmod(0o755)
        (texts / "latin.txt").write_bytes(b"caf\xe9 au lait")
        (texts / "closed").mkdir(mode=0)
        output = subprocess.run([sys.executable, "-c", program, folder], capture_output=True, text=True, check=True).stdout
        (texts / "closed").chmod(0o755)
    assert "2 documents or folders under" in output
    assert "closed: cannot be listed: Permission denied" in output
    assert "latin.txt: is not UTF-8 text" in output


def test_nothing_but_empty_files_is_an_error(tmp_path: Path) -> None:
    """An empty corpus must not become an empty pipeline, and the message says why it is one."""
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.txt").touch()
    with pytest.raises(InputError, match=r"has no documents\. The 2 files there are without text"):
        plan_sources(_config(tmp_path), 0)


def test_all_bad_files_are_named_at_once(texts: Path) -> None:
    """One file per attempt would take the user all day."""
    (texts / "image.png").write_bytes(b"\x89PNG\0\0")
    (texts / "latin.txt").write_bytes(b"caf\xe9 au lait")
    (texts / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n[1]\n{"body": 1, "title": 2}\n{"text": 7}\n')
    pq.write_table(pa.table({"body": ["x"]}), texts / "columns.parquet")
    (texts / "false.parquet").write_text("not parquet")
    with pytest.raises(InputError) as caught:
        plan_sources(_config(texts), 0)
    message = str(caught.value)
    for part in (
        "8 documents or folders under",
        "image.png: is binary, not text (a NUL byte at offset 4)",
        "latin.txt: is not UTF-8 text (byte 0xe9 at offset 3)",
        "broken.jsonl, line 2: is not JSON",
        "broken.jsonl, line 3: has no 'text'; it has list",
        "broken.jsonl, line 4: has no 'text'; it has ['body', 'title']. Set `corpus.text_field`",
        "broken.jsonl, line 5: 'text' holds a int, not text",
        "columns.parquet: has no column 'text'; it has ['body']",
        "false.parquet: cannot be read",
    ):
        assert part in message


def test_nothing_to_read_is_an_error(tmp_path: Path) -> None:
    """An empty corpus must not become an empty pipeline."""
    with pytest.raises(InputError, match=r"There is nothing at corpus\.path = '/no/such/place'"):
        plan_sources(_config(Path("/no/such/place")), 0)
    with pytest.raises(InputError, match="holds no files"):
        plan_sources(_config(tmp_path), 0)


def test_held_out_shards_must_leave_some_to_train_on(texts: Path) -> None:
    """Else the shuffle would have no rows."""
    n_shards = len(plan_sources(_config(texts), 0))
    with pytest.raises(ConfigError, match=rf"held_out_shards is {n_shards}, but there are only {n_shards} shard"):
        plan_sources(_config(texts, held_out_shards=n_shards), 0)


def test_the_standard_library_is_shuffled_by_its_own_key() -> None:
    """Held-out shards must be a fair sample, and the order must depend on the seed alone."""
    config = CorpusConfig(shard_bytes=200_000, max_shards=3)
    first, again, other = plan_sources(config, 0), plan_sources(config, 0), plan_sources(config, 1)
    assert first == again
    assert first[0].fingerprint != other[0].fingerprint
    names = [name for name, _ in iter_documents(config, first[0])]
    assert names != sorted(names)
    assert all("/test/" not in name for name in names)


def test_a_local_dataset_streams_by_ranges(tmp_path: Path) -> None:
    """A Hugging Face dataset is addressed, not read, to plan; a shard reads its own rows only."""
    folder = tmp_path / "data"
    Dataset.from_dict({"text": [f"row {i}" if i != 4 else "" for i in range(10)]}).to_parquet(str(folder / "train.parquet"))
    config = CorpusConfig(source="huggingface", path=str(folder), documents_per_shard=4)
    shards = plan_sources(config, 0)
    assert [(shard.spec["first"], shard.spec["stop"]) for shard in shards] == [(0, 4), (4, 8), (8, 10)]
    assert [text for _, text in iter_documents(config, shards[1])] == ["row 5", "row 6", "row 7"]
    assert next(iter_documents(config, shards[2]))[0] == "train:8"
    with pytest.raises(InputError, match=r"has no column 'body'; it has \['text'\]"):
        plan_sources(config.model_copy(update={"text_field": "body"}), 0)
    with pytest.raises(InputError, match=r"Cannot open the dataset .*split 'test'"):
        plan_sources(config.model_copy(update={"split": "test"}), 0)
    Dataset.from_dict({"text": ["changed"]}).to_parquet(str(folder / "train.parquet"))
    with pytest.raises(InputError, match="has changed since it was planned"):
        list(iter_documents(config, shards[1]))


@pytest.mark.parametrize("name", ["train.parquet", "train.jsonl"])
def test_the_text_of_a_dataset_is_estimated_without_reading_it(tmp_path: Path, name: str) -> None:
    """A forecast of 0 rows helps nobody: a footer, or the first rows, tell how much text there is about."""
    dataset = Dataset.from_dict({"text": [f"{i}: " + "some words " * 100 for i in range(400)], "more": [1] * 400})
    dataset.to_parquet(str(tmp_path / name)) if name.endswith("parquet") else dataset.to_json(str(tmp_path / name))
    shards = plan_sources(CorpusConfig(source="huggingface", path=str(tmp_path), documents_per_shard=100), 0)
    assert len(shards) == 4
    for shard in shards:
        assert shard.n_bytes == pytest.approx(100 * 1105, rel=0.05)


def test_a_shard_of_a_parquet_dataset_reads_its_own_row_groups_only(tmp_path: Path) -> None:
    """Passing over the rows before a shard would make all shards together read the data set as often as it has shards."""
    folder = tmp_path / "data"
    folder.mkdir()
    for part in range(3):
        table = pa.table({"text": [f"part {part}, row {i}" for i in range(10)]})
        pq.write_table(table, folder / f"train-{part:05}.parquet", row_group_size=4, compression="none", use_dictionary=False)
    _spoil(folder / "train-00000.parquet", b"part 0, row 0")
    _spoil(folder / "train-00001.parquet", b"part 1, row 9")
    config = CorpusConfig(source="huggingface", path=str(folder), documents_per_shard=6)
    shards = plan_sources(config, 0)
    assert [(shard.spec["first"], shard.spec["stop"]) for shard in shards] == [(0, 6), (6, 12), (12, 18), (18, 24), (24, 30)]
    expected = [f"part {row // 10}, row {row % 10}" for row in range(30)]
    for index in (1, 2, 4):
        spec = shards[index].spec
        assert list(iter_documents(config, shards[index])) == [(f"train:{row}", expected[row]) for row in range(spec["first"], spec["stop"])]
    for index in (0, 3):
        with pytest.raises(InputError, match=r"Reading .* failed"):
            list(iter_documents(config, shards[index]))


def test_a_parquet_file_without_the_column_is_named_when_it_is_read(tmp_path: Path) -> None:
    """Only the first file is looked at to plan; a later one may differ."""
    pq.write_table(pa.table({"text": ["one"]}), tmp_path / "train-0.parquet")
    pq.write_table(pa.table({"body": ["two"]}), tmp_path / "train-1.parquet")
    config = CorpusConfig(source="huggingface", path=str(tmp_path), documents_per_shard=1)
    shards = plan_sources(config, 0)
    assert [text for _, text in iter_documents(config, shards[0])] == ["one"]
    with pytest.raises(InputError, match=r"has no column 'text'; it has \['body'\]"):
        list(iter_documents(config, shards[1]))


def _spoil(file: Path, text: bytes) -> None:
    """Make the page unreadable in which the text lies, by a length before it that reaches beyond the page."""
    data = file.read_bytes()
    place = data.index(text)
    file.write_bytes(data[: place - 4] + b"\xff\xff\xff\x7f" + data[place:])


@pytest.mark.parametrize(
    ("environment", "reason"), [({"HF_ENDPOINT": "http://127.0.0.1:9"}, "refused"), ({"HF_HUB_OFFLINE": "1"}, "offline mode is enabled")]
)
def test_a_dataset_out_of_reach_is_named_with_the_next_step(environment: dict[str, str], reason: str) -> None:
    """No network is the commonest trouble of all, and its own traceback is three screens long."""
    program = (
        "from interp_assets.planning.config import CorpusConfig\n"
        "from interp_assets.corpus.sources import survey_sources\n"
        "from interp_assets.storage.seen import SeenFiles\n"
        "from interp_assets.errors import InputError\n"
        "try:\n"
        "    survey_sources(CorpusConfig(source='huggingface', path='no/such'), 0, (), SeenFiles(None))\n"
        "except InputError as error:\n"
        "    print(error)\n"
    )
    output = subprocess.run([sys.executable, "-c", program], env={**os.environ, **environment}, capture_output=True, text=True, check=True).stdout
    assert "Cannot look up the dataset 'no/such' at revision 'main'" in output
    assert reason in output
    assert "give the folder of a downloaded copy" in output
