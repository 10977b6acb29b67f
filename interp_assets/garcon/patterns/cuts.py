"""A head or an edge that is taken away becomes what that changes: logits and KL divergence at one position, beside the unedited text.

The text runs twice in one forward, once with the cut, so both ways are rounded alike. A head is cut in what it mixes (`z`): to zero, or to its mean
over the text. An edge is cut in the pattern: to zero, or to the mean of what all queries that look at its key give to that key, while the other edges
of the row keep their mass. Logits are centred over the vocabulary, because softmax sees no constant, in float64.
"""

from collections.abc import Iterator, Sequence
from typing import Final, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from interp_assets.compute.any_threads import AnyThreads
from interp_assets.errors import InputError, NonFiniteError
from interp_assets.garcon.points import find_point, n_heads, n_layers
from interp_assets.garcon.subject import SubjectModel
from interp_assets.garcon.taps import Tap, tapped

SHOWN: Final = 10
BATCH_TOKENS: Final = 8192
"""Positions of one forward of a sweep."""


class Cut(NamedTuple):
    """What is taken away."""

    layer: int
    head: int
    how: Literal["zero", "mean"] = "zero"
    query: int | None = None
    """Of an edge; None for the whole head."""
    key: int | None = None


class Change(NamedTuple):
    """What a cut does to the prediction at one position."""

    kl: float
    """sum p (log p - log p_cut), in nats."""
    tokens: list[int]
    """The most likely ones, before or after, and those that were asked for."""
    before: NDArray[np.float64]
    """Their centred logits."""
    after: NDArray[np.float64]
    p_before: NDArray[np.float64]
    """Their probabilities."""
    p_after: NDArray[np.float64]


def measure_cut(subject: SubjectModel, row: Sequence[int], cut: Cut, position: int = -1, tokens: Sequence[int] = ()) -> Change:
    """Return what a cut changes at a position. Raises `InputError` for a head, an edge, a position or a token that is not there."""
    at = check_cuts(subject, row, [cut], position)
    logits = _run(subject, row, [cut], at)
    if unknown := [token for token in tokens if not 0 <= token < logits.shape[1]]:
        raise InputError(f"There is no token {unknown[0]:,}: the model has logits of tokens 0 to {logits.shape[1] - 1:,}.")
    kl, log_p = _diverge(logits)
    likely = [int(token) for way in log_p for token in way.topk(min(SHOWN // 2, len(way))).indices]
    chosen = list(dict.fromkeys([*tokens, *likely]))
    shown, p = (logits - logits.mean(dim=1, keepdim=True))[:, chosen].numpy(), log_p[:, chosen].exp().numpy()
    return Change(float(kl[0]), chosen, shown[0], shown[1], p[0], p[1])


def sweep_heads(
    subject: SubjectModel, row: Sequence[int], how: Literal["zero", "mean"] = "zero", position: int = -1
) -> Iterator[tuple[list[Cut], NDArray[np.float64]]]:
    """Cut every head by itself, some at a time; yield the cuts with their KL divergences. Raises as `measure_cut` does."""
    cuts = each_head(subject, how)
    at = check_cuts(subject, row, cuts, position)
    step = max(1, BATCH_TOKENS // len(row) - 1)
    for first in range(0, len(cuts), step):
        part = cuts[first : first + step]
        yield part, _diverge(_run(subject, row, part, at))[0].numpy()


def each_head(subject: SubjectModel, how: Literal["zero", "mean"] = "zero") -> list[Cut]:
    """Return a cut of every head."""
    return [Cut(layer, head, how) for layer in range(n_layers(subject.net)) for head in range(n_heads(subject.net, "z"))]


def check_cuts(subject: SubjectModel, row: Sequence[int], cuts: Sequence[Cut], position: int) -> int:
    """Return the position from 0. Raises `InputError` for what cannot be cut there, without running anything."""
    if not row:
        raise InputError("The text has no tokens: give at least one.")
    if subject.net.get_output_embeddings() is None or not subject.is_causal:
        raise InputError(f"{subject.name} ({subject.net.config.model_type}) has no language-model head: there is nothing to measure a cut by.")
    if not -len(row) <= position < len(row):
        raise InputError(f"There is no position {position}; the text has {len(row)} tokens, from 0.")
    for cut in cuts:
        find_point(subject.net, f"z.{cut.layer}")
        if not 0 <= cut.head < n_heads(subject.net, "z"):
            raise InputError(f"There is no head {cut.layer}.{cut.head}; layer {cut.layer} has heads 0 to {n_heads(subject.net, 'z') - 1}.")
        if (cut.query is None) != (cut.key is None):
            raise InputError("An edge has a query and a key: name both, or neither for the whole head.")
        if cut.query is not None and cut.key is not None and not 0 <= cut.key <= cut.query < len(row):
            raise InputError(f"There is no edge from query {cut.query} to key {cut.key}: a query looks at itself and at what was before.")
    return position % len(row)


def _run(subject: SubjectModel, row: Sequence[int], cuts: Sequence[Cut], at: int) -> Tensor:
    """Return the logits at a position, [1 + cuts, vocabulary] float64: first those without any cut."""
    token_ids = torch.tensor([list(row)] * (1 + len(cuts)))
    arguments = subject.arguments(token_ids, None)
    if subject.can_choose_logits:
        arguments["logits_to_keep"] = torch.tensor([at], device=subject.device)
    by_point: dict[str, list[tuple[int, Cut]]] = {}
    for place, cut in enumerate(cuts):
        by_point.setdefault(f"{'z' if cut.query is None else 'pattern'}.{cut.layer}", []).append((1 + place, cut))
    taps = [Tap(find_point(subject.net, name), _Cutting(found)) for name, found in by_point.items()]
    with tapped(subject.net, taps, len(row)), torch.no_grad(), AnyThreads():
        logits = subject.net(**arguments).logits
    logits = logits[:, 0 if subject.can_choose_logits else at].double().cpu()
    if not bool(torch.isfinite(logits).all()):
        raise NonFiniteError("Logits are not finite. Serve the model in float32.")
    return logits


class _Cutting:
    """Takes heads or edges out of some rows of an activation."""

    def __init__(self, cuts: Sequence[tuple[int, Cut]]) -> None:
        self.cuts = cuts

    def __call__(self, value: Tensor) -> Tensor:
        changed = value.clone()
        for row, cut in self.cuts:
            if cut.query is not None:
                column = value[row, cut.head, :, cut.key]
                mean = column.sum() / (column > 0).sum().clamp(min=1)
                changed[row, cut.head, cut.query, cut.key] = 0.0 if cut.how == "zero" else mean
            else:
                changed[row, :, cut.head] = 0.0 if cut.how == "zero" else value[row, :, cut.head].mean(dim=0)
        return changed


def _diverge(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the KL divergence of every later row from the first, and all log probabilities."""
    log_p = torch.log_softmax(logits, dim=-1)
    return (log_p[0].exp() * (log_p[0] - log_p[1:])).sum(dim=-1).clamp(min=0.0), log_p
