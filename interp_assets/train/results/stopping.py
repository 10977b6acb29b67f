"""Trainings beside each other become a verdict: which of them is dominated, because another one is as sparse or sparser, and clearly more exact.

Compared are SAEs that read the same rows and take as many steps, each at the configured shares of them (`stop.at`), by the mean of their last logged
steps. A training that is dominated ends as a record (`ended.py`) and a checkpoint, never as an SAE: what is published does not depend on
its company. It stays ended while the section `stop` is there; without it the same training goes on from its checkpoint, bit for bit.
"""

import math
from collections.abc import Mapping
from typing import Final, NamedTuple

from interp_assets.planning.config import SaeConfig
from interp_assets.planning.sections import StopConfig
from interp_assets.storage.manifest import ArtifactRef
from interp_assets.storage.store import Store
from interp_assets.train.results.ended import STOPPED, find_ended
from interp_assets.train.trainer import Trainer

_LOGGED: Final = 5
"""Logged steps whose mean is compared: one batch alone says little."""


class _Place(NamedTuple):
    l0: float
    fvu: float


def find_dominated(trainers: Mapping[str, Trainer], stop: StopConfig) -> dict[str, str]:
    """Return those of trainings at one step that are to end, with the reason: by which other one, at which step."""
    found: dict[str, str] = {}
    for name, trainer in trainers.items():
        if trainer.step not in {math.ceil(share * trainer.n_steps) for share in stop.at} or trainer.step == trainer.n_steps:
            continue
        own = _place(trainer)
        others = {other: _place(beside) for other, beside in trainers.items() if other != name and beside.n_steps == trainer.n_steps}
        better = {other: place for other, place in others.items() if place.l0 <= own.l0 and place.fvu * (1 + stop.margin) < own.fvu}
        if better:
            best = min(better, key=lambda other: better[other].fvu)
            found[name] = (
                f"SAE {name!r} was stopped at step {trainer.step:,} of {trainer.n_steps:,}, with L0 {own.l0:.1f} and FVU {own.fvu:.4f}: {best!r} has "
                f"L0 {better[best].l0:.1f} and FVU {better[best].fvu:.4f}. Nothing is wrong; without `stop` it goes on from its checkpoint."
            )
    return found


def find_stopped(store: Store, sae: ArtifactRef, config: SaeConfig) -> str:
    """Say why an earlier run stopped a training; nothing where none did."""
    found = find_ended(store, sae, config)
    return str(found.facts["why"]) if found and found.facts["status"] == STOPPED else ""


def _place(trainer: Trainer) -> _Place:
    last = trainer.log[-_LOGGED:]
    return _Place(sum(row.l0 for row in last) / len(last), sum(row.fvu for row in last) / len(last))
