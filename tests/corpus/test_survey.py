"""Planning again: what has not changed is not read, and whatever has changed is."""

import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from planned import plan_sources

from interp_assets.corpus.sources import Survey, iter_documents, survey_sources
from interp_assets.errors import InputError
from interp_assets.planning.sections import CorpusConfig
from interp_assets.storage.seen import SETTLED_NS, SeenFiles


def _later() -> int:
    """Return a time at which files written just now have settled."""
    return time.time_ns() + 2 * SETTLED_NS


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Make a folder with one file of each kind, one of them without text."""
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("alpha " * 9)
    (folder / "b.jsonl").write_text("".join(f'{{"text": "line {i} and more", "body": "other {i}"}}\n' for i in range(5)))
    pq.write_table(pa.table({"text": [f"row {i} " * 4 for i in range(7)]}), folder / "c.parquet")
    (folder / "d.txt").touch()
    return folder


def _config(path: Path, **fields: object) -> CorpusConfig:
    return CorpusConfig.model_validate({"source": "files", "path": str(path), "shard_bytes": 40, **fields})


def _survey(config: CorpusConfig, notes: Path, **options: bool) -> Survey:
    with SeenFiles(notes, now_ns=_later, **options) as seen:
        return survey_sources(config, 0, (), seen)


def _noted(notes: Path) -> list[str]:
    with sqlite3.connect(notes) as database:
        return sorted(os.fsdecode(row[0]).rpartition("/")[2] for row in database.execute("SELECT path FROM notes"))


def test_an_unchanged_corpus_is_not_read_again(texts: Path, tmp_path: Path) -> None:
    """The second plan is the first one, and so is the plan that reads everything; that no byte was read shows a note that was altered."""
    first = _survey(_config(texts), tmp_path / "notes")
    assert first == _survey(_config(texts), tmp_path / "notes")
    assert first.shards == plan_sources(_config(texts), 0)
    assert first.empty_files == ["d.txt"]
    assert _noted(tmp_path / "notes") == ["a.txt", "b.jsonl", "c.parquet", "d.txt"]
    with sqlite3.connect(tmp_path / "notes") as database:
        ((question,),) = database.execute("SELECT question FROM notes WHERE CAST(path AS TEXT) LIKE '%a.txt'").fetchall()
    with SeenFiles(tmp_path / "notes", now_ns=_later) as seen:
        assert seen.note(seen.find(texts / "a.txt", question)[0], question, bytes(40))
    assert _survey(_config(texts), tmp_path / "notes").shards[0] != first.shards[0]
    assert _survey(_config(texts), tmp_path / "notes", reads_again=True) == first
    assert _survey(_config(texts), tmp_path / "notes") == first


def test_a_change_that_keeps_size_and_time_is_noticed(texts: Path, tmp_path: Path) -> None:
    """`touch -d` and `rsync -t` set the time of a file's content, but nothing can set the time of its last change of any kind."""
    file = texts / "a.txt"
    facts = file.stat()
    first = _survey(_config(texts), tmp_path / "notes")
    file.write_text("omega " * 9)
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns, file.stat().st_ino) == (facts.st_size, facts.st_mtime_ns, facts.st_ino)
    second = _survey(_config(texts), tmp_path / "notes")
    assert second.shards[0].fingerprint != first.shards[0].fingerprint
    assert second.shards[1:] == first.shards[1:]


def test_a_file_that_has_just_changed_gets_no_note(texts: Path, tmp_path: Path) -> None:
    """It may change again within one tick of the clock, and would look the same."""
    with SeenFiles(tmp_path / "notes") as seen:
        survey_sources(_config(texts), 0, (), seen)
    assert _noted(tmp_path / "notes") == []


def test_a_file_that_changes_while_it_is_read_gets_no_note(texts: Path, tmp_path: Path) -> None:
    """Its digest would be that of neither state."""
    with SeenFiles(tmp_path / "notes", now_ns=_later) as seen:
        draft, _ = seen.find(texts / "a.txt", "q")
        (texts / "a.txt").write_text("changed")
        assert not seen.note(draft, "q", b"answer")
        assert seen.note(seen.find(texts / "a.txt", "q")[0], "q", b"answer")
        assert seen.find(texts / "a.txt", "q")[1] == b"answer"


def test_another_field_is_another_question(texts: Path, tmp_path: Path) -> None:
    """The same file holds other documents under another `text_field`."""
    file = texts / "b.jsonl"
    first = _survey(_config(file, shard_bytes=10), tmp_path / "notes")
    other = _survey(_config(file, shard_bytes=10, text_field="body"), tmp_path / "notes")
    assert first.shards[0].fingerprint != other.shards[0].fingerprint
    assert next(iter_documents(_config(file, text_field="body", shard_bytes=10), other.shards[0])) == ("b.jsonl:1", "other 0")


