"""The store keeps its promises on disk and in memory."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from odd_names import ODD_NAME

from interp_assets.errors import ConfigError, StoreError, StoreMissingError
from interp_assets.storage.store import Store, check_path, open_store


@pytest.fixture(params=["memory", "local"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """Run each test on both kinds of store."""
    url = "memory://x" if request.param == "memory" else str(tmp_path / ODD_NAME)
    return open_store(url).child(f"a {ODD_NAME}/folder")


def test_what_is_put_can_be_read_whole_and_in_ranges(store: Store) -> None:
    """Reading is the base of everything."""
    store.put("x/y.bin", bytes(range(200)))
    assert store.get("x/y.bin") == bytes(range(200))
    assert store.get_ranges("x/y.bin", [10], [5]) == [bytes(range(10, 15))]
    assert store.get_ranges("x/y.bin", [0, 190], [2, 10]) == [bytes([0, 1]), bytes(range(190, 200))]
    assert store.size("x/y.bin") == 200
    assert store.size("x/none") is None


def test_a_range_past_the_end_is_an_error(store: Store) -> None:
    """Object stores answer short ranges silently; a short row would shift every row after it."""
    store.put("x", b"12345")
    with pytest.raises(StoreError, match="ends early: 4 bytes asked for at 3, 2 came"):
        store.get_ranges("x", [3], [4])


def test_only_one_of_two_creators_wins(store: Store) -> None:
    """Manifests are published create-only."""
    assert store.put("m", b"first", create=True)
    assert not store.put("m", b"second", create=True)
    assert store.get("m") == b"first"


def test_a_stream_that_raises_publishes_nothing(store: Store) -> None:
    """A truncated object that looks whole is the worst outcome."""

    def write_and_fail() -> None:
        with store.open_writer("big") as sink:
            sink.write(b"x" * (20 << 20))
            message = "the producer failed"
            raise ValueError(message)

    with pytest.raises(ValueError, match="the producer failed"):
        write_and_fail()
    assert store.size("big") is None
    assert list(store.list()) == []


def test_a_stream_arrives_whole(store: Store) -> None:
    """Parts must be joined in order."""
    data = os.urandom(1 << 20) * 20
    with store.open_writer("big") as sink:
        for start in range(0, len(data), 3_000_000):
            sink.write(memoryview(data)[start : start + 3_000_000])
    assert store.get("big") == data


def test_a_buffer_may_be_filled_again_after_it_was_written(store: Store) -> None:
    """A part is sent from the very buffer that was handed over: a writer that reuses one would overwrite what is still on its way."""
    buffer = bytearray(4 << 20)
    with store.open_writer("parts") as sink:
        for part in range(5):
            buffer[:] = bytes([part]) * len(buffer)
            sink.write(memoryview(buffer))
    data = store.get("parts")
    assert [data[part * len(buffer)] for part in range(5)] == [0, 1, 2, 3, 4]


def test_listing_and_deleting_stay_inside_the_folder(store: Store) -> None:
    """A child store must neither show nor touch its siblings."""
    store.put("k/a", b"1")
    store.put("k/b", b"22")
    store.put("kk", b"3")
    assert sorted(found[:2] for found in store.list("k")) == [("k/a", 1), ("k/b", 2)]
    store.delete(["k/a", "k/none"])
    assert sorted(item.path for item in store.list()) == ["k/b", "kk"]


def test_a_missing_object_names_itself(store: Store) -> None:
    """The message is what a user has to go by."""
    with pytest.raises(StoreMissingError, match=r"There is no .*a a#b\?.*/folder/nope"):
        store.get("nope")


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../b", "a//b", "", "a\\b", "./a"])
def test_paths_cannot_leave_the_store(path: str) -> None:
    """Manifests come from buckets that we do not control."""
    with pytest.raises(StoreError, match="is not a path inside a store"):
        check_path(path)


def test_a_name_that_is_no_utf8_is_a_sentence(tmp_path: Path) -> None:
    """An operating system allows it, and no object store does."""
    name = os.fsdecode(b"caf\xe9")
    for act in (lambda: open_store(str(tmp_path / name)), lambda: open_store(str(tmp_path)).get(name)):
        with pytest.raises(StoreError, match=r"The name b'.*caf\\xe9' is not UTF-8"):
            act()


def test_an_address_of_a_file_is_decoded(tmp_path: Path) -> None:
    """As `Path.as_uri` writes it."""
    open_store((tmp_path / ODD_NAME).as_uri()).put("x", b"1")
    assert (tmp_path / ODD_NAME / "x").read_bytes() == b"1"


def test_a_full_disk_says_what_to_do_and_publishes_nothing(tmp_path: Path) -> None:
    """Disk full is the commonest failure. A limit on the file size stands for it: the same error path, without filling a disk."""
    program = (
        "import resource, sys\n"
        "from interp_assets.errors import StoreError\n"
        "from interp_assets.storage.store import open_store\n"
        "store = open_store(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "try:\n"
        "    with store.open_writer('big') as sink:\n"
        "        for _ in range(40): sink.write(bytes(1 << 20))\n"
        "except StoreError as error:\n"
        "    print(error)\n"
        "print(list(store.list()))\n"
    )
    result = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert f"Could not write {tmp_path}/big" in result.stdout
    assert "Free some space and run the same command again: finished shards are kept." in result.stdout
    assert result.stdout.endswith("[]\n")


def test_a_read_only_folder_is_named(tmp_path: Path) -> None:
    """A path that is a file cannot become a folder; the message says where."""
    (tmp_path / "x").write_text("a file")
    with pytest.raises(StoreError, match=r"Could not write .*x/y"):
        open_store(str(tmp_path)).put("x/y", b"1")


def test_unknown_schemes_are_refused() -> None:
    """A typo in `root` must not become a folder."""
    with pytest.raises(ConfigError, match="No store for 'gs3://x'"):
        open_store("gs3://x")


def test_an_endpoint_without_encryption_has_to_be_asked_for() -> None:
    """A typing error in an address must not send keys and data in the clear."""
    with pytest.raises(ConfigError, match=r"The S3 endpoint http://somewhere is not encrypted. Use https, or set AWS_ALLOW_HTTP=true"):
        open_store("s3://bucket/prefix", s3={"aws_endpoint": "http://somewhere", "aws_region": "r"})
    open_store("s3://bucket/prefix", s3={"aws_endpoint": "http://somewhere", "aws_region": "r", "aws_allow_http": "true"})


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (
            507,
            "<Error><Code>XMinioStorageFull</Code><Message>Storage backend has reached its minimum.</Message></Error>",
            "is full",
        ),
        (403, "<Error><Code>QuotaExceeded</Code></Error>", "is full"),
        (403, "<Error><Code>storage_cap_exceeded</Code><Message>Cap exceeded</Message></Error>", "is full"),
        (500, "<Error><Code>InternalError</Code><Message>We encountered an internal error.</Message></Error>", "look at its own log"),
        (403, "<Error><Code>AccessDenied</Code><Message>No.</Message></Error>", ""),
    ],
)
def test_a_bucket_that_refuses_says_which_and_what_to_do(status: int, body: str, expected: str) -> None:
    """Servers say "full" in different words, and the client's own text hides all of them behind its retries."""
    with refuse(status, body) as endpoint:
        options = {"aws_endpoint": endpoint, "aws_access_key_id": "a", "aws_secret_access_key": "b", "aws_region": "r", "aws_allow_http": True}
        store = open_store("s3://bucket/folder", s3=options)
        with pytest.raises(StoreError) as caught:
            store.put("x", b"1")
    said, code = str(caught.value), body.partition("<Code>")[2].partition("<")[0]
    assert said.startswith("Could not write s3://bucket/folder/x: ")
    assert code in said
    assert "max_retries" not in said
    assert "<" not in said
    assert expected in said
    assert ("finished shards are kept." in said) is bool(expected)


@contextmanager
def refuse(status: int, body: str) -> Iterator[str]:
    """Serve nothing but refusals; yield the endpoint."""

    class Refusing(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_args: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
