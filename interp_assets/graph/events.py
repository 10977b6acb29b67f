"""A partition that was made becomes Dagster's event: its data version, its metadata, and what it took.

`record` is the same for one partition, a range of them and an asset without partitions:

1. The event of a partition is yielded as soon as the partition is finished, so a crash later in the range does not lose it.
2. Its data version is the digest of its artifacts. Dagster offers one version per output, not per partition, so the events are made
   here, with the same tags that Dagster would give them, and the output's own event is suppressed.
3. An `InterpError` becomes Dagster's `Failure` with the message alone. An error of one partition does not stop the others; an error of
   the configuration or the store would meet them all, so it does.
4. A partition that was stopped, as the configuration asked for, is observed instead, with the reason: nothing has failed.
5. A check answers for every partition, too, as an evaluation of its own.

Points 2 and 5 use four names that Dagster keeps private (its version is pinned); `tests/graph/test_runs.py` holds them.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import dagster as dg
from dagster._core.definitions.asset_checks.asset_check_evaluation import AssetCheckEvaluationTargetMaterializationData
from dagster._core.definitions.partitions.utils import get_tags_from_multi_partition_key
from dagster._core.definitions.source_asset import SYSTEM_METADATA_KEY_SOURCE_ASSET_OBSERVATION as SUPPRESS_EVENT
from dagster._core.errors import DagsterExecutionInterruptedError, raise_execution_interrupts
from dagster._core.execution.plan.execute_step import _build_data_version_tags, _get_code_version, _get_input_provenance_data

from interp_assets.compute.compiled import n_compilations
from interp_assets.errors import ConfigError, InterpError, StoppedError, StoreError
from interp_assets.planning.asset import Check, Markdown, Shown, Table, Verdict
from interp_assets.planning.progress import Progress, format_bytes, format_count
from interp_assets.storage.manifest import Produced, data_version
from interp_assets.storage.traffic import METER, Traffic

_MAX_FACTS_BYTES: Final = 4096
STOPPED: Final = "stopped"
"""Metadata of an observation: why a partition ended without artifacts, as the configuration asked for."""


class Shared(NamedTuple):
    """What was done for all partitions of a run at once, before each is recorded."""

    traffic: Traffic
    seconds: float
    is_rated: bool = True
    """Whether its time tells how fast such work is: not where a loop was compiled."""
    shares: Mapping[str, float] = {}
    """Of each partition, in the seconds."""


class Made(NamedTuple):
    """One finished partition, as Dagster shall show it."""

    data_version: str
    metadata: dict[str, Any]
    is_whole: bool = True
    """Whether all of its work was done just now; that of a training that went on from a checkpoint was not."""
    holds_anything: bool = True
    """Whether it has artifacts."""
    took: Shared | None = None
    """What it took where it was made elsewhere; None: what this process saw."""


def record(
    context: dg.AssetExecutionContext, work: Callable[[str], Made], progress: Progress, shared: Shared | None = None
) -> Iterator[dg.AssetMaterialization | dg.AssetObservation | dg.MaterializeResult]:
    """Run `work(partition key)` for every partition of this run, and yield its event (`""` is the key without partitions).

    `shared` is divided among the partitions when their costs are shown, its time as they were forecast: small ones beside a large one took
    little. Raises `dagster.Failure` at the end when partitions failed, with their messages; the others are recorded.
    """
    tags = _provenance_tags(context)
    failed: dict[str, InterpError] = {}
    keys = partition_keys(context)
    for key in keys:
        progress.begin("/".join(context.asset_key.path), key)
        before, begun, n_compiled = METER.total(), time.monotonic(), n_compilations()
        try:
            with interruptible(progress):
                made = work(key)
        except StoppedError as error:
            progress.leave()
            progress.tell(str(error))
            yield dg.AssetObservation(context.asset_key, partition=key or None, metadata={STOPPED: str(error)})
            continue
        except InterpError as error:
            progress.end()
            failed[key] = error
            if isinstance(error, ConfigError | StoreError):
                break
            context.log.error("%s: %s", key or context.asset_key.to_user_string(), error)  # noqa: TRY400 - the message says it all
            continue
        (progress.end if made.holds_anything else progress.leave)()
        took = made.took or _add_share(Shared(METER.total().since(before), time.monotonic() - begun), shared, key)
        is_rated = made.is_whole and took.is_rated and n_compilations() == n_compiled and (shared is None or shared.is_rated)
        is_new = not made.metadata.get("reused", True)
        table = progress.cost(context.asset_key.path, key, took.traffic, took.seconds, is_whole=is_rated) if is_new else None
        yield _event(context, key, _with_cost(made, table), tags)
    if failed:
        raise _failure(failed, len(keys)) from next(iter(failed.values()))
    yield dg.MaterializeResult(metadata={SUPPRESS_EVENT: True})


def record_verdicts(
    context: dg.AssetCheckExecutionContext, check: Check, verdicts: Mapping[str, Verdict]
) -> Iterator[dg.AssetCheckEvaluation | dg.Output[None]]:
    """Yield the evaluation of a check for every partition of this run.

    Dagster plans one for each partition, and would show those as skipped that a single result for the whole run leaves without an answer.
    """
    asset_key = context.check_specs[0].asset_key
    for key, verdict in verdicts.items():
        yield dg.AssetCheckEvaluation(
            asset_key=asset_key,
            check_name=check.name,
            passed=verdict.passed,
            description=" ".join(verdict.wrong) or None,
            metadata={name: as_metadata(value) for name, value in verdict.shown.items()},
            target_materialization_data=_target(context.instance, asset_key, key),
            severity=dg.AssetCheckSeverity.WARN if verdict.is_warning else dg.AssetCheckSeverity.ERROR,
            blocking=check.blocks,
            partition=key or None,
        )
    yield dg.Output(None)


def _target(instance: dg.DagsterInstance, asset_key: dg.AssetKey, key: str) -> AssetCheckEvaluationTargetMaterializationData | None:
    """Name the materialization that a check has looked at: the newest of its partition."""
    wanted = dg.AssetRecordsFilter(asset_key, asset_partitions=[key] if key else None)
    newest = next(iter(instance.fetch_materializations(wanted, limit=1).records), None)
    if newest is None:
        return None
    return AssetCheckEvaluationTargetMaterializationData(storage_id=newest.storage_id, run_id=newest.run_id, timestamp=newest.timestamp)


@contextmanager
def interruptible(progress: Progress) -> Iterator[None]:
    """Let Ctrl-C end what an asset does here: Dagster defers it between the events of a step, which may be hours apart, and forgets it then."""
    try:
        with raise_execution_interrupts():
            yield
    except (DagsterExecutionInterruptedError, KeyboardInterrupt) as error:  # a retry policy would take it for a failure and begin again
        progress.end()
        raise dg.Failure("Interrupted. Finished partitions are kept.", allow_retries=False) from error


def _add_share(own: Shared, shared: Shared | None, key: str) -> Shared:
    """Add a partition's part of what was done for all: of bytes and requests an equal one, for the rows were read once."""
    if shared is None:
        return own
    traffic = Traffic(*(mine + all_of_it // len(shared.shares) for mine, all_of_it in zip(own.traffic, shared.traffic, strict=True)))
    return Shared(traffic, own.seconds + shared.seconds * shared.shares[key])


def partition_keys(context: dg.AssetExecutionContext | dg.AssetCheckExecutionContext) -> list[str]:
    """List the partitions of this run; `[""]` without partitions."""
    op_context = context.op_execution_context
    return list(op_context.partition_keys) if op_context.has_partition_key or op_context.has_partition_key_range else [""]


def describe(produced: Sequence[Produced], url: str, shown: Mapping[str, Shown]) -> Made:
    """Describe the artifacts of one partition: rows, bytes, seconds, rows per second, where, digest, whether they were there before, and more."""
    extra = {name: as_metadata(value) for name, value in shown.items()}
    if not produced:
        return Made(data_version([]), _with_sizes(extra), holds_anything=False)
    n_bytes = sum(item.manifest.n_bytes for item in produced)
    n_rows = sum(n_rows_of(item) for item in produced)
    wall_s = sum(item.wall_s for item in produced)
    is_cached = all(item.is_cached for item in produced)
    version = data_version([item.manifest for item in produced])
    metadata: dict[str, Any] = {"rows": n_rows, "bytes": n_bytes, "seconds": round(wall_s, 3)}
    if wall_s and not is_cached:
        metadata["rows_per_s"] = round(n_rows / wall_s, 1)
    metadata |= {"digest": version, "reused": is_cached, "written_bytes": sum(item.manifest.n_bytes for item in produced if not item.is_cached)}
    metadata |= _where(produced, url, extra) | extra
    return Made(version, _with_sizes(metadata), is_whole=all(item.is_whole for item in produced))


def as_metadata(value: Shown) -> Any:
    """Return plain data as what Dagster's UI shows: finite numbers are drawn over partitions and time there, others would break its answer."""
    if isinstance(value, Markdown):
        return dg.MetadataValue.md(str(value))
    if isinstance(value, Table):
        return dg.MetadataValue.table([dg.TableRecord(row) for row in value])
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)  # the artifact has all digits
    return value if isinstance(value, bool | int | float | str) else dg.MetadataValue.json(value)


def n_rows_of(produced: Produced) -> int:
    """Return the rows of an artifact: what its facts say, else what its files say."""
    facts = produced.manifest.facts
    return int(facts["n_rows"]) if "n_rows" in facts else max((entry.n_rows or 0 for entry in produced.manifest.files), default=0)


def _where(produced: Sequence[Produced], url: str, named: Mapping[str, Any]) -> dict[str, Any]:
    """Say where the artifacts lie and what is known of them: directly for one, its numbers one by one; as a table for several.

    `named` are the numbers that the asset names itself, `mean_norm.resid_post.2` for the fact `mean_norm`: they are not said twice.
    """
    if len(produced) == 1:
        facts = {key: value for key, value in produced[0].manifest.facts.items() if isinstance(value, int | float | str | bool) and key != "n_rows"}
        numbers = {key: as_metadata(value) for key, value in facts.items() if not isinstance(value, str | bool)}
        others = {key: value for key, value in facts.items() if key not in numbers}
        shown = {"facts": dg.MetadataValue.json(others)} if others and len(json.dumps(others)) <= _MAX_FACTS_BYTES else {}
        new = {key: value for key, value in numbers.items() if not any(name.partition(".")[0] == key for name in named)}
        return {"artifact": dg.MetadataValue.path(f"{url}/{produced[0].ref.path}"), **new, **shown}
    rows = [
        {
            "artifact": item.ref.path,
            "rows": n_rows_of(item),
            "size": format_bytes(item.manifest.n_bytes),
            "digest": item.manifest.digest,
            "reused": item.is_cached,
        }
        for item in produced
    ]
    return {"artifacts": dg.MetadataValue.table([dg.TableRecord(row) for row in rows]), "root": dg.MetadataValue.path(url)}


def _with_sizes(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Write every count of bytes with a unit beside it: the number is for plots, the text for people."""
    beside: dict[str, Any] = {}
    for key, value in metadata.items():
        beside[key] = value
        if key.endswith("bytes") and isinstance(value, int):
            beside[key.replace("bytes", "size")] = format_bytes(value)
    return beside


def _with_cost(made: Made, table: list[dict[str, Any]] | None) -> Made:
    """Add what a partition that was made took, beside what it was expected to; in dollars where the configuration says what an hour costs."""
    if table is None:
        return made
    usd = {row["what"]: row["actual"] for row in table}["USD"]
    more: dict[str, Any] = {"usd": usd} if usd else {}
    rows = [dg.TableRecord({**row, "in short": f"{_shorten(row, 'estimated')} expected, {_shorten(row, 'actual')} taken"}) for row in table]
    return made._replace(metadata={**made.metadata, **more, "cost": dg.MetadataValue.table(rows)})


def _shorten(row: Mapping[str, Any], column: str) -> str:
    """Write one number of a table of costs for people."""
    is_size = str(row["what"]).startswith("bytes")
    return format_bytes(int(row[column])) if is_size else f"{row[column]:,.4g}"


def _event(context: dg.AssetExecutionContext, key: str, made: Made, tags: Mapping[str, str]) -> dg.AssetMaterialization:
    own = {**tags, "dagster/data_version": made.data_version}
    if isinstance(key, dg.MultiPartitionKey):
        own |= get_tags_from_multi_partition_key(key)
    return dg.AssetMaterialization(asset_key=context.asset_key, partition=key or None, metadata=made.metadata, tags=own)


def _provenance_tags(context: dg.AssetExecutionContext) -> dict[str, str]:
    """Return the tags by which Dagster tells whether a partition is stale: code version, and the versions of the inputs at this moment."""
    step = context.get_step_execution_context()
    inputs = _get_input_provenance_data(context.asset_key, step)
    return _build_data_version_tags(dg.DataVersion(""), _get_code_version(context.asset_key, step), inputs, data_version_is_user_provided=True)


def _failure(failed: Mapping[str, InterpError], n_keys: int) -> dg.Failure:
    """Make one failure of all errors: the message of the first, and how many there are."""
    first = str(next(iter(failed.values())))
    if n_keys == 1:
        text = first
    else:
        names = ", ".join(list(failed)[:8]) + (", ..." if len(failed) > 8 else "")
        text = f"{len(failed)} of {format_count(n_keys, 'partition')} failed ({names}); the finished ones are kept. The first one: {first}"
    messages = {key or "all": str(error) for key, error in failed.items()}
    is_transient = all(isinstance(error, StoreError) for error in failed.values())
    return dg.Failure(text, metadata={"failed": dg.MetadataValue.json(messages)}, allow_retries=is_transient)
