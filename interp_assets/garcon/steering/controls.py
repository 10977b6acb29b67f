"""A latent gets what it is compared with when it is steered: its own direction, for random and opposite ones, and a latent that fires as often."""

from interp_assets.compute.seeds import stream
from interp_assets.garcon.backend import Controls
from interp_assets.garcon.features import AttachedSae, check_latents


def find_controls(attached: AttachedSae, latent: int, seed: int) -> Controls:
    """Return a latent's controls. Raises `InputError` for one that the SAE does not have."""
    check_latents(attached, (latent,))
    return Controls(attached.sae.W_dec[latent].detach().float().cpu(), _other_latent(attached, latent, seed))


def _other_latent(attached: AttachedSae, latent: int, seed: int) -> int | None:
    """Draw another live latent that fires about as often: of the same tenth of live latents; None where nobody knows, or there is none."""
    if attached.firings is None:
        return None
    frequency = attached.firings.frequency.double()
    live = (attached.firings.maximum > 0).nonzero()[:, 0]
    if latent not in live.tolist():
        return None
    order = live[frequency[live].argsort(stable=True)].tolist()
    decile = order.index(latent) * 10 // len(order)
    alike = [found for place, found in enumerate(order) if place * 10 // len(order) == decile and found != latent]
    return alike[stream(seed, "dose", "other", latent).below(len(alike))] if alike else None
