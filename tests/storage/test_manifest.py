"""Manifests make artifacts exist, and find every changed byte."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interp_assets.errors import ArtifactCorruptError, ArtifactForeignError, ArtifactMissingError, ArtifactRaceError, StoreError
from interp_assets.storage.manifest import (
    ArtifactRef,
    ArtifactWriter,
    Manifest,
    create_artifact,
    decode_manifest,
    encode_manifest,
    find_manifest,
    load_manifest,
    make_ref,
    read_file,
    read_range,
    read_ranges,
)
from interp_assets.storage.store import Store, open_store

DATA = bytes(range(256)) * 40


def _ref(code: int = 1, kind: str = "example") -> ArtifactRef:
    return make_ref(kind, "1-stage", identity={"code": code}, inputs={"up": "0123"}, label="shard-000000")


def _publish(store: Store, data: bytes = DATA, ref: ArtifactRef | None = None) -> Manifest:
    ref = ref or _ref()
    with create_artifact(store, ref, replace=True) as art:
        art.put("rows.bin", data, n_rows=len(data), block_bytes=1000)
        art.facts = {"loss": 0.1, "n_rows": len(data)}
    return load_manifest(store, ref)


def test_a_published_artifact_reads_back(memory_store: Store) -> None:
    """Write, publish, read: the base of every stage."""
    manifest = _publish(memory_store)
    assert read_file(memory_store, _ref().path, manifest, "rows.bin") == DATA
    assert manifest.facts == {"loss": 0.1, "n_rows": len(DATA)}
    assert find_manifest(memory_store, _ref()) == manifest


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(DATA)), st.integers(0, 3000)), min_size=1, max_size=5))
def test_any_ranges_read_what_a_slice_would(ranges: list[tuple[int, int]]) -> None:
    """Ranges are widened to blocks and cut again: off-by-one errors live here."""
    store = open_store("memory://x")
    manifest = _publish(store)
    starts = [start for start, _ in ranges]
    lengths = [min(length, len(DATA) - start) for start, length in ranges]
    parts = read_ranges(store, _ref().path, manifest, "rows.bin", starts, lengths)
    assert parts == [DATA[start : start + length] for start, length in zip(starts, lengths, strict=True)]


def test_the_artifact_id_follows_identity_and_inputs_only() -> None:
    """It must be known before the work, and change exactly when the bytes would."""
    assert _ref() == _ref()
    assert _ref().path == f"1-stage/shard-000000-{_ref().artifact_id[:12]}"
    assert _ref(code=2).artifact_id != _ref().artifact_id
    assert make_ref("example", "1-stage", identity={"code": 1}, inputs={"up": "4567"}, label="shard-000000").artifact_id != _ref().artifact_id


def test_same_content_has_one_digest_at_any_time(memory_store: Store) -> None:
    """The digest is Dagster's data version: a rebuilt shard must not make downstream stale."""
    first = _publish(memory_store)
    second = _publish(memory_store)
    assert first.digest == second.digest
    assert _publish(memory_store, DATA[:-1] + b"x").digest != first.digest


def test_what_another_job_has_published_meanwhile_stays(memory_store: Store) -> None:
    """Two jobs may make one shard: the slower one must neither delete what the faster one published nor let a reader meet half of it."""
    first = _publish(memory_store)
    path = f"{_ref().path}/rows.bin"
    with create_artifact(memory_store, _ref()) as art:
        art.facts = dict(first.facts)
        with art.open("rows.bin", n_rows=first.files[0].n_rows, block_bytes=first.files[0].block_bytes) as sink:
            sink.write(DATA)
            assert memory_store.get(path) == DATA, "the published file is there all the time"
    assert art.manifest == first
    with pytest.raises(ArtifactRaceError, match="Two writers published"), create_artifact(memory_store, _ref()) as art:
        art.put("rows.bin", DATA[:-1] + b"x")
    assert memory_store.get(path) == DATA
    assert load_manifest(memory_store, _ref()) == first


