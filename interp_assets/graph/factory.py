"""An asset's record becomes Dagster's definitions: the asset with its partitions, dependencies and policies, and its checks.

One function makes them all. What a run of it does is said once, too: open the world, prepare the work (or send it to a cluster), then make and
record one partition after the other.
"""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, Final

import dagster as dg

from interp_assets.compute.compiled import n_compilations
from interp_assets.graph.events import Made, Shared, describe, interruptible, partition_keys, record, record_verdicts
from interp_assets.graph.fanout import Fanout, start_fanout
from interp_assets.graph.partitions import backfill_policy, claim_history, dependency, partitions_of, register, tags_of
from interp_assets.graph.workers import dismiss_crew
from interp_assets.planning.asset import Asset, Check, Job
from interp_assets.planning.config import PipelineConfig
from interp_assets.planning.progress import Progress
from interp_assets.planning.road import Road
from interp_assets.storage.listing import list_store
from interp_assets.storage.seen import open_seen
from interp_assets.storage.traffic import METER
from resources.world import World

OWNERS: Final = ["team:interpretability"]
GPU_POOL: Final = "gpu"
"""Runs that hold a subject model or SAEs in memory: Dagster starts as many at once as the pool's limit says (`dagster.yaml`: one)."""
RETRIES: Final = dg.RetryPolicy(max_retries=2, delay=1, backoff=dg.Backoff.EXPONENTIAL, jitter=dg.Jitter.PLUS_MINUS)
"""A store that refuses is asked again after about 1 and 3 seconds; what is finished is found, so only the rest is made. Nothing else is retried."""

_VERSION_TAG: Final = "dagster/data_version"

Events = Any
"""What an asset's body yields. Dagster reads the annotation as the type of the output when a checker wraps the body, so it promises nothing."""


def make_definition(asset: Asset, road: Road, config: PipelineConfig) -> dg.AssetsDefinition | dg.AssetSpec:
    """Make Dagster's asset of a record."""
    what: dict[str, Any] = {
        "key": list(asset.key),
        "partitions_def": partitions_of(asset.axis),
        "group_name": asset.group,
        "owners": OWNERS,
        "kinds": kinds_of(asset.kinds, config) if not asset.is_external else set(asset.kinds),
        "description": asset.description,
    }
    if asset.is_external:
        return dg.AssetSpec(**what)

    @dg.asset(
        **what,
        deps=[dependency(road, asset, item) for item in asset.reads],
        retry_policy=RETRIES,
        pool=GPU_POOL if asset.needs.accelerator else None,
        op_tags=tags_of(asset.needs, config),
        code_version=asset.code_version,
        backfill_policy=backfill_policy(asset, config),
        freshness_policy=_freshness(config) if asset.is_relied_on else None,
    )
    def body(context: dg.AssetExecutionContext, world: dg.ResourceParam[World], progress: dg.ResourceParam[Progress]) -> Events:
        yield from _plan(asset, road, context, world, progress) if asset.plan else _make(asset, context, world, progress)
        if asset.completes_plan:
            register(context.instance, road, world.open()[0])

    return body  # pyright: ignore[reportReturnType] - Dagster's overloads do not see through the arguments


def make_check(asset: Asset, check: Check) -> dg.AssetChecksDefinition:
    """Make Dagster's check of a record."""

    @dg.asset_check(
        asset=dg.AssetKey(list(asset.key)),
        name=check.name,
        description=check.description,
        blocking=check.blocks,
        partitions_def=partitions_of(asset.axis),
    )
    def body(context: dg.AssetCheckExecutionContext, world: dg.ResourceParam[World]) -> Events:
        pipeline, store = world.open()
        yield from record_verdicts(context, check, check.verdicts(pipeline, store, partition_keys(context)))

    return body


def kinds_of(kinds: Sequence[str], config: PipelineConfig) -> set[str]:
    """Return an asset's kinds, with the kind of its storage."""
    return {*kinds, "s3"} if config.root.startswith("s3://") else set(kinds)


