"""Examples and windows of one latent slice, which lie with slices and shards, become the windows of its records.

A latent group at a time: the examples that are shown, then from each dataset shard the windows of those that lie there, with token ids, the
place of the peak in it and in its context, activations and masked places. Every example must have its window.
"""

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from interp_assets.corpus.tokens import Roles, TokenShard
from interp_assets.errors import ArtifactCorruptError
from interp_assets.planning.progress import choose_word
from interp_assets.visualize.firings import ROW_BITS
from interp_assets.visualize.selection import INTERVAL, RANDOM, TOP
from interp_assets.visualize.tables import LatentTable

SHOWN_RANDOM: Final = 20
"""Random examples in a record."""
_ROW_MASK: Final = np.uint64((1 << ROW_BITS) - 1)


class DatasetShard(NamedTuple):
    """What the windows of one dataset shard are made of."""

    number: int
    """Index of the shard in the corpus."""
    tokens: TokenShard
    sources: list[str]
    """Where each document came from."""
    windows: LatentTable


class Example(NamedTuple):
    """One example: its window as it stands in a record, and the lists that it belongs to."""

    window: dict[str, Any]
    activation: float
    kind: int
    interval: int
    rank: int


def read_examples(examples: LatentTable, shards: list[DatasetShard], start: int, stop: int) -> Iterator[list[Example]]:
    """Yield the shown examples of each latent in [start, stop). Raises `ArtifactCorruptError` when one has no window."""
    asked = examples.read(start, stop)
    is_shown = _find_shown(asked["latent"], asked["kind"], asked["rank"])
    shown = {key: column[is_shown] for key, column in asked.items()}
    windows = _collect_windows(shown, shards, start, stop)
    edges = np.searchsorted(shown["latent"], np.arange(start, stop + 1).astype(np.uint32))
    columns = [shown[key].tolist() for key in ("activation", "kind", "interval", "rank")]
    for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        yield [Example(windows[j], *(column[j] for column in columns)) for j in range(low, high)]


def _find_shown(latents: NDArray[np.uint32], kinds: NDArray[np.uint8], ranks: NDArray[np.uint32]) -> NDArray[np.bool_]:
    """Mark the top and interval examples and the first `SHOWN_RANDOM` random ones of each latent."""
    shown = kinds & (TOP | INTERVAL) > 0
    places = np.flatnonzero(kinds & RANDOM)
    order = places[np.lexsort((ranks[places], latents[places]))]
    counts = np.bincount(latents[order])
    place_in_latent = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    shown[order[place_in_latent < SHOWN_RANDOM]] = True
    return shown


def _collect_windows(shown: dict[str, NDArray[Any]], shards: list[DatasetShard], start: int, stop: int) -> list[dict[str, Any]]:
    """Return the window of every shown example, from whichever shard it lies in."""
    found: dict[int, dict[str, Any]] = {}
    owner = (shown["row_id"] >> np.uint64(ROW_BITS)).astype(np.int64)
    lost: list[str] = []
    for shard in shards:
        mine = np.flatnonzero(owner == shard.number)
        table = shard.windows.read_table(start, stop)
        places = _match(table, shown["latent"][mine], shown["row_id"][mine], start)
        if places is None:
            lost.append(str(shard.number))
            continue
        windows = _make_windows(shard, shown["row_id"][mine], shown["activation"][mine], table.take(pa.array(places)))
        found |= dict(zip(mine.tolist(), windows, strict=True))
    if lost or len(found) < len(owner):
        raise ArtifactCorruptError(
            f"Examples of latents [{start}, {stop}) have no window in dataset {choose_word(len(lost), 'shard')} "
            f"{', '.join(lost) or 'outside the plan'}: the windows there were made from other examples. Re-materialize these shards of "
            "example_activations."
        )
    return [found[i] for i in range(len(owner))]


def _match(table: pa.Table, latents: NDArray[np.uint32], row_ids: NDArray[np.uint64], start: int) -> NDArray[np.int64] | None:
    """Return the place of each (latent, row id) in a table sorted by both; None when one is not there. Latents are below start + 2^23."""
    keys = _pair_keys(table.column("latent").to_numpy(), table.column("row_id").to_numpy(), start)
    wanted = _pair_keys(latents, row_ids, start)
    places = np.searchsorted(keys, wanted)
    is_there = places < len(keys)
    return places if is_there.all() and (keys[places] == wanted).all() else None


def _pair_keys(latents: NDArray[np.uint32], row_ids: NDArray[np.uint64], start: int) -> NDArray[np.int64]:
    return (latents.astype(np.int64) - start << ROW_BITS) | (row_ids & _ROW_MASK).astype(np.int64)


def _make_windows(shard: DatasetShard, row_ids: NDArray[np.uint64], peaks: NDArray[np.float32], table: pa.Table) -> Iterator[dict[str, Any]]:
    """Yield the windows of a table, each a dictionary as in docs/formats/feature_record.md, but for the rounding of activations (packing.py)."""
    tokens = shard.tokens
    rows = (row_ids & _ROW_MASK).astype(np.int64)
    firsts = (table.column("first_row").to_numpy() & _ROW_MASK).astype(np.int64)
    stops = (firsts + table.column("length").to_numpy()).tolist()
    offsets, activations = table.column("offsets").combine_chunks(), table.column("activations").combine_chunks()
    bounds = np.concatenate([[0], np.cumsum(offsets.value_lengths().to_numpy())]).tolist()
    spikes = list(map(list, zip(offsets.flatten().to_numpy().tolist(), activations.flatten().to_numpy().tolist(), strict=True)))
    starts = np.concatenate([[0], np.flatnonzero(np.diff(tokens.contexts)) + 1])
    positions = rows - starts[np.searchsorted(starts, rows, side="right") - 1]
    masked = np.flatnonzero(~tokens.valid)
    masked_low, masked_high = np.searchsorted(masked, firsts).tolist(), np.searchsorted(masked, stops).tolist()
    documents = tokens.documents[rows].tolist()
    runs = _find_runs(tokens.roles, firsts, np.array(stops)) if tokens.roles else None
    columns = zip(rows.tolist(), firsts.tolist(), stops, positions.tolist(), documents, peaks.tolist(), strict=True)
    for i, (row, first, stop, position, document, peak) in enumerate(columns):
        yield {
            "row": [shard.number, row],
            "document": shard.sources[document],
            "tokens": tokens.token_ids[first:stop].tolist(),
            "peak": row - first,
            "position": position,
            "activation": peak,
            "activations": spikes[bounds[i] : bounds[i + 1]],
            "masked": [place - first for place in masked[masked_low[i] : masked_high[i]].tolist()],
            **({"roles": runs[i]} if runs else {}),
        }


def _find_runs(roles: Roles, firsts: NDArray[np.int64], stops: NDArray[np.int64]) -> list[list[list[Any]]]:
    """Return for each window where in it a role begins to speak, its first place included, and which."""
    changes = np.flatnonzero(np.diff(roles.codes)) + 1
    lows, highs = np.searchsorted(changes, firsts, side="right"), np.searchsorted(changes, stops)
    begins = [[first, *changes[low:high].tolist()] for first, low, high in zip(firsts.tolist(), lows.tolist(), highs.tolist(), strict=True)]
    return [[[row - first, roles.names[roles.codes[row]]] for row in rows] for first, rows in zip(firsts.tolist(), begins, strict=True)]
