"""Pass C: for the examples that lie in one dataset shard, how their latent fires on the tokens around them.

A window is the example's row and up to `features.window` rows on each side, inside the same context and the same document. Activations come
from one of two places, and agree:

- `keep: all`: a lookup. Two binary searches in the sorted store of firings give the firings inside a window; no activation is read.
- `keep: candidates`: the encoder's column is moved to the data. The shard is streamed once, and each window's rows times its latent's column are
  computed as soon as the stream has passed the window's end. The opposite way, shipping the rows around each example to the job of its
  latent, moves 8 to 117 TB for a million latents; a window of firings is 65 bytes.

With `features.gather` the rows around the examples are written as well, a file for each latent slice (gather.py), from the same single read.

Rows that are not valid carry no activation. The format is described in docs/formats/example_activations.md.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Final, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from interp_assets.corpus.tokens import TokenShard, load_tokens
from interp_assets.harvest.rows import RowBlock, iter_row_blocks
from interp_assets.planning.pipeline import Pipeline
from interp_assets.storage.lineage import Digests, create_current, find_current, trace
from interp_assets.storage.manifest import Produced, timed
from interp_assets.storage.store import Store
from interp_assets.train.checkpoint import check_sae
from interp_assets.train.sae import Sae
from interp_assets.visualize import kernels
from interp_assets.visualize.candidates import FIRINGS
from interp_assets.visualize.encoder import RowLimits
from interp_assets.visualize.examples import EXAMPLES
from interp_assets.visualize.firings import ROW_BITS, expand_ranges
from interp_assets.visualize.gather import Gatherer, rows_of_windows
from interp_assets.visualize.lineage import candidates_lineage, examples_lineage, load_current, windows_lineage
from interp_assets.visualize.refs import slice_bounds, windows_ref
from interp_assets.visualize.tables import LatentTable, create_table
from interp_assets.visualize.thresholds import load_thresholds

WINDOWS: Final = "windows.parquet"
WINDOW_SCHEMA: Final = pa.schema(
    [
        ("latent", pa.uint32()),
        ("row_id", pa.uint64()),
        ("first_row", pa.uint64()),
        ("length", pa.uint16()),
        ("offsets", pa.list_(pa.uint16())),
        ("activations", pa.list_(pa.float32())),
    ]
)
GROUP_LATENTS: Final = 1 << 14
"""Latents whose windows are looked up at once."""
GROUP_WINDOWS: Final = 512
"""Windows whose rows are multiplied at once."""


class Requests(NamedTuple):
    """Windows wanted in one shard, sorted by latent and row. Rows are counted from the shard's first."""

    latents: NDArray[np.int64]
    rows: NDArray[np.int64]
    activations: NDArray[np.float32]
    """Latent activation of the example itself."""
    firsts: NDArray[np.int64]
    lengths: NDArray[np.int64]

    def take(self, places: NDArray[np.int64]) -> "Requests":
        """Return some of the requests."""
        return Requests(self.latents[places], self.rows[places], self.activations[places], self.firsts[places], self.lengths[places])


class Spikes(NamedTuple):
    """Activations inside the windows: window i's are [starts[i], starts[i + 1])."""

    starts: NDArray[np.int64]
    offsets: NDArray[np.uint16]
    activations: NDArray[np.float32]


