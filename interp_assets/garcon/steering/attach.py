"""An SAE is tried on a short text before it is used: what it leaves unexplained there tells a wrong place, scale or model, which its weights cannot.

FVU and L0 are measured where the SAE is said to belong, without special tokens, and stand beside what its evaluation found. FVU above 1 is worse than
the mean alone: such an SAE is refused, with the points where it does better, unless its own evaluation was as bad. Above 1.5 times the
evaluation's, every answer says so.
"""

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from interp_assets.errors import InputError
from interp_assets.garcon.features import AttachedSae, Fit
from interp_assets.garcon.points import find_point
from interp_assets.garcon.subject import SubjectModel

TEXT: Final = (
    "The ferry left at noon, and by the time it reached the second island most of the passengers had gone below to get out of the wind. "
    "A boy of about nine stayed at the rail. He counted the gulls aloud, lost his place, and began again. His mother, who had been reading, "
    'closed her book and asked him what he would do with the number once he had it. "Nothing," he said. "I only want to know." '
    "In 1912 the same route took eleven hours; today it takes three, and the harbour that was built for coal is used by people who study eels.\n"
)
"""What is read where no pipeline lends a text of its own."""
REFUSED_ABOVE: Final = 1.0
WARNED_ABOVE: Final = 1.5
_SHOWN: Final = 3


def try_sae(subject: SubjectModel, name: str, attached: AttachedSae, texts: Sequence[Sequence[int]], special: Sequence[int]) -> AttachedSae:
    """Return an SAE with how it fits some texts. Raises `InputError` for one of another width, and for one that explains less than nothing."""
    names = [find_point(subject.net, point).name for point in (*attached.hook_points, *([attached.target] if attached.target else []))]
    widths = [subject.d_in(point) for point in names]
    wide = sum(widths[: len(attached.hook_points)])
    if wide != attached.sae.d_in or widths[-1] != attached.sae.W_dec.shape[1] - sum(widths[:-1]) * bool(attached.more):
        raise InputError(
            f"The SAE {name!r} encodes rows of {attached.sae.d_in} and writes rows of {attached.sae.W_dec.shape[1]}; {', '.join(names)} of "
            f"{subject.name} are {widths} wide. It belongs to another point or another model."
        )
    contexts = [torch.tensor(list(text[: subject.max_context])) for text in texts]
    token_ids = torch.nn.utils.rnn.pad_sequence(contexts, batch_first=True)
    is_token = torch.nn.utils.rnn.pad_sequence([torch.ones(len(context), dtype=torch.bool) for context in contexts], batch_first=True)
    kept = is_token & ~torch.isin(token_ids, torch.tensor(list(special), dtype=torch.int64))
    n_kept = int(kept.sum())
    if n_kept < 2:
        return attached
    siblings = [point.name for point in subject.points() if point.kind not in ("pattern", "logits") and not attached.more and not attached.target]
    siblings = [point for point in siblings if subject.d_in(point) == attached.sae.d_in]
    rows = subject.capture(token_ids, is_token, list(dict.fromkeys((*names, *siblings))))
    rows = {point: values[kept.to(values.device)].float() for point, values in rows.items()}
    x = torch.cat([rows[point] for point in names[: len(attached.hook_points)]], dim=1)
    fit = measure_fit(attached, x, rows[names[-1]] if attached.target else x)
    told = attached.evaluated
    if not fit.fvu <= REFUSED_ABOVE and (told is None or told.fvu <= REFUSED_ABOVE):
        better = sorted((measure_fit(attached, rows[point], rows[point]).fvu, point) for point in siblings)[:_SHOWN]
        shown = ", ".join(f"{fvu:.3g} at {point}" for fvu, point in better)
        raise InputError(
            f"The SAE {name!r} leaves {fit.fvu:.3g} of the variance at {', '.join(names)} unexplained (FVU) on a text of {n_kept} tokens, "
            f"{'its evaluation says ' + format(told.fvu, '.3g') if told else 'where the mean alone leaves 1'}: it belongs to another point, scale or "
            f"model.{f' Of points as wide: FVU {shown}. Attach it there.' if shown else ''}"
        )
    warning = ""
    if told is not None and fit.fvu > WARNED_ABOVE * told.fvu:
        warning = (
            f"The SAE {name!r} leaves {fit.fvu:.3g} of the variance unexplained (FVU) on a text of {n_kept} tokens, "
            f"{fit.fvu / told.fvu:.2g} times what its evaluation found ({told.fvu:.3g}); L0 is {fit.l0:.3g} and was {told.l0:.3g}."
        )
    return attached._replace(fit=fit, warning=warning)


def measure_fit(attached: AttachedSae, x: Tensor, y: Tensor) -> Fit:
    """Measure what an SAE makes of rows `x` beside `y`, which it should reconstruct."""
    sae: Any = attached.sae
    latents = sae.encode(x)
    exact = y.double()
    error = (exact - sae.reconstruct(x, latents).double()).square().sum()
    return Fit(float(error / (exact - exact.mean(0)).square().sum()), float((latents > 0).sum(1).double().mean()))
