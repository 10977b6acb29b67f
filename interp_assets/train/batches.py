"""Mixed shards become training batches: batch i is a pure function of (manifests, seed, i), read ahead in the background.

The rows of all mixed shards of a hook point form one endless line, and batch i is its rows [i * batch_rows, (i + 1) * batch_rows):

1. Epoch 0 is the shards in order of bucket, read as they lie: they are mixed already.
2. A later epoch takes the shards in a keyed order, and permutes each chunk of `CHUNK_ROWS` in memory, so that rows meet other
   rows while the disk still reads forward. The keys depend on the pipeline's seed only: SAEs of a sweep, whatever their own seed,
   see the same rows in the same batches, and so do all hook points, whatever their widths: transcoders and crosscoders read several.
3. Batches run across the borders of chunks, shards and epochs: no row is dropped, none comes twice in an epoch.

So a trainer resumes at any batch with nothing but its number, and the number of ranks changes nothing. Memory: two chunks and the
batches that are read ahead.
"""

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from jaxtyping import Shaped
from torch import Tensor

from interp_assets.compute.seeds import stream
from interp_assets.errors import ArtifactForeignError, InputError
from interp_assets.shuffle.mixed import ROWS, MixedShard
from interp_assets.storage.store import Store
from interp_assets.storage.tensors import read_rows

CHUNK_ROWS: Final = 1 << 14
"""Rows that are read at once, and permuted among themselves in later epochs: 128 MiB of bfloat16 at a width of 4,096."""
_BATCHES_AHEAD: Final = 4


class Batch(NamedTuple):
    """One global batch: its number, and its rows in the stored dtype."""

    step: int
    rows: Shaped[Tensor, "batch d_in"]


class Chunk(NamedTuple):
    """Consecutive rows [start, stop) of the shard at place `shard` of the list, as read in epoch `epoch`."""

    epoch: int
    shard: int
    start: int
    stop: int

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return self.stop - self.start


@dataclass(frozen=True)
class RowOrder:
    """The endless line of rows: a pure function of shard sizes, chunk size and seed."""

    shard_rows: tuple[int, ...]
    chunk_rows: int
    seed: int

    @property
    def n_rows(self) -> int:
        """Rows of one epoch."""
        return sum(self.shard_rows)

    def chunks(self, position: int) -> Iterator[tuple[int, Chunk]]:
        """Yield the chunks from the one that holds `position` on, for ever, with the position of the first row of each."""
        epoch = position // self.n_rows
        first = epoch * self.n_rows
        while True:
            for shard in self._shard_order(epoch):
                for start in range(0, self.shard_rows[shard], self.chunk_rows):
                    chunk = Chunk(epoch, shard, start, min(start + self.chunk_rows, self.shard_rows[shard]))
                    if first + chunk.n_rows > position:
                        yield first, chunk
                    first += chunk.n_rows
            epoch += 1

    def permutation(self, chunk: Chunk) -> Tensor | None:
        """Return the order in which a chunk's rows come, or None when they come as they lie."""
        if chunk.epoch == 0:
            return None
        keyed = stream(self.seed, "train", "epoch", chunk.epoch, "shard", chunk.shard, "chunk", chunk.start)
        return torch.from_numpy(keyed.permutation(chunk.n_rows))

    def _shard_order(self, epoch: int) -> list[int]:
        n = len(self.shard_rows)
        return list(range(n)) if epoch == 0 else stream(self.seed, "train", "epoch", epoch, "shards").permutation(n).tolist()


def make_row_order(shards: Sequence[MixedShard], seed: int, d_in: int, where: str) -> RowOrder:
    """Order the rows of mixed shards. Raises `InputError` when there are none, `ArtifactForeignError` when they have another width."""
    wrong = [f"{shard.ref.path}: d_in {shard.d_in}" for shard in shards if shard.d_in != d_in]
    if wrong:
        raise ArtifactForeignError(
            f"{len(wrong)} mixed shards of {where} don't have d_in = {d_in}, the width that the plan gives this hook point: {wrong[:5]}. "
            "Plan again with `interp run`, and re-materialize `mixed_shards`."
        )
    sizes = tuple(shard.n_rows for shard in shards)
    if sum(sizes) == 0:
        raise InputError(f"The mixed shards of {where} hold no rows: there is nothing to train on. Give `corpus` more text.")
    return RowOrder(sizes, CHUNK_ROWS, seed)


def iter_batches(store: Store, shards: Sequence[MixedShard], order: RowOrder, batch_rows: int, steps: range) -> Generator[Batch]:
    """Yield the batches of consecutive steps, verified, read ahead by a background thread. Errors of the thread are raised here."""
    batches, reader = _cut_batches(store, shards, order, batch_rows, steps), ThreadPoolExecutor(1, "batches")
    ahead = deque(reader.submit(next, batches, None) for _ in range(_BATCHES_AHEAD))
    try:
        while (batch := ahead.popleft().result()) is not None:
            ahead.append(reader.submit(next, batches, None))
            yield batch
    finally:
        reader.shutdown(cancel_futures=True)


def describe_batch(shards: Sequence[MixedShard], order: RowOrder, batch_rows: int, step: int) -> str:
    """Name the shards and rows that batch `step` was made of, for messages."""
    parts: list[str] = []
    position, end = step * batch_rows, (step + 1) * batch_rows
    for first, chunk in order.chunks(position):
        if first >= end:
            break
        rows = f"rows {chunk.start:,} to {chunk.stop:,}"
        if order.permutation(chunk) is None:
            rows = f"rows {chunk.start + max(0, position - first):,} to {chunk.start + min(chunk.n_rows, end - first):,}"
        parts.append(f"{rows} of {shards[chunk.shard].ref.path} (epoch {chunk.epoch})")
    return "; ".join(parts)


def _cut_batches(store: Store, shards: Sequence[MixedShard], order: RowOrder, batch_rows: int, steps: range) -> Iterator[Batch]:
    if not steps:
        return
    pending: list[Tensor] = []
    n_pending, step, position = 0, steps.start, steps.start * batch_rows
    for first, chunk in order.chunks(position):
        rows = _read_chunk(store, shards[chunk.shard], order, chunk)[max(0, position - first) :]
        while len(rows):
            taken, rows = rows[: batch_rows - n_pending], rows[batch_rows - n_pending :]
            pending.append(taken)
            n_pending += len(taken)
            if n_pending < batch_rows:
                break
            yield Batch(step, pending[0] if len(pending) == 1 else torch.cat(pending))
            pending, n_pending, step = [], 0, step + 1
            if step == steps.stop:
                return


def _read_chunk(store: Store, shard: MixedShard, order: RowOrder, chunk: Chunk) -> Tensor:
    rows = read_rows(store, shard.ref.path, shard.manifest, ROWS, shard.rows, chunk.start, chunk.stop)
    permutation = order.permutation(chunk)
    return rows if permutation is None else rows[permutation]