@timed
def fire_windows(pipeline: Pipeline, store: Store, sae: Sae, name: str, index: int) -> Produced:
    """Run pass C for dataset shard `index`, over the examples of all latent slices of the SAE called `name`.

    Raises `ArtifactMissingError` that names the slices without examples, `ArtifactForeignError` for those of an earlier training.
    """
    ref = windows_ref(pipeline, name, index)
    known = Digests(store)
    kept = trace(known, windows_lineage(pipeline, name, index))
    if current := find_current(store, ref, kept):
        return Produced(ref, current, is_cached=True)
    check_sae(pipeline, sae, name)
    slices = range(pipeline.config.features.latent_slices)
    examples = [examples_lineage(pipeline, name, latent_slice) for latent_slice in slices]
    tables = [
        LatentTable(store, item[0].ref.path, manifest, EXAMPLES)
        for item, manifest in zip(examples, load_current(store, examples, known), strict=True)
    ]
    tokens = load_tokens(pipeline, store, index)
    requests = _read_requests(tables, tokens, index, pipeline.config.features.window)
    candidates = [candidates_lineage(pipeline, name, index, latent_slice) for latent_slice in slices]
    manifests = load_current(store, candidates, known)
    hook_point, n_block = pipeline.config.sae(name).hook_point, pipeline.config.execution.rows_per_block
    blocks = iter_row_blocks(pipeline, store, hook_point, index, n_block)
    gatherer = _make_gatherer(pipeline, name, requests, tokens, index) if pipeline.config.features.gather else None
    blocks = gatherer.watch(blocks) if gatherer else blocks
    if pipeline.config.features.keep == "all":
        firings = [LatentTable(store, item[0].ref.path, manifest, FIRINGS) for item, manifest in zip(candidates, manifests, strict=True)]
        parts = _look_up(firings, requests, index)
    else:
        limits = load_thresholds(pipeline, store, name, index) if sae.kind == "topk" else None
        parts = _encode(pipeline, sae, blocks, tokens, requests, limits)
    with create_current(store, ref, kept) as art:
        with create_table(art, WINDOWS, WINDOW_SCHEMA) as table:
            for asked, spikes in parts:
                table.append(_columns(asked, spikes, index))
        if gatherer:
            for _ in blocks:  # with `keep: all` nothing else reads them
                pass
            art.facts["n_gathered_rows"] = gatherer.write(art)
        art.facts |= {"n_windows": table.n_rows, "n_rows": tokens.n_rows}
    return art.produced


def window_bounds(
    contexts: NDArray[np.uint32], documents: NDArray[np.uint32], rows: NDArray[np.int64], window: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the first row and the length of the window around each of `rows`: inside its context and its document."""
    changes = np.flatnonzero((contexts[1:] != contexts[:-1]) | (documents[1:] != documents[:-1])) + 1
    edges = np.concatenate([[0], changes, [len(contexts)]])
    place = np.searchsorted(edges, rows, side="right")
    firsts = np.maximum(edges[place - 1], rows - window)
    return firsts, np.minimum(edges[place], rows + window + 1) - firsts


def _read_requests(tables: list[LatentTable], tokens: TokenShard, index: int, window: int) -> Requests:
    columns = [table.read(0, 1 << 31, ["latent", "row_id", "activation"]) for table in tables]
    latents, row_ids, activations = (np.concatenate([part[name] for part in columns]) for name in ("latent", "row_id", "activation"))
    mine = row_ids >> np.uint64(ROW_BITS) == np.uint64(index)
    rows = (row_ids[mine] & np.uint64((1 << ROW_BITS) - 1)).astype(np.int64)
    return Requests(latents[mine].astype(np.int64), rows, activations[mine], *window_bounds(tokens.contexts, tokens.documents, rows, window))


def _look_up(tables: list[LatentTable], requests: Requests, index: int) -> Iterator[tuple[Requests, Spikes]]:
    """Yield the windows of one latent group after the other, found in the store of firings."""
    first_id = np.uint64(index << ROW_BITS)
    for table in tables:
        for start in range(table.start // GROUP_LATENTS * GROUP_LATENTS, table.stop, GROUP_LATENTS):
            low, high = np.searchsorted(requests.latents, [max(start, table.start), min(start + GROUP_LATENTS, table.stop)])
            asked = requests.take(np.arange(low, high))
            if low == high:
                continue
            found = table.read(int(asked.latents[0]), int(asked.latents[-1]) + 1)
            keys = (found["latent"].astype(np.int64) - start << ROW_BITS) + (found["row_id"] - first_id).astype(np.int64)
            begin = (asked.latents - start << ROW_BITS) + asked.firsts
            low_places, high_places = np.searchsorted(keys, begin), np.searchsorted(keys, begin + asked.lengths)
            counts = high_places - low_places
            places = expand_ranges(low_places, counts)
            offsets = (keys[places] - np.repeat(begin, counts)).astype(np.uint16)
            yield asked, Spikes(np.concatenate([[0], np.cumsum(counts)]), offsets, found["activation"][places])


def _make_gatherer(pipeline: Pipeline, name: str, requests: Requests, tokens: TokenShard, index: int) -> Gatherer:
    """Find the rows that the windows of each latent slice cover."""
    needed = []
    for latent_slice in range(pipeline.config.features.latent_slices):
        low, high = np.searchsorted(requests.latents, slice_bounds(pipeline, name, latent_slice))
        needed.append(rows_of_windows(requests.firsts[low:high], requests.lengths[low:high], tokens.n_rows))
    return Gatherer(needed, f"Dataset shard {index} of SAE {name!r}")


def _encode(
    pipeline: Pipeline, sae: Sae, blocks: Iterator[RowBlock], tokens: TokenShard, requests: Requests, limits: RowLimits | None
) -> Iterator[tuple[Requests, Spikes]]:
    """Yield all windows at once, computed while the shard's rows stream by."""
    rounds = pipeline.config.features.encode_dtype == "bfloat16"
    sae = replace(sae, W_enc=sae.W_enc.bfloat16().float()) if rounds else sae
    by_end = np.argsort(requests.firsts + requests.lengths, kind="stable")
    ends = (requests.firsts + requests.lengths)[by_end]
    width = 2 * pipeline.config.features.window + 1
    found: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]] = []  # window among the requests, offset in it, activation
    buffer, n_done = torch.empty((0, sae.d_in)), 0
    for first_row, rows in blocks:
        buffer = torch.cat([buffer[max(0, len(buffer) - width) :], (rows.bfloat16() if rounds else rows).float()])
        n_ready = int(np.searchsorted(ends, first_row + len(rows), side="right"))
        fire = partial(_fire, sae, tokens, buffer=buffer, buffer_first=first_row + len(rows) - len(buffer), width=width, limits=limits)
        parts = [by_end[low : min(low + GROUP_WINDOWS, n_ready)] for low in range(n_done, n_ready, GROUP_WINDOWS)]
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for part, dense in zip(parts, pool.map(lambda part, fire=fire: fire(requests.take(part)), parts), strict=True):
                windows, offsets = np.nonzero(dense)
                found.append((part[windows], offsets, dense[windows, offsets]))
        n_done = n_ready
    windows, offsets, activations = (np.concatenate(columns) for columns in zip(*found, strict=True)) if found else (np.empty(0, np.int64),) * 3
    order = np.argsort(windows, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(windows, minlength=len(requests.rows)))])
    yield requests, Spikes(starts, offsets[order].astype(np.uint16), activations[order].astype(np.float32))


