"""Activations of many texts become a few numbers a hook point, without being kept: moments, norms, histograms, the largest of each dimension.

    mean        mean activation, [d] float64
    cov         covariance, [d, d] float64: mean of (x - mean)(x - mean)'
    norms       histogram of Euclidean norms
    histogram   histogram of each dimension's values
    top:64      the 64 largest values of each dimension, and where they are

Texts are run in batches, in their order. Sums are float64, of blocks of a fixed number of rows that are added in the order of the rows, so that how
texts are batched leaves no trace in them but what another shape of a batch does to the activations themselves (1e-7). Counts, histograms and the
largest values merge exactly in any order; of equal values those come first that stand earlier. Special tokens are left out.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import polars as pl
import torch
from torch import Tensor

from interp_assets.compute.octaves import N_BINS, bin_edges, bins_of
from interp_assets.errors import InputError, NonFiniteError
from interp_assets.garcon.plan import ReducePlan
from interp_assets.garcon.subject import SubjectModel

BATCH_TOKENS: Final = 4096
BLOCK_ROWS: Final = 2048
"""Rows whose sums are taken at once: always as many, because sums round by it."""
_LAST_ROW: Final = 0xFFFFFFFF


class Moments(NamedTuple):
    """Sums over rows, in float64; `merge` adds them in the order that they are given."""

    n: int
    sum: Tensor
    """[d]"""
    products: Tensor
    """[d, d]; empty where no covariance is wanted."""

    @property
    def mean(self) -> Tensor:
        """Mean row."""
        return self.sum / self.n

    @property
    def cov(self) -> Tensor:
        """Covariance of a row's dimensions."""
        return self.products / self.n - torch.outer(self.mean, self.mean)

    def merge(self, other: "Moments") -> "Moments":
        """Add the sums of rows that follow."""
        return Moments(self.n + other.n, self.sum + other.sum, self.products + other.products)


class Largest(NamedTuple):
    """The k largest values of each dimension, and their rows; of equal ones the earlier rows."""

    keys: Tensor
    """[k or fewer, d] int64, falling: value and row in one number."""

    @property
    def values(self) -> Tensor:
        """[k, d] float32."""
        ordered = (self.keys >> 32).to(torch.int32)
        return torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).view(torch.float32)

    @property
    def rows(self) -> Tensor:
        """[k, d] int64."""
        return _LAST_ROW - (self.keys & _LAST_ROW)

    def merge(self, other: "Largest", k: int) -> "Largest":
        """Keep the largest of both, whichever rows come first."""
        keys = torch.cat([self.keys, other.keys])
        return Largest(keys.topk(min(k, len(keys)), dim=0).values)


def find_largest(values: Tensor, first_row: int, k: int) -> Largest:
    """Return the k largest of each column of [rows, d]."""
    bits = (values.to(torch.float32) + 0.0).contiguous().view(torch.int32)  # -0 becomes 0, which it equals
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    rows = torch.arange(first_row, first_row + len(values), device=values.device)[:, None]
    keys = (ordered << 32) | (_LAST_ROW - rows)
    return Largest(keys.topk(min(k, len(keys)), dim=0).values)


class _Reducer:
    """What is wanted of one point, over the rows so far."""

    def __init__(self, names: Sequence[str], width: int) -> None:
        self.names, self.width = names, width
        zeros = torch.zeros(width, dtype=torch.float64)
        self.moments = Moments(0, zeros, torch.zeros((width, width) if "cov" in names else (0, 0), dtype=torch.float64))
        self.k = max((int(name.partition(":")[2]) for name in names if name.startswith("top:")), default=0)
        self.largest = Largest(torch.zeros((0, width), dtype=torch.int64))
        self.norms = torch.zeros(N_BINS, dtype=torch.int64)
        self.counts = torch.zeros((width if "histogram" in names else 0, 2 * N_BINS), dtype=torch.int64)
        self.n_rows = 0
        self._pending: list[Tensor] = []

    def add(self, rows: Tensor) -> None:
        """Add rows, in their order."""
        self._pending.append(rows.cpu())
        joined = torch.cat(self._pending)
        n_whole = len(joined) // BLOCK_ROWS * BLOCK_ROWS
        for first in range(0, n_whole, BLOCK_ROWS):
            self._measure(joined[first : first + BLOCK_ROWS])
        self._pending = [joined[n_whole:].clone()]

    def finish(self) -> None:
        """Add what is left of the last block."""
        if self._pending and len(self._pending[0]):
            self._measure(self._pending[0])
        self._pending = []

    def _measure(self, rows: Tensor) -> None:
        wide = rows.double()
        products = wide.T @ wide if "cov" in self.names else self.moments.products
        self.moments = self.moments.merge(Moments(len(rows), wide.sum(0), products if "cov" in self.names else torch.zeros_like(products)))
        if "norms" in self.names:
            self.norms += bins_of(wide.norm(dim=1)).bincount(minlength=N_BINS)
        if len(self.counts):
            bins = bins_of(rows.abs()) + N_BINS * (rows >= 0)
            places = bins + 2 * N_BINS * torch.arange(self.width)
            self.counts += places.flatten().bincount(minlength=self.counts.numel()).reshape(self.counts.shape)
        if self.k:
            self.largest = self.largest.merge(find_largest(rows, self.n_rows, self.k), self.k)
        self.n_rows += len(rows)


