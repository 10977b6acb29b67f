"""What this process asks of its stores, counted: requests as S3 would bill them, and bytes, so that a partition shows what it moved.

One meter a process, because reads and writes come from threads that a stage starts; a run makes one partition after the other, and looks
at the meter before and after each. Training ranks tell their launcher at their end what they did; tasks on a cluster
count for themselves and are not in it.
"""

import threading
from collections.abc import Sequence
from typing import Final, NamedTuple

COALESCED_BYTES: Final = 1 << 20
"""Ranges of one object that are nearer than this are read by one request (obstore's default)."""


class Traffic(NamedTuple):
    """Requests and bytes."""

    gets: int = 0
    """GET and HEAD."""
    puts: int = 0
    """PUT, parts of uploads and their ends, LIST."""
    read_bytes: int = 0
    written_bytes: int = 0

    def since(self, before: "Traffic") -> "Traffic":
        """Return what came after `before`."""
        return Traffic(*(now - then for now, then in zip(self, before, strict=True)))


class Meter:
    """Adds up traffic, from any thread."""

    def __init__(self) -> None:
        """Start at nothing."""
        self._lock, self._total = threading.Lock(), Traffic()

    def read(self, n_bytes: int, n_requests: int = 1) -> None:
        """Count reads."""
        self.add(Traffic(gets=n_requests, read_bytes=n_bytes))

    def written(self, n_bytes: int, n_requests: int = 1) -> None:
        """Count writes and listings."""
        self.add(Traffic(puts=n_requests, written_bytes=n_bytes))

    def add(self, other: Traffic) -> None:
        """Count what was done, here or by another process for this one."""
        with self._lock:
            self._total = Traffic(*(mine + theirs for mine, theirs in zip(self._total, other, strict=True)))

    def total(self) -> Traffic:
        """Return everything so far."""
        return self._total


METER: Final = Meter()


def count_upload(n_bytes: int, part_bytes: int) -> int:
    """Return the requests of a streamed object: one when it fits a part, else its parts and the upload's begin and end."""
    return 1 if n_bytes <= part_bytes else -(-n_bytes // part_bytes) + 2


def count_ranges(starts: Sequence[int], lengths: Sequence[int]) -> int:
    """Return the requests of ranges of one object: near ones are read together."""
    n_requests, end = 0, -COALESCED_BYTES - 1
    for start, length in sorted(zip(starts, lengths, strict=True)):
        n_requests += start - end > COALESCED_BYTES
        end = max(end, start + length)
    return n_requests
