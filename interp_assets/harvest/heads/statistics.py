"""Sums over rows of attention become what a head is: shares, means and their chance. Whole numbers until the last division, so they merge exactly."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from interp_assets.compute.head_loops import FIELDS, N_DISTANCES, N_SCORES

_PLACE: Final = {name: place for place, name in enumerate(FIELDS)}
_MASS, _NAT, _STEP, _FINE = 2.0**24, 2.0**20, 2.0**10, 2.0**16
_UNITS: Final[dict[str, float]] = {"entropy": _NAT, "distance": _STEP, "uniform_distance": _STEP, "distance2": 1.0} | dict.fromkeys(
    ("logit_std", "logit_margin", "logit_z", "output_norm"), _FINE
)
"""What one is, in the units of a field; of all others 2^24."""
_PER: Final = {"previous": "previous_rows", "first": "first_rows", "induction": "induction_rows", "duplicate": "duplicate_rows"}
_PER_ROW: Final[dict[str, str]] = dict.fromkeys(("entropy", "entropy_share", "logit_std", "logit_margin", "logit_z"), "spread_rows")
_CHANCES: Final = ("self", "previous", "first", "induction", "duplicate", "other_document", "distance")
MEANS: Final = tuple(name for name in FIELDS if not name.endswith("rows") and not name.startswith("uniform"))
"""Statistics of a head that are means over rows."""
CHANCES: Final = tuple(f"uniform_{name}" for name in _CHANCES)
"""The same of a head that looks at all keys that it sees alike."""


@dataclass(frozen=True)
class HeadStatistics:
    """Sums over valid rows for the heads of one layer, int64; units in docs/formats/head_candidates.md."""

    fields: NDArray[np.int64]
    """[heads, fields], in the order of `FIELDS`."""
    distance_mass: NDArray[np.int64]
    """[heads, distances]."""
    score: NDArray[np.int64]
    """[heads, bins] rows by their score."""
    mean_output: NDArray[np.int64]
    """[heads, d_value] in 2^-16."""
    key_mass: NDArray[np.int64]
    """[heads, tokens + 1]: mass on keys by their token, the first position left out."""
    query_mass: NDArray[np.int64]
    """[heads, tokens + 1]: mass that queries of a token do not give to a sink."""
    uniform_distance_mass: NDArray[np.int64]
    """[1, distances], as the following of a head that looks at all keys alike."""
    uniform_key_mass: NDArray[np.int64]
    uniform_query_mass: NDArray[np.int64]
    token_counts: NDArray[np.int64]
    """[2, tokens + 1]: places of each token as a key (the first position of a context left out), and valid rows."""

    @property
    def n_heads(self) -> int:
        """Number of heads."""
        return len(self.fields)

    def sum_of(self, name: str) -> NDArray[np.int64]:
        """Return one field of all heads."""
        return self.fields[:, _PLACE[name]]

    def mean_of(self, name: str) -> NDArray[np.float64]:
        """Return one statistic of all heads, [heads]: the mean over the rows that have it; NaN where no row has."""
        rows = self.sum_of(_PER_ROW.get(name) or _PER.get(name.removeprefix("uniform_"), "rows")).astype(np.float64)
        return np.divide(self.sum_of(name) / _UNITS.get(name, _MASS), rows, out=np.full(self.n_heads, np.nan), where=rows > 0)

    def missing_mass(self) -> NDArray[np.int64]:
        """Return by how much masses by distance and the learned sink miss the number of rows, [heads] in 2^-24."""
        return self.distance_mass.sum(axis=1) + self.sum_of("learned_sink") - (self.sum_of("rows") << 24)


def empty_statistics(n_heads: int, d_value: int, n_classes: int) -> HeadStatistics:
    """Return the statistics of no rows."""
    shapes = {
        "fields": (n_heads, len(FIELDS)),
        "distance_mass": (n_heads, N_DISTANCES),
        "score": (n_heads, N_SCORES),
        "mean_output": (n_heads, d_value),
        "key_mass": (n_heads, n_classes),
        "query_mass": (n_heads, n_classes),
        "uniform_distance_mass": (1, N_DISTANCES),
        "uniform_key_mass": (1, n_classes),
        "uniform_query_mass": (1, n_classes),
        "token_counts": (2, n_classes),
    }
    return HeadStatistics(**{name: np.zeros(shape, np.int64) for name, shape in shapes.items()})


def merge_statistics(parts: Sequence[HeadStatistics]) -> HeadStatistics:
    """Add up; the order does not matter."""
    return HeadStatistics(**{item.name: np.sum([getattr(part, item.name) for part in parts], axis=0) for item in fields(HeadStatistics)})


def statistics_arrays(statistics: HeadStatistics) -> dict[str, NDArray[np.int64]]:
    """Return the arrays of a file."""
    return dict(vars(statistics))


def as_statistics(tensors: Mapping[str, Tensor]) -> HeadStatistics:
    """Return the statistics of a file's tensors."""
    return HeadStatistics(**{item.name: tensors[item.name].numpy() for item in fields(HeadStatistics)})
