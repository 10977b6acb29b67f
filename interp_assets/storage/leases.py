"""A folder in a bucket becomes a lease between machines: one holds and renews it while it works; the next takes it when that ends or falls silent.

Numbered objects, of which the highest counts. Each number is created by exactly one (a conditional write); its holder overwrites it with a rising
count every `RENEW_S`, and at the end with the word that it is free. A process that is killed renews no more: who has watched the same count for
`SILENT_S`, or sees that it was a process of this machine that is gone, creates the next number. Clocks of machines are never compared, and the
highest object stays, so that no number is given twice.

A machine that slept for so long finds a higher number when it wakes, and says so: both then work, which costs work and damages nothing, since
artifacts are created once and whole. Where a store cannot create conditionally nothing is held, and work goes on as it would have without.
On a disk the kernel does this better: `locks.py`.
"""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, NamedTuple
from uuid import uuid4

from interp_assets.errors import StoreError, StoreMissingError
from interp_assets.storage.locks import Holder, name_holder, parse_holder
from interp_assets.storage.process_names import may_run, name_process
from interp_assets.storage.store import Store

RENEW_S: Final = 15.0
SILENT_S: Final = 60.0
_LOOK_S: Final = 3.0
_MAX_BYTES: Final = 1 << 16

Tell = Callable[[Holder | None], None]


class _Found(NamedTuple):
    """The object that counts."""

    number: int
    data: bytes
    """As it lies there: while it stays the same, its holder has not renewed it."""

    @property
    def content(self) -> dict[str, Any]:
        """What it says; nothing where it is damaged."""
        with suppress(ValueError):
            content = json.loads(self.data[:_MAX_BYTES])
            if isinstance(content, dict):
                return content
        return {}

    @property
    def is_free(self) -> bool:
        """Whether its holder has said so, or was a process of this machine that is gone."""
        return bool(self.content.get("is_free")) or not may_run(str(self.content.get("process", "")))


class _Lease:
    """An own number, until it is released."""

    def __init__(self, store: Store, folder: str, number: int, token: str) -> None:
        self._store, self._path, self.number, self._token = store, _path(folder, number), number, token
        self._count = 0

    def write(self, *, is_free: bool = False) -> None:
        """Renew it, or say that it is free."""
        self._count += 1
        self._store.put(self._path, _encode(self._token, self._count, is_free=is_free))


@contextmanager
def leased(
    store: Store,
    folder: str,
    *,
    waits_for: Tell,
    is_lost_to: Tell,
    wait: Callable[[threading.Event, float], bool] = threading.Event.wait,
) -> Iterator[None]:
    """Hold the lease of a folder of a store while the block runs.

    `waits_for` hears once who holds it meanwhile, `is_lost_to` who has taken it because this process was silent. `wait` waits for an event, at most
    so many seconds.
    """
    token = uuid4().hex
    try:
        lease = _take(store, folder, token, waits_for, wait)
    except StoreError:
        yield
        return
    done = threading.Event()
    keeper = threading.Thread(target=_keep, args=(store, folder, lease, done, is_lost_to, wait), name="lease", daemon=True)
    keeper.start()
    try:
        yield
    finally:
        done.set()
        keeper.join()
        with suppress(StoreError):
            lease.write(is_free=True)


def _take(store: Store, folder: str, token: str, waits_for: Tell, wait: Callable[[threading.Event, float], bool]) -> _Lease:
    is_told, silent_s, seen = False, 0.0, None
    while True:
        found = _latest(store, folder)
        silent_s = silent_s if found == seen else 0.0
        if found is None or found.is_free or silent_s >= SILENT_S:
            if lease := _create(store, folder, 1 if found is None else found.number + 1, token):
                return lease
            continue
        if not is_told:
            waits_for(parse_holder(found.content))
            is_told = True
        seen = found
        wait(threading.Event(), _LOOK_S)
        silent_s += _LOOK_S


def _create(store: Store, folder: str, number: int, token: str) -> _Lease | None:
    """Create a number; None where another did, or where a higher one had been there and gone unseen."""
    if not store.put(_path(folder, number), _encode(token, 0, is_free=False), create=True):
        return None
    found = _latest(store, folder)
    if found is None or found.number != number or found.content.get("token") != token:
        return None
    store.delete([item.path for item in store.list(folder) if _number(item.path) < number])
    return _Lease(store, folder, number, token)


def _keep(store: Store, folder: str, lease: _Lease, done: threading.Event, is_lost_to: Tell, wait: Callable[[threading.Event, float], bool]) -> None:
    while not wait(done, RENEW_S):
        with suppress(StoreError):  # the next renewal may come through
            lease.write()
            found = _latest(store, folder)
            if found is not None and found.number > lease.number:
                is_lost_to(parse_holder(found.content))
                return


def _latest(store: Store, folder: str) -> _Found | None:
    """Return the object with the highest number; None where there is none."""
    while numbers := [_number(item.path) for item in store.list(folder)]:
        with suppress(StoreMissingError):  # a higher one is there by now, and has swept
            return _Found(max(numbers), store.get(_path(folder, max(numbers))))
    return None


def _encode(token: str, count: int, *, is_free: bool) -> bytes:
    return (json.dumps({**name_holder()._asdict(), "process": name_process(), "token": token, "count": count, "is_free": is_free}) + "\n").encode()


def _path(folder: str, number: int) -> str:
    return f"{folder}/{number:08d}.json"


def _number(path: str) -> int:
    digits = path.rpartition("/")[2].removesuffix(".json")
    return int(digits) if digits.isdecimal() else 0
