"""What a file with an architecture of one's own imports: the mark of its function, and what that returns."""

from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])
DECLARED = "__architecture__"


class Terms:
    """What an architecture makes of some rows: their reconstruction, the latents, and the terms of its loss besides the squared error.

    `penalty` and each further term is a number of the graph: its mean over the rows that the function was given. All of them are added to the squared
    error, and logged, the penalty as `sparsity_loss` and others by their names. A plain number is only logged.
    """

    def __init__(self, y_hat: Any, *, latents: Any, penalty: Any = None, **terms: Any) -> None:
        self.y_hat, self.latents, self.penalty, self.terms = y_hat, latents, penalty, terms


def architecture(**declared: Any) -> Callable[[Function], Function]:
    """Declare a function as an architecture: `kind` is the built-in one whose recipe, initial weights and saved function it has.

    Further arguments, each written out: constants of the recipe that differ from its kind's (`decoder_norm`, `betas`, ...), `unit_norm`, `error`
    ("sum" or "mean" over dimensions), `whole_batch` (a row's latents depend on other rows), `surrogate_gradient` (straight-through, detached);
    `init=` adds weights: `(w, z, generator, *, options) -> dict`; `fold=` gives the weights of its kind that are saved: `(w, *, options) -> dict`.
    """

    def mark(function: Function) -> Function:
        setattr(function, DECLARED, declared)
        return function

    return mark
