"""How many rows every job sends to every bucket, drawn exactly from the law of a uniform permutation, one job at a time.

Under a uniform permutation of N rows, the table C[job, bucket] with given row sums (rows of the jobs) and column sums (capacities of the
buckets) has the multivariate hypergeometric law. A job needs only its own row of C, and finds it alone:

1. put the jobs at the leaves of a binary tree; at node [lo, hi) the remaining capacities of the buckets are known;
2. draw how the rows of the left half fall into the buckets from the stream that belongs to the node;
3. go left with that draw, or right with the rest.

All jobs draw the same numbers at the nodes they share, so they agree without talking: O(K log N) draws a job, O(K N) for the table.

One hypergeometric draw is an inversion around the mode: the weights p(x) / p(mode) follow from p(x+1)/p(x) = (G-x)(m-x) / ((x+1)(B-m+x+1))
within 10 standard deviations (the rest weighs less than 1e-22). Only + - * / and a square root are used, all correctly rounded by IEEE
754, so every machine draws the same integer; there is no log-gamma, whose last bits differ between libraries, and no rejection. Cost:
some 20 standard deviations of float64 operations, for populations up to 2^52. NumPy's own sampler refuses counts above 1e9 and does not
promise its stream. Source: Sanders 1998 and Gustedt 2008 for the law; Devroye 1986, X.1 for the inversion.
"""

import math
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from interp_assets.compute.seeds import Stream

MAX_POPULATION: Final = 1 << 52
"""Above it float64 no longer holds every count."""
_BLOCK_TERMS: Final = 1 << 13

NodeStream = Callable[[int, int], Stream]
"""Opens the stream of tree node [lo, hi)."""


def draw_hypergeometric(stream: Stream, n_good: int, n_bad: int, n_drawn: int) -> int:
    """Draw how many good items are among `n_drawn` taken without replacement from `n_good` + `n_bad`.

    Takes one word of the stream, or none when there is only one possible answer. Exact to about 1e-11 in probability.
    """
    n_items = n_good + n_bad
    assert min(n_good, n_bad, n_drawn) >= 0, f"negative counts: {n_good}, {n_bad}, {n_drawn}"
    assert n_drawn <= n_items < MAX_POPULATION, f"{n_drawn} drawn from {n_items}"
    if 2 * n_drawn > n_items:
        return n_good - draw_hypergeometric(stream, n_good, n_bad, n_items - n_drawn)
    lowest, highest = max(0, n_drawn - n_bad), min(n_drawn, n_good)
    if lowest == highest:
        return lowest
    first, cumulative = cumulative_weights(n_good, n_bad, n_drawn)
    place = int(np.searchsorted(cumulative, stream.uniform() * cumulative[-1], side="right"))
    return first + min(place, len(cumulative) - 1)


