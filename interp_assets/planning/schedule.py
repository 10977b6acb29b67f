"""What a pipeline still has to make becomes one line an asset: partitions, rows, bytes, memory and time, before anything runs.

What a partition takes is what its record says (`Asset.takes`), and what every partition later shows beside what it took. Seconds are
corrected by what is known of this machine (`rates.py`), where such work was done here before. Memory is what the largest job holds beside a
process with its libraries (`machine.PROCESS_BYTES`).

A partition counts as done when its artifacts are there and stay current: what will be made from other bytes, because something before it is
out of date, is counted too. Partitions without artifacts (a held-out shard has no share in the shuffle) do not
count at all. Files of middle passes are not needed any more once the rows are mixed, but are counted: they lie there until they are deleted.
"""

from typing import Final, NamedTuple

from interp_assets.planning.asset import Asset
from interp_assets.planning.costs import price
from interp_assets.planning.pipeline import Pipeline
from interp_assets.planning.rates import Rate
from interp_assets.planning.road import Road
from interp_assets.storage.lineage import Digests
from interp_assets.storage.listing import list_store
from interp_assets.storage.manifest import data_version
from interp_assets.storage.seen import open_seen
from interp_assets.storage.store import Store

START_S: Final = 0.3
"""What a partition takes besides, in one process: manifests, and Dagster's bookkeeping."""
JOB_START_S: Final = 5.0
"""The same for a job of its own: starting, imports, loading."""
_NOTHING: Final = data_version([])


class Line(NamedTuple):
    """What one asset needs. Rows, bytes and seconds are those of the partitions that are not there yet."""

    key: tuple[str, ...]
    n_missing: int
    n_partitions: int
    n_rows: int
    read_bytes: int
    written_bytes: int
    job_bytes: int
    """What the largest job holds, beside the process."""
    wall_s: float
    rate: Rate | None
    """What is known of this machine; None when only assumptions are."""

    @property
    def name(self) -> str:
        """The asset, as people write it."""
        return "/".join(self.key)


def make_schedule(road: Road, pipeline: Pipeline, store: Store, rates: dict[str, Rate], workers: int, known: Digests | None = None) -> list[Line]:
    """Return a line for every asset that has partitions, in the order of the data. The plan is made in every run. `known` is what was looked at."""
    first = Line(road.plan.key, 1, 1, 0, 0, 0, 0, START_S, None)
    with open_seen() as notes:
        known = known or Digests(list_store(store, notes))
        lines = [_line(road, asset, (pipeline, known.store, known), rates, workers) for asset in road.rest]
    return [first, *(line for line in lines if line.n_partitions)]


def _line(road: Road, asset: Asset, where: tuple[Pipeline, Store, Digests], rates: dict[str, Rate], workers: int) -> Line:
    pipeline, store, known = where
    versions = {key: road.find_version(asset, pipeline, store, key, known) for key in asset.partition_keys(pipeline)}
    missing = [key for key, version in versions.items() if version is None]
    loads = [asset.takes(pipeline, store, key) for key in missing]
    costs = [price(pipeline.config, load) for load in loads]
    known = [rates.get(asset.kind_of_work(pipeline.config, key)) for key in missing]
    seconds = [item.correct(cost.seconds) if item else cost.seconds for cost, item in zip(costs, known, strict=True)]
    start_s = START_S if workers == 1 else JOB_START_S
    total_s, longest_s = sum(seconds) + start_s * len(missing), max(seconds, default=0.0) + start_s
    return Line(
        key=asset.key,
        n_missing=len(missing),
        n_partitions=sum(version != _NOTHING for version in versions.values()),
        n_rows=round(sum(load.rows for load in loads)),
        read_bytes=int(sum(cost.read_bytes for cost in costs)),
        written_bytes=int(sum(cost.written_bytes for cost in costs)),
        job_bytes=int(max((load.memory_bytes for load in loads), default=0)),
        wall_s=max(total_s / workers, longest_s) if missing else 0.0,
        rate=max((item for item in known if item), key=lambda item: item.n_partitions, default=None),
    )
