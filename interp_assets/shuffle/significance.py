"""Statistics of an order become p-values under the law of a uniform permutation.

Most are counts of coincidences: pairs of positions in one given relation (neighbours, one batch, one offset of two buckets) whose rows
share a label (document, shard, bucket). Under a uniform permutation the mean and the variance of such a count are exact and need only
four numbers (`expect_coincidences`). Tails are normal, or Poisson while few coincidences are expected.
"""

import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray


class Expectation(NamedTuple):
    """Mean and variance of a statistic under a uniform permutation."""

    mean: float
    variance: float


def expect_coincidences(n_rows: int, n_pairs: int, n_paths: int, label_counts: NDArray[np.int64]) -> Expectation:
    """Return mean and variance of the number of given pairs of positions whose rows have one label.

    `n_pairs`: pairs of positions; `n_paths`: ordered pairs of them that share a position, the sum of d (d - 1) over positions in d pairs;
    `label_counts`: rows of each label, `[n_labels]`. Exact, in rationals: Mantel 1967 for two graphs, one of them being "has the same label".
    """
    sizes = [(int(size), int(count)) for size, count in zip(*np.unique(label_counts, return_counts=True), strict=True)]
    same = sum(size * (size - 1) // 2 * count for size, count in sizes)
    paths = sum(size * (size - 1) * (size - 2) * count for size, count in sizes)
    mean = Fraction(n_pairs * same * 2, n_rows * (n_rows - 1))
    square = mean
    if n_rows > 2:
        square += Fraction(n_paths * paths, n_rows * (n_rows - 1) * (n_rows - 2))
    if n_rows > 3:
        apart = (n_pairs * n_pairs - n_pairs - n_paths) * (same * same - same - paths) * 4
        square += Fraction(apart, n_rows * (n_rows - 1) * (n_rows - 2) * (n_rows - 3))
    return Expectation(float(mean), float(square - mean * mean))


def coincidence_p(count: int, expected: Expectation) -> float:
    """Return the two-sided p-value of a count of coincidences."""
    if expected.mean < 1000:
        return poisson_p(count, expected.mean)
    return normal_p((count - expected.mean) / math.sqrt(expected.variance)) if expected.variance > 0 else 1.0


def normal_p(z: float) -> float:
    """Return the two-sided p-value of a standard normal."""
    return math.erfc(abs(z) / math.sqrt(2))


def student_p(t: float, degrees: int) -> float:
    """Return the two-sided p-value of Student's t (Wallace 1959: within 0.1 standard deviations of the normal it is mapped to)."""
    scale = (8 * degrees + 1) / (8 * degrees + 3)
    return normal_p(scale * math.sqrt(degrees * math.log1p(t * t / degrees)))


def poisson_p(count: int, mean: float) -> float:
    """Return the two-sided p-value of a Poisson count."""
    if mean <= 0:
        return 1.0 if count == 0 else 0.0
    above = _gamma_below(float(count), mean) if count > 0 else 1.0
    return min(1.0, 2 * min(above, _gamma_above(float(count + 1), mean)))


def chi_square_p(value: float, degrees: int, *, is_two_sided: bool) -> float:
    """Return the p-value of a chi-square statistic; two-sided, it also falls for a table that is too even."""
    above, below = _gamma_above(degrees / 2, value / 2), _gamma_below(degrees / 2, value / 2)
    return min(1.0, 2 * min(above, below)) if is_two_sided else above


def _gamma_above(shape: float, x: float) -> float:
    return float(torch.special.gammaincc(torch.tensor(float(shape), dtype=torch.float64), torch.tensor(float(x), dtype=torch.float64)))


def _gamma_below(shape: float, x: float) -> float:
    return float(torch.special.gammainc(torch.tensor(float(shape), dtype=torch.float64), torch.tensor(float(x), dtype=torch.float64)))