def cumulative_weights(n_good: int, n_bad: int, n_drawn: int) -> tuple[int, NDArray[np.float64]]:
    """Return the first count x of the window, and the running sum of p(x) / p(mode) over the window. Wants `2 * n_drawn` <= population."""
    n_items = n_good + n_bad
    lowest, highest = max(0, n_drawn - n_bad), min(n_drawn, n_good)
    mode = min(max((n_drawn + 1) * (n_good + 1) // (n_items + 2), lowest), highest)
    variance = n_drawn * (n_good / n_items) * (n_bad / n_items) * ((n_items - n_drawn) / max(n_items - 1, 1))
    reach = int(10 * math.sqrt(variance)) + 40
    first, last = max(lowest, mode - reach), min(highest, mode + reach)
    return first, _weigh(n_good, n_bad, n_drawn, first, mode, last)


def draw_multivariate(stream: Stream, capacities: Sequence[int] | NDArray[np.int64], n_drawn: int) -> NDArray[np.int64]:
    """Draw how many of `n_drawn` rows fall into each bucket when the buckets still hold `capacities` rows. Returns `[K]`."""
    counts = np.zeros(len(capacities), np.int64)
    remaining = [int(capacity) for capacity in capacities]
    rest = sum(remaining)
    assert n_drawn <= rest, f"{n_drawn} rows into {rest} places"
    for bucket, capacity in enumerate(remaining):
        if n_drawn == 0:
            break
        rest -= capacity
        counts[bucket] = draw_hypergeometric(stream, capacity, rest, n_drawn)
        n_drawn -= int(counts[bucket])
    return counts


def count_row(node_stream: NodeStream, job_rows: Sequence[int], capacities: Sequence[int], job: int) -> NDArray[np.int64]:
    """Draw one job's row of the count table, `[K]`: how many of its rows go to each bucket. O(K log N) draws, and no other job's help."""
    starts = _check_margins(job_rows, capacities)
    lo, hi, remaining = 0, len(job_rows), np.array(capacities, np.int64)
    while hi - lo > 1:
        middle = (lo + hi) // 2
        left = draw_multivariate(node_stream(lo, hi), remaining, int(starts[middle] - starts[lo]))
        if job < middle:
            hi, remaining = middle, left
        else:
            lo, remaining = middle, remaining - left
    return remaining


def count_table(node_stream: NodeStream, job_rows: Sequence[int], capacities: Sequence[int]) -> NDArray[np.int64]:
    """Draw the whole table, `[N, K]`; row i equals `count_row(..., job=i)`. O(K N) draws."""
    starts = _check_margins(job_rows, capacities)
    table = np.zeros((len(job_rows), len(capacities)), np.int64)
    nodes = [(0, len(job_rows), np.array(capacities, np.int64))]
    while nodes:
        lo, hi, remaining = nodes.pop()
        if hi - lo == 1:
            table[lo] = remaining
            continue
        middle = (lo + hi) // 2
        left = draw_multivariate(node_stream(lo, hi), remaining, int(starts[middle] - starts[lo]))
        nodes += [(lo, middle, left), (middle, hi, remaining - left)]
    return table


def _check_margins(job_rows: Sequence[int], capacities: Sequence[int]) -> NDArray[np.int64]:
    """Return where each job's rows start; both margins of a table must have one sum."""
    starts = np.concatenate([[0], np.cumsum(np.asarray(job_rows, np.int64))])
    assert len(job_rows) > 0, "a table needs a job"
    assert int(starts[-1]) == sum(int(capacity) for capacity in capacities), f"{starts[-1]} rows into buckets {capacities}"
    return starts


def _weigh(n_good: int, n_bad: int, n_drawn: int, first: int, mode: int, last: int) -> NDArray[np.float64]:
    """Return the running sum of p(x) / p(mode) for x = first..last, in blocks that stay in the processor's cache (`accumulate` is sequential)."""
    good, bad, drawn = float(n_good), float(n_bad), float(n_drawn)
    weights = np.ones(last - first + 1)
    down, up = weights[mode - first :: -1], weights[mode - first :]
    for start in range(0, len(down) - 1, _BLOCK_TERMS):
        x = float(mode - start) - np.arange(min(_BLOCK_TERMS, len(down) - 1 - start))
        _extend(down, start, (x * (bad - drawn + x)) / ((good - x + 1) * (drawn - x + 1)))
    for start in range(0, len(up) - 1, _BLOCK_TERMS):
        x = float(mode + start) + np.arange(min(_BLOCK_TERMS, len(up) - 1 - start))
        _extend(up, start, ((good - x) * (drawn - x)) / ((x + 1) * (bad - drawn + x + 1)))
    return np.add.accumulate(weights, out=weights)


def _extend(weights: NDArray[np.float64], start: int, ratios: NDArray[np.float64]) -> None:
    """Continue the running product after `weights[start]`."""
    ratios[0] *= weights[start]
    np.multiply.accumulate(ratios, out=weights[start + 1 : start + 1 + len(ratios)])
