"""What a pipeline still has to make becomes one line an asset: partitions, rows, bytes, memory and time, before anything runs.

Bytes and seconds of a partition are those of `costs.py`, which every partition later shows beside what it took. Seconds are multiplied by what
is known of this machine (`rates.py`), where such work was done here before. Harvesting is bound by the model's operations, too: two for
each parameter and row. Memory is what the largest job holds beside a process with its libraries (`PROCESS_BYTES`).

A partition counts as done when its artifacts are there; partitions without artifacts (a held-out shard has no share in the shuffle) do not
count at all. Files of middle passes are not needed any more once the rows are mixed, but are counted: they lie there until they are deleted.
"""

from typing import Final, NamedTuple

from interp_assets.garcon.subject import make_meta_model
from interp_assets.planning.config import PipelineConfig, SaeConfig
from interp_assets.planning.costs import Cost, estimate_cost, expected_l0, rate_kind, rows_of
from interp_assets.planning.pipeline import Pipeline, shard_index
from interp_assets.planning.rates import Rate
from interp_assets.planning.road import Stop, find_version, make_road
from interp_assets.shuffle.rows import SORT_BYTES, RowFormat
from interp_assets.storage.store import Store
from interp_assets.storage.tensors import ITEM_BYTES
from interp_assets.visualize.estimate import Machine, Workload, estimate

PROCESS_BYTES: Final = 700 << 20
"""A Python process with Dagster and PyTorch."""
START_S: Final = 0.3
"""What a partition takes besides, in one process: manifests, and Dagster's bookkeeping."""
JOB_START_S: Final = 5.0
"""The same for a job of its own: starting, imports, loading."""
_WIDTH_OF_FORWARD: Final = 30
"""Values of the model's width that a forward pass holds for each token."""
_WEIGHT_COPIES: Final = 5
"""Weights, gradients, Adam's two moments, and a copy for checkpoints; of an imported SAE its file, tensors, float64, and what is written."""


class Line(NamedTuple):
    """What one asset needs. Rows, bytes and seconds are those of the partitions that are not there yet."""

    name: str
    stage: str
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


def make_schedule(pipeline: Pipeline, store: Store, rates: dict[str, Rate], workers: int) -> list[Line]:
    """Return a line for every asset after the plan, in the order of the data."""
    n_parameters = sum(weight.numel() for weight in make_meta_model(pipeline.config.model).net.parameters())
    return [_line(stop, pipeline, store, rates, (workers, n_parameters)) for stop in make_road(pipeline.config)[1:]]


def count_rows(pipeline: Pipeline, store: Store, indices: list[int]) -> int:
    """Return the rows of some shards, counted where their tokens are there, else estimated from the text."""
    return sum(rows_of(pipeline, store, index) for index in indices)


def workload(pipeline: Pipeline, store: Store, name: str) -> Workload:
    """Return what the feature passes of one SAE are given."""
    sae, config = pipeline.config.sae(name), pipeline.config
    d_in = pipeline.d_in(sae.hook_point)
    return Workload(
        n_rows=max(1, count_rows(pipeline, store, pipeline.shard_indices)),
        n_shards=len(pipeline.shard_indices),
        d_in=d_in,
        d_sae=sae.d_sae,
        l0=expected_l0(pipeline, store, name),
        row_bytes=RowFormat(d_in, config.harvest.dtype).row_bytes,
        vocabulary_size=pipeline.plan.vocabulary_size,
    )


def _line(stop: Stop, pipeline: Pipeline, store: Store, rates: dict[str, Rate], machine: tuple[int, int]) -> Line:
    workers, n_parameters = machine
    keys = stop.partition_keys(pipeline)
    if stop.name == "shuffle_pass_1":
        keys = [key for key in keys if stop.refs(pipeline, store, key)]
    missing = [key for key in keys if find_version(stop, pipeline, store, key) is None]
    if stop.axis in ("shard", "experiment"):
        costs = [estimate_cost(stop, pipeline, store, key) for key in missing]
    else:  # alike
        costs = [estimate_cost(stop, pipeline, store, missing[0])] * len(missing) if missing else []
    known = [rates.get(rate_kind(stop, pipeline.config, key)) for key in missing]
    rate = max((item for item in known if item), key=lambda item: item.n_partitions, default=None)
    if rate is None:
        costs = _with_model(stop, pipeline, store, missing, costs, n_parameters)
    seconds = [cost.seconds * (item.factor if item else 1.0) for cost, item in zip(costs, known, strict=True)]
    start_s = START_S if workers == 1 else JOB_START_S
    total_s, longest_s = sum(seconds) + start_s * len(missing), max(seconds, default=0.0) + start_s
    return Line(
        name=stop.name,
        stage=stop.stage,
        n_missing=len(missing),
        n_partitions=len(keys),
        n_rows=_rows(stop, pipeline, store, missing),
        read_bytes=int(sum(cost.read_bytes for cost in costs)),
        written_bytes=int(sum(cost.written_bytes for cost in costs)),
        job_bytes=_job_bytes(stop, pipeline, store, missing, n_parameters) if missing else 0,
        wall_s=max(total_s / workers, longest_s) if missing else 0.0,
        rate=rate,
    )


