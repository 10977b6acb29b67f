"""Answers that stay on the server for a while: a later plan names their tensors, and whoever made them fetches what he looks at.

A tensor's name is its digest, so a plan says the same whether the tensor comes along or lies here, and an answer that was computed twice lies here
once. Nobody finds what another user keeps.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from torch import Tensor

from interp_assets.errors import NotFoundError
from interp_assets.garcon.plan import TensorName, name_tensor


class _Item(NamedTuple):
    tensor: Tensor
    end: float


class KeptTensors:
    """What users keep. Safe to use from several threads."""

    def __init__(self, user_bytes: int, seconds: float, clock: Callable[[], float]) -> None:
        """Keep up to `user_bytes` of each user for `seconds`; beyond, his oldest make room."""
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
                while sum(item.tensor.nbytes for item in own.values()) > self._user_bytes and len(own) > 1:
                    del own[next(iter(own))]
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

    def _drop_ended(self) -> None:
        now = self._clock()
        for user, own in list(self._items.items()):
            self._items[user] = {digest: item for digest, item in own.items() if item.end > now}
            if not self._items[user]:
                del self._items[user]
