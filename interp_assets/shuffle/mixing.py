"""The row ids of mixed shards, in their final order, become findings: does this order look like a uniform permutation?

No single statistic sees every fault, so there is a battery; each names a way in which shuffles have gone wrong:

| finding | sees |
|---|---|
| `destination_buckets` | every shard giving each bucket an equal share (chi-square too *small*), or an unequal one |
| `destination_positions` | shards that stay near their place: a shuffle buffer, shards one after the other |
| `document_lags` | neighbours of one document at a distance of 1 to 1,024 rows (plotted): a missing last permutation |
| `batch_pairs`, `batch_entropy` | batches that see too few, or too regularly many, documents: a missing first permutation |
| `global_order`, `bucket_order` | rows that come in the order of the source (correlation of positions) |
| `successors` | a row followed by its successor in the text |
| `bucket_coincidence` | the same random stream in several gather jobs |
| `job_coincidence` | the same random stream in several split jobs |

Each has a p-value under the exact law (`significance.py`). Only row ids are read, 8 bytes a row; memory is one bucket's ids, a counter per
document and a fixed sample. What no statistic of one order can see is a constant count table: the tests' many seeds do.
"""

import math
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from interp_assets.planning.pipeline import SHARD_SHIFT
from interp_assets.shuffle.hypergeometric import cumulative_weights
from interp_assets.shuffle.significance import Expectation, chi_square_p, coincidence_p, expect_coincidences, normal_p, poisson_p, student_p

LAGS: Final = (1, 2, 3, 4, 6, 8, 16, 32, 64, 128, 256, 512, 1024)
MAX_CELLS: Final = 256
_MIN_EXPECTED: Final = 20
"""Rows expected in a cell of a chi-square table, so that its tails hold."""
_SAMPLE_ROWS: Final = 1 << 22
"""Rows whose destination is remembered, for `job_coincidence`."""


class SourceLayout(NamedTuple):
    """What the rows were before: training shards in order, their valid rows, and the row id at which each document starts."""

    shard_indices: NDArray[np.int64]
    shard_rows: NDArray[np.int64]
    document_starts: NDArray[np.uint64]
    """Ascending, over all shards."""


class Finding(NamedTuple):
    """One statistic: what was found, what a uniform permutation gives on average, and how likely a deviation as large is."""

    name: str
    found: float
    expected: float
    p: float


class LagFinding(NamedTuple):
    """How many pairs at one distance are of one document, against chance, in standard deviations."""

    lag: int
    found: int
    expected: float
    z: float


class Mixing(NamedTuple):
    """All findings, and the lags behind `document_lags`."""

    findings: list[Finding]
    lags: list[LagFinding]
    shard_rows: NDArray[np.int64]
    """Rows that were met of each training shard."""


