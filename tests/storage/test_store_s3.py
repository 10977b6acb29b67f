"""The store keeps the same promises on a real S3 server."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from odd_names import ODD_NAME
from s3_server import S3Server, start_s3_server

from interp_assets.errors import StoreError
from interp_assets.storage.leases import leased
from interp_assets.storage.manifest import create_artifact, find_manifest, load_manifest, make_ref, read_file, read_ranges
from interp_assets.storage.store import Store, open_store

pytestmark = pytest.mark.s3
REF = make_ref("example", "1-stage", identity={}, inputs={}, label="shard-000000")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """Run one server for this file."""
    server = start_s3_server(tmp_path_factory.mktemp("s3"))
    yield server
    server.stop()


@pytest.fixture
def store(server: S3Server) -> Store:
    """Open a prefix of its bucket with options, the way `resources/` does."""
    options = {key.lower(): value for key, value in server.environment.items() if key != "AWS_ENDPOINT_URL"}
    return open_store(f"s3://test/{ODD_NAME}", s3=options)


def test_streams_ranges_and_listings_work(store: Store) -> None:
    """Multipart writes, ranged reads and listings below a prefix."""
    data = os.urandom(20 << 20)
    with store.child("a").open_writer("big.bin") as sink:
        for start in range(0, len(data), 3_000_000):
            sink.write(memoryview(data)[start : start + 3_000_000])
    assert store.get("a/big.bin") == data
    assert store.get_ranges("a/big.bin", [5, 9 << 20], [7, 100]) == [data[5:12], data[9 << 20 : (9 << 20) + 100]]
    assert [found[:2] for found in store.child("a").list()] == [("big.bin", len(data))]
    store.delete(["a/big.bin", "a/none"])
    assert store.size("a/big.bin") is None


def test_only_one_creator_wins(store: Store) -> None:
    """Conditional puts carry the whole publication protocol."""
    assert store.put("m", b"1", create=True)
    assert not store.put("m", b"2", create=True)
    assert store.get("m") == b"1"


def test_two_machines_take_turns(store: Store) -> None:
    """On a bucket two commands did the same work twice, and neither said a word."""
    inside, most, told = 0, 0, []

    def work() -> None:
        nonlocal inside, most
        wait = threading.Event.wait
        with leased(store, ".turns", waits_for=told.append, is_lost_to=told.append, wait=lambda event, _s: wait(event, 0.05)):
            inside += 1
            most = max(most, inside)
            time.sleep(0.2)
            inside -= 1

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (most, inside) == (1, 0)
    assert told
    assert len(list(store.list(".turns"))) == 1


def test_a_stream_that_raises_publishes_nothing(store: Store) -> None:
    """Other clients complete the upload when the block raises."""

    def write_and_fail() -> None:
        with store.open_writer("broken") as sink:
            sink.write(bytes(20 << 20))
            message = "the producer failed"
            raise ValueError(message)

    with pytest.raises(ValueError, match="the producer failed"):
        write_and_fail()
    assert store.size("broken") is None


def test_an_artifact_has_the_same_digest_as_on_disk(store: Store, tmp_path: Path) -> None:
    """Moving a pipeline to a bucket must not change what it holds."""
    digests = []
    for target in (store, open_store(str(tmp_path))):
        with create_artifact(target, REF) as art:
            art.put("rows.bin", bytes(range(256)) * 100, block_bytes=1000)
        manifest = load_manifest(target, REF)
        assert find_manifest(target, REF) == manifest
        assert read_file(target, REF.path, manifest, "rows.bin") == bytes(range(256)) * 100
        assert read_ranges(target, REF.path, manifest, "rows.bin", [999, 5], [3, 2]) == [bytes([231, 232, 233]), bytes([5, 6])]
        digests.append(manifest.digest)
    assert digests[0] == digests[1]


def test_a_wrong_key_is_an_error_that_names_the_object(server: S3Server) -> None:
    """Refused credentials must not look like a missing object."""
    options = {
        "aws_endpoint": server.endpoint,
        "aws_access_key_id": "test-access",
        "aws_secret_access_key": "wrong",
        "aws_region": "us-east-1",
        "aws_allow_http": "true",
    }
    with pytest.raises(StoreError, match=r"Could not read s3://test/x"):
        open_store("s3://test", s3=options).get("x")
