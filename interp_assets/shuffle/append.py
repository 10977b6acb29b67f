"""New shards are merged into an already mixed set by one sequential read and write, and the result is again exactly uniform.

A uniform order of old and new rows together is: a uniform order of the old, one of the new, and a uniform interleaving of the two. The old
rows have theirs; the new rows get one from a shuffle of their own (`generations.py`); what is left is the interleaving:

1. how many old and new rows each output shard takes: a count table with two columns, drawn as every other (`hypergeometric.py`);
2. inside a shard, chunk by chunk, how many of the next rows are old (hypergeometric on what remains), and a uniform word that says which.

Every output shard is a job that knows from the table where its rows start in the old and in the new set; it reads both forward and holds a
few chunks. Old plus new bytes are read once and written once, instead of 2 * passes times. The order inside each source is kept. Streams
carry no hook point, so hook points stay aligned. The merged shards have ids of their own: they hold other bytes than a shuffle from
scratch would. Source: the merging step of MergeShuffle (Bacher et al. 2015), cut into jobs.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from interp_assets.compute.seeds import Stream
from interp_assets.errors import PlanError
from interp_assets.planning.pipeline import Pipeline
from interp_assets.planning.progress import Advance, unheard
from interp_assets.shuffle.gather import gather_bucket
from interp_assets.shuffle.generations import before, has_grown, newest
from interp_assets.shuffle.hypergeometric import count_table, draw_hypergeometric
from interp_assets.shuffle.mixed import ROWS, MixedShard, open_mixed, read_mixed_ids, save_mixed
from interp_assets.shuffle.permutation import Draws
from interp_assets.shuffle.refs import merged_shard_ref, n_mixed_shards
from interp_assets.shuffle.rows import RowFormat, Segment, cut_segment
from interp_assets.shuffle.sizes import shares
from interp_assets.storage.direct import PIECE_BYTES, allocate
from interp_assets.storage.dtypes import ITEM_BYTES
from interp_assets.storage.lineage import MADE_FROM, Digests, create_current, find_current
from interp_assets.storage.manifest import ArtifactRef, Produced, combine_ids, file_part, read_part, timed
from interp_assets.storage.store import Store

WORD_ROWS: Final = 4096
"""Rows per interleaving word; part of what decides the bytes."""


class Appending(NamedTuple):
    """What is merged: the mixed shards of the old and of the new rows, and how many shards come out."""

    old: list[MixedShard]
    new: list[MixedShard]
    n_buckets: int

    @property
    def n_rows(self) -> tuple[int, int]:
        """Rows of the old and of the new set."""
        return sum(shard.n_rows for shard in self.old), sum(shard.n_rows for shard in self.new)


def appended_ref(pipeline: Pipeline, hook_point: str, sources: Appending, bucket: int) -> ArtifactRef:
    """Address a merged shard. Its inputs are the mixed shards it was merged from."""
    inputs = {role: combine_ids([shard.ref.artifact_id for shard in shards]) for role, shards in (("old", sources.old), ("new", sources.new))}
    return merged_shard_ref(pipeline, hook_point, bucket, sources.n_buckets, inputs)


def mix_bucket(pipeline: Pipeline, store: Store, hook_point: str, bucket: int, progress: Advance = unheard, known: Digests | None = None) -> Produced:
    """Make mixed shard `bucket` of a pipeline, grown or not; `known` digests are not read again.

    The newest generation's mixed shards are small beside the old ones, and each merged shard may need any of them: the first bucket makes them all,
    old ones too, where they are out of date. Two jobs that do so at once make equal bytes.
    """
    known = known or Digests(store)
    if not has_grown(pipeline):
        return gather_bucket(pipeline, store, hook_point, bucket, progress, known=known)
    for part in (before(pipeline), newest(pipeline)):
        for own in range(n_mixed_shards(pipeline)):
            mix_bucket(part, store, hook_point, own, known=known)
    sources = Appending(open_mixed(before(pipeline), store, hook_point), open_mixed(newest(pipeline), store, hook_point), n_mixed_shards(pipeline))
    return append_bucket(pipeline, store, hook_point, sources, bucket, progress)


@timed
def append_bucket(pipeline: Pipeline, store: Store, hook_point: str, sources: Appending, bucket: int, progress: Advance = unheard) -> Produced:
    """Make merged shard `bucket`: an ordinary mixed shard. Holds some chunks and the shard's row ids, whatever its size."""
    formats = sorted({(shard.d_in, shard.dtype) for shard in [*sources.old, *sources.new]})
    if len(formats) != 1:
        raise PlanError(f"Rows of {len(formats)} kinds cannot be merged at {hook_point}: {formats} (width, dtype). Shuffle them apart.")
    ref = appended_ref(pipeline, hook_point, sources, bucket)
    kept = {MADE_FROM: combine_ids([shard.manifest.digest for shard in (*sources.old, *sources.new)])}
    if (manifest := find_current(store, ref, kept)) is not None:
        return Produced(ref, manifest, is_cached=True)
    draws, (n_old, n_new) = Draws(pipeline.config.seed), sources.n_rows
    table = merge_counts(draws, n_old, n_new, sources.n_buckets)
    at_old, at_new = (int(count) for count in table[:bucket].sum(axis=0))
    words = merge_words(merge_stream(draws, n_old, n_new, bucket), int(table[bucket, 0]), int(table[bucket, 1]))
    parts = _merge(_Forward(store, sources.old, at_old), _Forward(store, sources.new, at_new), words)
    with create_current(store, ref, kept) as art:
        save_mixed(art, parts, int(table[bucket].sum()), RowFormat(*formats[0]), progress)
    return art.produced