class MixingMeter:
    """Reads the buckets of one shuffle in order, then answers. The statistics are sums, so nothing is kept but counts."""

    def __init__(self, layout: SourceLayout, bucket_rows: list[int]) -> None:
        """Expect buckets of `bucket_rows` rows."""
        self._layout, self._bucket_rows = layout, bucket_rows
        self._n_rows, self._n_shards = sum(bucket_rows), len(layout.shard_indices)
        self._starts = np.concatenate([[0], np.cumsum(layout.shard_rows)])
        self._batch_rows = min(4096, max(16, self._n_rows // 64))
        self._cells_per_bucket = max(1, 16 // len(bucket_rows))
        self._n_cells = min(MAX_CELLS, len(bucket_rows) * self._cells_per_bucket)
        self._cells = np.zeros((self._n_shards, self._n_cells), np.int64)
        self._documents = np.zeros(len(layout.document_starts), np.int64)
        self._lag_counts = np.zeros(len(LAGS), np.int64)
        self._tail = np.zeros(0, np.int64)
        self._pending = np.zeros(0, np.int64)
        self._batch_pairs, self._entropies = 0, []
        self._previous_shards = np.zeros(0, np.int64)
        self._bucket_coincidences, self._bucket, self._first, self._successors, self._last_id = 0, 0, 0, 0, np.uint64(0)
        self._order_sums, self._bucket_order = np.zeros(3), 0.0
        self._sample_depth = max(1, _SAMPLE_ROWS // max(1, self._n_shards))
        deepest = int(layout.shard_rows.max(initial=0)) * 2
        self._destinations = np.full((self._n_shards, min(self._sample_depth, deepest)), -1, np.int32)

    def add(self, row_ids: NDArray[np.uint64]) -> None:
        """Take the next bucket's row ids, in order."""
        assert len(row_ids) == self._bucket_rows[self._bucket], "buckets come in order and whole"
        shards = np.searchsorted(self._layout.shard_indices, (row_ids >> np.uint64(SHARD_SHIFT)).astype(np.int64))
        rows = (row_ids & np.uint64((1 << SHARD_SHIFT) - 1)).astype(np.int64)
        documents = np.searchsorted(self._layout.document_starts, row_ids, side="right") - 1
        self._documents += np.bincount(documents, minlength=len(self._documents))
        self._add_cells(shards)
        self._add_lags(documents)
        self._add_batches(documents)
        self._add_order(self._starts[shards] + rows)
        self._add_coincidences(row_ids, shards, rows)
        self._bucket += 1
        self._first += len(row_ids)

    def findings(self) -> Mixing:
        """Return all findings that this shuffle is large enough for."""
        assert self._bucket == len(self._bucket_rows), "all buckets must have been added"
        lags = self._judge_lags()
        found = [*self._judge_cells(), *self._judge_documents(lags), *self._judge_order(), *self._judge_coincidences()]
        return Mixing([item for item in found if item is not None], lags, self._cells.sum(axis=1))

    def _add_cells(self, shards: NDArray[np.int64]) -> None:
        n_rows, n_parts = len(shards), self._cells_per_bucket
        parts = np.arange(n_rows) * n_parts // max(1, n_rows)
        cells = (self._bucket * n_parts + parts) * self._n_cells // (len(self._bucket_rows) * n_parts)
        self._cells += np.bincount(shards * self._n_cells + cells, minlength=self._cells.size).reshape(self._cells.shape)

    def _add_lags(self, documents: NDArray[np.int64]) -> None:
        line = np.concatenate([self._tail, documents])
        for i, lag in enumerate(LAGS):
            new = max(len(self._tail), lag)  # pairs that end among the new rows
            self._lag_counts[i] += np.count_nonzero(line[new:] == line[new - lag : max(0, len(line) - lag)])
        self._tail = line[-LAGS[-1] :]

    def _add_batches(self, documents: NDArray[np.int64]) -> None:
        line = np.concatenate([self._pending, documents])
        n_batches = len(line) // self._batch_rows
        whole = line[: n_batches * self._batch_rows]
        self._pending = line[len(whole) :]
        keys = np.repeat(np.arange(n_batches), self._batch_rows) * len(self._documents) + whole
        met, counts = np.unique(keys, return_counts=True)
        self._batch_pairs += int((counts * (counts - 1) // 2).sum())
        share = counts / self._batch_rows
        self._entropies += list(np.bincount(met // max(1, len(self._documents)), weights=-share * np.log(share), minlength=n_batches))

    def _add_order(self, sources: NDArray[np.int64]) -> None:
        middle = (self._n_rows - 1) / 2
        x, y = sources - middle, np.arange(self._first, self._first + len(sources)) - middle
        self._order_sums += [x.sum(), (x * x).sum(), (x * y).sum()]
        x, y = x - (x.mean() if len(x) else 0), y - (y.mean() if len(y) else 0)
        spread = float((x * x).sum() * (y * y).sum())
        self._bucket_order += (len(x) - 1) * float((x * y).sum()) ** 2 / spread if spread > 0 else 0.0

    def _add_coincidences(self, row_ids: NDArray[np.uint64], shards: NDArray[np.int64], rows: NDArray[np.int64]) -> None:
        line = row_ids if self._first == 0 else np.concatenate([[self._last_id], row_ids])
        self._successors += int(np.count_nonzero(line[1:] == line[:-1] + np.uint64(1)))
        self._last_id = line[-1] if len(line) else self._last_id
        n_common = min(len(shards), len(self._previous_shards))
        self._bucket_coincidences += int(np.count_nonzero(shards[:n_common] == self._previous_shards[:n_common]))
        self._previous_shards = shards
        sampled = rows < self._destinations.shape[1]
        self._destinations[shards[sampled], rows[sampled]] = self._bucket

    def _judge_cells(self) -> list[Finding | None]:
        n_buckets = len(self._bucket_rows)
        buckets = self._cells.reshape(self._n_shards, n_buckets, -1).sum(axis=2) if self._n_cells % n_buckets == 0 else self._cells
        return [_judge_table("destination_buckets", buckets), _judge_table("destination_positions", self._cells)]

    def _judge_lags(self) -> list[LagFinding]:
        found = []
        for lag, count in zip(LAGS, self._lag_counts, strict=True):
            if 4 * lag < self._n_rows:
                expected = expect_coincidences(self._n_rows, self._n_rows - lag, 2 * (self._n_rows - 2 * lag), self._documents)
                z = (int(count) - expected.mean) / math.sqrt(expected.variance) if expected.variance > 0 else 0.0
                found.append(LagFinding(lag, int(count), expected.mean, z))
        return found

    def _judge_documents(self, lags: list[LagFinding]) -> list[Finding | None]:
        size, n_batches = self._batch_rows, len(self._entropies)
        if not lags or n_batches < 2 or len(self._documents) < 2:
            return []
        worst = max(lags, key=lambda item: abs(item.z))
        spread = ((worst.found - worst.expected) / worst.z) ** 2 if worst.z else 0.0
        p_lags = min(1.0, len(lags) * coincidence_p(worst.found, Expectation(worst.expected, spread)))
        pairs = expect_coincidences(self._n_rows, n_batches * size * (size - 1) // 2, n_batches * size * (size - 1) * (size - 2), self._documents)
        mean, expected = float(np.mean(self._entropies)), expected_entropy(self._documents, size)
        error = float(np.std(self._entropies, ddof=1)) / math.sqrt(n_batches)
        p_entropy = student_p((mean - expected) / error, n_batches - 1) if error > 0 else float(math.isclose(mean, expected, rel_tol=1e-9))
        return [
            Finding("document_lags", worst.found, worst.expected, p_lags),
            Finding("batch_pairs", self._batch_pairs, pairs.mean, coincidence_p(self._batch_pairs, pairs)),
            Finding("batch_entropy", mean, expected, p_entropy),
        ]

    def _judge_order(self) -> list[Finding | None]:
        n_rows, (total, squares, products) = self._n_rows, self._order_sums
        spread = math.sqrt((squares - total * total / n_rows) * (n_rows * (n_rows * n_rows - 1.0) / 12))
        correlation = products / spread if spread > 0 else 0.0
        n_ordered = sum(rows > 1 for rows in self._bucket_rows)
        return [
            Finding("global_order", correlation, 0.0, normal_p(correlation * math.sqrt(n_rows - 1))),
            Finding("bucket_order", self._bucket_order, n_ordered, chi_square_p(self._bucket_order, n_ordered, is_two_sided=False)),
            Finding("successors", self._successors, 1.0, poisson_p(max(1, self._successors), 1.0)),
        ]

    def _judge_coincidences(self) -> list[Finding | None]:
        if len(self._bucket_rows) < 2 or self._n_shards < 2:
            return []
        sizes = np.array(self._bucket_rows)
        common = np.minimum(sizes[1:], sizes[:-1])
        expected = expect_coincidences(self._n_rows, int(common.sum()), 2 * int(np.minimum(common[1:], common[:-1]).sum()), self._cells.sum(axis=1))
        return [
            Finding("bucket_coincidence", self._bucket_coincidences, expected.mean, coincidence_p(self._bucket_coincidences, expected)),
            self._judge_jobs(),
        ]

    def _judge_jobs(self) -> Finding | None:
        """Count rows at one place of neighbouring shards that went to one bucket."""
        above, below = self._destinations[:-1], self._destinations[1:]
        linked = (above >= 0) & (below >= 0)
        count = int(np.count_nonzero(linked & (above == below)))
        degrees = np.zeros(self._destinations.shape, np.int64)
        degrees[:-1] += linked
        degrees[1:] += linked
        labels = np.bincount(self._destinations[self._destinations >= 0], minlength=len(self._bucket_rows))
        n_sampled = int(labels.sum())
        if n_sampled < 2 or not linked.any():
            return None
        expected = expect_coincidences(n_sampled, int(linked.sum()), int((degrees * (degrees - 1)).sum()), labels)
        return Finding("job_coincidence", count, expected.mean, coincidence_p(count, expected))


def expected_entropy(document_rows: NDArray[np.int64], batch_rows: int) -> float:
    """Return the mean entropy, in nats, of the documents of `batch_rows` rows drawn without replacement, at most half of all. Exact."""
    n_rows = int(document_rows.sum())
    total = 0.0
    for size, n_documents in zip(*np.unique(document_rows[document_rows > 0], return_counts=True), strict=True):
        first, cumulative = cumulative_weights(int(size), n_rows - int(size), batch_rows)
        weights = np.diff(cumulative, prepend=0.0)
        counts = np.arange(first, first + len(weights))
        share = np.maximum(counts, 1) / batch_rows
        total += int(n_documents) * float((weights * np.where(counts > 0, -share * np.log(share), 0.0)).sum() / weights.sum())
    return total


def _judge_table(name: str, table: NDArray[np.int64]) -> Finding | None:
    """Return the chi-square of a shard x destination table, shards and destinations grouped until every cell expects enough rows."""
    table = _group(_group(table, 0), 1)
    n_rows, (n_shards, n_places) = int(table.sum()), table.shape
    if n_shards < 2 or n_places < 2:
        return None
    expected = table.sum(axis=1, keepdims=True) * (table.sum(axis=0, keepdims=True) / n_rows)
    value = float(((table - expected) ** 2 / expected).sum()) * (n_rows - 1) / n_rows
    degrees = (n_shards - 1) * (n_places - 1)
    return Finding(name, value, degrees, chi_square_p(value, degrees, is_two_sided=True))


def _group(table: NDArray[np.int64], axis: int) -> NDArray[np.int64]:
    """Add up neighbouring lines of an axis until each has enough rows for every line of the other, and there are at most `MAX_CELLS`."""
    totals = table.sum(axis=1 - axis)
    smallest = max(_MIN_EXPECTED * table.shape[1 - axis], int(totals.sum()) / MAX_CELLS)
    edges, filled = [0], 0
    for line, total in enumerate(totals):
        filled += int(total)
        if filled >= smallest:
            edges.append(line + 1)
            filled = 0
    if len(edges) == 1:
        return table.sum(axis=axis, keepdims=True)
    return np.add.reduceat(table, edges[:-1], axis=axis)