def test_a_file_with_a_problem_is_named_each_time(texts: Path, tmp_path: Path) -> None:
    """A note of it would make the second plan go on without a word."""
    (texts / "e.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    for _ in range(2):
        with pytest.raises(InputError, match=r"e\.jsonl, line 2: is not JSON"):
            _survey(_config(texts), tmp_path / "notes")


def test_notes_of_files_that_are_gone_go_too(texts: Path, tmp_path: Path) -> None:
    """Text that lands and is taken away every day must not fill a disk with notes; other folders' notes are not touched."""
    other = tmp_path / "texts2"
    other.mkdir()
    (other / "kept.txt").write_text("kept " * 20)
    notes = tmp_path / "notes"
    _survey(_config(texts), notes)
    with SeenFiles(notes, now_ns=_later) as seen:
        seen.answer(other / "kept.txt", "q", lambda: b"kept")
    (texts / "a.txt").unlink()
    _survey(_config(texts), notes)
    assert _noted(notes) == ["b.jsonl", "c.parquet", "d.txt", "kept.txt"]


@pytest.mark.parametrize("content", [b"no database at all, but long enough to look at", b"SQLite format 3\0" + bytes(100)])
def test_damaged_notes_are_begun_anew(texts: Path, tmp_path: Path, content: bytes) -> None:
    """They hold nothing that cannot be read again."""
    (tmp_path / "notes").write_bytes(content)
    assert _survey(_config(texts), tmp_path / "notes").shards == plan_sources(_config(texts), 0)
    assert len(_noted(tmp_path / "notes")) == 4


def test_notes_with_a_damaged_page_are_begun_anew(texts: Path, tmp_path: Path) -> None:
    """Damage behind the first page shows only when a note is asked for; all would be read for ever after."""
    notes = tmp_path / "notes"
    first = _survey(_config(texts), notes)
    with sqlite3.connect(notes) as database:
        (page_bytes,) = database.execute("PRAGMA page_size").fetchone()
    data = notes.read_bytes()
    notes.write_bytes(data[:page_bytes] + b"\xff" * (len(data) - page_bytes))
    assert _survey(_config(texts), notes) == first
    assert _survey(_config(texts), notes) == first
    assert _noted(notes) == ["a.txt", "b.jsonl", "c.parquet", "d.txt"]


def test_a_user_without_a_home_has_no_notes() -> None:
    """Containers run as user ids that no table of users has; planning, and the end of every partition, asks for the cache folder."""
    program = (
        "from pathlib import Path\n"
        "from interp_assets.planning.rates import load_rates, note_rate, rates_path\n"
        "from interp_assets.storage.seen import open_seen\n"
        "with open_seen() as seen: print(seen.answer(Path('.'), 'q', lambda: b'read'))\n"
        "print(note_rate(rates_path(), 'sae', 10.0, 20.0), load_rates(rates_path()))\n"
    )
    environment = {**os.environ, "INTERP_CACHE": "~no-such-user-here/cache"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split("\n")[:2] == ["b'read'", "False {}"], done.stderr


def test_without_a_place_for_notes_all_is_read(texts: Path, tmp_path: Path) -> None:
    """A read-only home must not stop anybody."""
    (tmp_path / "file").touch()
    assert _survey(_config(texts), tmp_path / "file" / "notes").shards == plan_sources(_config(texts), 0)


def test_a_planned_shard_is_read_and_compared_when_it_is_tokenized(texts: Path, tmp_path: Path) -> None:
    """A file system whose times lie can give an old plan, but never tokens of other text under its ids."""
    shards = _survey(_config(texts), tmp_path / "notes").shards
    (texts / "a.txt").write_text("omega " * 9)
    with pytest.raises(InputError, match="--read-again"):
        list(iter_documents(_config(texts), shards[0]))


def test_a_note_whose_bits_have_flipped_is_none(texts: Path, tmp_path: Path) -> None:
    """SQLite has no checksums: a flipped stamp, question or answer would be another file's digest, until somebody reads again."""
    with SeenFiles(tmp_path / "notes", now_ns=_later) as seen:
        seen.answer(texts / "a.txt", "question", lambda: b"the right answer")
    good = (tmp_path / "notes").read_bytes()
    for word in (b"the right answer", b"question", b"a.txt"):
        place = good.rindex(word)
        (tmp_path / "notes").write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with SeenFiles(tmp_path / "notes", now_ns=_later) as seen:
            assert seen.answer(texts / "a.txt", "question", lambda: b"read again") == b"read again", word
