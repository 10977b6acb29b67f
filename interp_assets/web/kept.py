"""Answers that stay on the server for a while: a later plan names their tensors, and whoever made them fetches what he looks at.

A tensor's name is its digest, so a plan says the same whether the tensor comes along or lies here, and an answer that was computed twice lies here
once. Nobody finds what another user keeps.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Final, NamedTuple

from torch import Tensor

from interp_assets.errors import NotFoundError
from interp_assets.garcon.plan import TensorName, name_tensor

NAMELESS: Final = "?"
"""What the name of a user begins with whom the server does not know by a token of his own."""


def is_nameless(user: str) -> bool:
    """Tell whether a client has chosen what it is called, and so may come as many."""
    return user.startswith(NAMELESS)


class _Item(NamedTuple):
    tensor: Tensor
    end: float


class KeptTensors:
    """What users keep. Safe to use from several threads."""

    def __init__(self, user_bytes: int, seconds: float, clock: Callable[[], float]) -> None:
        """Keep up to `user_bytes` of each user for `seconds`; beyond, his oldest make room. Users without a name of their own count as one."""
        self._user_bytes, self._seconds, self._clock = user_bytes, seconds, clock
        self._lock = threading.Lock()
        self._items: dict[str, dict[str, _Item]] = {}

    def keep(self, user: str, tensors: Iterable[Tensor]) -> Iterator[TensorName]:
        """Keep tensors, and yield their names."""
        for tensor in tensors:
            there = tensor.detach().cpu()
            name = name_tensor(there)
            with self._lock:
                self._drop_ended()
                own = self._items.setdefault(user, {})
                own.pop(name.tensor, None)
                own[name.tensor] = _Item(there, self._clock() + self._seconds)
                self._make_room(user)
            yield name

    def get(self, user: str, digest: str) -> Tensor:
        """Return a tensor. Raises `NotFoundError`, in the same words whether it has ended, is another user's or never was."""
        with self._lock:
            self._drop_ended()
            item = self._items.get(user, {}).get(digest)
        if item is None:
            raise NotFoundError(
                f"Nothing of yours is kept under {digest:.64}. Kept results stay for {self._seconds / 60:g} minutes: run the trace again with "
                "keep=True, or send the tensor along."
            )
        return item.tensor

    def _make_room(self, user: str) -> None:
        """Let the oldest go until those of a user, or of all who name themselves, fit; the newest stays."""
        shared = [own for other, own in self._items.items() if other == user or (is_nameless(other) and is_nameless(user))]
        oldest = deque(sorted(((item.end, digest, own) for own in shared for digest, item in own.items()), key=lambda found: found[0]))
        n_bytes = sum(own[digest].tensor.nbytes for _, digest, own in oldest)
        while n_bytes > self._user_bytes and len(oldest) > 1:
            _, digest, own = oldest.popleft()
            n_bytes -= own.pop(digest).tensor.nbytes

    def _drop_ended(self) -> None:
        now = self._clock()
        for user, own in list(self._items.items()):
            self._items[user] = {digest: item for digest, item in own.items() if item.end > now}
            if not self._items[user]:
                del self._items[user]
