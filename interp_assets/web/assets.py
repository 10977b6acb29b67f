"""The feature browser as an asset: one bundle for each SAE that is shown."""

from collections.abc import Callable

from interp_assets.planning.asset import Asset, Job, Load, every, only
from interp_assets.planning.config import PipelineConfig, code_version
from interp_assets.planning.pipeline import Pipeline
from interp_assets.storage.manifest import Produced
from interp_assets.storage.store import Store
from interp_assets.visualize.refs import features_key
from interp_assets.web.refs import BUNDLE_VERSION, bundle_ref

RECORD_BYTES = 8000.0
"""A latent's record and its share of table and index."""


def make_assets(config: PipelineConfig) -> list[Asset]:
    """List the assets of this stage."""
    return [_browser(name) for name in config.features.saes]


def _browser(name: str) -> Asset:
    return Asset(
        key=features_key(name, "feature_browser"),
        group="web",
        kinds=("python", "sqlite"),
        description=(
            f"The records of {name} as a bundle that a browser opens by range requests from any folder or bucket: feature table, search index, "
            "records, vocabulary. `interp serve` shows it."
        ),
        reads=(every(*features_key(name, "feature_records")).remember(), only("sae_evaluation", partitions=[name]).remember()),
        artifacts=lambda pipeline, _store, _key: [bundle_ref(pipeline, name)],
        make=lambda job: _bundle(job, name),
        unit="features",
        takes=lambda pipeline, store, _key: _bundling(pipeline, store, name),
        is_relied_on=True,
        code_version=code_version(BUNDLE_VERSION),
    )


def _bundle(job: Job, name: str) -> Callable[[str], list[Produced]]:
    from interp_assets.web.bundle import build_bundle

    tokenizer = job.world.tokenizer()
    return lambda _key: [build_bundle(job.pipeline, job.store, name, tokenizer, progress=job.progress.advance)]


def _bundling(pipeline: Pipeline, _store: Store, name: str) -> Load:
    n_bytes = pipeline.config.sae(name).d_sae * RECORD_BYTES
    return Load(0, n_bytes, n_bytes, pipeline.config.features.latent_slices * 2, 8)
