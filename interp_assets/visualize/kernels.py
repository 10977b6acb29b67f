"""Loops over elements that NumPy has no word for, compiled: find firings in a product, and sort, measure and select them by latent.

M rows of a product (a multiple of G)     C latents of a product (`STRIP`, a constant)     G rows that are looked at together (`GROUP`)
N firings     L latents

Numba compiles them at their first call (1 s each; kept on disk where the disk can be written). They hold no lock while they run, so
Python threads run them side by side. What they compute is defined by the plain forms that the tests compare them with.

`append_firings` compares whole vectors of a product that lies in the core's cache: 0.11 ns an element, with one bit for each of 8 rows. What may
fire is computed in a fixed order from the rows themselves (15 ns, and more where a row comes from memory), so activations depend on nothing else.
Selection parts each latent's n best from the others: 10 to 50 ns a firing; heaps took 20 to 60, sorts 60. Measured and rejected for the scan: the
largest of 8 rows first, and a look at each where it may fire (twice as slow, because a bound lets one group in 30 through), `torch.nonzero` (4 to 14
times slower).
"""

from typing import Any, Final

import numpy as np

from interp_assets.compute.coarse import least
from interp_assets.compute.compiled import compiled
from interp_assets.compute.dots import dot, prefetch

TILE: Final = 512
"""Latents whose firings are kept together: a multiple of `STRIP`."""
STRIP: Final = 128
"""Latents per matrix product."""
GROUP: Final = 8
"""Rows that are looked at together."""
N_BINS: Final = 64
_BIN_SHIFT: Final = 21
_MANTISSA_BITS: Final = 23
_LEADING: Final = 1 << _MANTISSA_BITS
_AHEAD: Final = 8
"""Pre-activations whose rows are on their way from memory while others are computed."""
_MANY: Final = 8
_ROOM: Final = 4
"""Times as many words as are sought: from `_MANY` on they are sifted, `_ROOM` are kept meanwhile."""
_LAST_WORD: Final = np.uint64(0xFFFFFFFFFFFFFFFF)
_LOWEST_BIT: Final = np.array([0] + [(i & -i).bit_length() - 1 for i in range(1, 1 << GROUP)])


