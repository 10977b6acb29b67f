"""The run loop: a configuration becomes a finished road, in one process, making only what is missing.

    for each asset, in the order of the data
        which partitions are missing?   an artifact is not in the store, or Dagster does not know that it is
        for each contiguous range of them: one Dagster run
    an asset of which some partitions failed (one SAE of a sweep) stops only what reads these; one that failed whole stops the road
    siblings, such as the bundles of several SAEs, are looked at together: on a cluster the first sends the tasks of all (`fanout.py`)

One process and one run per range, because a Dagster run costs about a second of bookkeeping on SQLite and a queued backfill walks the
graph in steps of 30 seconds. The instance is the persistent one, so the UI shows every run, partition and plot.
"""

import atexit
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import dagster as dg
from dagster import DagsterEventType, DagsterInstance
from dagster._core.errors import DagsterExecutionInterruptedError

from interp_assets.corpus.sizes import are_counted
from interp_assets.errors import ConfigError, InterpError
from interp_assets.graph.assembly import assemble
from interp_assets.graph.events import STOPPED
from interp_assets.graph.fanout import side_by_side
from interp_assets.graph.local_ray import local_cluster
from interp_assets.graph.partitions import claim_history
from interp_assets.graph.readiness import check_machine
from interp_assets.graph.stages import make_road
from interp_assets.planning.asset import NONE, Asset
from interp_assets.planning.config import PipelineConfig
from interp_assets.planning.pipeline import Pipeline, load_pipeline, open_pipeline_store
from interp_assets.planning.progress import AssetReport, Progress
from interp_assets.planning.road import Partition, Road, group_siblings
from interp_assets.storage.leases import SILENT_S, leased
from interp_assets.storage.lineage import Digests
from interp_assets.storage.listing import list_store
from interp_assets.storage.locks import Holder, locked
from interp_assets.storage.process_names import name_process
from interp_assets.storage.seen import SeenFiles, open_seen
from interp_assets.storage.store import Store
from resources.launcher import PROCESS_TAG

TURN_LOCK: Final = ".working"
"""File whose lock a command holds while it works on a pipeline; it says who that is."""
TURN_LEASE: Final = ".turns"
"""The same in a bucket: a folder of another name, because a folder that was copied there has the file."""
_CREATION_LOCK: Final = ".opening"
HOME_VARIABLE: Final = "DAGSTER_HOME"
POSTGRES_VARIABLE: Final = "INTERP_POSTGRES_URL"
_RESOURCES: Final = Path(__file__).parents[2] / "resources"
_MISREAD: Final = "?"
"""What ends a path in the addresses of databases that Dagster makes."""
_VERSION_TAG: Final = "dagster/data_version"
_PAGE_EVENTS: Final = 1000
_QUIET: Final = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}


class RunError(InterpError):
    """A Dagster run failed; `trace` is what a developer wants to see besides the message."""

    def __init__(self, message: str, trace: str = "") -> None:
        super().__init__(message)
        self.trace = trace


class Outcome(NamedTuple):
    """What became of the missing partitions of one asset."""

    report: AssetReport
    errors: list[RunError]
    """One for each range that failed."""


def dagster_home(config: PipelineConfig) -> Path:
    """Return the folder of Dagster's database: `DAGSTER_HOME`, else `.dagster/<pipeline>` beside the pipeline's folder.

    Each pipeline has its own, because asset keys are the same in all pipelines. A root that is no local folder gets `.dagster/<pipeline>`
    in the working directory.
    """
    given = os.environ.get(HOME_VARIABLE)
    root = Path() if "://" in config.root else Path(config.root)
    home = (Path(given) if given else root / ".dagster" / config.name).expanduser().resolve()
    return _detour(home) if _MISREAD in str(home) else home


