"""Rows of attention become the sums that describe a head: one compiled sweep over scores, in whole numbers.

    s [heads, queries, keys] float32, the scores        x = s - largest of the row        e = round(2^24 exp(x)), a whole number

Every sum over keys is one of whole numbers, and is divided once, when the row is done: masses to 2^-24, entropies to 2^-20. So neither lanes nor
blocks of queries nor the order of contexts, batches and shards change a bit of what is counted. exp is written out (2^n times a polynomial in
float64, wrong by less than 1e-11 of itself), so it is the same everywhere. What lies 128 below the largest score counts as 128 below it.

Keys are counted by unsigned numbers: no loop asks whether a place is counted from the end, so each becomes vectors, and none makes a view, whose
count of references cost as much as a dozen keys.

Rejected: sums of float32 probabilities, which differ between two orders of the same contexts; a table for exp, which is slower than the polynomial.
Formats and meanings of the fields are told in docs/formats/head_candidates.md.
"""

from math import log, sqrt
from typing import Any, Final

import numpy as np

from interp_assets.compute.compiled import compiled

FIELDS: Final = (
    "rows",
    "self",
    "previous",
    "previous_rows",
    "first",
    "first_rows",
    "learned_sink",
    "induction",
    "induction_rows",
    "duplicate",
    "duplicate_rows",
    "other_document",
    "uniform_self",
    "uniform_previous",
    "uniform_first",
    "uniform_induction",
    "uniform_duplicate",
    "uniform_other_document",
    "uniform_distance",
    "entropy",
    "entropy_share",
    "spread_rows",
    "distance",
    "distance2",
    "logit_std",
    "logit_margin",
    "logit_z",
    "output_norm",
)
"""What one head's row of `fields` holds, in order. `*_rows` count the rows that have what is measured; `spread_rows` see two keys or more."""
(
    _ROWS,
    _SELF,
    _PREVIOUS,
    _PREVIOUS_ROWS,
    _FIRST,
    _FIRST_ROWS,
    _LEARNED_SINK,
    _INDUCTION,
    _INDUCTION_ROWS,
    _DUPLICATE,
    _DUPLICATE_ROWS,
    _OTHER_DOCUMENT,
    _UNIFORM_SELF,
    _UNIFORM_PREVIOUS,
    _UNIFORM_FIRST,
    _UNIFORM_INDUCTION,
    _UNIFORM_DUPLICATE,
    _UNIFORM_OTHER_DOCUMENT,
    _UNIFORM_DISTANCE,
    _ENTROPY,
    _ENTROPY_SHARE,
    _SPREAD_ROWS,
    _DISTANCE,
    _DISTANCE2,
    _LOGIT_STD,
    _LOGIT_MARGIN,
    _LOGIT_Z,
    _OUTPUT_NORM,
) = range(len(FIELDS))
N_DISTANCES: Final = 20
"""Bins of the distance: 0, 1, 2-3, 4-7, ..."""
N_SCORES: Final = 256
"""Bins of the row score: quarter octaves."""
SCORE_ORIGIN: Final = (127 - 40) << 2
"""Number of the first bin: 2^-40."""
SLOTS: Final = 16
"""Rows of each bin that are kept for a uniform sample."""
MAX_CONTEXT: Final = 1 << 17
"""Longer contexts could overflow 64-bit sums."""
NO_SCORE: Final = np.float32(-1.0)
_ONE: Final = float(1 << 24)
_LOG2_E: Final = 1.4426950408889634
_ROUNDS: Final = 1.5 * 2.0**52
"""What is added to it becomes a whole number in the last bits of the sum."""
_BIAS: Final = np.int64((1023 + 24) << 52)
_POWERS_OF_2: Final = (
    1.5303700711365694e-05,
    0.00015403475186530786,
    0.0013333478473685415,
    0.009618129135236140,
    0.055504109063258666,
    0.24022650695888502,
    0.6931471805568324,
    1.0,
)
"""Of 2^f = 1 + f (...), by Chebyshev's nodes, after the factor of f^8: wrong by less than 1e-11."""
_FAR: Final = np.float32(-128.0)
_LEAST: Final = -(1 << 31)
_SHORT: Final = 8192
"""Keys up to which e d^2 adds up in 64 bits."""