@compiled
def append_firings(product: Any, strip: Any, block: Any, first: Any, scratch: Any, columns: Any, n: Any) -> Any:
    """Append what exceeds the latent's and the row's threshold; return the number there are then, stored or not, and how many were computed.

    `product [M * C]` is that of the digits; `strip` is (values, bias, threshold, offset, inverse, norm, error) and `block` (values, threshold,
    inverse, error, reach), as in coarse.py; `first` is what (latents, rows) count from; `scratch` (flags, places), of at least M / G * C and
    M * C; `columns` (latents, rows, activations), of which the first `n` are taken. A caller that gets more back than they have places gives
    longer ones and calls again.
    """
    weights, bias, threshold = strip[:3]
    values, row_threshold = block[:2]
    flags, places = scratch
    latents, rows, activations = columns
    d = len(values) // max(1, len(row_threshold))
    _flag_rows(product, strip[2:], block[1:], flags)
    n_computed = _list_flags(flags[: len(row_threshold) // GROUP * STRIP], places)
    for i in range(n_computed):
        if i + _AHEAD < n_computed:
            prefetch(values, places[i + _AHEAD] // STRIP * d, d)
        row, j = places[i] // STRIP, places[i] % STRIP
        pre = dot(values, row * d, weights, j * d, d) + bias[j]
        if n < len(latents):
            latents[n], rows[n], activations[n] = first[0] + j, first[1] + row, pre
        n += (pre > threshold[j]) & (pre > row_threshold[row])
    return n, n_computed


@compiled
def _list_flags(flags: Any, places: Any) -> Any:
    """Write places `row * C + latent` of the bits that are set, group by group of rows; return how many."""
    n, words = 0, flags.view(np.uint64)
    for w in range(len(words)):
        if words[w] == 0:
            continue
        for place in range(w * 8, w * 8 + 8):
            left = np.int64(flags[place])
            while left:
                places[n] = (place // STRIP * GROUP + _LOWEST_BIT[left]) * STRIP + place % STRIP
                left &= left - 1
                n += 1
    return n


@compiled
def _flag_rows(product: Any, strip: Any, block: Any, flags: Any) -> None:
    """Set bit r of `flags [M / G, C]` where row r of a group may exceed both thresholds, for whole vectors of latents at a time."""
    threshold, offset, unit, norm, error = strip
    row_threshold, inverse, row_error, reach = block
    for g in range(len(row_threshold) // GROUP):
        own = flags[g * STRIP : (g + 1) * STRIP]
        own[:] = 0
        for r in range(GROUP):
            row, bit = g * GROUP + r, np.uint8(1 << r)
            limit, scale, wide, far = row_threshold[row], inverse[row], row_error[row], reach[row]
            x = product[row * STRIP : (row + 1) * STRIP]
            for j in range(STRIP):
                enough = least(max(threshold[j], limit), offset[j], unit[j], norm[j], error[j], scale, wide, far)
                own[j] |= bit if np.float32(x[j]) > enough else np.uint8(0)


@compiled
def keep_above(latents: Any, rows: Any, activations: Any, row_threshold: Any, columns: Any) -> Any:
    """Copy the firings that exceed their row's threshold to `columns`, each as long as there are firings; return how many."""
    kept_latents, kept_rows, kept_activations = columns
    n = 0
    for i in range(len(rows)):
        kept_latents[n], kept_rows[n], kept_activations[n] = latents[i], rows[i], activations[i]
        n += activations[i] > row_threshold[rows[i]]
    return n


@compiled
def sort_by_latent(latents: Any, row_ids: Any, activations: Any, offsets: Any, sorted_rows: Any, sorted_activations: Any) -> None:
    """Counting sort: fill `offsets [L + 1]` (zeros before) and the sorted columns; firings of a latent keep their order."""
    for i in range(len(latents)):
        offsets[latents[i] + 1] += 1
    for i in range(len(offsets) - 1):
        offsets[i + 1] += offsets[i]
    places = offsets[:-1].copy()
    for i in range(len(latents)):
        place = places[latents[i]]
        places[latents[i]] = place + 1
        sorted_rows[place] = row_ids[i]
        sorted_activations[place] = activations[i]


@compiled
def measure(offsets: Any, activations: Any, first_bin: Any, sums: Any, histogram: Any, maximum: Any) -> None:
    """Add the firings of each latent to `sums [L, digits]` (units of 2^-149, base 2^32; less than 2^31 firings), `histogram [L, 64]`, `maximum`."""
    bits = activations.view(np.int32)
    by_exponent = np.zeros(1 << (31 - _MANTISSA_BITS), np.int64)
    for latent in range(len(offsets) - 1):
        largest, smallest = np.int32(0), np.int32(0x7FFFFFFF)  # as integers, positive floats keep their order
        for i in range(offsets[latent], offsets[latent + 1]):
            largest, smallest = max(largest, bits[i]), min(smallest, bits[i])
            exponent = bits[i] >> _MANTISSA_BITS
            by_exponent[exponent] += (bits[i] & (_LEADING - 1)) | (_LEADING if exponent > 0 else 0)
            place = np.int64(bits[i] >> _BIN_SHIFT) - first_bin
            histogram[latent, min(max(place, 0), N_BINS - 1)] += 1
        for exponent in range(smallest >> _MANTISSA_BITS, (largest >> _MANTISSA_BITS) + 1):
            low, high = by_exponent[exponent] & 0xFFFFFFFF, by_exponent[exponent] >> 32
            shift = max(exponent - 1, 0)  # numbers without a leading one are in the same units as those of exponent 1
            for digit, part in ((shift >> 5, low << (shift & 31)), ((shift >> 5) + 1, high << (shift & 31))):
                sums[latent, digit] += part & 0xFFFFFFFF
                sums[latent, digit + 1] += part >> 32
            by_exponent[exponent] = 0
        maximum[latent] = max(maximum[latent], np.array([largest], np.int32).view(np.float32)[0])


@compiled
def rank_firings(offsets: Any, rows: Any, latent_keys: Any, row_keys: Any, priorities: Any) -> None:
    """Fill the priority of each firing, `mix(latent key ^ row key)` as in priority.py; `row_keys` are indexed by row."""
    for latent in range(len(offsets) - 1):
        key = latent_keys[latent]
        for i in range(offsets[latent], offsets[latent + 1]):
            word = key ^ row_keys[rows[i]]
            word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            priorities[i] = word ^ (word >> np.uint64(31))


@compiled
def select(offsets: Any, activations: Any, priorities: Any, documents: Any, by_document: Any, limits: Any, kinds: Any) -> None:
    """Set bit 1 of `kinds` for each latent's strongest firings (ties: smallest priority), bit 2 for those of smallest priority.

    `limits` says how many of each; `by_document` counts only the strongest firing of each document among the strongest.
    """
    n_top, n_random = limits
    bits, largest = activations.view(np.uint32), 1
    for latent in range(len(offsets) - 1):
        largest = max(largest, offsets[latent + 1] - offsets[latent])
    best, weakness, ties = np.empty(largest, np.int64), np.empty(largest, np.uint64), np.empty(largest, np.uint64)
    for latent in range(len(offsets) - 1):
        low, high = offsets[latent], offsets[latent + 1]
        limit = _nth_smallest(priorities[low:high], n_random)
        for i in range(low, high):
            if priorities[i] <= limit:
                kinds[i] |= 2
        n_best = 0
        for i in range(low, high):
            if by_document and n_best > 0 and documents[best[n_best - 1]] == documents[i]:
                if _is_stronger(activations, priorities, i, best[n_best - 1]):
                    best[n_best - 1] = i
            else:
                best[n_best] = i
                n_best += 1
        for j in range(n_best):
            weakness[j] = _LAST_WORD - bits[best[j]]  # bits of positive floats order as they do
        limit, n_left, n_tied = _nth_smallest(weakness[:n_best], n_top), n_top, 0
        for j in range(n_best):
            n_left -= weakness[j] < limit
            if weakness[j] == limit:
                ties[n_tied] = priorities[best[j]]
                n_tied += 1
        last = _nth_smallest(ties[:n_tied], n_left)
        for j in range(n_best):
            if weakness[j] < limit or (weakness[j] == limit and priorities[best[j]] <= last):
                kinds[best[j]] |= 1


@compiled
def _is_stronger(activations: Any, priorities: Any, one: Any, other: Any) -> Any:
    if activations[one] != activations[other]:
        return activations[one] > activations[other]
    return priorities[one] < priorities[other]


@compiled
def _nth_smallest(words: Any, n: Any) -> Any:
    """Return the n-th smallest of some words; of no more than n, the last word there is. Of many only those are parted that may be among the n."""
    if len(words) <= _MANY * n:
        return _LAST_WORD if len(words) <= n else np.partition(words, n - 1)[n - 1]
    kept = np.empty(_ROOM * n, np.uint64)
    i, n_kept = _sift(words, 0, _LAST_WORD, kept, 0)
    while i < len(words):
        kept[:] = np.partition(kept, n - 1)
        i, n_kept = _sift(words, i, kept[n - 1], kept, n)
    return _LAST_WORD if n_kept < n else np.partition(kept[:n_kept], n - 1)[n - 1]


@compiled
def _sift(words: Any, first: Any, bound: Any, kept: Any, n_kept: Any) -> Any:
    """Append words below a bound to those kept until there is no room; return the first word that is left, and how many are kept."""
    i = first
    while i < len(words) and n_kept < len(kept):
        kept[n_kept] = words[i]
        n_kept += words[i] < bound
        i += 1
    return i, n_kept


@compiled
def raise_largest(largest: Any, bounds: Any, rows: Any, values: Any) -> None:
    """Fold values into what each row knows: `largest [rows, n]` are heaps of the n largest, `bounds [rows]` what is just below the root of each.

    The bounds lie together: a value that does not count any more costs no look at the heap. Measured and rejected: unordered words whose
    smallest is found anew by whole vectors (1.3 to 3 times slower), sorted words (as fast at n = 33, slower beyond).
    """
    for i in range(len(rows)):
        if values[i] > bounds[rows[i]]:
            bounds[rows[i]] = _just_below(_replace_smallest(largest[rows[i]], values[i]))


@compiled
def fill_largest(largest: Any, bounds: Any, values: Any, weights: Any, bias: Any, threshold: Any) -> None:
    """Fold the pre-activations of rows `values [rows * d_in]` and a strip's latents into what the rows know; padding has infinite thresholds."""
    d = len(values) // max(1, len(bounds))
    for row in range(len(bounds)):
        for j in range(STRIP):
            if threshold[j] < np.inf:
                pre = dot(values, row * d, weights, j * d, d) + bias[j]
                if pre > bounds[row]:
                    bounds[row] = _just_below(_replace_smallest(largest[row], pre))


@compiled
def _just_below(root: Any) -> Any:
    """Return what everything exceeds that is positive and at least `root`; minus infinity while there is no root."""
    return root if root == -np.inf else max(np.nextafter(root, np.float32(-np.inf)), np.float32(0))


@compiled
def _replace_smallest(heap: Any, value: Any) -> Any:
    """Put a larger value in the place of a heap's root and return the new root."""
    n, parent = len(heap), 0
    while 2 * parent + 1 < n:
        child = 2 * parent + 1
        if child + 1 < n and heap[child + 1] < heap[child]:
            child += 1
        if heap[child] >= value:
            break
        heap[parent] = heap[child]
        parent = child
    heap[parent] = value
    return heap[0]


@compiled
def sort_by_row(rows: Any, values: Any, bounds: Any, offsets: Any, sorted_values: Any) -> Any:
    """Counting sort of what exceeds its row's bound: fill `offsets [rows + 1]` (zeros before) and the values; return how many there are."""
    for i in range(len(rows)):
        offsets[rows[i] + 1] += values[i] > bounds[rows[i]]
    for row in range(len(offsets) - 1):
        offsets[row + 1] += offsets[row]
    places = offsets[:-1].copy()
    for i in range(len(rows)):
        if values[i] > bounds[rows[i]]:
            sorted_values[places[rows[i]]] = values[i]
            places[rows[i]] += 1
    return offsets[-1]


@compiled
def middle_of_next(offsets: Any, values: Any, k: Any, middles: Any) -> None:
    """Fill what is between each row's k-th largest value and the next, or just below where they tie; values that are missing are not positive."""
    for row in range(len(offsets) - 1):
        own = values[offsets[row] : offsets[row + 1]]
        kth, following = np.float32(0), np.float32(0)
        if len(own) > k:
            ordered = np.partition(own, len(own) - 1 - k)
            following = ordered[len(own) - 1 - k]
            kth = ordered[len(own) - k :].min() if k > 0 else np.float32(np.inf)
        elif len(own) == k and k > 0:
            kth = own.min()
        middle = (kth + following) / np.float32(2) if k > 0 else following
        middles[row] = max(min(middle, np.nextafter(kth, np.float32(-np.inf))), np.float32(0))


@compiled
def multiply_windows(rows: Any, firsts: Any, lengths: Any, columns: Any, products: Any) -> None:
    """Fill `products [windows, width]` with each row of a window times the window's own column; what lies beyond its length stays.

    `rows [n * d_in]`, `columns [windows * d_in]`; a window is the rows [first, first + length).
    """
    d = len(columns) // max(1, len(firsts))
    for i in range(len(firsts)):
        for t in range(lengths[i]):
            products[i, t] = dot(rows, (firsts[i] + t) * d, columns, i * d, d)