def merge_counts(draws: Draws, n_old: int, n_new: int, n_buckets: int) -> NDArray[np.int64]:
    """Draw how many old and new rows each output shard takes, `[n_buckets, 2]`."""
    return count_table(partial(draws.stream, "append", n_old, n_new, "counts"), shares(n_old + n_new, n_buckets), [n_old, n_new])


def merge_stream(draws: Draws, n_old: int, n_new: int, bucket: int) -> Stream:
    """Open the stream of one output shard's words."""
    return draws.stream("append", n_old, n_new, "words", bucket)


def merge_words(bits: Stream, n_old: int, n_new: int, word_rows: int = WORD_ROWS) -> Iterator[NDArray[np.bool_]]:
    """Draw a uniform interleaving of `n_old` and `n_new` rows, `word_rows` places a time; True means the next old row."""
    while n_old + n_new:
        n_places = min(word_rows, n_old + n_new)
        from_old = draw_hypergeometric(bits, n_old, n_new, n_places)
        yield bits.permutation(n_places) < from_old
        n_old, n_new = n_old - from_old, n_new - (n_places - from_old)


def _merge(old: "_Forward", new: "_Forward", words: Iterator[NDArray[np.bool_]]) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.uint8]]]:
    """Yield row ids and rows of one output shard, a word at a time."""
    for is_old in words:
        ids, rows = np.empty(len(is_old), np.uint64), np.empty((len(is_old), old.row_bytes), np.uint8)
        for source, places in ((old, is_old), (new, ~is_old)):
            rows[places], ids[places] = source.take(int(places.sum()))
        yield ids, rows


class _Forward:
    """Reads the rows of several mixed shards one after the other, from a given row on, every checksum block once."""

    def __init__(self, store: Store, shards: Sequence[MixedShard], first_row: int) -> None:
        self.row_bytes = shards[0].d_in * ITEM_BYTES[shards[0].dtype] if shards else 0
        self._parts = self._read(store, shards, first_row)
        self._rows = np.zeros((0, self.row_bytes), np.uint8)
        self._ids = np.zeros(0, np.uint64)

    def take(self, n_rows: int) -> tuple[NDArray[np.uint8], NDArray[np.uint64]]:
        """Return the next `n_rows` rows and their ids."""
        while len(self._rows) < n_rows:
            rows, ids = next(self._parts)
            self._rows, self._ids = np.concatenate([self._rows, rows]), np.concatenate([self._ids, ids])
        taken = self._rows[:n_rows], self._ids[:n_rows]
        self._rows, self._ids = self._rows[n_rows:], self._ids[n_rows:]
        return taken

    def _read(self, store: Store, shards: Sequence[MixedShard], first_row: int) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint64]]]:
        scratch = memoryview(allocate(PIECE_BYTES))
        for shard in shards:
            start, first_row = min(first_row, shard.n_rows), max(0, first_row - shard.n_rows)
            ids = read_mixed_ids(store, shard, start, shard.n_rows)
            wanted = shard.rows.start + start * self.row_bytes, (shard.n_rows - start) * self.row_bytes
            held, done = b"", 0
            for piece in cut_segment(Segment(file_part(shard.ref.path, shard.manifest.file(ROWS), *wanted), 0)):
                held += read_part(store, piece.part, scratch)
                n_whole = len(held) // self.row_bytes
                rows = np.frombuffer(held, np.uint8, n_whole * self.row_bytes).reshape(n_whole, self.row_bytes)
                yield rows, ids[done : done + n_whole]
                held, done = held[n_whole * self.row_bytes :], done + n_whole
