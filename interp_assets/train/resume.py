"""The state of an SAE in training becomes a checkpoint artifact, and the newest valid one comes back.

Checkpoints of `4-sae/<name>-<id>` lie beside it, in `4-sae/<name>-<id>.checkpoints/step-<n>-<id>`: `state.safetensors` (weights,
moments, dead counters), `log.json` (the steps logged so far) and `times.json` (how long they took). Like every artifact they appear
whole or not at all; one that lost its times alone is still good. A checkpoint's id contains the SAE's id, so one of another configuration
is never taken for this one's; nor is one of other rows: it keeps their digests, as the SAE will. The newest `KEPT` stay while training
runs; none stays once the SAE is published.
"""

import json
import logging
from collections.abc import Mapping
from typing import Final, NamedTuple

from torch import Tensor

from interp_assets.errors import ArtifactError, ArtifactMissingError
from interp_assets.storage.lineage import create_current, is_kept
from interp_assets.storage.manifest import ArtifactRef, Manifest, load_manifest, make_ref, read_file, remove_artifact
from interp_assets.storage.store import Store
from interp_assets.storage.tensors import load_tensors, save_tensors
from interp_assets.train.refs import LogRow
from interp_assets.train.times import TIMES, TrainingTimes, parse_times
from interp_assets.train.trainer import Trainer

KEPT: Final = 2
STATE: Final = "state.safetensors"
LOG: Final = "log.json"
TERMS: Final = "terms.json"
"""What an architecture of one's own logs besides."""
_logger = logging.getLogger(__name__)


class Checkpoint(NamedTuple):
    """A training's state after `step` steps."""

    step: int
    tensors: dict[str, Tensor]
    log: list[LogRow]
    times: TrainingTimes
    terms: list[dict[str, float]]


def checkpoint_ref(sae: ArtifactRef, step: int) -> ArtifactRef:
    """Address the checkpoint of an SAE after `step` steps."""
    return make_ref("sae_checkpoint", _folder(sae), identity={"step": step}, inputs={"sae": sae.artifact_id}, label=f"step-{step:08d}")


def save_checkpoint(store: Store, sae: ArtifactRef, trainer: Trainer, times: TrainingTimes, kept: Mapping[str, str]) -> None:
    """Publish a trainer's state and remove all but the newest checkpoints; `kept` are digests of what it is trained on.

    Every rank must call it; the first one writes.
    """
    state = trainer.state()
    if trainer.ranks.rank != 0:
        return
    with create_current(store, checkpoint_ref(sae, trainer.step), kept) as art:
        save_tensors(art, STATE, state)
        art.put(LOG, json.dumps(trainer.log).encode())
        if trainer.terms:
            art.put(TERMS, json.dumps(trainer.terms).encode())
        art.put(TIMES, times.encode(), is_timed=True)
    for step in _steps(store, sae)[:-KEPT]:
        remove_artifact(store, checkpoint_ref(sae, step).path)


def load_checkpoint(store: Store, sae: ArtifactRef, kept: Mapping[str, str]) -> Checkpoint | None:
    """Read the newest checkpoint with whole weights and log, or None. A damaged one is reported and passed over; times may be lost.

    One of a training on other rows or statistics than those with the digests `kept` is removed.
    """
    for step in reversed(_steps(store, sae)):
        ref = checkpoint_ref(sae, step)
        try:
            manifest = load_manifest(store, ref)
            if not is_kept(manifest, kept):
                _logger.warning("Checkpoint %s/%s is removed: what it was trained on has other bytes now.", store.url, ref.path)
                remove_artifact(store, ref.path)
                continue
            log = [LogRow(*row) for row in json.loads(read_file(store, ref.path, manifest, LOG))]
            has_terms = any(entry.name == TERMS for entry in manifest.files)
            terms = json.loads(read_file(store, ref.path, manifest, TERMS)) if has_terms else []
            return Checkpoint(step, load_tensors(store, ref.path, manifest, STATE), log, _load_times(store, ref, manifest), terms)
        except ArtifactMissingError:
            continue
        except ArtifactError as error:
            _logger.warning("Checkpoint %s/%s is passed over: %s", store.url, ref.path, error)
    return None


def has_checkpoint(store: Store, sae: ArtifactRef) -> bool:
    """Tell whether a training of this SAE would go on from a checkpoint."""
    return bool(_steps(store, sae))


def remove_checkpoints(store: Store, sae: ArtifactRef) -> None:
    """Delete all checkpoints of an SAE."""
    for step in _steps(store, sae):
        remove_artifact(store, checkpoint_ref(sae, step).path)


def _load_times(store: Store, ref: ArtifactRef, manifest: Manifest) -> TrainingTimes:
    """Read how long the steps before a checkpoint took; start again from zero where that is lost, because weights are worth more."""
    try:
        return parse_times(read_file(store, ref.path, manifest, TIMES))
    except (ArtifactError, ValueError) as error:
        _logger.warning("The times of checkpoint %s/%s are lost, its weights are used: %s", store.url, ref.path, error)
        return TrainingTimes()


def _folder(sae: ArtifactRef) -> str:
    return f"{sae.path}.checkpoints"


def _steps(store: Store, sae: ArtifactRef) -> list[int]:
    n_skip = len(_folder(sae)) + 1
    names = {item.path[n_skip:].split("/")[0] for item in store.list(_folder(sae))}
    return sorted({int(name.split("-")[1]) for name in names if name.startswith("step-")})
