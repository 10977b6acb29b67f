"""Loops of a training step, compiled: fire and pull back a block of pre-activations, pick the largest of each row, put pairs in order.

Rows of a block lie in order; a row's values stay in the first-level cache from one small loop to the next, and each small loop touches
few enough arrays to become vector instructions. Sums by column (firings, gradients of biases) are kept beside. What torch does in seven
to thirteen passes at the speed of memory takes one here. The loops that sum and multiply the rows that pairs name: `bags.py`.

The k largest are parted from others by halving an interval and counting whole vectors, 0.1 us for 256: a heap takes 2, its branches can't be guessed.

Latents and gradients of a block may be bfloat16, where products want them so: they are read and written as halves (`bfloat16.py`), all that
is computed and summed is float32. Sums are of what was written, after rounding.

Numba compiles a loop at its first call (about a second; kept on disk where the disk can be written). Loops hold no lock, so `over_rows`
runs them on as many Python threads as torch has; parts and the order of their sums depend on the number of rows only. (OpenMP's idle threads spin
for milliseconds after each product of torch's; with OMP_WAIT_POLICY=PASSIVE, as our command line sets it, steps are 5 to 15% faster.) What
they compute is defined by the torch forms in `elementwise.py` and `train/losses/sparsify.py`, which other devices use and tests compare them with.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from interp_assets.compute.bfloat16 import as_array, narrow, widen
from interp_assets.compute.compiled import reordered

SMALLEST: Final = np.finfo(np.float32).tiny
"""The smallest value that counts as positive."""
_STRIP: Final = 4096
"""Columns of a row that a loop works on at once: a few arrays of 16 KiB, in the second-level cache."""
_HALVINGS: Final = 64


_PART_ROWS: Final = 32
"""Rows that are summed apart from others, at least."""
_MOST_PARTS: Final = 32


def is_native(*values: Tensor) -> bool:
    """Tell whether the loops can work on these tensors."""
    return all(value.dtype == torch.float32 for value in values) and is_readable(*values)


def is_readable(*values: Tensor) -> bool:
    """Tell whether the loops that know bfloat16 can work on these tensors."""
    return all(value.device.type == "cpu" and value.dtype in (torch.float32, torch.bfloat16) and value.is_contiguous() for value in values)


def as_arrays(*values: Tensor) -> list[NDArray[Any]]:
    """View tensors on the CPU as the arrays that the loops take."""
    return [as_array(value) for value in values]


def over_rows(loop: Callable[..., Any], n_rows: int, shape: tuple[int, int], *arguments: Any) -> NDArray[np.float32]:
    """Call `loop(*arguments, sums, first, last)` for parts of the rows side by side; return the sums `shape` of all parts.

    What is summed is divided by the number of rows alone, and added in order of part: equal bits for any number of threads.
    """
    n_threads = torch.get_num_threads()
    n = max(1, min(n_rows // _PART_ROWS, _MOST_PARTS) if shape[0] else min(n_threads, n_rows))
    sums = np.zeros((n, *shape), np.float32)
    edges = [n_rows * i // n for i in range(n + 1)]

    def work(first: int, last: int) -> None:
        for i in range(first, last):
            loop(*arguments, sums[i], edges[i], edges[i + 1])

    over_parts(work, n, [()] * min(n_threads, n))
    return sums.sum(0)


def over_bags(loop: Callable[..., Any], starts: NDArray[np.int64], *arguments: Any) -> None:
    """Call `loop(*arguments, starts, first, last)` for parts of the bags that hold about as many pairs; `starts` ends with their number."""
    n = torch.get_num_threads()
    edges = [*np.searchsorted(starts, [starts[-1] * i // n for i in range(n)]).tolist(), len(starts) - 1]
    edges[0] = 0
    _call([(loop, *arguments, starts, edges[i], edges[i + 1]) for i in range(n) if edges[i] < edges[i + 1]])


def over_parts(loop: Callable[..., Any], n: int, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Call `loop(*arguments[i], first, last)` for equal parts of `n` things, one part for each of `arguments`; return what the calls return."""
    edges = [n * i // len(arguments) for i in range(len(arguments) + 1)]
    return _call([(loop, *arguments[i], edges[i], edges[i + 1]) for i in range(len(arguments)) if edges[i] < edges[i + 1]])


def _call(calls: list[tuple[Any, ...]]) -> list[Any]:
    if len(calls) < 2:
        return [function(*arguments) for function, *arguments in calls]
    return [future.result() for future in [_pool(len(calls)).submit(*call) for call in calls]]


@cache
def _pool(n_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n_threads, thread_name_prefix="rows")


@reordered
def fire_rows(pre: Any, offset: Any, latents: Any, sums: Any, first: Any, last: Any) -> None:
    """Write `pre + offset` where `pre` is above 0, else 0. Sums: latents, firings."""
    for start in range(0, pre.shape[1], _STRIP):
        columns = slice(start, start + _STRIP)
        b, total, count = offset[columns], sums[0, columns], sums[1, columns]
        for row in range(first, last):
            p, f = pre[row, columns], latents[row, columns]
            for c in range(len(p)):
                f[c] = narrow(p[c] + b[c] if p[c] > 0 else np.float32(0), f)
            for c in range(len(p)):
                total[c] += widen(f[c])
            for c in range(len(p)):
                count[c] += np.float32(1) if p[c] > 0 else np.float32(0)


@reordered
def pull_rows(pre: Any, grad: Any, slopes: Any, scalars: Any, sums: Any, first: Any, last: Any) -> None:
    """Turn gradients of latents into those of pre-activations, in place, as `elementwise.pull` says. Sums: gradient, through, pre."""
    grad_n_fired, half, share, to_encoder = scalars[0], scalars[1], scalars[2], scalars[3]
    through = np.zeros(_STRIP, np.float32)
    for start in range(0, pre.shape[1], _STRIP):
        columns = slice(start, start + _STRIP)
        rise, drop, threshold = slopes[0, columns], slopes[1, columns], slopes[2, columns]
        total, total_through, total_pre = sums[0, columns], sums[1, columns], sums[2, columns]
        for row in range(first, last):
            p, g = pre[row, columns], grad[row, columns]
            if half > 0:
                for c in range(len(p)):
                    t = share * (grad_n_fired + (widen(g[c]) + rise[c]) * threshold[c])
                    through[c] = t if abs(p[c]) < half else np.float32(0)
                for c in range(len(p)):
                    total_through[c] += through[c]
                for c in range(len(p)):
                    total_pre[c] += p[c]
            if half > 0 and to_encoder > 0:
                for c in range(len(p)):
                    v = widen(g[c]) + rise[c]
                    g[c] = narrow((v if p[c] > 0 else drop[c]) + through[c], g)
            else:
                for c in range(len(p)):
                    v = widen(g[c]) + rise[c]
                    g[c] = narrow(v if p[c] > 0 else drop[c], g)
            for c in range(len(p)):
                total[c] += widen(g[c])


@reordered
def open_rows(gate: Any, parameters: Any, opened: Any, latents: Any, sums: Any, first: Any, last: Any) -> None:
    """Write the open gates and the gated magnitudes. Sums: firings, open gates."""
    for start in range(0, gate.shape[1], _STRIP):
        columns = slice(start, start + _STRIP)
        bias, gain, bias_magnitude = parameters[0, columns], parameters[1, columns], parameters[2, columns]
        count, total = sums[0, columns], sums[1, columns]
        for row in range(first, last):
            p, o, f = gate[row, columns], opened[row, columns], latents[row, columns]
            for c in range(len(p)):
                o[c] = narrow(p[c] if p[c] > 0 else np.float32(0), o)
            for c in range(len(p)):
                m = (p[c] - bias[c]) * gain[c] + bias_magnitude[c]
                f[c] = narrow(m if (p[c] > 0) & (m > 0) else np.float32(0), f)
            for c in range(len(p)):
                count[c] += np.float32(1) if widen(f[c]) > 0 else np.float32(0)
            for c in range(len(p)):
                total[c] += widen(o[c])


@reordered
def close_rows(gate: Any, parameters: Any, grads: Any, latents: Any, penalty: Any, sums: Any, first: Any, last: Any) -> None:
    """Add up, in the first of `grads`, the gradients of both uses of the projection. Sums: of the magnitude's bias, its gain, the gate's bias."""
    magnitude, opened = np.zeros(_STRIP, np.float32), np.zeros(_STRIP, np.float32)
    for start in range(0, gate.shape[1], _STRIP):
        columns = slice(start, start + _STRIP)
        bias, gain = parameters[0, columns], parameters[1, columns]
        total_magnitude, total_gain, total_gate = sums[0, columns], sums[1, columns], sums[2, columns]
        for row in range(first, last):
            p, g, q, f = gate[row, columns], grads[0][row, columns], grads[1][row, columns], latents[row, columns]
            for c in range(len(p)):
                magnitude[c] = widen(g[c]) if widen(f[c]) > 0 else np.float32(0)
            for c in range(len(p)):
                total_magnitude[c] += magnitude[c]
            for c in range(len(p)):
                magnitude[c] *= gain[c]
            for c in range(len(p)):
                total_gain[c] += magnitude[c] * (p[c] - bias[c])
            for c in range(len(p)):
                v = widen(q[c]) + penalty
                opened[c] = v if p[c] > 0 else np.float32(0)
            for c in range(len(p)):
                total_gate[c] += opened[c]
            for c in range(len(p)):
                g[c] = narrow(magnitude[c] + opened[c], g)


@reordered
def add_rows(values: Any, sums: Any, first: Any, last: Any) -> None:
    """Sum the rows."""
    total = sums[0]
    for row in range(first, last):
        v = values[row]
        for c in range(len(v)):
            total[c] += v[c]


@reordered
def write_widened(rounded: Any, bias: Any, out: Any, sums: Any, first: Any, last: Any) -> None:  # noqa: ARG001 - it sums nothing
    """Write rounded numbers as float32, plus a row."""
    for row in range(first, last):
        r, o = rounded[row], out[row]
        for c in range(len(o)):
            o[c] = widen(r[c]) + bias[c]


@reordered
def add_widened(rounded: Any, out: Any, sums: Any, first: Any, last: Any) -> None:  # noqa: ARG001 - it sums nothing
    """Add rounded numbers to float32."""
    for row in range(first, last):
        r, o = rounded[row], out[row]
        for c in range(len(o)):
            o[c] += widen(r[c])


@reordered
def split_places(places: Any, n_latents: Any, bags: Any, latents: Any, counts: Any, first: Any, last: Any) -> None:
    """Write row and latent of flat places, which come in order, and count the latents."""
    bag = places[first] // n_latents
    for i in range(first, last):
        while places[i] >= (bag + 1) * n_latents:
            bag += 1
        latent = places[i] - bag * n_latents
        bags[i], latents[i] = bag, latent
        counts[latent] += 1


@reordered
def order_latents(bags: Any, latents: Any, starts: Any, by_latent: Any, rows: Any, first: Any, last: Any) -> None:
    """Write the places of pairs and their rows in order of their latents, from `starts` on."""
    for i in range(first, last):
        latent = latents[i]
        by_latent[starts[latent]], rows[starts[latent]] = i, bags[i]
        starts[latent] += 1


@reordered
def sum_latents(values: Any, by_latent: Any, sums: Any, starts: Any, first: Any, last: Any) -> None:
    """Sum the values of each latent's pairs."""
    for latent in range(first, last):
        total = np.float32(0)
        for i in range(starts[latent], starts[latent + 1]):
            total += values[by_latent[i]]
        sums[latent] = total


@reordered
def sum_prefixes(parts: Any, empty: Any, whole: Any, sums: Any, first: Any, last: Any) -> None:
    """Turn groups' parts into sums of the errors of the prefixes that contain them, as `topk._prefix_errors` says. Sums: squared errors."""
    n_groups, squared = parts.shape[1], sums[0]
    for row in range(first, last):
        error = empty[row]
        total = np.float32(0)
        for j in range(len(error)):
            total += error[j] * error[j]
        squared[0] += total
        for group in range(n_groups):
            part, total = parts[row, group], np.float32(0)
            for j in range(len(part)):
                part[j] += error[j]
            for j in range(len(part)):
                total += part[j] * part[j]
            squared[group + 1] += total
            error = part
        result = whole[row]
        for j in range(len(error)):
            result[j] = error[j]
        for back in range(n_groups - 1):
            part, later = parts[row, n_groups - 2 - back], parts[row, n_groups - 1 - back]
            for j in range(len(part)):
                part[j] += later[j]
        start, part = empty[row], parts[row, 0]
        for j in range(len(part)):
            start[j] += part[j]


@reordered
def count_above(values: Any, bounds: Any, counts: Any, sums: Any, first: Any, last: Any) -> None:  # noqa: ARG001 - it sums nothing
    """Count in each row what is at least the row's bound."""
    for row in range(first, last):
        v, bound, n = values[row], bounds[row], 0
        for c in range(len(v)):
            n += v[c] >= bound
        counts[row] = n


@reordered
def take_above(values: Any, bounds: Any, starts: Any, columns: Any, sums: Any, first: Any, last: Any) -> None:  # noqa: ARG001 - it sums nothing
    """Write flat places (first of `columns`) and values of what is at least its row's bound, row by row from `starts`."""
    places, found = columns
    n = values.shape[1]
    hits = np.empty(65, np.int64)  # each comparison writes one, hit or not: a branch would be guessed wrong where hits are many
    for row in range(first, last):
        bound, at = bounds[row], starts[row]
        for start in range(0, n, 64):
            v, some = values[row, start : start + 64], 0
            for c in range(len(v)):
                some += v[c] >= bound
            if some == 0:
                continue
            n_hits = 0
            for c in range(len(v)):
                hits[n_hits] = c
                n_hits += v[c] >= bound
            for i in range(n_hits):
                places[at + i], found[at + i] = row * n + start + hits[i], v[hits[i]]
            at += n_hits


@reordered
def pick_rows(pre: Any, width: Any, places: Any, values: Any, counts: Any, sums: Any, first: Any, last: Any) -> None:  # noqa: ARG001
    """Write flat places (in order) and values of each row's k largest that are positive, of equal ones the first; and their counts.

    Maxima of `width` strided groups give a bound that at least k values reach, so only groups that reach it are looked at.
    """
    n, k = pre.shape[1], places.shape[1]
    n_grouped = n // width * width
    maxima = np.empty(width, np.float32)
    found, strength = np.empty(n, np.int64), np.empty(n, np.float32)
    for row in range(first, last):
        p = pre[row]
        for j in range(width):
            maxima[j] = p[j]
        for start in range(width, n_grouped, width):
            q = p[start : start + width]
            for j in range(width):
                maxima[j] = q[j] if q[j] > maxima[j] else maxima[j]  # noqa: FURB136 - max() would look for NaN, and not in vectors
        bound = max(bound_largest(maxima, k), SMALLEST)
        m = 0
        for j in range(width):
            if maxima[j] >= bound:
                for c in range(j, n_grouped, width):
                    if p[c] >= bound:
                        found[m], strength[m] = c, p[c]
                        m += 1
        for c in range(n_grouped, n):
            if p[c] >= bound:
                found[m], strength[m] = c, p[c]
                m += 1
        threshold = max(bound, bound_largest(strength[:m], k))
        last, kept = _last_tied(found[:m], strength[:m], threshold, k), 0
        for i in range(m):
            if strength[i] < threshold or (strength[i] == threshold and found[i] > last):
                continue
            c, v, at = row * n + found[i], strength[i], kept
            while at > 0 and places[row, at - 1] > c:
                places[row, at], values[row, at] = places[row, at - 1], values[row, at - 1]
                at -= 1
            places[row, at], values[row, at] = c, v
            kept += 1
        counts[row] = kept


@reordered
def _last_tied(columns: Any, values: Any, threshold: Any, k: Any) -> Any:
    """Return the last column whose value may tie with the threshold, so that no more than k reach it; `columns` are in any order."""
    n_above = n_tied = 0
    for i in range(len(values)):
        n_above += values[i] > threshold
        n_tied += values[i] == threshold
    if n_above + n_tied <= k:
        return np.iinfo(np.int64).max
    tied, n = np.empty(n_tied, np.int64), 0
    for i in range(len(values)):
        if values[i] == threshold:
            tied[n] = columns[i]
            n += 1
    return np.partition(tied, k - n_above - 1)[k - n_above - 1]


@reordered
def bound_largest(values: Any, k: Any) -> Any:
    """Return a number that k values reach, and more only where they tie with the k-th largest; minus infinity where there are no more than k."""
    n, square = len(values), np.float32(0)
    if n <= k:
        return np.float32(-np.inf)
    for i in range(n):
        square += values[i] * values[i]
    high = np.sqrt(square) * np.float32(1.01) + SMALLEST
    low = -high
    for _ in range(_HALVINGS):  # at least k values reach `low`, and fewer `high`
        middle = low * np.float32(0.5) + high * np.float32(0.5)
        if not low < middle < high:
            break
        count = _count(values, middle)
        if count == k:
            return middle
        if count < k:
            high = middle
        else:
            low = middle
    return np.partition(values, n - k)[n - k]


@reordered
def _count(values: Any, bound: Any) -> Any:
    """Count what reaches a bound, of less than 2^24 values."""
    total = np.float32(0)
    for i in range(len(values)):
        total += np.float32(1) if values[i] >= bound else np.float32(0)
    return total
