"""Stores count what they are asked for, as S3 would bill it."""

from interp_assets.storage.store import open_store
from interp_assets.storage.traffic import METER, Meter, Traffic, count_ranges, count_upload


def test_every_request_of_a_store_is_counted() -> None:
    """A bill that is compared with an estimate must have every request in it, lookups and listings too."""
    store, before = open_store("memory://traffic"), METER.total()
    store.put("a", b"12345")
    assert store.get("a") == b"12345"
    assert store.get_ranges("a", [0, 3], [1, 2]) == [b"1", b"45"]
    assert store.size("b") is None
    with store.open_writer("c") as sink:
        sink.write(memoryview(bytearray(7)))
    assert len(list(store.list())) == 2
    assert METER.total().since(before) == Traffic(gets=3, puts=3, read_bytes=8, written_bytes=12)


def test_near_ranges_are_one_request_and_far_ones_are_not() -> None:
    """The client reads over small gaps; the order in which ranges are asked for does not matter."""
    mib = 1 << 20
    assert count_ranges([0, 10, mib], [10, 10, 10]) == 1
    assert count_ranges([5 * mib, 0, 2 * mib], [1, mib // 2, 1]) == 3
    assert count_ranges([], []) == 0


def test_an_upload_is_its_parts_and_two_more() -> None:
    """Small objects are one PUT; large ones begin, send parts and end."""
    assert (count_upload(0, 8), count_upload(8, 8), count_upload(9, 8), count_upload(24, 8)) == (1, 1, 4, 5)


def test_meters_add_up() -> None:
    """What came since a moment is a difference."""
    meter = Meter()
    meter.read(3)
    before = meter.total()
    meter.written(5, 2)
    assert meter.total().since(before) == Traffic(puts=2, written_bytes=5)
