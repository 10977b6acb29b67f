"""A store: all that a stage may ask of a folder, a bucket or memory.

One implementation, `Store`, over the `obstore` library serves local folders, S3 and memory alike: whole and ranged reads,
streaming writes, conditional creation, listing and deletion. Only the bulk of local data goes another way, past the page cache
(`direct.py`, `docs/decisions/0003-direct-io.md`). Paths are relative, with `/` between their parts.

What is promised:

1. A write is atomic: readers see the old object, the new object or none, never a part. A writer that raises publishes nothing.
2. `put(..., create=True)` succeeds for exactly one of several racing writers.
3. On a local disk, what was written survives a power cut once the call has returned (fsync of file and folder).
4. Errors are `StoreError`s that name the object and the next step.

Checksums do not belong here: no client verifies a ranged read, so `manifest.py` does. Credentials do not belong here either:
`resources/` passes them in, the AWS ones as obstore's own environment variables.
"""

import os
import re
import stat
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol, TypeVar, runtime_checkable
from urllib.parse import unquote

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, GenericError
from obstore.store import LocalStore, MemoryStore, S3Store

from interp_assets.errors import NO_ROOM, ConfigError, StoreError, StoreMissingError
from interp_assets.storage.direct import DirectWriter, flush, read_into
from interp_assets.storage.foreign import mend_text
from interp_assets.storage.traffic import METER, count_ranges, count_upload

