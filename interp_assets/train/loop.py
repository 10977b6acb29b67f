"""Mixed shards become trained SAEs: one pass over the data feeds all SAEs that share hook points and a batch size.

1. Skip what is published; resume what has a checkpoint; draw initial weights for the rest.
2. Read each batch once, normalise it once, and advance every SAE by it. An SAE that is ahead (its checkpoint is newer) waits.
3. Fold each finished SAE, calibrate it on the rows that follow its training rows, measure it, publish it, drop its checkpoints.

An SAE's weights depend on its own configuration and the data only, not on the company it is trained in, and are the same bit for bit
whether or not the training was killed and resumed. Times never enter the artifact: rates go to `on_metrics`.
"""

import io
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Final, NamedTuple

import polars as pl
import torch
from torch import Tensor

from interp_assets.config import SaeConfig
from interp_assets.errors import InputError, NonFiniteError, PlanError
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
from interp_assets.train.fold import fold_weights
from interp_assets.train.parallel import ONE_RANK, Ranks
from interp_assets.train.recipes import RECIPES, Normalization, make_normalization, make_weights
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
    """What the SAEs of one group share: rows of the hook points that are encoded, and of those that are reconstructed."""

    shards: dict[str, list[MixedShard]]
    """By hook point."""
    order: RowOrder
    batch_rows: int
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    source: Normalization
    target: Normalization
    widths: tuple[int, ...]
    """Of the hook points that are reconstructed."""
    device: torch.device

    @property
    def where(self) -> str:
        """The first hook point, for messages."""
        return self.sources[0]


class _Rows(NamedTuple):
    """One batch of raw rows: what is encoded and what is reconstructed."""

    step: int
    x: Tensor
    y: Tensor


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
    and rows when a loss is not finite, `PlanError` when memory runs out.
    """
    produced: dict[str, Produced] = {}
    groups: dict[tuple[tuple[str, ...], tuple[str, ...], int], list[SaeConfig]] = {}
    for config in (pipeline.config.sae(name) for name in names):
        ref = sae_ref(pipeline, config.name)
        manifest = find_manifest(store, ref)
        if manifest is None:
            groups.setdefault((config.sources, config.targets, config.batch_rows), []).append(config)
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
    data, ranks = _open_data(pipeline, store, configs[0]), execution.ranks
    share = ranks.share(data.batch_rows)
    members = [_open_member(pipeline, store, config, data, ranks) for config in configs]
    for member in members:
        _advance(progress, member.trainer.step * data.batch_rows)
    first, last = min(member.trainer.step for member in members), max(member.trainer.n_steps for member in members)
    is_same = data.sources == data.targets
    for rows in _iter_rows(store, data, range(first, last)):
        x = data.source.apply(rows.x[share].to(data.device))
        y = x if is_same else data.target.apply(rows.y[share].to(data.device))
        for ref, trainer in members:
            if not trainer.step == rows.step < trainer.n_steps:
                continue
            row = _train_step(trainer, x, y, data)
            _advance(progress, data.batch_rows)
            if row is not None and on_metrics is not None:
                rows_per_s = (rows.step + 1 - first) * data.batch_rows / (time.perf_counter() - started_s)
                on_metrics(TrainingMetrics(trainer.config.name, row, trainer.n_steps, rows_per_s))
            if trainer.step % execution.checkpoint_steps == 0 and trainer.step < trainer.n_steps:
                save_checkpoint(store, ref, trainer)
    for ref, trainer in members:
        _publish(pipeline, store, ref, trainer, data)
    ranks.barrier()
    wall_s = time.perf_counter() - started_s
    return {trainer.config.name: Produced(ref, load_manifest(store, ref), is_cached=False, wall_s=wall_s) for ref, trainer in members}


def _train_step(trainer: Trainer, x: Tensor, y: Tensor, data: _Data) -> LogRow | None:
    """Advance one SAE. Raises `NonFiniteError` that names the rows, `PlanError` that names what to lower when memory runs out."""
    try:
        return trainer.train_step(x, y)
    except NonFiniteError as error:
        where = describe_batch(data.shards[data.where], data.order, data.batch_rows, trainer.step)
        raise NonFiniteError(f"{error}, on {where}. Lower learning_rate or sparsity_coefficient, or look at these rows.") from error
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        raise_if_out_of_memory(error, trainer.config, data.device)
        raise


def raise_if_out_of_memory(error: Exception, config: SaeConfig, device: torch.device) -> None:
    """Raise `PlanError` with the knobs when an error says that memory ran out; torch's CPU allocator says so in words only."""
    if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "not enough memory" not in str(error) and "can't allocate" not in str(error):
        return
    raise PlanError(
        f"Memory of {device} ran out while SAE {config.name!r} was trained (d_sae {config.d_sae:,}, batch_rows {config.batch_rows:,}). Lower "
        "batch_rows first (activations), or d_sae (weights, moments and gradients: 8 x d_sae x width x 4 bytes); train fewer SAEs in one "
        "run; or divide the latents over more processes with execution.latent_processes. The last checkpoint is kept."
    ) from error


