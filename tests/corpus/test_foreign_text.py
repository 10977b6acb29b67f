"""Text that others wrote: what is valid is read, what is damaged is named, and no format is swallowed as one document."""

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from planned import plan_sources

from interp_assets.corpus.sources import iter_documents
from interp_assets.corpus.unpacked import OPEN_FILES
from interp_assets.errors import InputError
from interp_assets.planning.sections import CorpusConfig

TEXTS = [f"document {i}: " + "words " * (i % 7 + 3) for i in range(40)]


def _config(path: Path, **fields: object) -> CorpusConfig:
    return CorpusConfig.model_validate({"source": "files", "path": str(path), "shard_bytes": 100, **fields})


def _read_all(config: CorpusConfig) -> list[tuple[str, str]]:
    return [document for shard in plan_sources(config, 0) for document in iter_documents(config, shard)]


def _lines(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


def _zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, codec="zstd", asbytes=True))


def test_half_a_surrogate_pair_is_read_as_the_replacement_character(tmp_path: Path) -> None:
    """It is valid JSON and no text: tweets that were cut off hold it, and UTF-8 cannot."""
    (tmp_path / "a.jsonl").write_bytes(
        b'{"text": "cut \\ud83d off", "\\udc00": 1}\n{"text": "whole \\ud83d\\ude00"}\n' + b'{"text": "raw \xed\xa0\x80"}\n{"text": "\\\\ud800"}\n'
    )
    assert [text for _, text in _read_all(_config(tmp_path, shard_bytes=10))] == ["cut \ufffd off", "whole \U0001f600", "raw \ufffd", "\\ud800"]


def test_packed_files_hold_what_they_hold_unpacked(tmp_path: Path) -> None:
    """`.zst` is what large corpora come in; names in capital letters are the same formats."""
    for folder, files in {
        "plain": {"a.jsonl": _lines(TEXTS), "b.txt": b"one text"},
        "gz": {"a.jsonl.gz": gzip.compress(_lines(TEXTS)), "b.txt.gz": gzip.compress(b"one text")},
        "zst": {"A.JSONL.ZST": _zstd(_lines(TEXTS[:9])) + _zstd(_lines(TEXTS[9:])), "b.txt.zst": _zstd(b"one text")},
        "ndjson": {"a.ndjson.zst": _zstd(_lines(TEXTS)), "b.md": b"one text"},
    }.items():
        (tmp_path / folder).mkdir()
        for name, data in files.items():
            (tmp_path / folder / name).write_bytes(data)
        assert [text for _, text in _read_all(_config(tmp_path / folder))] == [*TEXTS, "one text"], folder
    assert _read_all(_config(tmp_path / "zst"))[3][0] == "A.JSONL.ZST:4"