@compiled
def sweep_rows(block: Any, context: Any, scratch: Any, sums: Any, row_scores: Any) -> None:
    """Add the rows of some queries of one context to the sums of every head, and fill `row_scores [heads, queries]`.

    `block`: scores [heads, queries, keys]; sinks [heads] (-inf: none); value norms [heads, keys]; output norms [heads, queries]; the first query.
    `context`: the keys [low, high) that each query sees; whether it counts; the last earlier place of its token, or -1; its document's places
    [first, stop); the class of its token. `scratch`: exponentials and logits [keys] int32. `sums`: fields [heads, fields], distance
    masses [heads, bins], key masses by place [heads, keys], query masses by class [heads, classes], scores [heads, bins]: all int64.
    """
    scores, sinks, value_norms, output_norms, first_query = block
    low, high, counts = context[0], context[1], context[2]
    exponentials, logits = scratch
    for i in range(scores.shape[1]):
        q = first_query + i
        row_scores[:, i] = NO_SCORE
        if q >= len(counts) or not counts[q]:
            continue
        for h in range(len(scores)):
            top = _find_top(scores[h, i], low[q], high[q])
            largest = max(top[0], sinks[h])
            total, weighted = _exponentiate(scores[h, i], low[q], high[q], largest, exponentials, logits)
            sink = np.int64(0)
            if sinks[h] > -np.inf:
                e, place = _exponential(max(sinks[h] - largest, _FAR))
                sink = np.int64(e)
                total, weighted = total + sink, weighted + sink * np.int64(place)
            _add_logits(top, (low[q], high[q], largest), logits, sums[0][h])
            _add_masses(q, context, exponentials, (total, sink, weighted), sums[0][h])
            _add_distances(q, low[q], high[q], exponentials, total, sums[0][h], sums[1][h])
            row_scores[h, i] = _score(q, low[q], high[q], exponentials, value_norms[h]) / np.float64(total)
            _add_tokens(q, context, exponentials, (total, sink), (sums[2][h], sums[3][h]))
            sums[0][h, _ROWS] += 1
            sums[0][h, _OUTPUT_NORM] += np.int64(np.rint(np.float64(output_norms[h, i]) * 65536.0))
            if row_scores[h, i] >= 0:
                sums[4][h, bin_of(row_scores[h, i])] += 1


@compiled
def bin_of(score: Any) -> Any:
    """Return the bin of a row score: quarter octaves from 2^-40; the outer bins hold what lies outside."""
    place = np.int64(np.float32(score).view(np.int32) >> np.int32(21)) - SCORE_ORIGIN
    return min(max(place, np.int64(0)), np.int64(N_SCORES - 1))


@compiled
def _find_top(scores: Any, low: Any, high: Any) -> Any:
    """Return the largest score and the second largest, which is -inf where there is one alone. Bits compare as whole numbers, lane by lane."""
    first, second, n_first = np.int32(_LEAST), np.int32(_LEAST), 0
    for k in range(np.uint64(low), np.uint64(high)):
        first = max(first, _in_order(scores[k]))
    for k in range(np.uint64(low), np.uint64(high)):
        place = _in_order(scores[k])
        n_first += place == first
        second = max(second, place if place < first else np.int32(_LEAST))
    largest = _out_of_order(first)
    if n_first > 1:
        return largest, largest
    return largest, _out_of_order(second) if high - low > 1 else np.float32(-np.inf)


