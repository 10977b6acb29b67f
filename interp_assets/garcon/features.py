"""An SAE at a hook point, as a plan needs it: latents of a part of an activation, and what the part becomes when some are set.

The SAE itself comes from a later stage; here it is whatever encodes rows and has decoder rows. Heads of `z` stand side by side in its rows.
A transcoder reads at one point and is written at another; a crosscoder reads several side by side, and is written at all of them.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from interp_assets.errors import InputError


@runtime_checkable
class Encoder(Protocol):
    """What a trained SAE can do."""

    @property
    def d_in(self) -> int:
        """Width of a row."""
        ...

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        ...

    @property
    def W_dec(self) -> Tensor:
        """The decoder's rows, [d_sae, d_out]."""
        ...

    def encode(self, x: Tensor) -> Tensor:
        """Return the latent activations of rows."""
        ...

    def reconstruct(self, x: Tensor, latents: Tensor) -> Tensor:
        """Return what latents stand for, of rows that they were encoded from."""
        ...


class Firings(NamedTuple):
    """How the latents of an SAE fire on the rows of its pipeline."""

    maximum: Tensor
    """[d_sae]: the largest activation; 0 of a latent that never fired."""
    frequency: Tensor
    """[d_sae]: share of rows on which it fires."""
    quantile: Callable[[int, float], float]
    """Of a latent's activations where it fires, the one below which that share lies."""


class Fit(NamedTuple):
    """How well an SAE explains some activations."""

    fvu: float
    """Share of their variance that it does not explain."""
    l0: float
    """Mean number of latents that fire."""


class AttachedSae(NamedTuple):
    """An SAE and the hook points that its rows come from."""

    sae: Encoder
    hook_point: str
    target: str = ""
    """Where a transcoder's reconstruction belongs; empty for an SAE, whose rows are their own."""
    more: tuple[str, ...] = ()
    """The other hook points of a crosscoder, whose rows stand side by side."""
    firings: Firings | None = None
    """None where no pipeline tells."""
    evaluated: Fit | None = None
    """On the held-out rows of its pipeline."""
    fit: Fit | None = None
    """On the text that it was tried on when it was attached (`steering/attach.py`); None before."""
    warning: str = ""
    """What was odd about that."""

    @property
    def is_transcoder(self) -> bool:
        """Tell whether it is written at another point than it reads."""
        return bool(self.target)

    @property
    def is_read_elsewhere(self) -> bool:
        """Tell whether its latents are not those of what stands where it is written."""
        return bool(self.target or self.more)

    @property
    def hook_points(self) -> tuple[str, ...]:
        """The points that its rows come from."""
        return (self.hook_point, *self.more)

    @property
    def written_at(self) -> str:
        """The point that its decoder rows belong to."""
        return self.target or self.hook_point


def encode_part(attached: AttachedSae, part: Tensor, latents: tuple[int, ...] | None) -> Tensor:
    """Return [places, latents] of [places, ...]. Raises `InputError` for another width and for latents that the SAE does not have."""
    rows = part.flatten(1)
    sae = attached.sae
    if rows.shape[1] != sae.d_in:
        raise InputError(f"The SAE of {attached.hook_point!r} encodes rows of {sae.d_in}; there are rows of {rows.shape[1]}.")
    check_latents(attached, latents or ())
    found = sae.encode(rows.float())
    return found if latents is None else found[:, list(latents)]


def check_latents(attached: AttachedSae, latents: tuple[int, ...]) -> None:
    """Raise `InputError` for latents that the SAE does not have."""
    if not all(0 <= latent < attached.sae.d_sae for latent in latents):
        raise InputError(f"Latents {list(latents)}: the SAE of {attached.hook_point!r} has latents 0 to {attached.sae.d_sae - 1:,}.")


def move_part(
    attached: AttachedSae,
    part: Tensor,
    latents: tuple[int, ...],
    values: tuple[float, ...],
    *,
    before: Tensor | None = None,
    along: Tensor | None = None,
) -> Tensor:
    """Return [places, ...] moved along decoder rows, by the values or, with what latents were `before`, from that to the values.

    The SAE's error stays in it. `along` are other directions in the place of the decoder rows, [latents, d_out]. Raises `InputError` for latents
    that the SAE does not have and for directions of another shape.
    """
    check_latents(attached, latents)
    directions = attached.sae.W_dec[list(latents)] if along is None else along
    if tuple(directions.shape) != (len(latents), part[0].numel()):
        raise InputError(
            f"Directions at {attached.written_at!r} have shape {list(directions.shape)}; expected {[len(latents), part[0].numel()]}, one a latent."
        )
    wanted = part.new_tensor(values).float()[None]
    change = wanted.expand(len(part), -1) if before is None else wanted - before
    return part + (change @ directions.to(change)).to(part.dtype).reshape(part.shape)