def _freshness(config: PipelineConfig) -> dg.FreshnessPolicy | None:
    """Return the policy of assets that people rely on, in a pipeline that takes in new text; a finished study does not age."""
    if not config.retrain.after_tokens:
        return None
    days = timedelta(days=config.retrain.stale_after_days)
    return dg.FreshnessPolicy.time_window(fail_window=days, warn_window=days / 2)


def _plan(asset: Asset, road: Road, context: dg.AssetExecutionContext, world: World, progress: Progress) -> Events:
    """Plan, register the partitions, and note the state of what lies outside."""
    assert asset.plan is not None

    def tell(sentence: str) -> None:
        context.log.info(sentence)
        progress.tell(sentence)

    claim_history(context.instance, world.config.name)
    store = world.store()
    pipeline = asset.plan(world.config, store, tell)
    register(context.instance, road, pipeline)
    with open_seen() as notes:
        road.check(pipeline, list_store(store, notes))
    for outside in road.outside:
        observed = outside.observe(pipeline) if outside.observe else {}
        known = _observed_versions(context.instance, outside) if observed else {}
        for key, found in observed.items():
            if known.get(key) == found.version:
                continue  # ten thousand events that say nothing new would be a minute of every run
            tags = {_VERSION_TAG: found.version}
            yield dg.AssetObservation(dg.AssetKey(list(outside.key)), partition=key, metadata=found.facts, tags=tags)
    shown = asset.shows(Job(world, pipeline, store), "", [])
    version = _hash_version({**pipeline.facts, "corpus": pipeline.config.corpus.model_dump()})
    yield from record(context, lambda _key: describe([], store.url, shown)._replace(data_version=version), progress)


def _make(asset: Asset, context: dg.AssetExecutionContext, world: World, progress: Progress) -> Events:
    assert asset.make is not None
    pipeline, store = world.open()
    job = Job(world, pipeline, store, tuple(partition_keys(context)), progress, context.log.info)
    if fanout := start_fanout(asset, job):
        yield from record(context, lambda key: _take(fanout, asset, job, key), progress)
        return
    if asset.needs.accelerator:
        dismiss_crew()  # it would share the device with them
    shared = None
    if asset.is_made_together:
        before, begun, n_compiled = METER.total(), time.monotonic(), n_compilations()
        with interruptible(progress):
            make = asset.make(job)
        shares, took_s = progress.divide(asset.key, job.keys), time.monotonic() - begun
        shared = Shared(METER.total().since(before), took_s, is_rated=n_compilations() == n_compiled, shares=shares)
    else:
        make = asset.make(job)

    def work(key: str) -> Made:
        produced = make(key)
        return describe(produced, store.url, asset.shows(job, key, produced))

    yield from record(context, work, progress, shared)


def _take(fanout: Fanout, asset: Asset, job: Job, key: str) -> Made:
    """Take from a cluster what it has made. Its time rates nothing: a worker has a share of a machine."""
    taken = fanout.take(asset, key)
    made = describe(taken.made, job.store.url, {**asset.shows(job, key, taken.made), "node": taken.node})
    return made._replace(took=Shared(taken.traffic, taken.seconds, is_rated=False))


def _observed_versions(instance: dg.DagsterInstance, asset: Asset) -> dict[str, str]:
    """Return the version of every partition of something outside, as it was observed last."""
    event_type, tags = dg.DagsterEventType.ASSET_OBSERVATION, [_VERSION_TAG]
    found = instance.event_log_storage.get_latest_tags_by_partition(dg.AssetKey(list(asset.key)), event_type, tags)
    return {partition: tags[_VERSION_TAG] for partition, tags in found.items() if _VERSION_TAG in tags}


def _hash_version(content: Mapping[str, Any]) -> str:
    """Return a data version for plain data."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()