@compiled
def _in_order(score: Any) -> Any:
    """Return a float32's bits, turned so that they compare as the number does."""
    bits = np.float32(score).view(np.int32)
    return np.int32(bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@compiled
def _out_of_order(place: Any) -> Any:
    """Return the float32 of such bits."""
    return np.int32(place ^ ((place >> np.int32(31)) & np.int32(0x7FFFFFFF))).view(np.float32)


@compiled
def _exponentiate(scores: Any, low: Any, high: Any, largest: Any, exponentials: Any, logits: Any) -> Any:
    """Write e, and x in 2^-16, of the keys that are seen; return the sums of e and of e x."""
    for k in range(np.uint64(low), np.uint64(high)):
        exponentials[k], logits[k] = _exponential(max(scores[k] - largest, _FAR))
    total, weighted = np.int64(0), np.int64(0)
    for k in range(np.uint64(low), np.uint64(high)):
        total += np.int64(exponentials[k])
        weighted += np.int64(exponentials[k]) * np.int64(logits[k])
    return total, weighted


@compiled
def _exponential(x: Any) -> Any:
    """Return round(2^24 exp(x)) and round(2^16 x), for -128 <= x <= 0: 2^n, made of its bits, times a polynomial for 2^f, |f| <= 1/2."""
    y = max(np.float64(x) * _LOG2_E, -40.0)
    rounded = np.float64(y + _ROUNDS)  # n stands in its last bits
    f = y - (rounded - _ROUNDS)
    p = 1.3250805517502249e-06
    for coefficient in _POWERS_OF_2:
        p = p * f + coefficient
    power = np.int64((rounded.view(np.int64) << np.int64(52)) + _BIAS).view(np.float64)
    return np.int32(p * power + 0.5), np.int32(np.rint(np.float32(x) * np.float32(65536.0)))


@compiled
def _share(part: Any, total: Any) -> Any:
    """Return part / total in 2^-24, rounded."""
    return np.int64(np.float64(part) / np.float64(total) * _ONE + 0.5)


@compiled
def _add_masses(q: Any, context: Any, exponentials: Any, totals: Any, fields: Any) -> None:
    """Add where the row looks: at itself, before it, at the first position, behind earlier occurrences of its token, out of its document."""
    low, high, _, same, document_first, document_stop, _ = context
    total, sink, weighted = totals
    n = high[q] - low[q]
    fields[_SELF] += _share(exponentials[q], total)
    fields[_LEARNED_SINK] += _share(sink, total)
    if q - 1 >= low[q]:
        fields[_PREVIOUS] += _share(exponentials[q - 1], total)
        fields[_PREVIOUS_ROWS] += 1
    if q > 0 and low[q] == 0:
        fields[_FIRST] += _share(exponentials[0], total)
        fields[_FIRST_ROWS] += 1
    induced, copied, n_induced, n_copied = np.int64(0), np.int64(0), 0, 0
    j = same[q]
    while j >= low[q] - 1 and j >= 0:
        if j >= low[q]:
            copied, n_copied = copied + np.int64(exponentials[j]), n_copied + 1
        if j + 1 < q:
            induced, n_induced = induced + np.int64(exponentials[j + 1]), n_induced + 1
        j = same[j]
    if high[q] == q + 1 and n_induced:  # whoever sees what follows has nothing to induce
        fields[_INDUCTION] += _share(induced, total)
        fields[_INDUCTION_ROWS] += 1
    if n_copied:
        fields[_DUPLICATE] += _share(copied, total)
        fields[_DUPLICATE_ROWS] += 1
    outside = _add_up(exponentials, low[q], min(high[q], document_first[q])) + _add_up(exponentials, max(low[q], document_stop[q]), high[q])
    fields[_OTHER_DOCUMENT] += _share(outside, total)
    n_outcomes = n + (1 if sink > 0 else 0)
    if n > 1:
        entropy = max(log(np.float64(total) / _ONE) - np.float64(weighted) / (np.float64(total) * 65536.0), 0.0)
        fields[_ENTROPY] += np.int64(entropy * 1048576.0 + 0.5)
        fields[_ENTROPY_SHARE] += np.int64(min(entropy / log(np.float64(n_outcomes)), 1.0) * _ONE + 0.5)
        fields[_SPREAD_ROWS] += 1


@compiled
def _add_logits(top: Any, seen: Any, logits: Any, fields: Any) -> None:
    """Add how the scores spread: standard deviation, largest less second largest, and how many deviations the largest lies above the mean."""
    low, high, largest = seen
    n = high - low
    if n < 2:
        return
    total, squares = np.int64(0), np.int64(0)
    for k in range(np.uint64(low), np.uint64(high)):
        total += np.int64(logits[k])
        squares += np.int64(logits[k]) * np.int64(logits[k])
    mean = np.float64(total) / n
    deviation = sqrt(max(np.float64(squares) / n - mean * mean, 0.0))
    fields[_LOGIT_STD] += np.int64(deviation + 0.5)
    fields[_LOGIT_MARGIN] += np.int64(min(np.float64(top[0]) - np.float64(top[1]), 128.0) * 65536.0 + 0.5)
    if deviation > 0:
        over = max(np.float64(top[0]) - np.float64(largest), -128.0) * 65536.0 - mean
        fields[_LOGIT_Z] += np.int64(max(over, 0.0) / deviation * 65536.0 + 0.5)


@compiled
def _add_distances(q: Any, low: Any, high: Any, exponentials: Any, total: Any, fields: Any, masses: Any) -> None:
    """Add how far the row looks: the mean distance, its square, and the mass in each bin of distances."""
    far, square = np.int64(0), 0.0
    if high - low <= _SHORT:
        whole = np.int64(0)
        for k in range(np.uint64(low), np.uint64(high)):
            e, d = np.int64(exponentials[k]), abs(q - np.int64(k))
            far += e * d
            whole += e * (d * d)
        square = np.float64(whole)
    else:
        upper, lower = np.int64(0), np.int64(0)
        for k in range(np.uint64(low), np.uint64(high)):
            d = abs(q - np.int64(k))
            moment = np.int64(exponentials[k]) * d
            far += moment
            upper += (moment >> 20) * d
            lower += (moment & 0xFFFFF) * d
        square = np.float64(upper) * 1048576.0 + np.float64(lower)
    fields[_DISTANCE] += np.int64(np.float64(far) / np.float64(total) * 1024.0 + 0.5)
    fields[_DISTANCE2] += np.int64(square / np.float64(total) + 0.5)
    masses[0] += _share(exponentials[q], total)
    for b in range(1, N_DISTANCES):
        near, beyond = np.int64(1) << (b - 1), np.int64(1) << b if b < N_DISTANCES - 1 else np.int64(MAX_CONTEXT)
        if q - near < low and q + near >= high:
            break
        inside = _add_up(exponentials, max(low, q - beyond + 1), q - near + 1) + _add_up(exponentials, q + near, min(high, q + beyond))
        masses[b] += _share(inside, total)


@compiled
def _score(q: Any, low: Any, high: Any, exponentials: Any, value_norms: Any) -> Any:
    """Return the largest e |v W_O| of a key that is neither the first nor the query itself; -e of nothing where there is none."""
    before = _best(exponentials, value_norms, max(low, 1), min(high, q))
    best = max(before, _best(exponentials, value_norms, max(low, q + 1, 1), high))
    return -np.inf if best < 0 else np.int64(best).view(np.float64)


@compiled
def _best(exponentials: Any, value_norms: Any, low: Any, high: Any) -> Any:
    """Return the bits of the largest product of keys [low, high), -1 where there is none: from 0 on, numbers compare as their bits do."""
    best = np.int64(-1)
    if low < high:
        for k in range(np.uint64(low), np.uint64(high)):
            best = max(best, np.float64(np.float64(exponentials[k]) * np.float64(value_norms[k])).view(np.int64))
    return best


@compiled
def _add_up(exponentials: Any, low: Any, high: Any) -> Any:
    """Return the sum of keys [low, high), which may be none."""
    total = np.int64(0)
    if low < high:
        for k in range(np.uint64(low), np.uint64(high)):
            total += np.int64(exponentials[k])
    return total


@compiled
def _add_tokens(q: Any, context: Any, exponentials: Any, totals: Any, masses: Any) -> None:
    """Add the row's masses to the places of its keys, and what it does not give to a sink to the class of its token."""
    low, high, classes = context[0][q], context[1][q], context[6]
    total, sink = totals
    keys, queries = masses
    scale = _ONE / np.float64(total)
    if max(low, 1) < high:
        for k in range(np.uint64(max(low, 1)), np.uint64(high)):
            keys[k] += np.int64(np.int32(np.float64(exponentials[k]) * scale + 0.5))
    first = np.int64(exponentials[0]) if low == 0 else np.int64(0)
    queries[classes[q]] += _share(total - sink - first, total)


@compiled
def count_chance(context: Any, fields: Any, distance_mass: Any, slopes: Any, queries: Any) -> None:
    """Add what a head that looks at all visible keys alike has: one row of `fields`, bins, key masses by place as `slopes`, query masses."""
    low, high, counts, same, document_first, document_stop, classes = context
    for q in range(len(counts)):
        if not counts[q]:
            continue
        n = high[q] - low[q]
        even = _share(1, n)
        fields[_UNIFORM_SELF] += even
        if q - 1 >= low[q]:
            fields[_UNIFORM_PREVIOUS] += even
        if q > 0 and low[q] == 0:
            fields[_UNIFORM_FIRST] += even
        n_induced, n_copied = np.int64(0), np.int64(0)
        j = same[q]
        while j >= low[q] - 1 and j >= 0:
            n_copied += j >= low[q]
            n_induced += j + 1 < q
            j = same[j]
        if high[q] == q + 1:
            fields[_UNIFORM_INDUCTION] += _share(n_induced, n)
        fields[_UNIFORM_DUPLICATE] += _share(n_copied, n)
        outside = max(min(high[q], document_first[q]) - low[q], 0) + max(high[q] - max(low[q], document_stop[q]), 0)
        fields[_UNIFORM_OTHER_DOCUMENT] += _share(outside, n)
        before, behind = np.int64(q - low[q]), np.int64(high[q] - 1 - q)
        steps = before * (before + 1) // 2 + behind * (behind + 1) // 2
        fields[_UNIFORM_DISTANCE] += np.int64(np.float64(steps) / n * 1024.0 + 0.5)
        distance_mass[0] += even
        for b in range(1, N_DISTANCES):
            near, beyond = np.int64(1) << (b - 1), np.int64(1) << b if b < N_DISTANCES - 1 else np.int64(MAX_CONTEXT)
            inside = max(min(before, beyond - 1) - near + 1, 0) + max(min(behind, beyond - 1) - near + 1, 0)
            distance_mass[b] += _share(inside, n)
        if high[q] > max(low[q], 1):
            slopes[max(low[q], 1)] += even
            slopes[high[q]] -= even
        queries[classes[q]] += _share(n - (low[q] == 0), n)


@compiled
def offer_rows(row_scores: Any, priorities: Any, first_row: Any, slots: Any) -> None:
    """Keep of each head and bin the rows of smallest priority: `slots` (priorities, rows, scores), each [heads, bins, SLOTS]; free ones are last."""
    kept, rows, scores = slots
    for h in range(row_scores.shape[0]):
        for i in range(row_scores.shape[1]):
            if row_scores[h, i] < 0:
                continue
            b = bin_of(row_scores[h, i])
            place = SLOTS - 1
            if priorities[h, i] >= kept[h, b, place]:
                continue
            while place > 0 and priorities[h, i] < kept[h, b, place - 1]:
                kept[h, b, place], rows[h, b, place], scores[h, b, place] = (
                    kept[h, b, place - 1],
                    rows[h, b, place - 1],
                    scores[h, b, place - 1],
                )
                place -= 1
            kept[h, b, place], rows[h, b, place], scores[h, b, place] = priorities[h, i], first_row + i, row_scores[h, i]


@compiled
def offer_strongest(row_scores: Any, priorities: Any, documents: Any, first_row: Any, best: Any) -> None:
    """Keep of each head and document the row of highest score, of equals that of smallest priority: `best` (priorities, rows, scores)."""
    kept, rows, scores = best
    for h in range(row_scores.shape[0]):
        for i in range(row_scores.shape[1]):
            if row_scores[h, i] < 0:
                continue
            d, score, priority = documents[first_row + i], row_scores[h, i], priorities[h, i]
            if score > scores[h, d] or (score == scores[h, d] and priority < kept[h, d]):
                kept[h, d], rows[h, d], scores[h, d] = priority, first_row + i, score