def test_every_flipped_byte_of_a_file_is_found(memory_store: Store) -> None:
    """No storage client verifies a ranged read."""
    manifest = _publish(memory_store)
    path = f"{_ref().path}/rows.bin"
    for place in (0, 999, 1000, 5555, len(DATA) - 1):
        damaged = bytearray(DATA)
        damaged[place] ^= 1
        memory_store.put(path, bytes(damaged))
        with pytest.raises(ArtifactCorruptError, match=f"damaged in block {place // 1000} "):
            read_range(memory_store, _ref().path, manifest, "rows.bin", place, 1)


def test_every_flipped_byte_of_a_manifest_is_found(memory_store: Store) -> None:
    """The manifest guards the files; its seal guards the manifest, to the last space."""
    _publish(memory_store)
    data = memory_store.get(f"{_ref().path}/manifest.json")
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 1
        with pytest.raises((ArtifactCorruptError, ArtifactForeignError)):
            decode_manifest(bytes(damaged), "here")


def test_a_truncated_manifest_is_no_artifact(memory_store: Store) -> None:
    """A half-written artifact is rebuilt, and reading it says how."""
    _publish(memory_store)
    path = f"{_ref().path}/manifest.json"
    memory_store.put(path, memory_store.get(path)[:50])
    assert find_manifest(memory_store, _ref()) is None
    with pytest.raises(ArtifactCorruptError, match=r"is not a manifest .*Re-materialize"):
        load_manifest(memory_store, _ref())


def test_a_missing_manifest_says_what_to_do(memory_store: Store) -> None:
    """The commonest case: upstream was not materialized."""
    with pytest.raises(ArtifactMissingError, match=r"There is no artifact at .*Materialize it first"):
        load_manifest(memory_store, _ref())


def test_an_artifact_that_raises_is_not_published(memory_store: Store) -> None:
    """Nothing may look finished that is not."""

    def fail() -> None:
        with create_artifact(memory_store, _ref(), replace=True) as art:
            art.put("rows.bin", DATA)
            message = "halfway"
            raise ValueError(message)

    with pytest.raises(ValueError, match="halfway"):
        fail()
    assert find_manifest(memory_store, _ref()) is None


def test_a_shorter_file_makes_the_artifact_unfinished(memory_store: Store) -> None:
    """The cheap skip test compares sizes, so a truncated or lost file is rebuilt."""
    _publish(memory_store)
    memory_store.put(f"{_ref().path}/rows.bin", DATA[:-1])
    assert find_manifest(memory_store, _ref()) is None
    memory_store.delete([f"{_ref().path}/rows.bin"])
    assert find_manifest(memory_store, _ref()) is None


def test_a_foreign_artifact_is_refused(memory_store: Store) -> None:
    """A folder copied from another pipeline must not be taken for ours."""
    _publish(memory_store)
    foreign = _ref(code=2)
    memory_store.put(f"{foreign.path}/manifest.json", memory_store.get(f"{_ref().path}/manifest.json"))
    with pytest.raises(ArtifactForeignError, match="another pipeline or configuration"):
        load_manifest(memory_store, foreign)


def test_a_newer_version_is_refused(memory_store: Store) -> None:
    """An old release must not misread a new format."""
    data = encode_manifest(_publish(memory_store)).replace(b'"version": 1', b'"version": 3')
    with pytest.raises(ArtifactForeignError, match=r"version 3; this release reads .* versions \(1, 2\)\. Upgrade"):
        decode_manifest(data, "here")


def test_of_two_writers_with_other_bytes_the_second_is_told(memory_store: Store) -> None:
    """Equal bytes are harmless; different bytes mean that something is not deterministic."""
    _publish(memory_store)
    writer = ArtifactWriter(memory_store, _ref())
    writer.put("other.bin", b"other")
    with pytest.raises(ArtifactRaceError, match="Two writers published"):
        writer.publish(datetime.now(UTC))


