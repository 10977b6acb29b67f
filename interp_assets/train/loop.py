"""Mixed shards become trained SAEs: one pass over the data feeds all SAEs that share a hook point and a batch size.

1. Skip what is published; resume what has a checkpoint; draw initial weights for the rest.
2. Read each batch once, normalise it once, and advance every SAE by it. An SAE that is ahead (its checkpoint is newer) waits.
3. Fold each finished SAE, calibrate it on the rows that follow its training rows, measure it, publish it, drop its checkpoints.

An SAE's weights depend on its own configuration and the data only, not on the company it is trained in, and are the same bit for bit
whether or not the training was killed and resumed. Times never enter the artifact: rates go to `on_metrics`.
"""

import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import polars as pl
import torch

from interp_assets.config import SaeConfig
from interp_assets.errors import NonFiniteError
from interp_assets.garcon.device import choose_device
from interp_assets.harvest.statistics import load_statistics
from interp_assets.manifest import ArtifactRef, Produced, create_artifact, find_manifest, load_manifest
from interp_assets.pipeline import Pipeline
from interp_assets.seeds import stream
from interp_assets.shuffle.generations import before, has_grown
from interp_assets.shuffle.mixed import MixedShard, open_mixed
from interp_assets.store import Store
from interp_assets.tensors import save_tensors
from interp_assets.train.batches import RowOrder, describe_batch, iter_batches, make_row_order
from interp_assets.train.calibrate import CALIBRATION_ROWS, calibrate_threshold, measure_sae
from interp_assets.train.checkpoint import load_sae, save_sae
from interp_assets.train.parallel import ONE_RANK, Ranks
from interp_assets.train.recipes import RECIPES, Normalization, fold_weights, make_normalization, make_weights
from interp_assets.train.refs import sae_ref
from interp_assets.train.resume import load_checkpoint, remove_checkpoints, save_checkpoint
from interp_assets.train.trainer import LogRow, Trainer, n_steps
from interp_assets.train.warm import unfold_weights

TRAINING: Final = "training.parquet"
FREQUENCY: Final = "firing_frequency.safetensors"


class TrainingMetrics(NamedTuple):
    """What `on_metrics` hears of a logged step: the logged row, and how fast training runs (which is in no artifact)."""

    name: str
    row: LogRow
    n_steps: int
    rows_per_s: float
    """Rows per second of this SAE's group since it started."""


