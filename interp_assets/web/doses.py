"""Dose curves become small files of a bundle, one a latent, and curves again: what steering by a feature did, for pages that have no model at hand.

A file holds the means and intervals of every outcome, strength and arm, and the texts that were written under the latent itself; the format is
`docs/formats/feature_bundle.md`. What comes from elsewhere is checked as a whole before anything of it is shown.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from interp_assets.errors import ArtifactCorruptError
from interp_assets.planning.progress import format_count
from interp_assets.storage.foreign import parse_json
from interp_assets.storage.manifest import ArtifactWriter

if TYPE_CHECKING:
    from interp_assets.garcon.steering.dose import Dose  # torch; the server imports this module for its format

FORMAT: Final = "interp-assets/dose-curves"
VERSION: Final = 1
MAX_BYTES: Final = 16 << 20
_ARM: Final = "feature"
"""Whose texts are kept."""

Numbers = list[float | None]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Curve(_Part):
    """Means of one outcome under one arm, at each strength, and the ends of their intervals; None where nothing could be measured."""

    mean: Numbers
    low: Numbers
    high: Numbers


class WrittenText(_Part):
    """What was written while the latent was set."""

    strength: int
    """Which of the strengths."""
    prompt: int
    text: str


class DoseCurve(_Part):
    """What one recipe's sweep found."""

    recipe: str
    """Its name in the configuration, or how the latent was found."""
    edits: list[dict[str, Any]]
    strengths: Annotated[list[str], Field(min_length=1)]
    """With their units, rising as they were asked."""
    prompts: Annotated[list[str], Field(min_length=1)]
    n_texts: int
    """Of the latent, at each strength."""
    new_tokens: int
    temperature: float
    outcomes: dict[str, dict[str, Curve]]
    """By outcome and arm."""
    texts: list[WrittenText]

    @model_validator(mode="after")
    def _check(self) -> "DoseCurve":
        lengths = {len(numbers) for arms in self.outcomes.values() for curve in arms.values() for numbers in (curve.mean, curve.low, curve.high)}
        if lengths - {len(self.strengths)}:
            raise ValueError(f"curves of {sorted(lengths)} points for {format_count(len(self.strengths), 'strength')}")
        if any(not 0 <= text.strength < len(self.strengths) or not 0 <= text.prompt < len(self.prompts) for text in self.texts):
            raise ValueError("a text is of a strength or a prompt that is not there")
        return self


class LatentDoses(_Part):
    """All dose curves of one latent."""

    format: Literal["interp-assets/dose-curves"] = FORMAT
    version: Literal[1] = VERSION
    latent: int
    curves: Annotated[list[DoseCurve], Field(min_length=1)]


def describe_dose(
    dose: "Dose", recipe: str, edits: Sequence[Mapping[str, Any]], *, prompts: Sequence[str], new_tokens: int, temperature: float
) -> DoseCurve:
    """Return what a page shows of a dose curve."""
    found: dict[str, dict[str, dict[str, Numbers]]] = {}
    for line in dose.table().to_dicts():
        arms = found.setdefault(line["outcome"], {})
        curve = arms.setdefault(line["arm"], {name: [None] * len(dose.strengths) for name in Curve.model_fields})
        for name, numbers in curve.items():
            numbers[dose.strengths.index(line["strength"])] = line[name] if math.isfinite(line[name]) else None
    outcomes = {outcome: {arm: Curve(**curve) for arm, curve in arms.items()} for outcome, arms in found.items()}
    own = [line for line in dose.texts.to_dicts() if line["arm"] == _ARM]
    return DoseCurve(
        recipe=recipe,
        edits=[dict(edit) for edit in edits],
        strengths=dose.strengths,
        prompts=list(prompts),
        n_texts=len(own) // len(dose.strengths),
        new_tokens=new_tokens,
        temperature=temperature,
        outcomes=outcomes,
        texts=[
            WrittenText(strength=dose.strengths.index(line["strength"]), prompt=line["prompt"], text=line["text"])
            for line in own
            if line["continuation"] == 0
        ],
    )


def write_doses(art: ArtifactWriter, doses: Mapping[int, Sequence[DoseCurve]]) -> dict[str, Any]:
    """Write the curves of each latent; return what `bundle.json` says of them."""
    for latent, curves in sorted(doses.items()):
        content = LatentDoses(latent=latent, curves=list(curves)).model_dump_json(indent=1)
        art.put(dose_file(latent), (content + "\n").encode())
    return {"version": VERSION, "latents": sorted(doses)}


def read_doses(data: bytes, latent: int, where: str) -> LatentDoses:
    """Read the curves of a latent. Raises `ArtifactCorruptError` for what is none, or of another latent or version."""
    try:
        found = LatentDoses.model_validate(parse_json(data, MAX_BYTES))
    except (ValidationError, ValueError, RecursionError) as error:
        raise ArtifactCorruptError(
            f"{where} holds no dose curves ({' '.join(str(error).split()):.300}). Materialize `feature_browser` again."
        ) from error
    if found.latent != latent:
        raise ArtifactCorruptError(f"{where} holds the dose curves of latent {found.latent}. Materialize `feature_browser` again.")
    return found


def dose_file(latent: int) -> str:
    """Name the file of a latent."""
    return f"doses/{latent}.json"
