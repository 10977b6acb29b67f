"""An imported SAE and some held-out rows become FVU and L0, beside what its folder claims; and what is wild becomes its likely cause.

An SAE of another place, scale or model is a valid SAE: only rows can tell. `train/evaluate.py` measures it, at the import over the first
`N_ROWS` valid held-out rows, and what is judged does not depend on a few rows of huge norm:

    the median over rows of squared error / squared deviation from these rows' mean is above `MAX_ROW_FVU`: the mean alone would do better
    L0 is `MAX_L0_RATIO` times what the folder claims, or a `MAX_L0_RATIO`-th of it, or 0
"""

from typing import Final, NamedTuple

N_ROWS: Final = 4096
MAX_ROW_FVU: Final = 1.0
MAX_L0_RATIO: Final = 10.0


class Fit(NamedTuple):
    """What was measured."""

    n_rows: int
    l0: float
    fvu: float
    median_row_fvu: float


class Claims(NamedTuple):
    """What a folder says of its SAE's quality, with the file that says it; None where nothing does."""

    l0: float | None = None
    l0_from: str = ""
    fvu: float | None = None
    fvu_from: str = ""


def explain_misfit(fit: Fit, claims: Claims) -> str:
    """Say what is wild about an SAE, by which check, and where that usually comes from; empty for a sound one."""
    if fit.median_row_fvu > MAX_ROW_FVU:
        return (
            f"on {fit.n_rows:,} held-out rows the median row's squared error is {fit.median_row_fvu:.3g} of its squared distance from the mean (FVU "
            f"{fit.fvu:.3g}, L0 {fit.l0:.3g}), more than {MAX_ROW_FVU:g}: the mean alone would do better. Likely it was trained at another place (a "
            "module before or after a norm, another layer), on scaled or centred rows, or on another model."
        )
    claimed = claims.l0 or 0.0
    if fit.l0 == 0 or (claimed and not 1 / MAX_L0_RATIO <= fit.l0 / claimed <= MAX_L0_RATIO):
        told = f"{claims.l0_from} says {claimed:.3g}" if claimed else "its folder says nothing"
        return (
            f"on {fit.n_rows:,} held-out rows {fit.l0:.3g} latents fire on a row, {told}; more than {MAX_L0_RATIO:g} times as many or as few means "
            f"(FVU {fit.fvu:.3g}) that its rows were scaled, or those of another layer or model, or its thresholds are not calibrated."
        )
    return ""