def _with_model(stop: Stop, pipeline: Pipeline, store: Store, keys: list[str], costs: list[Cost], n_parameters: int) -> list[Cost]:
    """Let harvesting take at least the operations of its forward passes."""
    if stop.name != "activations":
        return costs
    forward_s = 2.0 * n_parameters / Machine().flops
    pairs = zip(keys, costs, strict=True)
    return [cost._replace(seconds=max(cost.seconds, forward_s * rows_of(pipeline, store, shard_index(key)))) for key, cost in pairs]


def _rows(stop: Stop, pipeline: Pipeline, store: Store, missing: list[str]) -> int:
    """Return the rows that go through the missing partitions of an asset; 0 where no row does."""
    if stop.axis == "shard":
        return count_rows(pipeline, store, [shard_index(key) for key in missing])
    if stop.name == "sae":
        return sum(0 if pipeline.config.sae(key).imported else pipeline.config.sae(key).n_rows for key in missing)
    if stop.axis == "bucket":
        return round(count_rows(pipeline, store, pipeline.train_indices) * len(missing) / stop.n_buckets)
    if stop.axis == "slice|shard":
        return count_rows(pipeline, store, [shard_index(key.rpartition("|")[2]) for key in missing])
    if stop.name == "sae_evaluation":
        return len(missing) * count_rows(pipeline, store, pipeline.held_out_indices)
    return count_rows(pipeline, store, pipeline.train_indices) if stop.name == "shuffle_certificate" and missing else 0


def _job_bytes(stop: Stop, pipeline: Pipeline, store: Store, missing: list[str], n_parameters: int) -> int:
    """Return what the largest job of an asset's missing partitions holds."""
    config: PipelineConfig = pipeline.config
    largest = max((rows_of(pipeline, store, index) for index in pipeline.shard_indices), default=0)
    formats = [RowFormat(width, config.harvest.dtype) for width in pipeline.plan.hook_widths.values()]
    record_bytes = max(item.record_bytes for item in formats) + SORT_BYTES
    if stop.name == "token_shards":
        return largest * 100
    if stop.name == "activations":
        tokens = min(config.execution.tokens_per_batch, largest) * max(pipeline.plan.hook_widths.values()) * 4 * _WIDTH_OF_FORWARD
        return n_parameters * ITEM_BYTES[config.model.dtype] + tokens
    if stop.name == "shuffle_pass_1":
        return largest * record_bytes
    if stop.axis == "bucket":
        return count_rows(pipeline, store, pipeline.train_indices) * record_bytes // stop.n_buckets
    if stop.stage == "train" and stop.axis == "experiment":
        model = n_parameters * ITEM_BYTES[config.model.dtype] if stop.name == "sae_evaluation" else 0
        return max(_sae_bytes(stop, pipeline, config.sae(name)) for name in missing) + model
    if stop.stage == "visualize":
        return estimate(workload(pipeline, store, stop.key[1]), config.features, config.features.latent_slices).job_bytes
    return 0


def _sae_bytes(stop: Stop, pipeline: Pipeline, sae: SaeConfig) -> int:
    """Return what an SAE's weights, with their copies, and a batch of rows, latents, reconstructions and errors take; reading one takes no batch."""
    d_in, d_out = (sum(pipeline.d_in(hook_point) for hook_point in names) for names in (sae.sources, sae.targets))
    skip = d_in * d_out if sae.task == "skip_transcoder" else 0
    weights = ((d_in + d_out) * sae.d_sae + skip) * 4
    batch = sae.batch_rows * (d_in + 3 * d_out + 2 * sae.d_sae) * 4
    if stop.name == "sae":
        return weights * _WEIGHT_COPIES + (0 if sae.imported else batch)
    return weights + batch
