"""An SAE that another tool trained becomes a published SAE of this pipeline, for evaluation, feature passes and browser to run on like any other.

The configuration names its folder and the digest of its files; only the digest decides the artifact's id, so that the folder may move. Read, the
weights are checked against the pipeline (widths of the hook points, number of latents) and written in our own form (`checkpoint.py`): raw
activations in, float32. Nothing is trained, and nothing measured: an artifact that does not depend on the data keeps its id when text is added,
and `evaluate.py` measures it on the held-out shards.
"""

import time
from pathlib import Path

import torch

from interp_assets.config import SaeConfig
from interp_assets.errors import InputError
from interp_assets.manifest import Produced, create_artifact, find_manifest
from interp_assets.pipeline import Pipeline
from interp_assets.store import Store, open_store
from interp_assets.tensors import save_tensors
from interp_assets.train.checkpoint import FREQUENCY, save_sae
from interp_assets.train.exchange_files import Foreign, read_foreign
from interp_assets.train.refs import sae_ref
from interp_assets.train.sae import Sae


def import_sae(pipeline: Pipeline, store: Store, name: str) -> Produced:
    """Publish the imported SAE called `name`.

    Raises `InputError` when its folder has changed since the configuration was written, or holds an SAE of other sizes than the pipeline's.
    """
    ref = sae_ref(pipeline, name)
    manifest = find_manifest(store, ref)
    if manifest is not None:
        return Produced(ref, manifest, is_cached=True, wall_s=0.0)
    started_s, config = time.perf_counter(), pipeline.config.sae(name)
    foreign = open_foreign(config.imported)
    if foreign.digest != config.imported_digest:
        raise InputError(
            f"SAE {name!r}: the files in {config.imported} have the digest {foreign.digest}, imported_digest says {config.imported_digest}: they are "
            "not the ones that were imported. Put those back, or run `interp import` again for an entry of another name."
        )
    check_sizes(pipeline, config, foreign.sae)
    sae, origin, frequency = foreign.sae, foreign.origin, foreign.firing_frequency
    with create_artifact(store, ref) as art:
        save_sae(art, sae, pipeline, config, l0=origin.l0)
        if frequency is not None and frequency.shape == (sae.d_sae,):
            save_tensors(art, FREQUENCY, {"firing_frequency": frequency, "n_rows": torch.tensor([0])})
        art.facts |= {
            "architecture": config.architecture,
            "kind": sae.kind,
            "task": config.task,
            "d_in": sae.d_in,
            "d_out": sae.d_out,
            "d_sae": sae.d_sae,
            "n_steps": 0,
            "n_rows": 0,
            "imported": {**origin._asdict(), "digest": foreign.digest},
        }
    assert art.manifest is not None
    return Produced(ref, art.manifest, is_cached=False, wall_s=time.perf_counter() - started_s)


def open_foreign(address: str) -> Foreign:
    """Read the SAE at a folder or `s3://` address. Raises `InputError` when there is none, or one that cannot be read."""
    if "://" not in address and not Path(address).expanduser().is_dir():
        kind = "a file: name the folder it lies in" if Path(address).expanduser().is_file() else "not there"
        raise InputError(f"The folder {address} of an imported SAE is {kind}. Download it first, or correct its address.")
    return read_foreign(open_store(address))


def check_sizes(pipeline: Pipeline, config: SaeConfig, sae: Sae) -> None:
    """Raise `InputError` when an SAE's widths are not those of its hook points, or its latents not as many as the configuration says."""
    (source,), (target,) = config.sources, config.targets
    pairs = (
        ("d_in", sae.d_in, pipeline.d_in(source), f"the width of {source}"),
        ("d_out", sae.d_out, pipeline.d_in(target), f"the width of {target}"),
        ("d_sae", sae.d_sae, config.d_sae, "d_sae of the configuration"),
    )
    wrong = [f"{name} is {found:,}, expected {expected:,} ({why})" for name, found, expected, why in pairs if found != expected]
    if wrong:
        raise InputError(
            f"SAE {config.name!r} in {config.imported} does not fit: {'; '.join(wrong)}. It was trained on another model, hook point or size: "
            "`interp import` says what its folder tells about that."
        )