def _fire(
    sae: Sae, tokens: TokenShard, asked: Requests, buffer: Tensor, buffer_first: int, width: int, limits: RowLimits | None
) -> NDArray[np.float32]:
    """Return `[windows, width]` activations: rows of each window times the encoder column of its latent; the example's own as it is known."""
    rows = asked.firsts[:, None] + np.arange(width)
    inside = np.arange(width) < asked.lengths[:, None]
    rows = np.where(inside, rows, asked.firsts[:, None])
    latents = torch.from_numpy(asked.latents)
    columns = sae.W_enc.T[latents].contiguous().numpy().reshape(-1)
    products = np.zeros(rows.shape, np.float32)
    kernels.multiply_windows(buffer.numpy().reshape(-1), asked.firsts - buffer_first, asked.lengths, columns, products)
    pre = torch.from_numpy(products) + sae.b_enc[latents, None]
    found = pre.numpy()
    if limits is None:
        fires = found > sae.threshold[latents, None].clamp_min(0.0).numpy()
    else:
        fires = (found > limits.threshold[rows]) & limits.are_met(rows, asked.latents[:, None], found)
    activations = np.where(fires & inside & tokens.valid[rows], found, 0)
    activations[np.arange(len(rows)), asked.rows - asked.firsts] = asked.activations
    return activations


def _columns(asked: Requests, spikes: Spikes, index: int) -> dict[str, object]:
    first_id = np.uint64(index << ROW_BITS)
    starts = pa.array(spikes.starts.astype(np.int32))
    return {
        "latent": asked.latents.astype(np.uint32),
        "row_id": asked.rows.astype(np.uint64) + first_id,
        "first_row": asked.firsts.astype(np.uint64) + first_id,
        "length": asked.lengths.astype(np.uint16),
        "offsets": pa.ListArray.from_arrays(starts, pa.array(spikes.offsets)),
        "activations": pa.ListArray.from_arrays(starts, pa.array(spikes.activations)),
    }
