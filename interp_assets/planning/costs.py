"""What a partition takes becomes what it costs: requests, seconds and dollars; beside it stands what it did, for Dagster's UI and `interp costs`.

Each record says what a partition reads, writes and computes (`Asset.takes`); this is bytes over bandwidth or operations over the rate of two
cores. Rows are counted where token shards are there, else estimated from the text. What was done is counted by the stores of this process
(`storage/traffic.py`) and by the clock: cluster tasks in other processes are in the seconds and not in the requests.

An estimate is for deciding, before anything is bought, whether a pipeline takes minutes or weeks: within a factor of two for bytes, and as
good as the machine's two numbers (`Machine`) for seconds. Partitions of a few kilobytes are all manifests and start-up, which is not in it.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from interp_assets.errors import InterpError
from interp_assets.planning.asset import Asset, Load
from interp_assets.planning.config import PipelineConfig
from interp_assets.planning.machine import ONE_WORKER, Prices
from interp_assets.planning.pipeline import load_pipeline, open_pipeline_store
from interp_assets.planning.progress import Compared, Estimator
from interp_assets.planning.rates import load_rates, note_rate, rates_path
from interp_assets.planning.road import Road
from interp_assets.storage.traffic import Traffic

UNITS: Final = ("bytes read", "bytes written", "requests", "seconds", "USD")


class Cost(NamedTuple):
    """What a partition takes."""

    read_bytes: float
    written_bytes: float
    requests: float
    seconds: float
    usd: float

    def plus(self, other: "Cost") -> "Cost":
        """Return both together."""
        return Cost(*(a + b for a, b in zip(self, other, strict=True)))


def price(config: PipelineConfig, load: Load) -> Cost:
    """Return what making a partition is expected to cost."""
    prices = Prices()
    gets = float(load.n_inputs) + load.read_bytes / prices.get_bytes
    puts = float(load.n_outputs) * 2 + load.written_bytes / prices.put_bytes
    move_s = (load.read_bytes + load.written_bytes) / (ONE_WORKER.read_gb_per_s * 1e9)
    seconds = float(max(load.busy_s, move_s))
    return Cost(load.read_bytes, load.written_bytes, round(gets + puts), seconds, _usd(config, gets, puts, seconds))


def measure_cost(config: PipelineConfig, traffic: Traffic, seconds: float) -> Cost:
    """Return what making a partition took."""
    gets, puts, read_bytes, written_bytes = map(float, traffic)
    return Cost(read_bytes, written_bytes, gets + puts, seconds, _usd(config, gets, puts, seconds))


def tabulate(estimated: Cost, actual: Cost) -> list[dict[str, Any]]:
    """Return both side by side, a row a unit."""
    return [
        {"what": name, "estimated": _round(float(before)), "actual": _round(float(after))}
        for name, before, after in zip(UNITS, estimated, actual, strict=True)
    ]


def make_estimator(config: PipelineConfig, road: Road) -> Estimator:
    """Return what tells, of each partition of a pipeline that has been made, what it took beside what it was expected to take."""
    return _Estimates(config, road)


class _Estimates:
    """What partitions should take: as records say, and as this machine took before the run."""

    def __init__(self, config: PipelineConfig, road: Road) -> None:
        self._config, self._road, self._rates = config, road, load_rates(rates_path())

    def foresee(self, asset: Sequence[str], partition: str) -> float | None:
        found = self._road.get(tuple(asset))
        estimated = self._price(found, partition)
        return self._correct(found, partition, estimated.seconds) if estimated else None

    def compare(self, asset: Sequence[str], partition: str, traffic: Traffic, seconds: float, *, is_whole: bool) -> Compared | None:
        found = self._road.get(tuple(asset))
        estimated = self._price(found, partition)
        if estimated is None:
            return None
        if is_whole:
            note_rate(rates_path(), found.kind_of_work(self._config, partition), estimated.seconds, seconds)
        return Compared(tabulate(estimated, measure_cost(self._config, traffic, seconds)), self._correct(found, partition, estimated.seconds))

    def _correct(self, asset: Asset, partition: str, seconds: float) -> float:
        rate = self._rates.get(asset.kind_of_work(self._config, partition))
        return rate.correct(seconds) if rate else seconds

    def _price(self, asset: Asset, partition: str) -> Cost | None:
        store = open_pipeline_store(self._config)
        try:
            return price(self._config, asset.takes(load_pipeline(self._config, store), store, partition))
        except InterpError:
            return None  # the plan or the tokens went away meanwhile; the partition's own event matters more


def add_up(tables: Iterable[Sequence[Mapping[str, Any]]]) -> tuple[Cost, Cost]:
    """Return the sums of the tables that partitions show."""
    estimated = actual = Cost(0, 0, 0, 0, 0)
    for table in tables:
        estimated = estimated.plus(Cost(*(float(row["estimated"]) for row in table)))
        actual = actual.plus(Cost(*(float(row["actual"]) for row in table)))
    return estimated, actual


def _usd(config: PipelineConfig, gets: float, puts: float, seconds: float) -> float:
    """Price requests where the store bills them, and hours where the configuration says what one costs."""
    prices = Prices()
    requests = gets * prices.get_usd + puts * prices.put_usd if config.root.startswith("s3://") else 0.0
    return requests + seconds / 3600 * config.execution.usd_per_hour


def _round(value: float) -> float:
    return float(f"{value:.4g}") if value < 1000 else float(round(value))