def test_every_damaged_file_is_named_with_the_others(tmp_path: Path) -> None:
    """A stream that breaks in the middle ended in "A bug in interp-assets": each library has exceptions of its own."""
    packed, zstd = gzip.compress(_lines(TEXTS)), _zstd(_lines(TEXTS))
    flipped = bytearray(packed)
    flipped[len(packed) // 2] ^= 0xFF
    table = pa.table({"text": pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xed\xa0"))})
    damaged = {
        "cut.jsonl.gz": packed[: len(packed) // 2],
        "flipped.jsonl.gz": bytes(flipped),
        "deflate.jsonl.gz": packed[:10] + b"\xff" * 30,
        "no.jsonl.gz": b"no gzip at all",
        "cut.jsonl.zst": zstd[: len(zstd) // 2],
        "tail.jsonl.zst": zstd + b"tail",
        "no.txt.zst": b"no zstd at all",
        "cut.parquet": b"PAR1",
        "binary.txt.gz": gzip.compress(b"a\0b"),
    }
    for name, data in damaged.items():
        (tmp_path / name).write_bytes(data)
    pq.write_table(table, tmp_path / "bytes.parquet")
    (tmp_path / "lost.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("a name of another time")
    with pytest.raises(InputError) as caught:
        plan_sources(_config(tmp_path), 0)
    message = str(caught.value)
    assert f"{len(damaged) + 3} documents or folders under" in message
    for name in (*damaged, "bytes.parquet", "lost.txt", "caf\\xe9.txt"):
        assert f"{name}: " in message.replace("the name b'caf\\xe9.txt'", "caf\\xe9.txt: ")
    message.encode()


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_damage_after_planning_is_named_by_the_shard_that_reads_it(tmp_path: Path, name: str) -> None:
    """Not a bug of ours, and the next step is to plan again."""
    pack = gzip.compress if name.endswith("gz") else _zstd
    (tmp_path / name).write_bytes(pack(_lines(TEXTS)))
    shards = plan_sources(_config(tmp_path), 0)
    (tmp_path / name).write_bytes(pack(_lines(TEXTS))[:-30])
    with pytest.raises(InputError, match=rf"{name}: cannot be read: .*It has changed since it was planned: run `interp run` again"):
        list(iter_documents(_config(tmp_path), shards[-1]))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("t.csv", "a table"),
        ("T.TSV", "a table"),
        ("t.csv.gz", "a table"),
        ("t.arrow", "a table"),
        ("t.json", "JSON, not text: if every line is an object, name it .jsonl"),
        ("c4.json.gz", "JSON, not text: if every line is an object, name it .jsonl"),
        ("wiki.xml", "XML"),
        ("t.sqlite", "a database"),
        ("mail.mbox", "a file of many records"),
        ("t.tar.gz", "an archive, not text: unpack it"),
        ("t.zip", "an archive, not text: unpack it"),
        ("t.jsonl.bz2", "compressed, not text: unpack it, or pack it as .gz or .zst"),
        ("t.txt.xz", "compressed"),
        ("t.parquet.zst", "Parquet in a wrapping"),
        ("t.rtf", "an office file"),
    ],
)
def test_a_format_that_is_not_read_is_refused_by_its_name(tmp_path: Path, name: str, reason: str) -> None:
    """A table that is swallowed as one document looks like text, and nothing later would tell."""
    (tmp_path / "good.txt").write_text("text " * 50)
    (tmp_path / name).write_bytes(b"text\nrow 1\nrow 2\n")
    with pytest.raises(InputError, match=rf"1 document or folder .*\n.*{name}: is {reason}"):
        plan_sources(_config(tmp_path), 0)
    (tmp_path / name).rename(tmp_path / f"{name}.txt")
    assert "text\nrow 1\nrow 2\n" in [text for _, text in _read_all(_config(tmp_path, shard_bytes=10))]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_a_packed_file_is_unpacked_once_for_all_of_its_shards(tmp_path: Path, name: str) -> None:
    """Unpacking all that lies before a shard, for each shard anew, takes hours for 1 GB: here 20 times the file."""
    data = _lines(TEXTS)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else _zstd(data))
    config = _config(tmp_path)
    before = OPEN_FILES.n_unpacked
    shards = plan_sources(config, 0)
    assert OPEN_FILES.n_unpacked - before == len(data)
    assert len(shards) > 15
    before = OPEN_FILES.n_unpacked
    texts = [text for shard in shards for _, text in iter_documents(config, shard)]
    assert texts == TEXTS
    assert OPEN_FILES.n_unpacked - before <= len(data)
    before = OPEN_FILES.n_unpacked
    every_third = [[text for _, text in iter_documents(config, shard)] for shard in shards[::3]]
    assert every_third == [[text for _, text in iter_documents(config, shard)] for shard in shards[::3]]
    assert OPEN_FILES.n_unpacked - before <= 2 * len(data)
    last, first = ([text for _, text in iter_documents(config, shard)] for shard in (shards[-1], shards[0]))
    assert first + last == TEXTS[: len(first)] + TEXTS[-len(last) :]


@pytest.mark.parametrize("name", ["train.jsonl", "train.jsonl.gz", "train.jsonl.zst"])
def test_a_dataset_that_is_no_parquet_is_streamed_on(tmp_path: Path, name: str) -> None:
    """Its shards read on where the one before ended; and `.zst` needs no package of its own."""
    data = _lines(TEXTS)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else _zstd(data) if name.endswith("zst") else data)
    config = CorpusConfig(source="huggingface", path=str(tmp_path), documents_per_shard=7)
    shards = plan_sources(config, 0)
    texts = [text for shard in shards for _, text in iter_documents(config, shard)]
    assert texts == TEXTS
    assert [text for _, text in iter_documents(config, shards[2])] == TEXTS[14:21]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("train.jsonl.gz", gzip.compress(_lines(TEXTS), mtime=0)[:200]),
        ("train.jsonl.gz", gzip.compress(_lines(TEXTS), mtime=0)[:20] + b"\xff" * 80),
        ("train.jsonl.zst", b"no zstd"),
        ("train.jsonl.xz", b"no xz"),
        ("train.zip", b"PK\x03\x04 no zip"),
        ("train.parquet", b"PAR1"),
        ("train.jsonl", b'{"text": "a"}\n{"te'),
        ("train.csv", b'text\n"a\0\n'),
        ("train.csv", b"text\ncaf\xe9\n"),
    ],
)
def test_a_damaged_dataset_is_named_with_the_next_step(tmp_path: Path, name: str, data: bytes, recwarn: pytest.WarningsRecorder) -> None:
    """A dozen formats, each read by another library, each with exceptions of its own."""
    (tmp_path / name).write_bytes(data)
    config = CorpusConfig(source="huggingface", path=str(tmp_path), documents_per_shard=7)
    with pytest.raises(InputError, match=str(tmp_path)):
        _read_all(config)


def test_a_datasets_path_that_is_taken_for_a_pattern_is_refused(tmp_path: Path) -> None:
    """The library finds no files there, and says that there are none."""
    folder = tmp_path / "really?"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(_lines(TEXTS))
    with pytest.raises(InputError, match=r"has one of the characters \*\?\[, .*Rename that folder, or read .* with corpus\.source: files"):
        plan_sources(CorpusConfig(source="huggingface", path=str(folder), documents_per_shard=20), 0)