@cache
def _detour(home: Path) -> Path:
    """Return a link, for the time of this process, to a folder whose own path Dagster would cut off: it writes addresses of SQLite files by hand."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="interp-assets-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        (folder / "dagster").symlink_to(home, target_is_directory=True)
    except OSError as error:
        raise ConfigError(f"The path {home} has a {_MISREAD!r}, and no link to it can be made ({error}). Name another in {HOME_VARIABLE}.") from error
    return folder / "dagster"


def open_instance(config: PipelineConfig) -> DagsterInstance:
    """Open the persistent instance of a pipeline; a new one gets the settings of `resources/dagster.yaml`, or those of production.

    Production is Postgres and logs in S3: with `INTERP_POSTGRES_URL` set. Raises `ConfigError`, also when the history is another pipeline's.
    """
    home = dagster_home(config)
    try:
        home.mkdir(parents=True, exist_ok=True)
        if not (home / "dagster.yaml").exists():
            shutil.copyfile(_RESOURCES / ("dagster.production.yaml" if os.environ.get(POSTGRES_VARIABLE) else "dagster.yaml"), home / "dagster.yaml")
    except OSError as error:
        raise ConfigError(f"Dagster's folder {home} cannot be made: {error.strerror}. Name another one in {HOME_VARIABLE}.") from error
    with locked(home / _CREATION_LOCK):  # two first runs would both make the tables
        instance = DagsterInstance.from_config(str(home))
        try:
            claim_history(instance, config.name)
        except ConfigError:
            instance.dispose()
            raise
    return instance


@contextmanager
def take_turn(config: PipelineConfig, tell: Callable[[str], None]) -> Iterator[None]:
    """Let one command at a time work on a pipeline: wait for another one, and `tell` who that is and that it is waited for.

    Two would do the same work twice. The lock lies beside the artifacts, so that all machines with that folder see it; in a bucket it is a lease.
    """
    is_folder = "://" not in config.root

    def name(holder: Holder | None) -> str:
        return holder.describe() if holder else "Another command"

    def wait_for(holder: Holder | None) -> None:
        works = f"{name(holder)} works on pipeline {config.name}"
        tell(f"{works}. Waiting until it has ended; then this goes on with what is left. Ctrl-C ends the wait.")

    def lose_to(holder: Holder | None) -> None:
        why = f"because this command was not heard of for {SILENT_S:g} s"
        tell(f"{name(holder)} has taken over pipeline {config.name}, {why}. Both go on: work may be done twice, and nothing is damaged.")

    with ExitStack() as stack:
        folder = Path(config.root).expanduser() / config.name if is_folder else dagster_home(config)
        stack.enter_context(locked(folder / TURN_LOCK, waits_for=wait_for))
        if config.root.startswith("s3://"):
            stack.enter_context(leased(open_pipeline_store(config), TURN_LEASE, waits_for=wait_for, is_lost_to=lose_to))
        yield


def run_road(
    config: PipelineConfig, instance: DagsterInstance, *, select: Sequence[str] = (), progress: Progress | None = None
) -> Iterator[AssetReport]:
    """Materialize what is missing, asset by asset, and report each one when it is done.

    `select` limits the run to the named assets (the plan is always made: it notices new text). Raises the first `RunError`: at an asset that
    failed whole, else when all is made that does not read what failed. What is finished stays, and the next run goes on from there.
    """
    with local_cluster(config.execution), open_seen() as notes:
        yield from _run_road(config, instance, select, progress or Progress(), notes)


def _run_road(
    config: PipelineConfig, instance: DagsterInstance, select: Sequence[str], progress: Progress, notes: SeenFiles
) -> Iterator[AssetReport]:
    road = make_road(config)
    rest = [asset for asset in road.select(select) if not asset.plan]
    job = assemble(config, progress).resolve_implicit_global_asset_job_def()
    progress.expect(road.plan.name, 1)
    yield _whole(run_asset(job, instance, road.plan, [""], [""]))
    real_store = open_pipeline_store(config)
    pipeline = load_pipeline(config, real_store)
    store = list_store(real_store, notes)
    known = Digests(store)
    progress.plan(sum(len(find_holding(road, asset, pipeline, store)) for asset in rest))
    errors: list[RunError] = []
    broken: set[Partition] = set()
    ended: set[Partition] = set()
    is_certain = are_counted(pipeline, store)
    check_machine(road, pipeline, store, rest, known)
    for siblings in group_siblings(rest):
        if not is_certain and (is_certain := are_counted(pipeline := load_pipeline(config, store), store)):
            road.check(pipeline, store)  # the plan could only estimate the rows
            check_machine(road, pipeline, store, rest, known)
        due = [(asset, find_missing(road, asset, pipeline, store, instance, known)) for asset in siblings]
        with side_by_side([asset for asset, missing in due if missing], config):
            for asset, missing in due:
                if keys := asset.partition_keys(pipeline):
                    left = find_left(road, asset, pipeline, missing, broken, ended)
                    kept_back = {*left.waiting, *left.stopped}
                    ready = [key for key in missing if key not in kept_back]
                    holding = find_holding(road, asset, pipeline, store)
                    progress.skip(len(holding - set(ready)))
                    progress.expect(asset.name, len(holding & set(ready)), asset.unit)
                    outcome = run_asset(job, instance, asset, ready, keys)
                    stopped = [*outcome.report.stopped, *left.stopped]
                    if len(outcome.report.failed) == len(keys):
                        if errors:  # what failed before is why: a table of SAEs of which none could be trained
                            raise errors[0]
                        _whole(outcome)
                    told = outcome.report.message if errors else ""  # the first is raised
                    errors += outcome.errors
                    broken |= {(asset.name, key) for key in [*outcome.report.failed, *left.waiting]}
                    ended |= {(asset.name, key) for key in stopped}
                    report = outcome.report._replace(waiting=left.waiting, stopped=stopped, message=told)
                    yield count_partitions(road, asset, (pipeline, store), ready, report)
        if any(missing for _, missing in due):  # what was listed and read is as old as what it was before
            store = list_store(real_store, notes)
            known = Digests(store)
        if any(asset.completes_plan for asset in siblings):
            pipeline = load_pipeline(config, store)
            progress.plan(sum(len(find_holding(road, asset, pipeline, store)) for asset in rest))
    if errors:
        raise errors[0]


class Left(NamedTuple):
    """What of an asset is due and cannot be made."""

    waiting: list[str]
    """Before what has failed."""
    stopped: list[str]
    """Because what it reads was stopped."""


def find_left(road: Road, asset: Asset, pipeline: Pipeline, due: Sequence[str], broken: set[Partition], ended: set[Partition]) -> Left:
    """Return which of the partitions that are due read what has failed (`broken`), and which others what was stopped (`ended`)."""
    awaited = {key: road.awaited(asset, pipeline, key) for key in due} if broken or ended else {}
    waiting = [key for key, parents in awaited.items() if parents & broken]
    return Left(waiting, [key for key, parents in awaited.items() if parents & ended and not parents & broken])


def find_missing(road: Road, asset: Asset, pipeline: Pipeline, store: Store, instance: DagsterInstance, known: Digests | None = None) -> list[str]:
    """List the partitions of an asset that have to be run, in order: without artifacts, made from other bytes, or not as Dagster knows them."""
    recorded = recorded_versions(instance, asset)
    keys = asset.partition_keys(pipeline)
    known = known or Digests(store)
    return [key for key in keys if key not in recorded or road.find_version(asset, pipeline, store, key, known) != recorded[key]]


def recorded_versions(instance: DagsterInstance, asset: Asset) -> dict[str, str]:
    """Return the data version of every partition that Dagster knows of an asset (`""` without partitions)."""
    key = dg.AssetKey(list(asset.key))
    if asset.axis is NONE:
        event = instance.get_latest_materialization_event(key)
        tags = event.asset_materialization.tags if event and event.asset_materialization else None
        return {"": tags[_VERSION_TAG]} if tags and _VERSION_TAG in tags else {}
    found = instance.event_log_storage.get_latest_tags_by_partition(key, DagsterEventType.ASSET_MATERIALIZATION, [_VERSION_TAG])
    return {partition: tags[_VERSION_TAG] for partition, tags in found.items() if _VERSION_TAG in tags}


def recorded_costs(instance: DagsterInstance, asset: Asset) -> list[list[dict[str, Any]]]:
    """Return, for every partition of an asset that was made, the table of what it was expected to take and what it took the last time."""
    found: dict[str, list[dict[str, Any]]] = {}
    has_more, cursor = True, None
    while has_more:
        records, cursor, has_more = instance.fetch_materializations(dg.AssetKey(list(asset.key)), limit=_PAGE_EVENTS, cursor=cursor)
        for record in records:
            event = record.asset_materialization
            table = event.metadata.get("cost") if event else None
            if event and isinstance(table, dg.TableMetadataValue):
                found.setdefault(event.partition or "", [dict(row.data) for row in table.records])
    return list(found.values())


def make_ranges(missing: Sequence[str], keys: Sequence[str]) -> list[tuple[str, str]]:
    """Join missing partitions that follow each other in `keys` into ranges (first, last).

    Keys of two dimensions (`slice|shard`) are joined along the second only, because Dagster reads a range as a rectangle.
    """
    ranges: list[tuple[str, str]] = []
    place = {key: i for i, key in enumerate(keys)}
    for key in missing:
        row = key.rpartition("|")[0]
        if ranges and place[key] == place[ranges[-1][1]] + 1 and ranges[-1][1].rpartition("|")[0] == row:
            ranges[-1] = (ranges[-1][0], key)
        else:
            ranges.append((key, key))
    return ranges


def explain_failure(name: str, result: dg.ExecuteInProcessResult) -> RunError:
    """Turn a failed run of an asset into one paragraph: what the stage said, or what went wrong in our own code."""
    for event in result.all_events:
        if event.event_type != DagsterEventType.STEP_FAILURE:
            continue
        failure = event.step_failure_data
        if failure.user_failure_data is not None and failure.user_failure_data.description:
            return RunError(failure.user_failure_data.description, failure.error.to_string() if failure.error else "")
        if failure.error is not None:
            cause = failure.error.cause or failure.error
            text = cause.message.strip()
            said = text.removeprefix(f"{InterpError.__module__}.{cause.cls_name}: ")
            return RunError(said if said != text else f"{name} failed: {text}", failure.error.to_string())
    return RunError(f"{name} failed, and Dagster does not say why. Look at the run in its UI (`interp dev`).")


def _was_interrupted(result: dg.ExecuteInProcessResult) -> bool:
    for event in result.all_events:
        error = event.step_failure_data.error if event.event_type == DagsterEventType.STEP_FAILURE else None
        while error is not None:
            if error.cls_name in (DagsterExecutionInterruptedError.__name__, KeyboardInterrupt.__name__):
                return True
            error = error.cause
    return False


def run_asset(job: dg.JobDefinition, instance: DagsterInstance, asset: Asset, missing: list[str], keys: list[str]) -> Outcome:
    """Run the missing partitions of one asset, one Dagster run a contiguous range; a range that fails does not stop the others.

    Raises `KeyboardInterrupt` when a run was interrupted: Dagster records that as a failure, and a person wants all of it to stop.
    """
    started = time.monotonic()
    n_bytes, n_found, failed_checks, failed, stopped, made, errors = 0, 0, [], [], [], [], []
    ranges = [("", "")] if missing == [""] else make_ranges(missing, keys)
    for first, last in ranges:
        tags = {"interp/asset": asset.name, "interp/stage": asset.stage, PROCESS_TAG: name_process()}
        if first:
            tags |= {"dagster/asset_partition_range_start": first, "dagster/asset_partition_range_end": last}
        with _own_signals():
            result = job.execute_in_process(
                instance=instance, asset_selection=[dg.AssetKey(list(asset.key))], tags=tags, run_config=_QUIET, raise_on_error=False
            )
        events = result.asset_materializations_for_node(_node_name(asset))
        ended = [event.partition or "" for event in result.asset_observations_for_node(_node_name(asset)) if STOPPED in event.metadata]
        stopped += ended
        if not result.success:
            if _was_interrupted(result):
                raise KeyboardInterrupt
            errors.append(explain_failure(asset.name, result))
            failed += sorted(set(keys[keys.index(first) : keys.index(last) + 1]) - {event.partition or "" for event in events} - set(ended))
        n_bytes += sum(_written_bytes(event) for event in events)
        n_found += sum(_is_found(event) for event in events)
        made += [event.partition or "" for event in events if not _is_found(event)]
        failed_checks += [f"{check.check_name}: {check.description}" for check in result.get_asset_check_evaluations() if not check.passed]
    failed_checks = list(dict.fromkeys(failed_checks))  # each answers for every partition
    n_made = len(missing) - len(failed) - len(stopped) - n_found
    message = str(errors[0]) if errors else ""
    report = AssetReport(asset.name, len(keys), n_made, n_bytes, time.monotonic() - started, failed_checks, n_found, failed)
    report = report._replace(stopped=stopped, message=message, made=made)
    return Outcome(report, errors)


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep what SIGTERM does: after a run Dagster gives it SIGINT's handler, and a shell's background jobs, which ignore that, could not be ended."""
    is_ours = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if is_ours and handler is not None:
            signal.signal(signal.SIGTERM, handler)


