"""Machines that meet in a bucket take turns: one works, the others are told who does, and what falls silent is taken over."""

import json
import threading
import time
from typing import Any

import pytest

from interp_assets.errors import StoreError
from interp_assets.storage.leases import RENEW_S, SILENT_S, leased
from interp_assets.storage.locks import Holder
from interp_assets.storage.process_names import name_process
from interp_assets.storage.store import Store, open_store

FOLDER = ".turns"
OTHER = {"process_id": 7, "host": "elsewhere", "command": "interp run", "since": "2026-11-30T12:00:00+00:00"}


def quick(event: threading.Event, _seconds: float) -> bool:
    """Wait a moment only."""
    return event.wait(0.002)


def say(store: Store, number: int, **content: Any) -> None:
    """Write what another machine would."""
    store.put(f"{FOLDER}/{number:08d}.json", json.dumps({**OTHER, "count": 0, **content}).encode())


def hold(store: Store, told: list[Holder | None], lost: list[Holder | None] | None = None, wait: Any = quick) -> Any:
    """Take the lease."""
    return leased(store, FOLDER, waits_for=told.append, is_lost_to=([] if lost is None else lost).append, wait=wait)


def test_one_at_a_time_works(memory_store: Store) -> None:
    """Whoever comes first; nobody is left out, and no object but the last stays."""
    inside, most, done = 0, 0, []

    def work(i: int) -> None:
        nonlocal inside, most
        with hold(memory_store, []):
            inside += 1
            most = max(most, inside)
            time.sleep(0.003)
            inside -= 1
            done.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert most == 1
    assert sorted(done) == list(range(6))
    assert len(list(memory_store.list(FOLDER))) == 1


def test_who_waits_is_told_for_whom_until_it_is_free(memory_store: Store) -> None:
    """A command on another machine that stands still without a word looks broken; while the other renews, it is waited for, however long."""
    say(memory_store, 1)
    told: list[Holder | None] = []
    n_looks = 0

    def wait(event: threading.Event, seconds: float) -> bool:
        nonlocal n_looks
        if seconds != RENEW_S:
            n_looks += 1
            say(memory_store, 1, count=n_looks // 4, is_free=n_looks == 200)
        return quick(event, seconds)

    with hold(memory_store, told, wait=wait):
        assert n_looks == 200
    assert [holder and holder.describe() for holder in told] == ["`interp run` (process 7 on elsewhere, since 2026-11-30 12:00:00+00:00)"]


def test_a_machine_that_fell_silent_is_not_waited_for_for_ever(memory_store: Store) -> None:
    """It was killed, or lost its network: no clock is compared, only whether it renews."""
    say(memory_store, 4)
    waited_s = 0.0

    def wait(event: threading.Event, seconds: float) -> bool:
        nonlocal waited_s
        waited_s += seconds if seconds != RENEW_S else 0
        return quick(event, seconds)

    with hold(memory_store, [], wait=wait):
        assert [item.path for item in memory_store.list(FOLDER)] == [f"{FOLDER}/00000005.json"]
    assert SILENT_S <= waited_s < SILENT_S + 10


def test_a_process_of_this_machine_that_is_gone_is_not_waited_for(memory_store: Store) -> None:
    """After `kill -9` the same command goes on at once."""
    machine, _, rest = name_process().partition(":")
    say(memory_store, 1, process=f"{machine}:{2**22 + 1}:{rest.split(':', 1)[1]}")
    told: list[Holder | None] = []
    with hold(memory_store, told):
        assert told == []


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"process_id": "x"}', b"\xff" * 9])
def test_a_damaged_lease_is_one_of_somebody_who_is_silent(memory_store: Store, content: bytes) -> None:
    """It names nobody, and must not end in an error."""
    memory_store.put(f"{FOLDER}/00000001.json", content)
    told: list[Holder | None] = []
    with hold(memory_store, told):
        assert told == [None]


def test_who_slept_learns_that_another_has_taken_over(memory_store: Store) -> None:
    """Both then work: nothing is damaged, and nobody is surprised."""
    heard = threading.Event()
    lost: list[Holder | None] = []

    def hear(holder: Holder | None) -> None:
        lost.append(holder)
        heard.set()

    with leased(memory_store, FOLDER, waits_for=lost.append, is_lost_to=hear, wait=quick):
        say(memory_store, 2)
        assert heard.wait(10)
    assert [holder and holder.host for holder in lost] == ["elsewhere"]
    assert json.loads(memory_store.get(f"{FOLDER}/00000002.json"))["host"] == "elsewhere"


class Refusing(Store):
    """A store that cannot create conditionally."""

    def put(self, path: str, data: bytes, *, create: bool = False) -> bool:
        """Refuse."""
        if create:
            message = "not implemented"
            raise StoreError(message)
        return super().put(path, data)


def test_where_nothing_can_be_created_conditionally_work_goes_on() -> None:
    """As it would have without a lease."""
    with hold(Refusing(open_store("memory://")._backend, "memory://"), []):  # type: ignore[arg-type]
        pass
