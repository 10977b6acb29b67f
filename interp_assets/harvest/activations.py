"""A token shard and the subject model become one activation shard for every hook point, in one forward per batch.

1. Contexts are taken in order, a window of them at a time. Inside a window, contexts whose lengths round up to the same multiple of 16
   are run together, `FORWARD_TOKENS` positions at once.
2. Every row is checked to be finite, cast to the stored dtype, put at its place in the window and written when the window is complete:
   row i of the file is token position i of the shard, the not valid ones included, padding never.
3. Statistics are taken of the stored rows in blocks of a fixed size.

A context's padded length depends on its own length only, so a row does not depend on what it was padded to. A matrix product may round
differently for another number of contexts (on a CPU that was seen for contexts of 16-64 tokens at d_model 256: a few stored bfloat16
values), so that number is a function of the padded length and of nothing else. Only where memory is short, `execution.tokens_per_batch`
below `FORWARD_TOKENS` makes it smaller. Where the model itself computes by the length (`garcon/rope.py`), contexts of one length are run together,
unpadded. Of the number of threads a row is independent too (`garcon/subject.py`).

Several hook points are written side by side; a NaN or an infinity at one of them leaves nothing published at any.
Memory: one window of rows for each hook point (at least 16,384), and one forward.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Final, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from interp_assets.corpus.refs import token_shard_ref
from interp_assets.corpus.tokens import TokenShard, context_offsets, load_tokens
from interp_assets.errors import InputError, NonFiniteError
from interp_assets.garcon.subject import SubjectModel
from interp_assets.harvest.refs import activation_shard_ref
from interp_assets.harvest.rows import ROWS
from interp_assets.harvest.statistics import StatisticsAccumulator, save_shard_statistics
from interp_assets.planning.pipeline import Pipeline, shard_key
from interp_assets.planning.progress import Advance, choose_word, format_count, unheard
from interp_assets.storage.manifest import ArtifactWriter, ByteSink, Produced, create_artifact, find_made_from, load_manifest
from interp_assets.storage.store import Store
from interp_assets.storage.tensors import TensorSpec, as_bytes, make_header

PADDING_STEP: Final = 16
WINDOW_ROWS: Final = 16384
FORWARD_TOKENS: Final = 8192
"""Token positions per forward: enough to fill a device, part of what decides the last bits."""


class Batch(NamedTuple):
    """Contexts that are run together, padded on the right to one length."""

    token_ids: Int64[Tensor, "batch context"]
    attention_mask: Bool[Tensor, "batch context"]
    rows: Int64[Tensor, " n"]
    """Row in the window of every position that is not padding, in the order of the mask."""


def harvest_shard(pipeline: Pipeline, store: Store, model: SubjectModel, index: int, progress: Advance = unheard) -> dict[str, Produced]:
    """Publish the activation shards of corpus shard `index` at all configured hook points; `progress` advances by rows.

    What was made from these very tokens is kept; if some are missing, those are made in one run over the tokens. Raises `NonFiniteError`,
    naming shard, hook point, row, context, offset and token, when an activation is not finite or does not fit the stored dtype.
    """
    start = time.monotonic()
    refs = {name: activation_shard_ref(pipeline, name, index) for name in pipeline.config.harvest.hook_points}
    source = load_manifest(store, token_shard_ref(pipeline, index))
    found = {name: find_made_from(store, ref, [source]) for name, ref in refs.items()}
    missing = [name for name, manifest in found.items() if manifest is None]
    produced = {name: Produced(refs[name], manifest, is_cached=True, wall_s=0.0) for name, manifest in found.items() if manifest is not None}
    if not missing:
        return produced
    tokens = load_tokens(pipeline, store, index)
    for name in missing:
        if model.d_in(name) != pipeline.d_in(name):
            raise InputError(
                f"Hook point {name!r} has width {model.d_in(name)} in {model.name}, the plan says {pipeline.d_in(name)}: "
                "plan again with `interp run`."
            )
    with ExitStack() as stack:
        writers: dict[str, _RowWriter] = {}
        for name in missing:
            art = stack.enter_context(create_artifact(store, refs[name], made_from=[source]))
            writers[name] = _RowWriter(art, stack, pipeline, name, index, tokens)
        for n_rows in _harvest(model, tokens, writers, pipeline.config.execution.tokens_per_batch):
            progress(n_rows)
        for writer in writers.values():
            writer.finish()
    for name, writer in writers.items():
        produced[name] = writer.art.produced._replace(wall_s=time.monotonic() - start)
    return {name: produced[name] for name in refs}


def make_batches(
    token_ids: NDArray[np.uint32],
    offsets: NDArray[np.int64],
    tokens_per_batch: int,
    *,
    max_context: int,
    must_see_mask: bool,
    step: int = PADDING_STEP,
) -> Iterator[Batch]:
    """Group contexts by their length, padded to a multiple of `step`, and yield batches of about `tokens_per_batch` positions, at least one each.

    `offsets` holds the first row of every context and the end. With `must_see_mask` (encoders) a context that fills its padded length
    exactly is padded further or kept apart, so that whether a mask is used depends on its own length only.
    """
    lengths = np.diff(offsets)
    padded = _padded_lengths(lengths, max_context, step, must_see_mask=must_see_mask)
    is_full = padded == lengths
    keys = padded * 2 + (is_full if must_see_mask else 0)
    for key in np.unique(keys):
        members = np.flatnonzero(keys == key)
        length = int(key) // 2
        n_contexts = max(1, tokens_per_batch // length)
        for first in range(0, len(members), n_contexts):
            chosen = members[first : first + n_contexts]
            places = np.arange(length)[None, :]
            mask = places < lengths[chosen][:, None]
            rows = offsets[chosen][:, None] + places
            padded_ids = np.zeros((len(chosen), length), np.int64)
            padded_ids[mask] = token_ids[rows[mask]]
            yield Batch(torch.from_numpy(padded_ids), torch.from_numpy(mask), torch.from_numpy(rows[mask]))


def _padded_lengths(lengths: NDArray[np.int64], max_context: int, step: int, *, must_see_mask: bool) -> NDArray[np.int64]:
    room = lengths + 1 if must_see_mask else lengths
    return np.maximum(lengths, np.minimum(max_context, -(-room // step) * step))


def _harvest(model: SubjectModel, tokens: TokenShard, writers: "dict[str, _RowWriter]", tokens_per_batch: int) -> Iterator[int]:
    """Run all contexts and hand the rows to the writers; yields the number of rows of each finished batch."""
    offsets = context_offsets(tokens.contexts)
    for first, stop in _windows(offsets, WINDOW_ROWS):
        base = int(offsets[first])
        n_rows = int(offsets[stop]) - base
        for writer in writers.values():
            writer.open_window(base, n_rows)
        batches = make_batches(
            tokens.token_ids[base : base + n_rows],
            offsets[first : stop + 1] - base,
            min(tokens_per_batch, FORWARD_TOKENS),
            max_context=model.max_context,
            must_see_mask=not model.is_causal,
            step=1 if model.follows_length else PADDING_STEP,
        )
        for batch in batches:
            mask = batch.attention_mask
            captured = model.capture(batch.token_ids, None if bool(mask.all()) else mask, list(writers))
            for name, writer in writers.items():
                writer.put(batch.rows, captured[name][mask.to(captured[name].device)])
            yield len(batch.rows)
        for writer in writers.values():
            writer.close_window()


def _windows(offsets: NDArray[np.int64], window_rows: int) -> Iterator[tuple[int, int]]:
    """Cut contexts into runs [first, stop) of at most `window_rows` rows, at least one context each."""
    first = 0
    n_contexts = len(offsets) - 1
    while first < n_contexts:
        stop = int(np.searchsorted(offsets, offsets[first] + window_rows, side="right")) - 1
        stop = min(n_contexts, max(first + 1, stop))
        yield first, stop
        first = stop


class _RowWriter:
    """Checks, casts, writes and counts the rows of one hook point, window by window."""

    def __init__(self, art: ArtifactWriter, stack: ExitStack, pipeline: Pipeline, hook_point: str, index: int, tokens: TokenShard) -> None:
        """Open the rows file on `stack`, so that it is closed with everything else of the shard."""
        self.art = art
        self._name, self._index, self._tokens = hook_point, index, tokens
        self._d_in = pipeline.d_in(hook_point)
        self._dtype_name = pipeline.config.harvest.dtype
        self._dtype = getattr(torch, self._dtype_name)
        self._statistics = StatisticsAccumulator(self._d_in)
        spec = TensorSpec(self._dtype_name, (tokens.n_rows, self._d_in))
        self._file = stack.enter_context(ExitStack())
        self._sink: ByteSink = self._file.enter_context(art.open(ROWS, n_rows=tokens.n_rows, dtype=spec.dtype, shape=spec.shape))
        self._sink.write(make_header({"rows": spec}))
        self._base = 0
        self._window = torch.empty(0)

    def open_window(self, base: int, n_rows: int) -> None:
        self._base = base
        self._window = torch.empty((n_rows, self._d_in), dtype=self._dtype)

    def put(self, rows: Int64[Tensor, " n"], values: Float[Tensor, "n d_in"]) -> None:
        stored = values.to(self._dtype)
        if not bool(torch.isfinite(stored).all()):
            self._refuse(rows, stored.cpu(), values.cpu())
        self._window[rows] = stored.cpu()

    def close_window(self) -> None:
        self._sink.write(as_bytes(self._window))
        valid = torch.from_numpy(self._tokens.valid[self._base : self._base + len(self._window)].copy())
        self._statistics.add(self._window[valid])

    def finish(self) -> None:
        """Close the rows file and write the statistics."""
        self._file.close()
        save_shard_statistics(self.art, self._statistics.finish(), self._tokens.n_rows, self._dtype_name)

    def _refuse(self, rows: Tensor, stored: Tensor, values: Tensor) -> None:
        bad_rows = ~torch.isfinite(stored).all(dim=1)
        which = int(torch.where(bad_rows, rows, rows.max() + 1).argmin())
        row = self._base + int(rows[which])
        column = int((~torch.isfinite(stored[which])).nonzero()[0])
        value = float(values[which, column])
        context = int(self._tokens.contexts[row])
        offset = row - int(np.searchsorted(self._tokens.contexts, context))
        overflow = f"; the value {value:.4g} does not fit {self._dtype_name}, use bfloat16" if np.isfinite(value) else ""
        bad = f"{format_count(int(bad_rows.sum()), 'row')} of the batch {choose_word(int(bad_rows.sum()), 'is', 'are')}"
        raise NonFiniteError(
            f"Activation {stored[which, column]} at hook point {self._name!r} of {shard_key(self._index)}: row {row:,} (context {context:,}, offset "
            f"{offset}, token id {int(self._tokens.token_ids[row])}), dimension {column}{overflow}. {bad} "
            "not finite; nothing of the shard was published. Run the model in float32 or bfloat16, or take the document out of the corpus."
        )
