"""Failed, missing and outdated partitions are made again, and only what depends on their bytes: `interp backfill`.

    for each asset, in the order of the data
        which partitions are due?   failed, or not in the store, or made from other bytes than are there now
        which of them can be made?  those whose upstream partitions are there; the others wait and are counted
        one Dagster run for each contiguous range, whether or not an earlier one failed

A run of the road stops where an asset has failed whole; a backfill goes as far as it can, and says at the end what is left. A partition
that is made again with the bytes it had leaves everything behind it alone, because what counts is the digest.

Dagster's own backfills do the same from its UI, through the daemon and the run launcher, on as many machines as there are; they walk the
graph in steps of half a minute. This one needs no daemon and takes a second a run.
"""

from collections.abc import Iterator, Sequence

import dagster as dg
from dagster import DagsterEventType, DagsterInstance, DagsterRunStatus
from dagster._core.definitions.partitions.context import partition_loading_context
from dagster._core.storage.partition_status_cache import AssetPartitionStatus

from interp_assets.errors import ArtifactError, ConfigError
from interp_assets.graph.assembly import assemble
from interp_assets.graph.fanout import side_by_side
from interp_assets.graph.jobs import count_partitions, find_holding, find_missing, run_asset
from interp_assets.graph.partitions import partitions_of
from interp_assets.graph.readiness import check_machine
from interp_assets.graph.stages import make_road
from interp_assets.planning.asset import NONE, Asset
from interp_assets.planning.config import PipelineConfig
from interp_assets.planning.pipeline import Pipeline, load_pipeline, open_pipeline_store
from interp_assets.planning.progress import AssetReport, Progress
from interp_assets.planning.road import Partition, group_siblings
from interp_assets.storage.listing import list_store
from interp_assets.storage.manifest import remove_artifact
from interp_assets.storage.seen import SeenFiles, open_seen
from interp_assets.storage.store import Store
from interp_assets.storage.verify import verify_artifact


def run_backfill(
    config: PipelineConfig,
    instance: DagsterInstance,
    *,
    select: Sequence[str] = (),
    partitions: Sequence[str] = (),
    only_failed: bool = False,
    progress: Progress | None = None,
) -> Iterator[AssetReport]:
    """Make what is due, asset by asset, and report each asset that had something to do.

    `select` limits it to the named assets. `partitions` names partitions to make, whatever their state; the others are left alone. Of these
    every byte is read first, and what is damaged is removed: a file of the right size counts as whole otherwise.
    `only_failed` makes failed partitions and what comes after them. The plan is taken as it is: new text is the business of `interp run`.
    Raises `ArtifactMissingError` without a plan, `ConfigError` for an unknown asset or partition.
    """
    with open_seen() as notes:
        yield from _run_backfill(config, instance, (select, partitions), only_failed, progress or Progress(), notes)


def _run_backfill(
    config: PipelineConfig,
    instance: DagsterInstance,
    named: tuple[Sequence[str], Sequence[str]],
    only_failed: bool,  # noqa: FBT001 - as `run_backfill` was asked
    progress: Progress,
    notes: SeenFiles,
) -> Iterator[AssetReport]:
    road, (select, partitions) = make_road(config), named
    selected = [asset for asset in road.select(select) if not asset.plan]
    store = open_pipeline_store(config)
    pipeline = load_pipeline(config, store)
    _check_partitions(selected, pipeline, partitions)
    listed = list_store(store, notes)
    if not partitions:
        check_machine(road, pipeline, listed, selected)
    job = assemble(config, progress).resolve_implicit_global_asset_job_def()
    touched: set[Partition] = set()
    broken: set[Partition] = set()

    def find_due(asset: Asset) -> tuple[list[str], list[str]]:
        """List the partitions that are due and can be made, and those that wait for failed ones."""
        keys = asset.partition_keys(pipeline)
        failed_before = set(find_failed(asset, keys, instance))
        due = set(find_missing(road, asset, pipeline, listed, instance)) | failed_before
        if partitions:
            due = set(keys) & set(partitions)
        elif only_failed:
            due = {key for key in due if key in failed_before or road.parents(asset, pipeline, key) & touched}
        waiting = [key for key in keys if key in due and broken and road.awaited(asset, pipeline, key) & broken]
        ready = [key for key in keys if key in due and key not in set(waiting)]
        if partitions:
            _remove_damaged(asset, pipeline, store, ready)
        return ready, waiting

    for siblings in group_siblings(selected):
        all_due = [(asset, *find_due(asset)) for asset in siblings]
        with side_by_side([asset for asset, ready, _ in all_due if ready], config):
            for asset, ready, waiting in all_due:
                if not ready and not waiting:
                    continue
                n_holding = len(find_holding(road, asset, pipeline, store) & set(ready))
                progress.plan(n_holding)
                progress.expect(asset.name, n_holding, asset.unit)
                outcome = run_asset(job, instance, asset, ready, asset.partition_keys(pipeline))
                touched |= {(asset.name, key) for key in ready}
                broken |= {(asset.name, key) for key in [*outcome.report.failed, *waiting]}
                yield count_partitions(road, asset, (pipeline, store), ready, outcome.report._replace(waiting=waiting))
        if any(ready for _, ready, _ in all_due):  # what was listed is as old as what it was before
            listed = list_store(store, notes)


def find_failed(asset: Asset, keys: Sequence[str], instance: DagsterInstance) -> list[str]:
    """List the partitions whose latest run failed, whether or not an earlier one had made them."""
    asset_key = dg.AssetKey(list(asset.key))
    if asset.axis is NONE:
        run_id = _last_run(instance, asset_key)
        run = instance.get_run_by_id(run_id) if run_id else None
        event = instance.get_latest_materialization_event(asset_key)
        is_made = event is not None and event.run_id == run_id
        return [""] if run is not None and run.status == DagsterRunStatus.FAILURE and not is_made else []
    partitions_def = partitions_of(asset.axis)
    assert partitions_def is not None
    with partition_loading_context(dynamic_partitions_store=instance):
        status = instance.get_status_by_partition(asset_key, list(keys), partitions_def) or {}
    return [key for key in keys if status.get(key) == AssetPartitionStatus.FAILED]


def _last_run(instance: DagsterInstance, asset: dg.AssetKey) -> str | None:
    """Return the run that last set out to make an asset."""
    filters = dg.EventRecordsFilter(event_type=DagsterEventType.ASSET_MATERIALIZATION_PLANNED, asset_key=asset)
    records = instance.event_log_storage.get_event_records(filters, limit=1)
    return records[0].run_id if records else None


def _remove_damaged(asset: Asset, pipeline: Pipeline, store: Store, keys: Sequence[str]) -> None:
    for key in keys:
        try:
            paths = [ref.path for ref in asset.artifacts(pipeline, store, key)]
        except ArtifactError:
            continue  # upstream is not there: the run says so
        for path in paths:
            objects = list(store.list(path))
            if objects and next(verify_artifact(store, path, objects), None):
                remove_artifact(store, path)


def _check_partitions(selected: Sequence[Asset], pipeline: Pipeline, partitions: Sequence[str]) -> None:
    known = {key for asset in selected for key in asset.partition_keys(pipeline)}
    if unknown := [key for key in partitions if key not in known]:
        names = ", ".join(asset.name for asset in selected)
        raise ConfigError(f"There is no partition {', '.join(map(repr, unknown))} in {names}. They look like {sorted(known - {''})[:3]}.")