OnMetrics = Callable[[TrainingMetrics], None]


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a training runs; never part of an id."""

    ranks: Ranks = ONE_RANK
    """The ranks that train together."""
    checkpoint_steps: int = 500
    """Steps between two checkpoints."""


@dataclass(frozen=True)
class _Data:
    """What the SAEs of one group share."""

    shards: list[MixedShard]
    order: RowOrder
    batch_rows: int
    normalization: Normalization
    device: torch.device


class _Member(NamedTuple):
    ref: ArtifactRef
    trainer: Trainer


def train_saes(
    pipeline: Pipeline,
    store: Store,
    names: Sequence[str],
    progress: Callable[[int], None] | None = None,
    on_metrics: OnMetrics | None = None,
    execution: Execution = Execution(),
) -> dict[str, Produced]:
    """Train the named SAEs; those that share hook point and batch size share one read of the data.

    `progress` advances by the rows that each SAE has trained on: `training_rows` is the total. Raises `NonFiniteError` that names step
    and rows when a loss is not finite.
    """
    produced: dict[str, Produced] = {}
    groups: dict[tuple[str, int], list[SaeConfig]] = {}
    for config in (pipeline.config.sae(name) for name in names):
        ref = sae_ref(pipeline, config.name)
        manifest = find_manifest(store, ref)
        if manifest is None:
            groups.setdefault((config.hook_point, config.batch_rows), []).append(config)
        else:
            produced[config.name] = Produced(ref, manifest, is_cached=True, wall_s=0.0)
            _advance(progress, n_steps(config) * config.batch_rows)
    execution.ranks.barrier()
    for configs in groups.values():
        produced |= _train_group(pipeline, store, configs, progress, on_metrics, execution)
    return {name: produced[name] for name in names}


def training_rows(pipeline: Pipeline, names: Sequence[str]) -> int:
    """Return how far `progress` will advance in all."""
    configs = [pipeline.config.sae(name) for name in names]
    return sum(n_steps(config) * config.batch_rows for config in configs)


def _train_group(
    pipeline: Pipeline,
    store: Store,
    configs: list[SaeConfig],
    progress: Callable[[int], None] | None,
    on_metrics: OnMetrics | None,
    execution: Execution,
) -> dict[str, Produced]:
    started_s = time.perf_counter()
    data = _open_data(pipeline, store, configs[0])
    share = execution.ranks.share(data.batch_rows)
    members = [_open_member(pipeline, store, config, data) for config in configs]
    for member in members:
        _advance(progress, member.trainer.step * data.batch_rows)
    first, last = min(member.trainer.step for member in members), max(member.trainer.n_steps for member in members)
    for batch in iter_batches(store, data.shards, data.order, data.batch_rows, range(first, last)):
        z = data.normalization.apply(batch.rows[share].to(data.device))
        for ref, trainer in members:
            if not trainer.step == batch.step < trainer.n_steps:
                continue
            try:
                row = trainer.train_step(z, execution.ranks)
            except NonFiniteError as error:
                where = describe_batch(data.shards, data.order, data.batch_rows, batch.step)
                raise NonFiniteError(f"{error}, on {where}. Lower learning_rate or sparsity_coefficient, or look at these rows.") from error
            _advance(progress, data.batch_rows)
            if row is not None and on_metrics is not None:
                rows_per_s = (batch.step + 1 - first) * data.batch_rows / (time.perf_counter() - started_s)
                on_metrics(TrainingMetrics(trainer.config.name, row, trainer.n_steps, rows_per_s))
            if execution.ranks.rank == 0 and trainer.step % execution.checkpoint_steps == 0 and trainer.step < trainer.n_steps:
                save_checkpoint(store, ref, trainer)
    if execution.ranks.rank == 0:
        for ref, trainer in members:
            _publish(pipeline, store, ref, trainer, data)
    execution.ranks.barrier()
    wall_s = time.perf_counter() - started_s
    return {trainer.config.name: Produced(ref, load_manifest(store, ref), is_cached=False, wall_s=wall_s) for ref, trainer in members}


def _open_data(pipeline: Pipeline, store: Store, config: SaeConfig) -> _Data:
    shards = open_mixed(pipeline, store, config.hook_point)
    order = make_row_order(shards, pipeline.config.seed, pipeline.d_in(config.hook_point), config.hook_point)
    normalization = make_normalization(load_statistics(pipeline, store, config.hook_point))
    return _Data(shards, order, config.batch_rows, normalization, choose_device(pipeline.config.execution.device))


def _open_member(pipeline: Pipeline, store: Store, config: SaeConfig, data: _Data) -> _Member:
    ref = sae_ref(pipeline, config.name)
    (sample,) = iter_batches(store, data.shards, data.order, data.batch_rows, range(1))
    generator = torch.Generator().manual_seed(stream(pipeline.config.seed, "train", "weights", config.seed).torch_seed())
    weights = make_weights(config, data.normalization.apply(sample.rows), generator)
    if has_grown(pipeline):
        weights = unfold_weights(config, load_sae(before(pipeline), store, config.name), data.normalization)
    trainer = Trainer(config, weights, data.device)
    checkpoint = load_checkpoint(store, ref)
    if checkpoint is not None:
        trainer.restore(checkpoint.tensors, checkpoint.step, checkpoint.log)
    return _Member(ref, trainer)


def _publish(pipeline: Pipeline, store: Store, ref: ArtifactRef, trainer: Trainer, data: _Data) -> None:
    config = trainer.config
    n_blocks = max(1, min(CALIBRATION_ROWS, data.order.n_rows) // data.batch_rows)
    steps = range(trainer.n_steps, trainer.n_steps + n_blocks)
    blocks = [batch.rows.to(data.device) for batch in iter_batches(store, data.shards, data.order, data.batch_rows, steps)]
    sae = fold_weights(config, trainer.weights, data.normalization).to(data.device)
    if RECIPES[config.architecture].is_calibrated:
        sae = calibrate_threshold(sae, blocks, config.k)
    measures = measure_sae(sae, blocks)
    with create_artifact(store, ref) as art:
        save_sae(art, sae.to("cpu"), pipeline, config, l0=measures.l0)
        table = io.BytesIO()
        pl.DataFrame(trainer.log, schema=list(LogRow._fields), orient="row").write_parquet(table)
        art.put(TRAINING, table.getvalue(), n_rows=len(trainer.log))
        frequency = measures.n_fired.double() / measures.n_rows
        save_tensors(art, FREQUENCY, {"firing_frequency": frequency, "n_rows": torch.tensor([measures.n_rows])})
        art.facts |= {
            "architecture": config.architecture,
            "kind": sae.kind,
            "d_in": sae.d_in,
            "d_sae": sae.d_sae,
            "n_steps": trainer.n_steps,
            "n_rows": trainer.n_steps * config.batch_rows,
            "loss": trainer.log[-1].loss,
            "l0": measures.l0,
            "fvu": measures.fvu,
            "dead_share": measures.dead_share,
            "threshold": float(sae.threshold[0]) if RECIPES[config.architecture].is_calibrated else None,
            "normalization_scale": data.normalization.scale,
        }
    remove_checkpoints(store, ref)


def _advance(progress: Callable[[int], None] | None, n: int) -> None:
    if progress is not None and n:
        progress(n)
