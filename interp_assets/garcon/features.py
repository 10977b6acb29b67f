"""An SAE at a hook point, as a plan needs it: latents of a part of an activation, and what the part becomes when some are set.

The SAE itself comes from a later stage; here it is whatever encodes rows and has decoder rows. Heads of `z` stand side by side in its rows.
"""

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
        """The decoder's rows, [d_sae, d_in]."""
        ...

    def encode(self, x: Tensor) -> Tensor:
        """Return the latent activations of rows."""
        ...


class AttachedSae(NamedTuple):
    """An SAE and the hook point that its rows come from."""

    sae: Encoder
    hook_point: str


def encode_part(attached: AttachedSae, part: Tensor, latents: tuple[int, ...] | None) -> Tensor:
    """Return [places, latents] of [places, ...]. Raises `InputError` for another width and for latents that the SAE does not have."""
    rows = part.flatten(1)
    sae = attached.sae
    if rows.shape[1] != sae.d_in:
        raise InputError(f"The SAE of {attached.hook_point!r} encodes rows of {sae.d_in}; there are rows of {rows.shape[1]}.")
    if latents is not None and not all(0 <= latent < sae.d_sae for latent in latents):
        raise InputError(f"Latents {list(latents)}: the SAE of {attached.hook_point!r} has latents 0 to {sae.d_sae - 1:,}.")
    found = sae.encode(rows.float())
    return found if latents is None else found[:, list(latents)]


def clamp_part(attached: AttachedSae, part: Tensor, latents: tuple[int, ...], values: tuple[float, ...]) -> Tensor:
    """Return [places, ...] with latents set to values: the SAE's error stays in it."""
    found = encode_part(attached, part, latents)
    change = found.new_tensor(values)[None] - found
    return part + (change @ attached.sae.W_dec[list(latents)].to(change)).to(part.dtype).reshape(part.shape)
