"""What a browser opens, as assets: one bundle for each SAE that is shown, and one of a model's attention heads."""

from collections.abc import Callable

from interp_assets.corpus.sizes import TEXT_BYTES_PER_TOKEN
from interp_assets.harvest.heads.refs import head_counts, heads_of
from interp_assets.planning.asset import Asset, Job, Load, every, only
from interp_assets.planning.config import PipelineConfig, code_version
from interp_assets.planning.pipeline import Pipeline
from interp_assets.planning.sections import HeadsConfig
from interp_assets.storage.manifest import Produced
from interp_assets.storage.store import Store
from interp_assets.visualize.refs import features_key
from interp_assets.visualize.steering.refs import recipes_of
from interp_assets.web.checks import READS_BACK
from interp_assets.web.refs import ATTENTION_VERSION, BUNDLE_VERSION, attention_ref, bundle_ref

RECORD_BYTES = 8000.0
"""A latent's record and its share of table and index."""
HEAD_BYTES = 34e3
"""A head's record."""


def make_assets(config: PipelineConfig) -> list[Asset]:
    """List the assets of this stage; none of heads without a section `heads`."""
    heads = [_attention(config.heads)] if config.heads else []
    return [*heads, *(_browser(config, name) for name in config.features.saes)]


def _attention(heads: HeadsConfig) -> Asset:
    prompts = (every("prompt_patterns").remember(),) if heads.prompts else ()
    prompts += (every("prompt_targets").remember(),) if heads.explained else ()
    return Asset(
        key=("attention_browser",),
        group="web",
        kinds=("python", "json"),
        description=(
            "The records of all attention heads and the patterns over prompts as a bundle that a browser opens by range requests from any folder or "
            "bucket. `interp serve` shows it: look at the map of the heads."
        ),
        reads=(every("head_records").remember(), every("head_examples"), *prompts),
        artifacts=lambda pipeline, _store, _key: [attention_ref(pipeline)],
        make=_bundle_heads,
        unit="heads",
        shows=lambda _job, _key, made: {name: made[0].manifest.facts[name] for name in ("n_heads", "n_prompts", "record_bytes")},
        takes=_bundling_heads,
        checks=(READS_BACK,),
        is_relied_on=True,
        code_version=code_version(ATTENTION_VERSION),
    )


def _browser(config: PipelineConfig, name: str) -> Asset:
    recipes = recipes_of(config.steering, name)
    doses = [only("steering_sweep", partitions=recipes).remember()] if recipes else []
    doses += [only("steering_search", partitions=[name]).remember()] if config.steering and config.steering.search else []
    return Asset(
        key=features_key(name, "feature_browser"),
        group="web",
        kinds=("python", "sqlite"),
        description=(
            f"The records of {name} as a bundle that a browser opens by range requests from any folder or bucket: feature table, search index, "
            "records, vocabulary. `interp serve` shows it."
        ),
        reads=(every(*features_key(name, "feature_records")).remember(), only("sae_evaluation", partitions=[name]).remember(), *doses),
        artifacts=lambda pipeline, _store, _key: [bundle_ref(pipeline, name)],
        make=lambda job: _bundle(job, name),
        unit="features",
        takes=lambda pipeline, store, _key: _bundling(pipeline, store, name),
        is_relied_on=True,
        code_version=code_version(BUNDLE_VERSION),
    )


def _bundle_heads(job: Job) -> Callable[[str], list[Produced]]:
    from interp_assets.web.attention import build_attention_bundle

    tokenizer = job.world.tokenizer()
    return lambda _key: [build_attention_bundle(job.pipeline, job.store, tokenizer, progress=job.progress.advance)]


def _bundle(job: Job, name: str) -> Callable[[str], list[Produced]]:
    from interp_assets.web.bundle import build_bundle

    tokenizer = job.world.tokenizer()
    return lambda _key: [build_bundle(job.pipeline, job.store, name, tokenizer, progress=job.progress.advance)]


def _bundling(pipeline: Pipeline, _store: Store, name: str) -> Load:
    n_bytes = pipeline.config.sae(name).d_sae * RECORD_BYTES
    return Load(0, n_bytes, n_bytes, pipeline.config.features.latent_slices * 2, 8)


def _bundling_heads(pipeline: Pipeline, _store: Store, _key: str) -> Load:
    n_heads, prompts = sum(head_counts(pipeline).values()), heads_of(pipeline).prompts
    lengths = [len(heads_of(pipeline).prompt(name).text) / TEXT_BYTES_PER_TOKEN for name in prompts]
    n_bytes = n_heads * (HEAD_BYTES + sum(n_tokens**2 / 4 for n_tokens in lengths))
    return Load(0, n_bytes, n_bytes, 2 * len(head_counts(pipeline)) + len(prompts), 4 + 5 * len(prompts))
