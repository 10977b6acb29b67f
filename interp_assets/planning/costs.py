"""A plan becomes what each partition will read, write, ask, take and cost; beside it stands what it did, for Dagster's UI and `interp costs`.

The arithmetic of the shuffle and of the feature passes is that of `interp plan` (`shuffle/estimate.py`, `visualize/estimate.py`); the other
stages are bytes over bandwidth or operations over the rate of two cores. Rows are counted where token shards are there, else estimated
from the text. What was done is counted by the stores of this process (`traffic.py`) and by the clock: cluster tasks in other processes
are in the seconds and not in the requests.

An estimate is for deciding, before anything is bought, whether a pipeline takes minutes or weeks: within a factor of two for bytes, and as
good as the machine's two numbers (`Machine`) for seconds. Partitions of a few kilobytes are all manifests and start-up, which is not in it.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from interp_assets.corpus.refs import token_shard_ref
from interp_assets.errors import InterpError
from interp_assets.planning.config import PipelineConfig
from interp_assets.planning.pipeline import Pipeline, load_pipeline, open_pipeline_store, shard_index
from interp_assets.planning.progress import Estimator
from interp_assets.planning.rates import note_rate, rates_path
from interp_assets.planning.road import Stop, make_road
from interp_assets.shuffle.estimate import Prices
from interp_assets.shuffle.rows import RowFormat
from interp_assets.storage.manifest import find_manifest
from interp_assets.storage.store import Store
from interp_assets.storage.traffic import Traffic
from interp_assets.train.refs import sae_ref
from interp_assets.visualize.estimate import Machine, Workload, estimate

TEXT_BYTES_PER_TOKEN: Final = 4
TOKEN_BYTES: Final = 7.0
"""A token in `tokens.parquet`, with its place in the text."""
TEXT_BYTES_PER_S: Final = 1e6
"""Tokenized by two cores, files included."""
HARVEST_ROWS_PER_S: Final = 10_000
"""Rows of a small model on two cores; a plan does not know how large the model is."""
STATISTICS_BYTES_PER_DIMENSION: Final = 40
TRAIN_PRODUCTS: Final = 5
"""Matrix products of a training step (benchmarks/bench_train.py)."""
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


class _Work(NamedTuple):
    """What is known of a partition before its price: bytes from and to the store, objects opened, seconds of computing."""

    read_bytes: float = 0.0
    written_bytes: float = 0.0
    n_inputs: float = 1.0
    n_outputs: float = 1.0
    busy_s: float = 0.0


def estimate_cost(stop: Stop, pipeline: Pipeline, store: Store, key: str) -> Cost:
    """Return what making one partition is expected to take. Raises `PlanError` when the plan has no such number of rows."""
    prices, machine = Prices(), Machine(workers=1)
    work = _work(stop, pipeline, store, key, machine)
    gets = float(work.n_inputs) + work.read_bytes / prices.get_bytes
    puts = float(work.n_outputs) * 2 + work.written_bytes / prices.put_bytes
    move_s = (work.read_bytes + work.written_bytes) / (machine.read_gb_per_s * 1e9)
    seconds = float(max(work.busy_s, move_s))
    return Cost(work.read_bytes, work.written_bytes, round(gets + puts), seconds, _usd(pipeline.config, gets, puts, seconds))


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


def make_estimator(config: PipelineConfig) -> Estimator:
    """Return what tells, of each partition of a pipeline that has been made, what it took beside what it was expected to take."""
    road = {stop.key: stop for stop in make_road(config)}

    def compare(asset: Sequence[str], partition: str, traffic: Traffic, seconds: float, *, is_whole: bool) -> list[dict[str, Any]] | None:
        stop = road.get(tuple(asset))
        if stop is None or stop.name == "corpus_plan":
            return None
        store = open_pipeline_store(config)
        try:
            estimated = estimate_cost(stop, load_pipeline(config, store), store, partition)
            if is_whole:
                note_rate(rates_path(), rate_kind(stop, config, partition), estimated.seconds, seconds)
            return tabulate(estimated, measure_cost(config, traffic, seconds))
        except InterpError:
            return None  # the plan or the tokens went away meanwhile; the partition's own event matters more

    return compare


def rate_kind(stop: Stop, config: PipelineConfig, key: str) -> str:
    """Name a partition's kind of work, for what is known of this machine: the asset; the model where that decides how long a row takes.

    An SAE that is read from a folder is another kind than one that is trained.
    """
    if stop.name == "sae" and config.sae(key).imported:
        return "sae imported"
    return f"{stop.key[-1]} {config.model.name}" if stop.name in ("activations", "sae_evaluation") else stop.key[-1]


def add_up(tables: Iterable[Sequence[Mapping[str, Any]]]) -> tuple[Cost, Cost]:
    """Return the sums of the tables that partitions show."""
    estimated = actual = Cost(0, 0, 0, 0, 0)
    for table in tables:
        estimated = estimated.plus(Cost(*(float(row["estimated"]) for row in table)))
        actual = actual.plus(Cost(*(float(row["actual"]) for row in table)))
    return estimated, actual


def _work(stop: Stop, pipeline: Pipeline, store: Store, key: str, machine: Machine) -> _Work:
    config = pipeline.config
    if stop.stage == "visualize":
        return _feature_work(stop, pipeline, store, machine)
    if stop.axis == "shard" and stop.name != "shuffle_pass_1":
        n_rows = rows_of(pipeline, store, shard_index(key))
        if stop.name == "token_shards":
            n_bytes = pipeline.source(shard_index(key)).n_bytes
            return _Work(0, n_rows * TOKEN_BYTES, 2, 2, n_bytes / TEXT_BYTES_PER_S)
        row_bytes = sum(_format(pipeline, hook_point).row_bytes for hook_point in config.harvest.hook_points)
        return _Work(n_rows * TOKEN_BYTES, n_rows * row_bytes, 3, 2 * len(config.harvest.hook_points), n_rows / HARVEST_ROWS_PER_S)
    shuffled = sum(_format(pipeline, hook_point).record_bytes for hook_point in config.harvest.hook_points)
    n_train = len(pipeline.train_indices)
    if stop.name == "shuffle_pass_1":
        index = shard_index(key)
        n_bytes = rows_of(pipeline, store, index) * shuffled if index in pipeline.train_indices else 0
        return _Work(n_bytes, n_bytes, 3, 1 if n_bytes else 0)
    data_bytes = sum(rows_of(pipeline, store, index) for index in pipeline.train_indices) * shuffled
    if stop.axis == "bucket":
        n_bytes = data_bytes / stop.n_buckets
        return _Work(n_bytes, n_bytes, 2 * n_train, 1)
    if stop.name == "shuffle_certificate":
        return _Work(2 * data_bytes, 0, 2 * n_train, 1)
    if stop.axis == "experiment":
        return _sae_work(stop, pipeline, store, key, machine)
    if stop.stage == "web":
        n_bytes = pipeline.config.sae(stop.key[1]).d_sae * 8000.0
        return _Work(n_bytes, n_bytes, config.features.latent_slices * 2, 8)
    width = sum(pipeline.d_in(hook_point) for hook_point in config.harvest.hook_points) * STATISTICS_BYTES_PER_DIMENSION
    return _Work(n_train * width, width, 2 * n_train, 1) if stop.name == "activation_statistics" else _Work(0, 0, n_train, 1)


def _sae_work(stop: Stop, pipeline: Pipeline, store: Store, key: str, machine: Machine) -> _Work:
    sae = pipeline.config.sae(key)
    d_in, weights_bytes = pipeline.d_in(sae.hook_point), 8.0 * pipeline.d_in(sae.hook_point) * sae.d_sae
    if stop.name == "sae" and sae.imported:
        return _Work(weights_bytes, weights_bytes, 4, 4)
    if stop.name == "sae":
        record_bytes = _format(pipeline, sae.hook_point).record_bytes
        busy_s = TRAIN_PRODUCTS * 2.0 * sae.n_rows * d_in * sae.d_sae / machine.flops
        return _Work(sae.n_rows * record_bytes, weights_bytes, 4, 4, busy_s)
    n_rows = sum(rows_of(pipeline, store, index) for index in pipeline.held_out_indices)
    read_bytes = n_rows * (_format(pipeline, sae.hook_point).row_bytes + TOKEN_BYTES) + weights_bytes
    return _Work(read_bytes, 0, 4 * len(pipeline.held_out_indices), 2, 3 * n_rows / HARVEST_ROWS_PER_S)


def _feature_work(stop: Stop, pipeline: Pipeline, store: Store, machine: Machine) -> _Work:
    config, sae = pipeline.config, pipeline.config.sae(stop.key[1])
    n_shards, n_slices = len(pipeline.shard_indices), config.features.latent_slices
    work = Workload(
        n_rows=max(1, sum(rows_of(pipeline, store, index) for index in pipeline.shard_indices)),
        n_shards=n_shards,
        d_in=pipeline.d_in(sae.hook_point),
        d_sae=sae.d_sae,
        l0=expected_l0(pipeline, store, sae.name),
        row_bytes=_format(pipeline, sae.hook_point).row_bytes,
        vocabulary_size=pipeline.plan.vocabulary_size,
    )
    passes = {item.name.split()[-1]: item for item in estimate(work, config.features, n_slices, machine).passes}
    if stop.key[-1] not in passes:
        return _Work()
    cost = passes[stop.key[-1]]
    n_inputs = {"feature_candidates": 3, "feature_examples": n_shards, "example_activations": n_slices, "feature_records": n_shards}[stop.key[-1]]
    busy_s = cost.wall_s / cost.jobs - machine.job_s
    return _Work(cost.read_bytes / cost.jobs, cost.written_bytes / cost.jobs, 2 * n_inputs, 2, busy_s)


def rows_of(pipeline: Pipeline, store: Store, index: int) -> int:
    """Return the rows of a shard, counted where its tokens are there."""

    def count() -> int:
        manifest = find_manifest(store, token_shard_ref(pipeline, index))
        return int(manifest.facts["n_rows"]) if manifest else pipeline.source(index).n_bytes // TEXT_BYTES_PER_TOKEN

    return pipeline.remember(("rows", index), count)


def expected_l0(pipeline: Pipeline, store: Store, name: str) -> float:
    """Return how many latents of an SAE fire on a row: as its training measured it, and before that `k`, whatever the architecture makes of it."""
    manifest = find_manifest(store, sae_ref(pipeline, name))
    return float((manifest.facts.get("l0") if manifest else None) or pipeline.config.sae(name).k)


def _format(pipeline: Pipeline, hook_point: str) -> RowFormat:
    return RowFormat(pipeline.d_in(hook_point), pipeline.config.harvest.dtype)


def _usd(config: PipelineConfig, gets: float, puts: float, seconds: float) -> float:
    """Price requests where the store bills them, and hours where the configuration says what one costs."""
    prices = Prices()
    requests = gets * prices.get_usd + puts * prices.put_usd if config.root.startswith("s3://") else 0.0
    return requests + seconds / 3600 * config.execution.usd_per_hour


def _round(value: float) -> float:
    return float(f"{value:.4g}") if value < 1000 else float(round(value))