def _whole(outcome: Outcome) -> AssetReport:
    """Return what was done. Raises the first error."""
    if outcome.errors:
        raise outcome.errors[0]
    return outcome.report


def count_partitions(road: Road, asset: Asset, where: tuple[Pipeline, Store], missing: Sequence[str], report: AssetReport) -> AssetReport:
    """Count as `interp plan` does: partitions that hold nothing, as a held-out shard's share of the shuffle, are none."""
    empty = set(asset.partition_keys(where[0])) - find_holding(road, asset, *where)
    return report._replace(n_partitions=report.n_partitions - len(empty), n_made=report.n_made - len(empty & set(missing)))


def find_holding(road: Road, asset: Asset, pipeline: Pipeline, store: Store) -> set[str]:
    """Return the partitions of an asset that have artifacts, there or not."""
    return {key for key in asset.partition_keys(pipeline) if road.holds_anything(asset, pipeline, store, key)}


def _node_name(asset: Asset) -> str:
    return dg.AssetKey(list(asset.key)).to_python_identifier()


def _written_bytes(event: dg.AssetMaterialization) -> int:
    value = event.metadata.get("written_bytes")
    return int(value.value) if isinstance(value, dg.IntMetadataValue) and value.value else 0


def _is_found(event: dg.AssetMaterialization) -> bool:
    """Say whether all artifacts of a partition were there already; a partition without any is made."""
    value = event.metadata.get("reused")
    return isinstance(value, dg.BoolMetadataValue) and bool(value.value)
