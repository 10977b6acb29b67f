"""A strength as people write it becomes a number: how high a latent is set, how much of a vector is added.

    10 max      of a latent: ten times its largest activation on the rows of its pipeline
    q0.99       of a latent: that quantile of its activations where it fires
    3.5 raw     of a latent in the units of its activations; of a vector, so many times the vector
    0.2 norm    so much that what is added is that share of the mean norm at its hook point

A plan holds the numbers, so that its hash says what was done; the words are for people. A number alone is refused: a latent's activation may
range to 0.5 or to 500, and nobody can tell which was meant.
"""

import math
import re
from typing import Final

from interp_assets.errors import InputError
from interp_assets.garcon.features import AttachedSae, check_latents

UNITS: Final = (
    "'3.5 raw' (the units of the activations), '10 max' (times the latent's largest activation), 'q0.99' (that quantile of its activations) or "
    "'0.2 norm' (a share of the mean norm at the hook point)"
)
_WRITTEN: Final = re.compile(r"\s*(?:(?P<number>[-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?)\s+(?P<unit>raw|max|norm)|q(?P<share>[0-9.]+))\s*")


def latent_strength(written: str | float, attached: AttachedSae, sae: str, latent: int, mean_norm: float | None) -> float:
    """Return what a latent is set to, or how much of its decoder row is added. Raises `InputError` with what to write."""
    check_latents(attached, (latent,))
    number, unit = split_strength(written, f"latent {latent} of {sae!r}")
    if unit == "raw":
        return number
    if unit == "norm":
        length = float(attached.sae.W_dec[latent].norm())
        if not length:
            raise InputError(f"Latent {latent} of {sae!r} has a decoder row of length 0: it moves nothing, however strong.")
        return number * _known_norm(written, attached.written_at, mean_norm) / length
    if attached.firings is None:
        raise InputError(
            f"{written!r} of latent {latent} of {sae!r}: how it fires is not known here. Name the SAE in features.saes of its pipeline and run it, "
            "or write the strength as '3.5 raw'."
        )
    maximum = float(attached.firings.maximum[latent])
    if maximum <= 0:
        raise InputError(
            f"{written!r} of latent {latent} of {sae!r}: it is dead, it never fired on the rows of its pipeline. Choose a live latent, or write the "
            "strength as '3.5 raw'."
        )
    return number * maximum if unit == "max" else attached.firings.quantile(latent, number)


def vector_strength(written: str | float, point: str, length: float, mean_norm: float | None) -> float:
    """Return how many times a vector of a length is added at a point. Raises `InputError` with what to write."""
    number, unit = split_strength(written, f"a vector at {point!r}")
    if unit == "raw":
        return number
    if unit != "norm":
        raise InputError(f"{written!r} of a vector at {point!r}: that unit belongs to a latent. Write '2 raw' for twice the vector, or '0.2 norm'.")
    if not length:
        raise InputError(f"The vector at {point!r} is zero: it has no direction.")
    return number * _known_norm(written, point, mean_norm) / length


def _known_norm(written: str | float, point: str, mean_norm: float | None) -> float:
    if mean_norm is None:
        raise InputError(
            f"{written!r} at {point!r}: the mean norm there is not known here. Add the point to harvest.hook_points of a pipeline and take the model "
            "from `lab.open(...).model()`, or write the strength as '3.5 raw'."
        )
    return mean_norm


def split_strength(written: str | float, what: str) -> tuple[float, str]:
    """Return number and unit; the unit of a quantile is `q`. Raises `InputError` for a number without one."""
    found = _WRITTEN.fullmatch(str(written))
    try:
        number = float(found["number"] or found["share"]) if found else math.nan
    except ValueError:
        number = math.nan
    if found is None or not math.isfinite(number) or (found["share"] and not 0 <= number <= 1):
        raise InputError(f"The strength of {what} has a unit: {UNITS}; found {written!r}.")
    return number, found["unit"] or "q"
