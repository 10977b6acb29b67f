"""Loops over products of digits, compiled: which pre-activations of each row reach a level, or are its largest, and how strong these are.

Rows of a product lie in order, and what is found comes out in order of row and latent. A row is compared whole, by vector instructions, with the
least that a product must be where its pre-activation may reach the level (0.1 ns an element), and 64 answers become one word. What may reach it
is computed from the rows themselves (`dots.py`), while the columns that come next are asked for: 20 to 30 ns.

Computing in order of latent, so that columns are read as they lie, takes as long as asking for them beforehand, and sorting comes on top.

`_compute` adds in the order that is written; all others may add in any, for which the bounds leave room.
"""

from typing import Any, Final

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from interp_assets.compute.coarse import SLACK
from interp_assets.compute.compiled import compiled, reordered
from interp_assets.compute.dots import dot, prefetch
from interp_assets.compute.loops import SMALLEST, bound_largest

_WORD: Final = 64
_CAREFUL: Final = np.float32(SLACK)
"""Relative error of a level in the units of a product: some eight roundings."""
_AHEAD: Final = 8
"""Columns that are on their way from memory while others are multiplied."""


@reordered
def take_reaching(product: Any, block: Any, columns: Any, level: Any, first_place: Any, room: Any) -> Any:
    """Find what reaches a level: return the number that do, that of pre-activations that were computed, and the room.

    `block` is (values, inverse, error, reach) of the product's rows, `columns` (values, bias, terms), values being flat. The room then begins with
    the values found and their flat places, the product's first being `first_place`.
    """
    n, m = product.shape[1], 0
    flags = np.zeros((n // _WORD + 1) * _WORD, np.uint8)
    for row in range(len(product)):
        if m + n > len(room[0]):
            room = _grow(room, m + n)
        _flag_reaching(product[row], columns[2], level, block, row, flags)
        m = _append(flags, product[row], row, columns[2], block, room, m)
    values, places, rows, latents, _, _, chosen, _ = room
    for i in range(m):
        chosen[i] = i
    _compute(block, columns, (rows, latents), chosen[:m], values)
    n_kept = 0
    for i in range(m):
        places[n_kept], values[n_kept] = first_place + rows[i] * n + latents[i], values[i]
        n_kept += values[i] >= level
    return n_kept, m, room


@reordered
def take_largest(product: Any, block: Any, columns: Any, sizes: Any, first_place: Any, room: Any) -> Any:
    """Find the k largest of each row that are positive, of equal ones the first; `sizes` is k and a number of groups, at least k.

    1. The k-th largest of the maxima of groups, less what digits may be wrong by, is reached by k values: all that may reach it are listed.
    2. The values of those k that seem to be the largest are computed. The smallest is a closer bound.
    3. The values of all others that may reach that are computed, and the k-th largest of all is the threshold.
    """
    k, n = sizes[0], product.shape[1]
    room, levels, ends = _list_rows(product, block, columns[2], sizes, room)
    values, places, rows, latents, seems, mays, chosen, marks = room
    n_chosen, n_before = 0, np.zeros(len(ends), np.int64)
    for r in range(len(product)):
        bound = bound_largest(seems[ends[r] : ends[r + 1]], k)
        for i in range(ends[r], ends[r + 1]):
            chosen[n_chosen], marks[i] = i, seems[i] >= bound
            n_chosen += marks[i]
        n_before[r + 1] = n_chosen
    _compute(block, columns, (rows, latents), chosen[:n_chosen], values)
    for r in range(len(product)):
        if n_before[r + 1] - n_before[r] >= k:
            levels[r] = max(levels[r], _smallest(values, chosen[n_before[r] : n_before[r + 1]]))
    n_computed, n_chosen = n_chosen, 0
    for r in range(len(product)):
        enough = levels[r] * block[1][r]
        for i in range(ends[r], ends[r + 1]):
            chosen[n_chosen] = i
            n_chosen += (mays[i] >= enough) & ~marks[i]
    for i in chosen[:n_chosen]:
        marks[i] = True
    _compute(block, columns, (rows, latents), chosen[:n_chosen], values)
    n_kept = 0
    for r in range(len(product)):
        first_kept = n_kept
        for i in range(ends[r], ends[r + 1]):
            places[n_kept], values[n_kept] = first_place + rows[i] * n + latents[i], values[i]
            n_kept += marks[i] & (values[i] >= levels[r])
        n_kept = _keep_largest(places, values, first_kept, n_kept, k)
    return n_kept, n_computed + n_chosen, room


@reordered
def make_room(n: Any) -> Any:
    """Return room for `n` values, places, rows, latents; what they seem to be and may be, in units of the row's last digit; choices and marks."""
    numbers, whole = np.empty((3, n), np.float32), np.empty((2, n), np.int64)
    return numbers[0], whole[0], np.empty(n, np.int32), np.empty(n, np.int32), numbers[1], numbers[2], whole[1], np.empty(n, np.bool_)


@reordered
def _list_rows(product: Any, block: Any, terms: Any, sizes: Any, room: Any) -> Any:
    """List what may belong to the k largest of its row; return the room, a level that these reach, and where each row's end."""
    k, width = sizes
    n, m, widest = product.shape[1], 0, _widest(terms)
    levels, ends = np.full(len(product), SMALLEST, np.float32), np.zeros(len(product) + 1, np.int64)
    flags, maxima = np.zeros((n // _WORD + 1) * _WORD, np.uint8), np.empty(width, np.float32)
    for row in range(len(product)):
        if m + n > len(room[0]):
            room = _grow(room, m + n)
        p, level = product[row], SMALLEST
        if k < n:
            level = max(level, _bound(p, terms, widest, block, row, maxima, k))
        _flag_reaching(p, terms, level, block, row, flags)
        m = _append(flags, p, row, terms, block, room, m)
        levels[row], ends[row + 1] = level, m
    return room, levels, ends


@reordered
def _widest(terms: Any) -> Any:
    """Return the largest norm, error and bias of a column, the first two times its unit."""
    norm, error, bias = np.float32(0), np.float32(0), np.float32(0)
    for j in range(terms.shape[1]):
        norm, error, bias = max(norm, terms[4, j] * terms[2, j]), max(error, terms[4, j] * terms[3, j]), max(bias, abs(terms[5, j]))
    return norm, error, bias


@reordered
def _bound(p: Any, terms: Any, widest: Any, block: Any, row: Any, maxima: Any, k: Any) -> Any:
    """Return a value that at least k pre-activations of a row reach."""
    _, inverses, errors, reaches = block
    inverse, width, size, bias = inverses[row], len(maxima), terms[4], terms[5]
    for j in range(width):
        maxima[j] = np.float32(p[j]) * size[j] + inverse * bias[j]
    for start in range(width, len(p) // width * width, width):
        q, s, b = p[start : start + width], size[start : start + width], bias[start : start + width]
        for j in range(width):
            u = np.float32(q[j]) * s[j] + inverse * b[j]
            maxima[j] = u if u > maxima[j] else maxima[j]  # noqa: FURB136
    seems = bound_largest(maxima, k) if width > k else _smallest(maxima, np.arange(width))
    wrong = errors[row] * widest[0] + reaches[row] * widest[1] + (abs(seems) + 2 * widest[2] * inverse) * _CAREFUL
    return (seems - wrong) / inverse


@reordered
def _flag_reaching(p: Any, terms: Any, level: Any, block: Any, row: Any, flags: Any) -> None:
    """Set flags where a product may belong to a value that reaches the level."""
    _, inverses, errors, reaches = block
    inverse, error, reach = inverses[row], errors[row], reaches[row]
    low, unit, offset, norm, column_error = (level - abs(level) * _CAREFUL) * inverse, terms[0], terms[1], terms[2], terms[3]
    for j in range(len(p)):
        flags[j] = np.float32(p[j]) >= low * unit[j] - inverse * offset[j] - error * norm[j] - reach * column_error[j]


@reordered
def _append(flags: Any, p: Any, row: Any, terms: Any, block: Any, room: Any, m: Any) -> Any:
    """Append what is flagged in a row; return how many there are then."""
    _, _, rows, latents, seems, mays, _, _ = room
    inverse, error, reach, first = block[1][row], block[2][row], block[3][row], m
    for start in range(0, len(flags), _WORD):
        word = _word(flags, start)
        while word != 0:
            j = start + _lowest(word)
            rows[m], latents[m], seems[m] = row, j, p[j]
            m += 1
            word &= word - np.uint64(1)
    for i in range(first, m):
        j = latents[i]
        u, offset = seems[i] * terms[4, j], inverse * terms[5, j]
        wrong = (error * terms[2, j] + reach * terms[3, j]) * terms[4, j]
        seems[i] = u + offset
        mays[i] = u + offset + wrong + (abs(u) + abs(offset)) * _CAREFUL
    return m


@reordered
def _smallest(values: Any, chosen: Any) -> Any:
    """Return the smallest of chosen values."""
    least = np.float32(np.inf)
    for i in chosen:
        least = min(least, values[i])
    return least


@reordered
def _keep_largest(places: Any, values: Any, start: Any, stop: Any, k: Any) -> Any:
    """Keep the k largest of [start, stop), of equal ones the first, where there are more; return where they end."""
    if stop - start <= k:
        return stop
    threshold, n_tied, kept = bound_largest(values[start:stop], k), k, start
    for i in range(start, stop):
        n_tied -= values[i] > threshold
    for i in range(start, stop):
        places[kept], values[kept] = places[i], values[i]
        is_tied = values[kept] == threshold
        kept += (values[kept] > threshold) | (is_tied & (n_tied > 0))
        n_tied -= is_tied
    return kept


@compiled
def _compute(block: Any, columns: Any, pairs: Any, chosen: Any, values: Any) -> None:
    """Compute the values of chosen pairs; their order keeps a row in the cache, and the columns that come next are asked for."""
    (rows, latents), x, (W, bias, _) = pairs, block[0], columns
    d = len(x) // max(1, len(block[1]))
    for n in range(len(chosen)):
        if n + _AHEAD < len(chosen):
            prefetch(W, np.int64(latents[chosen[n + _AHEAD]]) * d, d)
        i = chosen[n]
        j = np.int64(latents[i])
        values[i] = dot(x, rows[i] * d, W, j * d, d) + bias[j]


@reordered
def _grow(room: Any, n: Any) -> Any:
    """Return room for at least `n`, and twice as much as there was, with the same content."""
    longer = make_room(max(n, 2 * len(room[0])))
    for i in range(len(room[0])):
        longer[2][i], longer[3][i], longer[4][i], longer[5][i] = room[2][i], room[3][i], room[4][i], room[5][i]
    return longer


def _write_word(typing: Any, flags: Any, start: Any) -> Any:  # noqa: ARG001
    """Make 64 flags one word, the first of them its lowest bit."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        lanes = ir.VectorType(ir.IntType(8), _WORD)
        data = context.make_array(signature.args[0])(context, builder, values[0]).data
        own = builder.load(builder.bitcast(builder.gep(data, [values[1]]), lanes.as_pointer()), align=1)
        return builder.bitcast(builder.icmp_unsigned("!=", own, ir.Constant(lanes, [0] * _WORD)), ir.IntType(_WORD))

    return types.uint64(flags, types.int64), generate


def _write_lowest(typing: Any, word: Any) -> Any:  # noqa: ARG001
    """Return the place of the lowest bit that is set."""

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:  # noqa: ARG001
        whole = ir.IntType(_WORD)
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(whole, [whole, ir.IntType(1)]), "llvm.cttz.i64")
        return builder.call(function, [values[0], ir.Constant(ir.IntType(1), 1)])

    return types.int64(word), generate


_word: Any = intrinsic(_write_word)
_lowest: Any = intrinsic(_write_lowest)