def test_a_hostile_file_name_is_refused(memory_store: Store) -> None:
    """A manifest from an untrusted bucket must not read outside its folder."""
    with create_artifact(memory_store, _ref(), replace=True) as art, pytest.raises(StoreError, match="is not a path inside a store"):
        art.put("../../secret", b"")


def test_unfinished_files_of_an_earlier_attempt_are_removed(local_store: Store) -> None:
    """Garbage of a crashed attempt must not stay beside the rebuilt artifact."""
    local_store.put(f"{_ref().path}/left-over.bin", b"x")
    _publish(local_store)
    assert sorted(Path(item.path).name for item in local_store.list(_ref().path)) == ["manifest.json", "rows.bin"]


def test_files_that_hold_times_are_verified_but_not_part_of_the_digest(memory_store: Store) -> None:
    """Rates and profiles belong to what they measure; the same inputs must still give the same digest."""
    digests = []
    for rate in (b"1.5", b"2.5"):
        with create_artifact(memory_store, _ref(), replace=True) as art:
            art.put("rows.bin", DATA)
            art.put("times.json", rate, is_timed=True)
        manifest = load_manifest(memory_store, _ref())
        assert manifest.timed == ["times.json"]
        assert read_file(memory_store, _ref().path, manifest, "times.json") == rate
        digests.append(manifest.digest)
    assert digests[0] == digests[1]
    with create_artifact(memory_store, _ref(), replace=True) as art:
        art.put("rows.bin", DATA)
    assert load_manifest(memory_store, _ref()).digest == digests[0]
    with create_artifact(memory_store, _ref(), replace=True) as art:
        art.put("rows.bin", DATA[:-1])
        art.put("times.json", b"1.5", is_timed=True)
    assert load_manifest(memory_store, _ref()).digest != digests[0]
    memory_store.put(f"{_ref().path}/times.json", b"9.5")
    with pytest.raises(ArtifactCorruptError, match=r"times.json is damaged in block 0"):
        read_file(memory_store, _ref().path, load_manifest(memory_store, _ref()), "times.json")


@pytest.mark.parametrize("order", ["one after the other", "while the first was writing", "over the first's times"])
def test_two_writers_with_different_times_leave_a_whole_artifact(order: str, local_store: Store) -> None:
    """Times of two runs differ: the file of one beside the manifest of the other would make a finished SAE look damaged."""
    writers = [create_artifact(local_store, _ref()) for _ in range(2)]
    arts = [writer.__enter__() for writer in writers]
    for art, times in zip(arts, (b"1.25", b"2.5, and a longer trace"), strict=True):
        art.put("rows.bin", DATA)
        art.put("times.json", times, is_timed=True)
    writers[0].__exit__(None, None, None)
    if order == "while the first was writing":
        local_store.delete([f"{_ref().path}/manifest.json"])
        arts[1]._put_timed()
        arts[0].publish(datetime.now(UTC))
    elif order == "over the first's times":
        arts[1]._put_timed()
    writers[1].__exit__(None, None, None)
    manifest = find_manifest(local_store, _ref())
    assert manifest is not None
    assert arts[0].manifest is not None
    assert manifest.digest == arts[0].manifest.digest
    expected = b"2.5, and a longer trace" if order == "over the first's times" else b"1.25"
    assert read_file(local_store, _ref().path, manifest, "times.json") == expected
    assert arts[1].manifest == manifest


def test_a_manifest_says_version_2_only_where_it_has_timed_files(memory_store: Store) -> None:
    """An older release must say "upgrade" about what it cannot read, and go on reading all the rest."""
    found = []
    for is_timed in (False, True):
        with create_artifact(memory_store, _ref(), replace=True) as art:
            art.put("times.json", b"1.5", is_timed=is_timed)
        found.append(json.loads(memory_store.get(f"{_ref().path}/manifest.json"))["version"])
    assert found == [1, 2]
