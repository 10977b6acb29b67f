"""Logits become one number for each row: the metrics of a plan."""

from collections.abc import Sequence

import torch
from torch import Tensor

from interp_assets.errors import InputError
from interp_assets.garcon.plan import Divergence, LogitDiff, LogProb, Loss
from interp_assets.planning.progress import format_count

MetricOp = LogitDiff | LogProb | Loss | Divergence


def places_of(metric: MetricOp, lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Return row and position of every number of a metric; of a loss none, it takes all. Raises `InputError` for one outside its row."""
    rows = range(len(lengths)) if metric.rows is None else metric.rows
    if metric.metric == "loss":
        if short := [row for row in rows if lengths[row] < 2]:
            raise InputError(f"Row {short[0]} has one token: there is no next one, and no loss.")
        return []
    places = [(row, metric.pos + lengths[row] if metric.pos < 0 else metric.pos) for row in rows]
    for row, place in places:
        if not 0 <= place < lengths[row]:
            raise InputError(f"Metric {metric.name!r} is at position {metric.pos} of row {row}, which has {lengths[row]} tokens.")
    return places


def measure(metric: LogitDiff | LogProb | Divergence, logits: Tensor, other: Tensor | None = None) -> Tensor:
    """Return a metric for every row of `logits`, [rows, vocabulary], in float32, or float64 of a float64 model.

    `other` are the logits that a divergence is from.
    """
    chosen = logits if logits.dtype == torch.float64 else logits.float()
    if metric.metric == "kl":
        assert other is not None
        if other.shape != chosen.shape:
            raise InputError(f"Metric {metric.name!r} compares logits of shape {list(chosen.shape)} with {list(other.shape)}.")
        log_other = other.to(chosen).log_softmax(-1)
        return (log_other.exp() * (log_other - chosen.log_softmax(-1))).sum(-1)
    if metric.metric == "logprob":
        return _pick(chosen.log_softmax(-1), metric.token, metric.name).clone()  # a view would keep the numbers of all tokens
    return _pick(chosen, metric.token, metric.name) - _pick(chosen, metric.other, metric.name)


def _pick(values: Tensor, token: int | tuple[int, ...], name: str) -> Tensor:
    n_rows, vocabulary = values.shape
    tokens = [token] * n_rows if isinstance(token, int) else list(token)
    if len(tokens) != n_rows or max(tokens) >= vocabulary or min(tokens) < 0:
        raise InputError(f"Metric {name!r} names the tokens {tokens} for {format_count(n_rows, 'row')} and a vocabulary of {vocabulary:,}.")
    if isinstance(token, int):
        return values.select(1, token)
    return values.gather(1, torch.tensor(tokens, device=values.device)[:, None])[:, 0]
