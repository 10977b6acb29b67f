"""Numbers of rows and their two classes become a logistic regression, many at once, and how well each does on other rows.

    loss = mean of softplus(-t * (x w + b)) over the rows, both classes of one weight + |w|^2 / (2 n),        t = 1 or -1

which is scikit-learn's with `C=1, class_weight="balanced"`, on columns of mean square 1. All regressions are one problem for L-BFGS: the sum of
losses that share no weight. Accuracy is balanced: the mean of both classes' shares, so chance is 0.5 whatever they weigh.
"""

from collections.abc import Callable
from typing import Final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_STEPS: Final = 200
_FLAT: Final = 1e-7
Score = Callable[[Float[Tensor, "weights probes"]], Float[Tensor, "rows probes"]]
"""Multiplies what each probe reads of the rows by its weights."""


def read_all(x: Float[Tensor, "rows width"]) -> Score:
    """Let every probe read all columns."""
    return lambda weights: x @ weights


def read_chosen(x: Float[Tensor, "rows width"], chosen: Int[Tensor, "k probes"]) -> Score:
    """Let each probe read columns of its own."""
    columns = x[:, chosen]  # [rows, k, probes]
    return lambda weights: (columns * weights).sum(1)


def scale(x: Float[Tensor, "rows width"]) -> Float[Tensor, "rows width"]:
    """Bring columns to a mean square of 1, which changes no sign and leaves zeros alone."""
    size = x.square().mean(0).sqrt()
    return x / torch.where(size > 0, size, 1.0)


def choose(x: Float[Tensor, "width probes"], k: int) -> Int[Tensor, "k probes"]:
    """Return the columns whose class means differ most, the strongest first."""
    return x.abs().topk(min(k, len(x)), dim=0).indices


def balance(is_positive: Bool[Tensor, "rows probes"], is_used: Bool[Tensor, "rows probes"]) -> Float[Tensor, "rows probes"]:
    """Weigh rows so that both classes weigh 1/2 among those that are used; the others weigh 0."""
    weights = torch.zeros(is_positive.shape, dtype=torch.float32)
    for of_class in (is_positive & is_used, ~is_positive & is_used):
        weights += of_class / (2 * of_class.sum(0).clamp(min=1))
    return weights


def fit(
    score: Score, n_weights: int, is_positive: Bool[Tensor, "rows probes"], weights: Float[Tensor, "rows probes"], n_rows: Float[Tensor, " probes"]
) -> Float[Tensor, "rows probes"]:
    """Fit all probes on the rows that weigh, `n_rows` of each, and return what each says of every row: above 0 is the positive class."""
    signs = is_positive.float() * 2 - 1
    found = torch.zeros(n_weights + 1, signs.shape[1], requires_grad=True)
    solver = torch.optim.LBFGS([found], max_iter=_STEPS, history_size=20, tolerance_grad=_FLAT, tolerance_change=1e-10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        margin = (score(found[:-1]) + found[-1]) * signs
        loss = (weights * torch.nn.functional.softplus(-margin)).sum() + (found[:-1].square().sum(0) / (2 * n_rows)).sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(closure)  # pyright: ignore[reportArgumentType] - a loss is a tensor here
    with torch.no_grad():
        return score(found[:-1]) + found[-1]


def measure(
    said: Float[Tensor, "rows probes"], is_positive: Bool[Tensor, "rows probes"], weights: Float[Tensor, "rows probes"]
) -> Float[Tensor, " probes"]:
    """Return the balanced accuracy of each probe over the rows that weigh."""
    return (weights * ((said > 0) == is_positive)).double().sum(0)
