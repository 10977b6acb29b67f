"""Rows of huge norm (attention sinks) are told from ordinary ones, so that an SAE's quality is known on both apart.

A few positions, mostly the first of a context and its separators, have residual streams of hundreds of times the usual norm. Their squared norms
are most of all variance, and one latent that reconstructs them makes FVU look good, whatever becomes of all other rows. A row is an outlier where,
at a hook point that the SAE reads or reconstructs, its norm exceeds `OUTLIER_MULTIPLE` times the median norm of the training rows there.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp_assets.compute.elementwise import sum_all
from interp_assets.harvest.refs import OUTLIER_MULTIPLE
from interp_assets.harvest.statistics import load_statistics, squared_deviation
from interp_assets.planning.config import SaeConfig
from interp_assets.planning.pipeline import Pipeline
from interp_assets.storage.store import Store


def norm_limits(pipeline: Pipeline, store: Store, config: SaeConfig) -> dict[str, float]:
    """Return the largest norm of an ordinary row at every hook point of an SAE; infinity where the median is 0."""
    hook_points = dict.fromkeys((*config.sources, *config.targets))
    medians = {name: load_statistics(pipeline, store, name).median_norm for name in hook_points}
    return {name: OUTLIER_MULTIPLE * median if median > 0 else math.inf for name, median in medians.items()}


def find_outliers(rows: Mapping[str, Float[Tensor, "*rows width"]], limits: Mapping[str, float]) -> Bool[Tensor, "*rows"]:
    """Tell which rows are outliers at one of the hook points."""
    found = [values.float().norm(dim=-1) > limits[name] for name, values in rows.items()]
    return torch.stack(found).any(dim=0)


class GroupSums:
    """What is summed over some of the rows to tell FVU and L0 there."""

    def __init__(self, width: int) -> None:
        """Begin with no rows of `width` dimensions."""
        self.n_rows, self.n_fired = 0, 0
        self.squared_error, self.squared_norm = 0.0, 0.0
        self.row_sum = torch.zeros(width, dtype=torch.float64)

    def add(self, y: Float[Tensor, "rows width"], squared_error: Float[Tensor, " rows"], n_fired: Tensor) -> None:
        """Add rows, the squared error of each, and how many latents fired on it."""
        exact = y.double()
        self.n_rows += len(y)
        self.n_fired += int(n_fired.sum())
        self.squared_error += float(sum_all(squared_error.double()))
        self.squared_norm += float(sum_all(exact.square().sum(1)))
        self.row_sum += exact.sum(0).cpu()

    @property
    def fvu(self) -> float | None:
        """Squared error over squared deviation from the mean of these rows; None where they do not deviate."""
        return find_fvu([self])

    @property
    def l0(self) -> float | None:
        """Mean number of latents that fire; None without rows."""
        return self.n_fired / self.n_rows if self.n_rows else None


def find_fvu(groups: Iterable[GroupSums]) -> float | None:
    """Return the FVU of the rows of several groups together; None where they do not deviate from their mean."""
    groups = list(groups)
    row_sum = torch.stack([group.row_sum for group in groups]).sum(0)
    deviation = squared_deviation(sum(group.squared_norm for group in groups), row_sum, sum(group.n_rows for group in groups))
    return sum(group.squared_error for group in groups) / deviation if deviation else None