T = TypeVar("T")
READ_ATTEMPTS: Final = 4
PART_BYTES: Final = 8 << 20
"""Size of one part of a streamed write."""
CREDENTIALS: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)(?:[^/?#\s\"]*@|[^/?#@:\s\"]*:[^/?#@\s\"]*[^0-9/?#@\s\"][^@\s\"]*@)")
"""An address up to the end of a name or key that stands before its host. A key may hold what ends a host, so of `a:b/c@d` all before @ is one; a port
is digits alone."""
_FULL_BUCKET: Final = re.compile(r"quota|storage_?cap|storage_?full|insufficient_?storage|status code: 507|no writable volumes", re.IGNORECASE)
"""What servers say when there is no room: Ceph `QuotaExceeded`, MinIO `XMinioStorageFull`, B2 `storage_cap_exceeded`, WebDAV-like 507."""


class ObjectInfo(NamedTuple):
    """One object of a listing: its path relative to the store, its size and its tag."""

    path: str
    n_bytes: int
    tag: str = ""
    """What a store says of its content: another one after every change."""


@runtime_checkable
class ByteSink(Protocol):
    """Where a streamed write goes."""

    def write(self, data: bytes | memoryview) -> Any:
        """Append `data`. A writable buffer is copied and may be reused at once; a read-only one is not, and must not change afterwards."""


class Store:
    """What a stage may ask of storage, over one of obstore's stores. Make it with `open_store`; `url` names it for people and messages."""

    def __init__(self, backend: "_Folder | S3Store | MemoryStore", url: str, prefix: str = "") -> None:
        """Wrap `backend`; every path is taken relative to `prefix` inside it."""
        self._place = backend
        self._prefix = prefix
        self.url = url

    @property
    def _backend(self) -> LocalStore | S3Store | MemoryStore:
        return self._place.open() if isinstance(self._place, _Folder) else self._place

    def get(self, path: str) -> bytes:
        """Read a whole object. Raises `StoreMissingError` when it is not there."""
        self._check_kind(path)
        with self._explained("read", path):
            data = read_again(lambda: bytes(obstore.get(self._backend, self._key(path)).bytes()))
        METER.read(len(data))
        return data

    def parse(self, path: str, parse: Callable[[bytes, str], T]) -> T:
        """Return what `parse` makes of a whole object and of its name for messages. Raises like it and `get`."""
        return parse(self.get(path), f"{self.url}/{path}")

    def get_ranges(self, path: str, starts: Sequence[int], lengths: Sequence[int]) -> list[bytes]:
        """Read several ranges of one object, concurrently and coalesced. Raises `StoreError` when the object ends earlier."""
        self._check_kind(path)
        with self._explained("read", path):
            parts = read_again(lambda: obstore.get_ranges(self._backend, self._key(path), starts=starts, lengths=lengths))
        METER.read(sum(map(len, parts)), count_ranges(starts, lengths))
        for start, length, part in zip(starts, lengths, parts, strict=True):
            self._check_length(path, start, length, len(part))
        return [bytes(part) for part in parts]

    def get_into(self, path: str, start: int, out: memoryview) -> memoryview:
        """Read exactly `len(out)` bytes from `start` that nobody will want again. Raises `StoreError` when the object ends earlier."""
        local = self.local_path(path)
        self._check_kind(path)
        with self._explained("read", path):
            if local is not None:
                n_read, view = read_into(local, start, out), out
            else:
                (part,) = read_again(lambda: obstore.get_ranges(self._backend, self._key(path), starts=[start], lengths=[len(out)]))
                n_read, view = len(part), memoryview(part)
        METER.read(n_read)
        self._check_length(path, start, len(out), n_read)
        return view

    def put(self, path: str, data: bytes, *, create: bool = False) -> bool:
        """Write a whole object atomically; with `create`, answer False and change nothing when it exists already."""
        METER.written(len(data))
        with self._explained("write", path):
            if isinstance(self._place, _Folder):
                self._place.path.mkdir(parents=True, exist_ok=True)
            try:
                obstore.put(self._backend, self._key(path), data, mode="create" if create else "overwrite")
            except AlreadyExistsError:
                return False
            self._sync(path)
        return True

    @contextmanager
    def open_writer(self, path: str) -> Iterator[ByteSink]:
        """Stream an object; it appears when the block ends, and never if the block raises. Local files go past the page cache."""
        local = self.local_path(path)
        if local is not None:
            with self._open_direct(local, path) as sink:
                yield sink
            return
        with self._explained("write", path):
            writer = obstore.open_writer(self._backend, self._key(path), buffer_size=PART_BYTES, max_concurrency=4)
        writer.__enter__()
        try:
            sink = _Sink(writer, self, path)
            yield sink
        except BaseException:
            writer.__exit__(*sys.exc_info())
            raise
        with self._explained("write", path):
            writer.__exit__(None, None, None)
        METER.written(sink.n_bytes, count_upload(sink.n_bytes, PART_BYTES))

    @contextmanager
    def _open_direct(self, local: Path, path: str) -> Iterator[ByteSink]:
        with self._explained("write", path):
            writer = DirectWriter(local)
        try:
            sink = _Sink(writer, self, path)
            yield sink
            with self._explained("write", path):
                writer.close()
            METER.written(sink.n_bytes, count_upload(sink.n_bytes, PART_BYTES))
        except BaseException:
            writer.abort()
            raise

    def size(self, path: str) -> int | None:
        """Return the size in bytes, or None when there is no such object."""
        METER.read(0)
        try:
            with self._explained("look up", path):
                return int(obstore.head(self._backend, self._key(path))["size"])
        except StoreMissingError:
            return None

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """List the objects under a folder, in no promised order."""
        n_skip = len(self._prefix) + 1 if self._prefix else 0
        with self._explained("list", prefix):
            for batch in obstore.list(self._backend, self._key(prefix) or None, chunk_size=1000):
                METER.written(0)
                for item in batch:
                    yield ObjectInfo(item["path"][n_skip:], int(item["size"]), item["e_tag"] or "")

    def list_times(self, prefix: str = "") -> dict[str, datetime]:
        """Return when each object under a folder was last written."""
        n_skip = len(self._prefix) + 1 if self._prefix else 0
        with self._explained("list", prefix):
            listed = obstore.list(self._backend, self._key(prefix) or None, chunk_size=1000)
            return {item["path"][n_skip:]: item["last_modified"] for batch in listed for item in batch}

    def delete(self, paths: Sequence[str]) -> None:
        """Delete objects; those that do not exist are no error."""
        for path in paths:
            with suppress(StoreMissingError), self._explained("delete", path):
                obstore.delete(self._backend, self._key(path))

    def child(self, prefix: str) -> "Store":
        """Return the store of a folder of this one."""
        return Store(self._place, f"{self.url}/{check_path(prefix)}", self._key(prefix))

    def local_path(self, path: str = "") -> Path | None:
        """Return the file behind a path, or None when the store is not a local folder."""
        return self._place.path / self._key(path) if isinstance(self._place, _Folder) else None

    def _check_kind(self, path: str) -> None:
        """Raise `StoreError` for a pipe, a socket or a device, of which reading would wait for ever."""
        local = self.local_path(path)
        with suppress(OSError):
            if local is not None and not stat.S_ISREG(mode := local.stat().st_mode) and not stat.S_ISDIR(mode):
                raise StoreError(f"{local} is a pipe, socket or device and no file. Move it away.")

    def _check_length(self, path: str, start: int, n_wanted: int, n_found: int) -> None:
        if n_found != n_wanted:
            raise StoreError(
                f"{self.url}/{path} ends early: {n_wanted:,} bytes asked for at {start:,}, {n_found:,} came. "
                "Run `interp verify` on its folder and re-materialize the partition that it names."
            )

    def _key(self, path: str) -> str:
        relative = check_path(path) if path else ""
        return "/".join(part for part in (self._prefix, relative) if part)

    def _sync(self, path: str) -> None:
        """Flush a local file and its folder entry to the disk; other backends are durable once they answer."""
        if local := self.local_path(path):
            flush(local)
            flush(local.parent)

    @contextmanager
    def _explained(self, verb: str, path: str) -> Iterator[None]:
        where = f"{self.url}/{path}"
        try:
            yield
        except FileNotFoundError as error:
            raise StoreMissingError(f"There is no {where}.") from error
        except (BaseError, OSError) as error:
            raise StoreError(f"Could not {verb} {where}: {_reason(error)}") from error


class _Folder:
    """A local folder, made by the first write: to ask for what is not there leaves no trace."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened: LocalStore | None = None

    def open(self) -> LocalStore | MemoryStore:
        """Return the store of the folder; an empty one while there is none."""
        if self._opened is None and self.path.is_dir():
            self._opened = LocalStore(str(self.path))
        return self._opened or MemoryStore()


class _Sink:
    """Hand bytes to a writer and explain its failures."""

    def __init__(self, writer: Any, store: Store, path: str) -> None:
        self._writer, self._store, self._path = writer, store, path
        self._copies = isinstance(writer, DirectWriter)
        self.n_bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        if not self._copies and isinstance(data, memoryview) and not data.readonly:
            data = bytes(data)  # obstore keeps a reference until the part is sent; the caller may fill its buffer again
        with self._store._explained("write", self._path):  # noqa: SLF001 - the sink is part of the store
            self._writer.write(data)
        self.n_bytes += data.nbytes if isinstance(data, memoryview) else len(data)


def check_address(address: str, where: str) -> None:
    """Raise `ConfigError`, which does not repeat it, for an address that has a name or a key before its host: addresses are shown and kept."""
    if CREDENTIALS.match(address):
        scheme = address.partition("://")[0]
        raise ConfigError(
            f"{where} holds credentials in an address ({scheme}://...@...), which would be shown in messages and kept in histories. Write it without "
            "them, and give them as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or by a role."
        )


def open_store(url: str, *, s3: dict[str, Any] | None = None) -> Store:
    """Open the store at `url`: a local folder (made by the first write), `s3://bucket/prefix`, or `memory://name`.

    `s3` holds endpoint, region and credentials for obstore's `S3Store`; what is not given comes from the usual `AWS_*` environment
    variables. Raises `ConfigError` for any other scheme.
    """
    check_address(url, "An address of a store")
    _check_text(url)
    scheme, separator, rest = url.partition("://")
    if not separator or scheme == "file":
        folder = Path(unquote(rest) if separator else url).expanduser().resolve()
        if folder.exists() and not folder.is_dir():
            raise StoreError(f"{folder} is a file and no folder. Name another one.")
        return Store(_Folder(folder), str(folder))
    if scheme == "s3":
        bucket, _, prefix = rest.partition("/")
        config: Any = {key: value for key, value in s3.items() if key != "aws_allow_http"} if s3 else None
        endpoint = (s3 or {}).get("aws_endpoint") or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
        if str(endpoint).startswith("http://") and not _allows_http(s3):
            check_address(str(endpoint), "The S3 endpoint")
            raise ConfigError(f"The S3 endpoint {endpoint} is not encrypted. Use https, or set AWS_ALLOW_HTTP=true for a server on your own network.")
        backend = S3Store(bucket, config=config, client_options={"timeout": "120 seconds", "allow_http": _allows_http(s3)})
        return Store(backend, url.rstrip("/"), prefix.strip("/"))
    if scheme == "memory":
        return Store(MemoryStore(), url)
    raise ConfigError(f"No store for {url!r}: use a folder, s3://bucket/prefix or memory://name.")


def read_again(read: Callable[[], T]) -> T:
    """Return `read()`, tried again after 0.1, 0.2 and 0.4 seconds when a connection broke in the middle of a body.

    The client itself tries again what fails before the first byte; reads change nothing, so they may be repeated.
    """
    for attempt in range(READ_ATTEMPTS - 1):
        try:
            return read()
        except GenericError:
            time.sleep(0.1 * 2**attempt)
    return read()


def _allows_http(s3: dict[str, Any] | None) -> bool:
    """Say whether an endpoint may be plain HTTP: keys and data would travel in the clear, so somebody has to ask for it."""
    asked = (s3 or {}).get("aws_allow_http", os.environ.get("AWS_ALLOW_HTTP", ""))
    return str(asked).lower() in ("true", "1")


def check_path(path: str) -> str:
    """Return `path` when it is a relative path inside the store. Raises `StoreError` for anything that could leave it."""
    parts = path.split("/")
    if not path or path.startswith("/") or "\\" in path or "\0" in path or any(part in ("", ".", "..") for part in parts):
        raise StoreError(f"{path!r} is not a path inside a store: parts separated by single slashes, none of them '.' or '..'.")
    _check_text(path)
    return path


def _check_text(path: str) -> None:
    """Raise `StoreError` for a name that an operating system allows and no object store."""
    if mend_text(path) != path:
        raise StoreError(f"The name {os.fsencode(path)!r} is not UTF-8. Rename it, or use another.")


def _reason(error: BaseException) -> str:
    """Reduce an error of the storage library to its first line and what the server said, with the next step where it is known."""
    lines = str(error).splitlines() or [type(error).__name__]
    text = re.sub(r",? after \d+ retries, max_retries: \d+, retry_timeout: \S+|: *<.*", "", lines[0])
    said = re.search(r"<Code>([^<]{1,100})</Code>\s*(?:<Message>([^<]{1,300})</Message>)?", str(error))
    if said is not None and said[1] not in text:
        text = f"{text}: {': '.join(part.rstrip('.') for part in said.groups() if part)}"
    if any(f"os error {code}" in text or getattr(error, "errno", None) == code for code in NO_ROOM):
        return f"{text}. Free some space and run the same command again: finished shards are kept."
    if _FULL_BUCKET.search(text):
        return f"{text}. The bucket is full or over its quota. Make room, then run the same command again: finished shards are kept."
    if re.search(r"status code: 5\d\d", text):
        return f"{text}. The store is overloaded, or full, or broken: look at its own log. Then run the same command again: finished shards are kept."
    return text
