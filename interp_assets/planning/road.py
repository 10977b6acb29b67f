"""The graph as data: for every asset, in order, its partitions and the artifacts that each partition consists of.

    corpus_plan -> token_shards -> activations, activation_statistics -> shuffle_plan -> shuffle_pass_1 .. -> mixed_shards,
    shuffle_certificate -> sae, sae_evaluation -> sweep, and for each SAE that is shown: feature_candidates, feature_examples,
    example_activations, feature_records, feature_browser

Given the plan, all of it is a pure function of the configuration. It serves whoever asks "what is missing?" (the run loop), "how much
will there be?" (`interp plan`) and "does the asset graph say the same?" (a test). How assets depend on each other does not belong
here: the `assets.py` of each stage says so.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from interp_assets.corpus.refs import token_shard_ref
from interp_assets.errors import ArtifactError, ConfigError
from interp_assets.harvest.refs import activation_shard_ref, statistics_ref
from interp_assets.planning.config import PipelineConfig
from interp_assets.planning.pipeline import Pipeline, shard_index, shard_key
from interp_assets.shuffle.generations import has_grown, newest
from interp_assets.shuffle.plan import load_shard_rows, make_sizes
from interp_assets.shuffle.refs import (
    bucket_index,
    bucket_key,
    certificate_ref,
    mixed_shard_ref,
    n_mixed_shards,
    pass_name,
    shuffle_plan_ref,
    split_bucket_ref,
    split_shard_ref,
)
from interp_assets.storage.manifest import ArtifactRef, Manifest, data_version, find_made_from, load_manifest
from interp_assets.storage.store import Store
from interp_assets.train.refs import evaluation_ref, sae_ref, sweep_ref
from interp_assets.visualize.refs import (
    candidates_ref,
    examples_ref,
    features_key,
    grid_key,
    records_ref,
    slice_index,
    slice_key,
    split_grid_key,
    windows_ref,
)
from interp_assets.web.refs import bundle_ref

Axis = Literal["none", "shard", "bucket", "experiment", "slice", "slice|shard"]
Refs = Callable[[Pipeline, Store, str], list[ArtifactRef]]
Sources = Callable[[Pipeline, str], list[list[ArtifactRef]]]


class Stop(NamedTuple):
    """One asset on the road."""

    key: tuple[str, ...]
    """Asset key, for example `("features", "demo", "feature_records")`."""
    stage: str
    """The stage folder that makes it."""
    axis: Axis
    """What its partitions are; `none` for an asset without partitions."""
    n_buckets: int
    """Partitions of the axis `bucket`, else 0."""
    refs: Refs
    """Artifacts of one partition (`""` without partitions)."""
    sources: Sources | None = None
    """For each of these artifacts, those whose digests it remembers as `made_from`; None where the stage has another way to tell."""

    @property
    def name(self) -> str:
        """The key as people write it: parts joined by `/`."""
        return "/".join(self.key)

    def partition_keys(self, pipeline: Pipeline) -> list[str]:
        """List all partitions in order; `[""]` without partitions."""
        config = pipeline.config
        shards = [shard_key(index) for index in pipeline.shard_indices]
        n_slices = config.features.latent_slices
        keys: dict[Axis, list[str]] = {
            "none": [""],
            "shard": shards,
            "bucket": [bucket_key(bucket) for bucket in range(self.n_buckets)],
            "experiment": [sae.name for sae in config.saes],
            "slice": [slice_key(index) for index in range(n_slices)],
            "slice|shard": [grid_key(latent_slice, index) for latent_slice in range(n_slices) for index in pipeline.shard_indices],
        }
        return keys[self.axis]


def make_road(config: PipelineConfig) -> list[Stop]:
    """List every asset of a pipeline, each after those it is made from."""
    fan_out, passes = config.shuffle.fan_out, config.shuffle.passes
    road = [
        Stop(("corpus_plan",), "corpus", "none", 0, lambda _pipeline, _store, _key: []),
        Stop(("token_shards",), "corpus", "shard", 0, lambda pipeline, _store, key: [token_shard_ref(pipeline, shard_index(key))]),
        Stop(("activations",), "harvest", "shard", 0, _activations, _tokens),
        Stop(("activation_statistics",), "harvest", "none", 0, _per_hook_point(statistics_ref), _training_activations),
        Stop(("shuffle_plan",), "shuffle", "none", 0, lambda pipeline, _store, _key: [shuffle_plan_ref(pipeline)]),
        *(
            Stop((pass_name(p),), "shuffle", "shard" if p == 1 else "bucket", fan_out ** (p - 1), _split_refs(p), _split_sources if p == 1 else None)
            for p in range(1, passes)
        ),
        Stop(("mixed_shards",), "shuffle", "bucket", fan_out ** (passes - 1), _mixed_shards, _mixed_sources),
        Stop(("shuffle_certificate",), "shuffle", "none", 0, _per_hook_point(certificate_ref), _certificate_sources),
        Stop(("sae",), "train", "experiment", 0, lambda pipeline, _store, key: [sae_ref(pipeline, key)]),
        Stop(
            ("sae_evaluation",),
            "train",
            "experiment",
            0,
            lambda pipeline, _store, key: [evaluation_ref(pipeline, key)],
            lambda pipeline, key: [[sae_ref(pipeline, key)]],
        ),
        Stop(("sweep",), "train", "none", 0, lambda pipeline, _store, _key: [sweep_ref(pipeline)], _sweep_sources),
    ]
    for sae in config.features.saes:
        road += _features(sae)
    return road


def select_stops(road: list[Stop], select: Sequence[str]) -> list[Stop]:
    """Keep the named assets and `corpus_plan`; all of them when none is named. Raises `ConfigError` for a name that there is not."""
    wanted = set(select)
    known = {stop.name for stop in road}
    if unknown := sorted(wanted - known):
        raise ConfigError(f"There is no asset {', '.join(map(repr, unknown))}; this pipeline has {', '.join(sorted(known))}.")
    return [stop for stop in road if not wanted or stop.name in wanted or (stop.axis == "none" and stop.name == "corpus_plan")]


def find_version(stop: Stop, pipeline: Pipeline, store: Store, key: str, known: dict[str, Manifest] | None = None) -> str | None:
    """Return the data version of a partition when all its artifacts exist and were made from what is there now, else None.

    An id promises equal bytes on one kind of device only: a shard made again elsewhere may keep its id and change its digest, and what was
    made from the old bytes is then out of date. `known` keeps the manifests of inputs between the partitions of one asset.
    """
    known = {} if known is None else known

    def load(ref: ArtifactRef) -> Manifest:
        if ref.path not in known:
            known[ref.path] = load_manifest(store, ref)
        return known[ref.path]

    def load_all(inputs: list[ArtifactRef]) -> list[Manifest]:
        try:
            return [load(item) for item in inputs]
        except ArtifactError:
            if stop.stage == "shuffle":
                return []  # split files may be deleted once their rows are mixed
            raise

    try:
        refs = stop.refs(pipeline, store, key)
        sources = stop.sources(pipeline, key) if stop.sources else [[] for _ in refs]
        found = [find_made_from(store, ref, load_all(inputs)) for ref, inputs in zip(refs, sources, strict=True)]
        sae = load_manifest(store, sae_ref(pipeline, stop.key[1])).digest if stop.stage == "visualize" else None
    except ArtifactError:
        return None
    manifests = [manifest for manifest in found if manifest is not None and (sae is None or manifest.facts.get("sae_digest") == sae)]
    return data_version(manifests) if len(manifests) == len(found) else None


def _features(sae: str) -> list[Stop]:
    return [
        Stop(features_key(sae, "feature_candidates"), "visualize", "slice|shard", 0, _candidates(sae)),
        Stop(
            features_key(sae, "feature_examples"),
            "visualize",
            "slice",
            0,
            lambda pipeline, _store, key: [examples_ref(pipeline, sae, slice_index(key))],
        ),
        Stop(
            features_key(sae, "example_activations"),
            "visualize",
            "shard",
            0,
            lambda pipeline, _store, key: [windows_ref(pipeline, sae, shard_index(key))],
        ),
        Stop(
            features_key(sae, "feature_records"),
            "visualize",
            "slice",
            0,
            lambda pipeline, _store, key: [records_ref(pipeline, sae, slice_index(key))],
        ),
        Stop(features_key(sae, "feature_browser"), "web", "none", 0, lambda pipeline, _store, _key: [bundle_ref(pipeline, sae)]),
    ]


def _candidates(sae: str) -> Refs:
    def refs(pipeline: Pipeline, _store: Store, key: str) -> list[ArtifactRef]:
        latent_slice, index = split_grid_key(key)
        return [candidates_ref(pipeline, sae, index, latent_slice)]

    return refs


def _activations(pipeline: Pipeline, _store: Store, key: str) -> list[ArtifactRef]:
    return [activation_shard_ref(pipeline, hook_point, shard_index(key)) for hook_point in pipeline.config.harvest.hook_points]


def _tokens(pipeline: Pipeline, key: str) -> list[list[ArtifactRef]]:
    return [[token_shard_ref(pipeline, shard_index(key))] for _ in pipeline.config.harvest.hook_points]


def _training_activations(pipeline: Pipeline, _key: str) -> list[list[ArtifactRef]]:
    hook_points = pipeline.config.harvest.hook_points
    return [[activation_shard_ref(pipeline, hook_point, index) for index in pipeline.train_indices] for hook_point in hook_points]


def _mixed_shards(pipeline: Pipeline, _store: Store, key: str) -> list[ArtifactRef]:
    return [mixed_shard_ref(pipeline, hook_point, bucket_index(key)) for hook_point in pipeline.config.harvest.hook_points]


def _split_sources(pipeline: Pipeline, key: str) -> list[list[ArtifactRef]]:
    index = shard_index(key)
    hook_points = pipeline.config.harvest.hook_points if index in pipeline.train_indices else []
    return [[activation_shard_ref(pipeline, hook_point, index)] for hook_point in hook_points]


def _mixed_sources(pipeline: Pipeline, _key: str) -> list[list[ArtifactRef]]:
    """The split files or activation shards of one or two passes; in other cases `gather_bucket` compares when it runs."""
    passes, hook_points = pipeline.config.shuffle.passes, pipeline.config.harvest.hook_points
    if passes > 2 or has_grown(pipeline):
        return [[] for _ in hook_points]
    ref = activation_shard_ref if passes == 1 else split_shard_ref
    return [[ref(pipeline, hook_point, index) for index in pipeline.train_indices] for hook_point in hook_points]


def _certificate_sources(pipeline: Pipeline, _key: str) -> list[list[ArtifactRef]]:
    buckets = range(n_mixed_shards(pipeline))
    return [[mixed_shard_ref(pipeline, hook_point, bucket) for bucket in buckets] for hook_point in pipeline.config.harvest.hook_points]


def _sweep_sources(pipeline: Pipeline, _key: str) -> list[list[ArtifactRef]]:
    names = [config.name for config in pipeline.config.saes]
    return [[ref for name in names for ref in (sae_ref(pipeline, name), evaluation_ref(pipeline, name))]]


def _per_hook_point(ref: Callable[[Pipeline, str], ArtifactRef]) -> Refs:
    return lambda pipeline, _store, _key: [ref(pipeline, hook_point) for hook_point in pipeline.config.harvest.hook_points]


def _split_refs(pass_index: int) -> Refs:
    """Split files of one corpus shard, or of all jobs of one bucket in a middle pass. Held-out and pending shards have none."""

    def refs(pipeline: Pipeline, store: Store, key: str) -> list[ArtifactRef]:
        hook_points = pipeline.config.harvest.hook_points
        if pass_index == 1:
            index = shard_index(key)
            is_shuffled = index in pipeline.train_indices
            return [split_shard_ref(pipeline, hook_point, index) for hook_point in hook_points] if is_shuffled else []
        bucket, own = bucket_index(key), newest(pipeline)
        n_jobs = len(make_sizes(own, load_shard_rows(own, store)).job_rows(pass_index, bucket))
        return [split_bucket_ref(pipeline, hook_point, pass_index, bucket, job) for hook_point in hook_points for job in range(n_jobs)]

    return refs
