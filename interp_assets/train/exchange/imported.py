"""An SAE that another tool trained becomes a published SAE of this pipeline, for evaluation, feature passes and browser to run on like any other.

The configuration names its folder and the digest of its files; only the digest decides the artifact's id, so that the folder may move. Read, the
weights are checked against the pipeline (widths of the hook points, number of latents) and written in our own form (`train/checkpoint.py`): raw
activations in, float32. Nothing is trained, and nothing measured: an artifact that does not depend on the data keeps its id when text is added,
and `train/evaluate.py` measures it on the held-out shards.
"""

from pathlib import Path
from typing import Final

import torch

from interp_assets.errors import InputError
from interp_assets.planning.config import SaeConfig
from interp_assets.planning.options import Architecture
from interp_assets.planning.pipeline import Pipeline
from interp_assets.storage.manifest import Produced, create_artifact, find_manifest, timed
from interp_assets.storage.store import Store, open_store
from interp_assets.storage.tensors import save_tensors
from interp_assets.train.checkpoint import FREQUENCY, Source, save_sae
from interp_assets.train.exchange.folders import Foreign, read_foreign
from interp_assets.train.refs import sae_ref
from interp_assets.train.sae import Sae, SaeKind

NEAREST: Final[dict[SaeKind, Architecture]] = {"relu": "relu", "jump_relu": "jump_relu", "topk": "topk"}
"""What an imported SAE is called here, by what it computes, however it was trained."""


@timed
def import_sae(pipeline: Pipeline, store: Store, name: str) -> Produced:
    """Publish the imported SAE called `name`.

    Raises `InputError` when its folder has changed since the configuration was written, or holds an SAE of other sizes than the pipeline's.
    """
    ref = sae_ref(pipeline, name)
    if (manifest := find_manifest(store, ref)) is not None:
        return Produced(ref, manifest, is_cached=True)
    config, foreign = pipeline.config.sae(name), read_import(pipeline, name)
    sae, told, frequency = foreign.sae, foreign.recorded, foreign.firing_frequency
    with create_artifact(store, ref) as art:
        source = Source(told.architecture, told.model, told.dataset, told.context_length)
        save_sae(art, sae, pipeline, config, l0=told.l0, source=source)
        if frequency is not None:
            save_tensors(art, FREQUENCY, {"firing_frequency": frequency, "n_rows": torch.tensor([0])})
        art.facts |= {
            "architecture": NEAREST[sae.kind],
            "kind": sae.kind,
            "task": config.task,
            "d_in": sae.d_in,
            "d_out": sae.d_out,
            "d_sae": sae.d_sae,
            "n_steps": 0,
            "n_rows": 0,
            "imported": {**told._asdict(), "digest": foreign.digest},
        }
    return art.produced


def read_import(pipeline: Pipeline, name: str) -> Foreign:
    """Read the folder of an imported SAE. Raises `InputError` when it is not what the configuration and the plan say."""
    config = pipeline.config.sae(name)
    foreign = open_foreign(config.imported, config.looked_in)
    if foreign.digest != config.imported_digest:
        raise InputError(
            f"SAE {name!r}: the files in {config.imported} have the digest {foreign.digest}, imported_digest says {config.imported_digest}: they are "
            "not the ones that were imported. Put those back, or run `interp import` again for an entry of another name."
        )
    check_sizes(pipeline, config, foreign.sae)
    return foreign


def open_foreign(address: str, looked_in: str = "") -> Foreign:
    """Read the SAE at a folder or `s3://` address; `looked_in` says where else. Raises `InputError` when none can be read."""
    if "://" not in address and not Path(address).expanduser().is_dir():
        kind = "a file: name the folder it lies in" if Path(address).expanduser().is_file() else "not there"
        raise InputError(f"The folder {address} of an imported SAE is {kind}{looked_in}. Download it first, or correct its address.")
    return read_foreign(open_store(address))


def check_sizes(pipeline: Pipeline, config: SaeConfig, sae: Sae) -> None:
    """Raise `InputError` when an SAE's widths are not those of its hook points, or its latents, architecture or k not those of its entry."""
    (source,), (target,) = config.sources, config.targets
    pairs = (
        ("d_in", sae.d_in, pipeline.d_in(source), f"the width of {source}"),
        ("d_out", sae.d_out, pipeline.d_in(target), f"the width of {target}"),
        ("d_sae", sae.d_sae, config.d_sae, "d_sae of the configuration"),
    )
    wrong = [f"{name} is {found:,}, expected {expected:,} ({why})" for name, found, expected, why in pairs if found != expected]
    if config.architecture != NEAREST[sae.kind]:
        wrong.append(f"architecture is {NEAREST[sae.kind]}, expected {config.architecture} (the configuration)")
    if sae.kind == "topk" and config.k != sae.k:
        wrong.append(f"k is {sae.k:,}, expected {config.k:,} (the configuration)")
    if wrong:
        raise InputError(
            f"SAE {config.name!r} in {config.imported} does not fit: {'; '.join(wrong)}. It was trained on another model, hook point or size, or "
            "its entry was changed: `interp import` says what its folder tells, and writes the entry."
        )