def reduce_texts(subject: SubjectModel, plan: ReducePlan, progress: Callable[[int], None] | None = None) -> dict[str, dict[str, Any]]:
    """Return what is wanted of each point: tensors for moments, tables for the rest. `progress` is advanced by tokens.

    Raises `InputError` for points without rows and texts without tokens that count, `NonFiniteError` with the first place.
    """
    steps, reached = reduce_steps(subject, plan), 0
    while True:
        try:
            done, _ = next(steps)
        except StopIteration as end:
            return end.value
        if progress is not None:
            progress(done - reached)
        reached = done


def reduce_steps(subject: SubjectModel, plan: ReducePlan) -> Generator[tuple[int, int], None, dict[str, dict[str, Any]]]:
    """Do what `reduce_texts` does, a forward a step, each of which yields how many tokens are done and how many there are."""
    reducers = {name: _Reducer(names, subject.d_in(name)) for name, names in plan.reductions.items()}
    places: list[tuple[int, int]] = []
    n_done, n_tokens = 0, sum(map(len, plan.rows))
    for batch in _batches(plan.rows):
        token_ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(plan.rows[text]) for text in batch], batch_first=True)
        is_token = torch.arange(token_ids.shape[1])[None] < torch.tensor([[len(plan.rows[text])] for text in batch])
        kept = is_token & ~torch.isin(token_ids, torch.tensor(plan.special, dtype=torch.int64))
        captured = subject.capture(token_ids, is_token, list(reducers))
        for name, rows in captured.items():
            chosen = rows[kept.to(rows.device)]
            if not bool(torch.isfinite(chosen).all()):
                row = int((~torch.isfinite(chosen)).any(1).nonzero()[0])
                text, position = kept.nonzero()[row].tolist()
                raise NonFiniteError(f"{name} of text {batch[text]} is not finite at position {position}. Run the model in float32.")
            reducers[name].add(chosen.float() if chosen.dtype != torch.float64 else chosen)
        places += [(batch[text], position) for text, position in kept.nonzero().tolist()]
        n_done += int(is_token.sum())
        yield n_done, n_tokens
    if not places:
        raise InputError("The texts have no tokens but special ones: there is nothing to reduce.")
    answers: dict[str, dict[str, Any]] = {}
    for name, reducer in reducers.items():
        reducer.finish()
        answers[name] = {what: _answer(reducer, what, plan, places) for what in reducer.names}
    return answers


def _batches(rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Yield the texts of each batch: consecutive ones, as many as fit with their padding."""
    batch: list[int] = []
    longest = 0
    for text, row in enumerate(rows):
        longest = max(longest, len(row))
        if batch and longest * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch, longest = [], len(row)
        batch.append(text)
    yield batch


def _answer(reducer: _Reducer, what: str, plan: ReducePlan, places: Sequence[tuple[int, int]]) -> Any:
    if what in ("mean", "cov"):
        return getattr(reducer.moments, what)
    if what == "norms":
        return pl.DataFrame(_bins(reducer.norms.numpy(), bin_edges()))
    if what == "histogram":
        edges = bin_edges()
        signed = np.concatenate([-edges[::-1][:-1], edges])  # bins of negative numbers run to the left
        counts = torch.cat([reducer.counts[:, :N_BINS].flip(1), reducer.counts[:, N_BINS:]], dim=1).numpy()
        tables = [pl.DataFrame({"dimension": np.int64(d), **_bins(row, signed)}) for d, row in enumerate(counts)]
        return pl.concat(tables)
    k = int(what.partition(":")[2])
    values, rows = reducer.largest.values[:k], reducer.largest.rows[:k]
    order = rows.T.flatten().tolist()
    texts, positions = zip(*(places[row] for row in order), strict=True)
    return pl.DataFrame(
        {
            "dimension": np.repeat(np.arange(values.shape[1]), len(values)),
            "rank": np.tile(np.arange(len(values)), values.shape[1]),
            "value": values.T.flatten().numpy(),
            "text": texts,
            "position": positions,
            "token_id": [plan.rows[text][position] for text, position in zip(texts, positions, strict=True)],
        }
    )


def _bins(counts: Any, edges: Any) -> dict[str, Any]:
    filled = np.flatnonzero(counts)
    return {"low": edges[filled], "high": edges[filled + 1], "count": counts[filled]}
