"""Failed, missing and outdated partitions are made again, and only what depends on their bytes: `interp backfill`.

    for each asset, in the order of the data
        which partitions are due?   failed, or not in the store, or made from other bytes than are there now
        which of them can be made?  those whose upstream partitions are there; the others wait and are counted
        one Dagster run for each contiguous range, whether or not an earlier one failed

A run of the road stops at the first asset that fails; a backfill goes as far as it can, and says at the end what is left. A partition
that is made again with the bytes it had leaves everything behind it alone, because what counts is the digest.

Dagster's own backfills do the same from its UI, through the daemon and the run launcher, on as many machines as there are; they walk the
graph in steps of half a minute. This one needs no daemon and takes a second a run.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import dagster as dg
from dagster import DagsterEventType, DagsterInstance, DagsterRunStatus
from dagster._core.definitions.partitions.context import partition_loading_context
from dagster._core.storage.partition_status_cache import AssetPartitionStatus

from interp_assets.errors import ArtifactError, ConfigError
from interp_assets.graph.definitions import build_defs
from interp_assets.graph.jobs import find_missing, run_stop
from interp_assets.planning.config import PipelineConfig
from interp_assets.planning.pipeline import Pipeline, load_pipeline, open_pipeline_store
from interp_assets.planning.progress import AssetReport, Progress
from interp_assets.planning.road import Stop, make_road, select_stops
from interp_assets.storage.manifest import remove_artifact
from interp_assets.storage.store import Store
from interp_assets.storage.verify import verify_artifact


class BackfillReport(NamedTuple):
    """What a backfill did for one asset."""

    report: AssetReport
    failed: list[str]
    """Partitions that failed (again)."""
    waiting: list[str]
    """Partitions that are due and cannot be made before failed ones upstream."""
    message: str
    """What the first failure said; empty when there is none."""


def run_backfill(
    config: PipelineConfig,
    instance: DagsterInstance,
    *,
    select: Sequence[str] = (),
    partitions: Sequence[str] = (),
    only_failed: bool = False,
    progress: Progress | None = None,
) -> Iterator[BackfillReport]:
    """Make what is due, asset by asset, and report each asset that had something to do.

    `select` limits it to the named assets. `partitions` names partitions to make, whatever their state; the others are left alone. Of these
    every byte is read first, and what is damaged is removed: a file of the right size counts as whole otherwise.
    `only_failed` makes failed partitions and what comes after them. The plan is taken as it is: new text is the business of `interp run`.
    Raises `ArtifactMissingError` without a plan, `ConfigError` for an unknown asset or partition.
    """
    progress = progress or Progress()
    road = [stop for stop in select_stops(make_road(config), select) if stop.name != "corpus_plan"]
    store = open_pipeline_store(config)
    pipeline = load_pipeline(config, store)
    _check_partitions(road, pipeline, partitions)
    defs = build_defs(config, progress=progress)
    job, parents = defs.resolve_implicit_global_asset_job_def(), _Parents(defs, instance)
    touched: set[tuple[str, str]] = set()
    broken: set[tuple[str, str]] = set()
    for stop in road:
        keys = stop.partition_keys(pipeline)
        failed_before = set(find_failed(defs, stop, keys, instance))
        due = set(find_missing(stop, pipeline, store, instance)) | failed_before
        if partitions:
            due = set(keys) & set(partitions)
        elif only_failed:
            due = {key for key in due if key in failed_before or parents.of(stop, key) & touched}
        waiting = [key for key in keys if key in due and parents.of(stop, key) & broken]
        ready = [key for key in keys if key in due and key not in set(waiting)]
        if not due:
            continue
        if partitions:
            _remove_damaged(stop, pipeline, store, ready)
        progress.plan(len(ready))
        progress.expect(stop.name, len(ready))
        outcome = run_stop(job, instance, stop, ready, keys)
        touched |= {(stop.name, key) for key in ready}
        broken |= {(stop.name, key) for key in [*outcome.failed, *waiting]}
        yield BackfillReport(outcome.report, outcome.failed, waiting, str(outcome.errors[0]) if outcome.errors else "")


def find_failed(defs: dg.Definitions, stop: Stop, keys: Sequence[str], instance: DagsterInstance) -> list[str]:
    """List the partitions whose latest run failed, whether or not an earlier one had made them."""
    asset = dg.AssetKey(list(stop.key))
    if stop.axis == "none":
        run_id = _last_run(instance, asset)
        run = instance.get_run_by_id(run_id) if run_id else None
        event = instance.get_latest_materialization_event(asset)
        is_made = event is not None and event.run_id == run_id
        return [""] if run is not None and run.status == DagsterRunStatus.FAILURE and not is_made else []
    partitions_def = defs.resolve_asset_graph().get(asset).partitions_def
    assert partitions_def is not None
    with partition_loading_context(dynamic_partitions_store=instance):
        status = instance.get_status_by_partition(asset, list(keys), partitions_def) or {}
    return [key for key in keys if status.get(key) == AssetPartitionStatus.FAILED]


def _last_run(instance: DagsterInstance, asset: dg.AssetKey) -> str | None:
    """Return the run that last set out to make an asset."""
    filters = dg.EventRecordsFilter(event_type=DagsterEventType.ASSET_MATERIALIZATION_PLANNED, asset_key=asset)
    records = instance.event_log_storage.get_event_records(filters, limit=1)
    return records[0].run_id if records else None


def _remove_damaged(stop: Stop, pipeline: Pipeline, store: Store, keys: Sequence[str]) -> None:
    for key in keys:
        try:
            paths = [ref.path for ref in stop.refs(pipeline, store, key)]
        except ArtifactError:
            continue  # upstream is not there: the run says so
        for path in paths:
            objects = list(store.list(path))
            if objects and next(verify_artifact(store, path, objects), None):
                remove_artifact(store, path)


def _check_partitions(road: Sequence[Stop], pipeline: Pipeline, partitions: Sequence[str]) -> None:
    known = {key for stop in road for key in stop.partition_keys(pipeline)}
    if unknown := [key for key in partitions if key not in known]:
        names = ", ".join(stop.name for stop in road)
        raise ConfigError(f"There is no partition {', '.join(map(repr, unknown))} in {names}. They look like {sorted(known - {''})[:3]}.")


class _Parents:
    """Which upstream partitions a partition reads, by the asset graph's own mappings."""

    def __init__(self, defs: dg.Definitions, instance: DagsterInstance) -> None:
        self._graph, self._instance = defs.resolve_asset_graph(), instance

    def of(self, stop: Stop, key: str) -> set[tuple[str, str]]:
        """Return the upstream partitions as (asset, partition), `""` for an asset without partitions."""
        child = dg.AssetKey(list(stop.key))
        found: set[tuple[str, str]] = set()
        with partition_loading_context(dynamic_partitions_store=self._instance):
            for parent in self._graph.get(child).parent_keys:
                name = parent.to_user_string()
                if not self._graph.get(parent).is_partitioned:
                    found.add((name, ""))
                    continue
                result = self._graph.get_parent_partition_keys_for_child(key or None, parent, child)
                found |= {(name, str(item)) for item in result.partitions_subset.get_partition_keys()}
        return found