def _iter_rows(store: Store, data: _Data, steps: range) -> Iterator[_Rows]:
    """Yield aligned batches of all hook points, side by side: the shuffle gave them one order, and batches don't depend on width."""
    names = list(data.shards)
    readers = [iter_batches(store, data.shards[name], data.order, data.batch_rows, steps) for name in names]
    with ExitStack() as stack:
        for reader in readers:
            stack.enter_context(closing(reader))
        for batches in zip(*readers, strict=True):
            rows = {name: batch.rows for name, batch in zip(names, batches, strict=True)}
            x = _side_by_side([rows[name] for name in data.sources])
            y = x if data.sources == data.targets else _side_by_side([rows[name] for name in data.targets])
            yield _Rows(batches[0].step, x, y)


def _side_by_side(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _open_data(pipeline: Pipeline, store: Store, config: SaeConfig) -> _Data:
    hook_points = list(dict.fromkeys((*config.sources, *config.targets)))
    shards = {name: open_mixed(pipeline, store, name) for name in hook_points}
    orders = [make_row_order(shards[name], pipeline.config.seed, pipeline.d_in(name), name) for name in hook_points]
    assert all(order == orders[0] for order in orders), "hook points of one shuffle have the same rows in the same shards"
    if orders[0].n_rows < config.batch_rows:
        raise InputError(
            f"The mixed shards of {config.hook_point} hold {orders[0].n_rows:,} rows, less than one batch of SAE {config.name!r} "
            f"(batch_rows = {config.batch_rows:,}): a batch would hold rows twice. Lower batch_rows, or give `corpus` more text."
        )
    statistics = {name: load_statistics(pipeline, store, name) for name in hook_points}
    return _Data(
        shards=shards,
        order=orders[0],
        batch_rows=config.batch_rows,
        sources=config.sources,
        targets=config.targets,
        source=make_normalization([statistics[name] for name in config.sources]),
        target=make_normalization([statistics[name] for name in config.targets]),
        widths=tuple(pipeline.d_in(name) for name in config.targets),
        device=choose_device(pipeline.config.execution.device),
    )


def _open_member(pipeline: Pipeline, store: Store, config: SaeConfig, data: _Data, ranks: Ranks) -> _Member:
    ref = sae_ref(pipeline, config.name)
    (sample,) = _iter_rows(store, data, range(1))
    generator = torch.Generator().manual_seed(stream(pipeline.config.seed, "train", "weights", config.seed).torch_seed())
    weights = make_weights(config, data.source.apply(sample.x), sum(data.widths), generator)
    if has_grown(pipeline):
        weights = unfold_weights(config, load_sae(before(pipeline), store, config.name), data.source, data.target)
    trainer = Trainer(config, weights, data.device, ranks, data.widths)
    checkpoint = load_checkpoint(store, ref)
    if checkpoint is not None:
        trainer.restore(checkpoint.tensors, checkpoint.step, checkpoint.log)
    return _Member(ref, trainer)


def _publish(pipeline: Pipeline, store: Store, ref: ArtifactRef, trainer: Trainer, data: _Data) -> None:
    config, weights = trainer.config, trainer.whole_weights()
    if trainer.ranks.rank != 0:
        return
    n_blocks = max(1, min(CALIBRATION_ROWS, data.order.n_rows) // data.batch_rows)
    steps = range(trainer.n_steps, trainer.n_steps + n_blocks)
    blocks = [rows._replace(x=rows.x.to(data.device), y=rows.y.to(data.device)) for rows in _iter_rows(store, data, steps)]
    x, y = [block.x for block in blocks], [block.y for block in blocks]
    sae = fold_weights(config, weights, data.source, data.target, data.widths).to(data.device)
    if RECIPES[config.architecture].is_calibrated:
        sae = calibrate_threshold(sae, x, config.k)
    measures = measure_sae(sae, x, y)
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
            "task": config.task,
            "d_in": sae.d_in,
            "d_out": sae.d_out,
            "d_sae": sae.d_sae,
            "n_steps": trainer.n_steps,
            "n_rows": trainer.n_steps * config.batch_rows,
            "loss": trainer.log[-1].loss,
            "l0": measures.l0,
            "fvu": measures.fvu,
            "dead_share": measures.dead_share,
            "threshold": float(sae.threshold[0]) if RECIPES[config.architecture].is_calibrated else None,
            "normalization_scale": float(data.source.scale[0]),
        }
    remove_checkpoints(store, ref)


def _advance(progress: Callable[[int], None] | None, n: int) -> None:
    if progress is not None and n:
        progress(n)
