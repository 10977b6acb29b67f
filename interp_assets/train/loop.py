"""Mixed shards become trained SAEs: one pass over the data feeds all SAEs that share hook points and a batch size.

1. Skip what is published; resume what has a checkpoint, from the same rows and statistics; draw initial weights for the rest.
2. Read each batch once, normalise it once, and advance every SAE by it. An SAE that is ahead (its checkpoint is newer) waits; one whose
   loss is not finite, or that memory does not hold, drops out and is told of, and the others go on.
3. Fold each finished SAE, calibrate it on the rows that follow its training rows, measure it, publish it, drop its checkpoints.

An SAE's weights depend on its own configuration and the data only, not on the company it is trained in, and are the same bit for bit
whether or not the training was killed and resumed, or another SAE dropped out. Times go to `on_metrics` and to files outside the digest.
"""

import io
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import groupby
from typing import NamedTuple

import polars as pl
import torch
from torch import Tensor
from torch.profiler import record_function

from interp_assets.compute.compiled import n_compilations
from interp_assets.compute.seeds import stream
from interp_assets.errors import ConfigError, InputError, InterpError, NonFiniteError, OwnCodeError, PlanError, StoppedError, StoreError
from interp_assets.planning.config import ExecutionConfig, SaeConfig
from interp_assets.planning.pipeline import Pipeline
from interp_assets.planning.progress import Advance, unheard
from interp_assets.planning.sections import StopConfig
from interp_assets.shuffle.generations import before, has_grown
from interp_assets.storage.lineage import Digests, create_current, find_current, trace
from interp_assets.storage.manifest import ArtifactRef, ArtifactWriter, Manifest, Produced, load_manifest
from interp_assets.storage.store import Store
from interp_assets.storage.tensors import save_tensors
from interp_assets.train.checkpoint import FREQUENCY, load_sae, save_sae
from interp_assets.train.fold import fold_weights, unfold_weights
from interp_assets.train.lineage import sae_lineage
from interp_assets.train.losses.calibrate import CALIBRATION_ROWS, SaeMeasures, calibrate_threshold, measure_sae
from interp_assets.train.losses.loss import Weights
from interp_assets.train.own.load import keep_code, open_recipe
from interp_assets.train.parallel import ONE_RANK, Ranks
from interp_assets.train.profile import CHECKPOINT, NORMALIZE, Profile, StepProfiler, save_profile
from interp_assets.train.recipes import make_weights
from interp_assets.train.refs import TRAINING, LogRow, sae_ref
from interp_assets.train.results.stopping import find_dominated, find_stopped
from interp_assets.train.resume import load_checkpoint, remove_checkpoints, save_checkpoint
from interp_assets.train.rows import TrainingData, TrainingRows, iter_rows, open_training_data
from interp_assets.train.sae import Sae
from interp_assets.train.times import TIMES, TrainingTimes, WaitClock, describe_times, forget_peaks
from interp_assets.train.trainer import Trainer, n_steps


class TrainingMetrics(NamedTuple):
    """What `on_metrics` hears of a logged step: the logged row, and how fast training runs (which is in no artifact)."""

    name: str
    row: LogRow
    n_steps: int
    rows_per_s: float | None
    """Rows per second of this SAE's group in its ordinary steps so far (`times.py`); None before the first of them."""
    input_wait_share: float | None
    """Share of their time in which the group waited for rows."""


OnMetrics = Callable[[TrainingMetrics], None]
OnFailure = Callable[[str, InterpError], object]
"""Hears of an SAE that dropped out, and why."""


class _Member(NamedTuple):
    ref: ArtifactRef
    trainer: Trainer
    times: TrainingTimes
    kept: dict[str, str]
    """Digests of what it is trained on, as facts."""


class _Group(NamedTuple):
    """SAEs that share one read of the data, and who hears how they do."""

    configs: list[SaeConfig]
    ranks: Ranks
    progress: Advance
    on_metrics: OnMetrics | None
    on_failure: OnFailure
    dropped: set[str]
    stop: StopConfig | None = None

    def drop(self, config: SaeConfig, step: int, error: InterpError) -> None:
        """Let an SAE go that was trained up to `step`. Raises what stops all others too, and what other ranks may not see."""
        if isinstance(error, ConfigError | StoreError) or (
            self.ranks.size > 1 and not isinstance(error, NonFiniteError | OwnCodeError | StoppedError)
        ):
            raise error
        self.dropped.add(config.name)
        self.progress((n_steps(config) - step) * config.batch_rows)
        self.on_failure(config.name, error)


def train_saes(
    pipeline: Pipeline,
    store: Store,
    names: Sequence[str],
    progress: Advance = unheard,
    on_metrics: OnMetrics | None = None,
    ranks: Ranks = ONE_RANK,
    on_failure: OnFailure | None = None,
) -> dict[str, Produced]:
    """Train the named SAEs with the `ranks` that call this; those that share hook point and batch size share one read of the data.

    `progress` advances by the rows that each SAE has trained on, or never will: `training_rows` is the total. `on_failure` hears of each SAE
    that cannot be trained, with the error: `NonFiniteError` that names step and rows when its loss is not finite, `PlanError` when memory
    runs out. Without it the first of them is raised, when all others are published.
    """
    produced: dict[str, Produced] = {}
    failures: dict[str, InterpError] = {}
    due: list[SaeConfig] = []
    for config in (pipeline.config.sae(name) for name in names):
        ref = sae_ref(pipeline, config.name)
        manifest = find_trained(pipeline, store, config.name)
        if manifest is None and pipeline.config.stop and (why := find_stopped(store, ref, config)):
            progress(n_steps(config) * config.batch_rows)
            (on_failure or failures.setdefault)(config.name, StoppedError(why))
        elif manifest is None:
            due.append(config)
        else:
            produced[config.name] = Produced(ref, manifest, is_cached=True, wall_s=0.0)
            progress(n_steps(config) * config.batch_rows)
    ranks.barrier()
    for configs in _group(due):
        group = _Group(configs, ranks, progress, on_metrics, on_failure or failures.setdefault, set(), pipeline.config.stop)
        produced |= _train_group(pipeline, store, group)
    if failures:
        raise next(iter(failures.values()))
    return {name: produced[name] for name in names if name in produced}


class Brief(NamedTuple):
    """A training of which nothing is kept."""

    log: list[LogRow]
    measures: SaeMeasures
    """On the rows that follow those it was trained on."""
    wall_s: float
    """Of its group."""


def train_briefly(pipeline: Pipeline, store: Store, names: Sequence[str], on_metrics: OnMetrics | None, on_failure: OnFailure) -> dict[str, Brief]:
    """Train the named SAEs as `train_saes` does, publish nothing, and return how they did. Those that cannot be trained are told of."""
    found: dict[str, Brief] = {}
    execution = pipeline.config.execution.model_copy(update={"checkpoint_steps": sys.maxsize, "profile_steps": 0})
    for configs in _group([pipeline.config.sae(name) for name in names]):
        group, started_s = _Group(configs, ONE_RANK, unheard, on_metrics, on_failure, set()), time.perf_counter()
        try:
            data = open_training_data(pipeline, store, configs[0])
        except InputError as error:
            for config in configs:
                group.drop(config, 0, error)
            continue
        members = list(_open_members(pipeline, store, group, data))
        if members:
            _run_steps(store, members, data, group, execution)
        for member, blocks in _with_fresh_rows(store, members, data):
            _, measures = _finish(member.trainer, member.trainer.whole_weights(), data, blocks)
            found[member.trainer.config.name] = Brief(member.trainer.log, measures, time.perf_counter() - started_s)
    return found


def _group(configs: Sequence[SaeConfig]) -> list[list[SaeConfig]]:
    """Put together what shares one read of the data."""
    groups: dict[tuple[tuple[str, ...], tuple[str, ...], int], list[SaeConfig]] = {}
    for config in configs:
        groups.setdefault((config.sources, config.targets, config.batch_rows), []).append(config)
    return list(groups.values())


def find_trained(pipeline: Pipeline, store: Store, name: str) -> Manifest | None:
    """Return the manifest of an SAE that was trained on the rows and statistics that are there now."""
    return find_current(store, sae_ref(pipeline, name), trace(Digests(store), [sae_lineage(pipeline, name)]))


def training_rows(pipeline: Pipeline, names: Sequence[str]) -> int:
    """Return how far `progress` will advance in all; imported SAEs take no rows."""
    configs = [pipeline.config.sae(name) for name in names]
    return sum(n_steps(config) * config.batch_rows for config in configs if not config.imported)


def _train_group(pipeline: Pipeline, store: Store, group: _Group) -> dict[str, Produced]:
    started_s = time.perf_counter()
    members: list[_Member] = []
    try:
        data = open_training_data(pipeline, store, group.configs[0])
        forget_peaks(data.device)
        members += _open_members(pipeline, store, group, data)
        profile = _run_steps(store, members, data, group, pipeline.config.execution) if members else None
        _publish_all(pipeline, store, members, data, profile, len(group.configs))
    except InterpError as error:  # what these read is damaged: other SAEs may read what is sound
        steps = {member.trainer.config.name: member.trainer.step for member in members}
        for config in group.configs:
            if config.name not in group.dropped and find_trained(pipeline, store, config.name) is None:
                group.drop(config, steps.get(config.name, 0), error)
    group.ranks.barrier()
    wall_s = time.perf_counter() - started_s
    refs = {config.name: sae_ref(pipeline, config.name) for config in group.configs if config.name not in group.dropped}
    return {name: Produced(ref, load_manifest(store, ref), is_cached=False, wall_s=wall_s) for name, ref in refs.items()}


def _open_members(pipeline: Pipeline, store: Store, group: _Group, data: TrainingData) -> Iterator[_Member]:
    for config in group.configs:
        try:
            member = _open_member(pipeline, store, config, data, group.ranks)
        except (PlanError, OwnCodeError) as error:
            group.drop(config, 0, error)
            continue
        if member.trainer.step:
            group.progress(member.trainer.step * data.batch_rows)
        yield member


def _run_steps(store: Store, members: list[_Member], data: TrainingData, group: _Group, execution: ExecutionConfig) -> Profile | None:
    """Advance all members to their last step, by one read of the data; return what a watched window of steps showed.

    A member that cannot go on is taken out of `members`.
    """
    steps = range(min(member.trainer.step for member in members), max(member.trainer.n_steps for member in members))
    share, watched = group.ranks.share(data.batch_rows), execution.profile_steps if group.ranks.rank == 0 else 0
    with closing(StepProfiler(watched, steps, data.device)) as profiler, closing(iter_rows(store, data, steps)) as reader:
        profiler.before(steps.start)
        clock, together = WaitClock(), TrainingTimes()
        first_steps = {member.trainer.step for member in members}
        for rows in clock.each(reader):
            with record_function(NORMALIZE):
                x, y = data.normalize(rows, share)
            n_compiled = n_compilations()
            trained: list[tuple[_Member, float]] = []
            for member in [member for member in members if member.trainer.step == rows.step < member.trainer.n_steps]:
                before_s = clock.elapsed_s
                try:
                    row = _train_step(member.trainer, x, y, data)
                except (NonFiniteError, OwnCodeError, PlanError) as error:
                    members.remove(member)
                    group.drop(member.trainer.config, rows.step, error)
                    continue
                trained.append((member, clock.elapsed_s - before_s))
                group.progress(data.batch_rows)
                if row is not None and group.on_metrics is not None:
                    rates = together.rows_per_s, together.input_wait_share
                    group.on_metrics(TrainingMetrics(member.trainer.config.name, row, member.trainer.n_steps, *rates))
            is_rated = rows.step not in first_steps and rows.step not in profiler.window and n_compilations() == n_compiled
            wall_s, wait_s = clock.lap(), clock.last_wait_s
            own_s = sum((step_s for _, step_s in trained), 0.0)
            together.add(wall_s=wall_s, wait_s=wait_s, step_s=own_s, n_rows=data.batch_rows, is_rated=is_rated)
            for member, step_s in trained:
                member.times.add(wall_s=wall_s, wait_s=wait_s, step_s=step_s, n_rows=data.batch_rows, is_rated=is_rated)
            with record_function(CHECKPOINT):
                for (ref, trainer, times, kept), _ in trained:
                    if trainer.step % execution.checkpoint_steps == 0 and trainer.step < trainer.n_steps:
                        save_checkpoint(store, ref, trainer, times, kept)
                _stop_dominated(store, members, group, rows.step + 1)
            with clock.stopped():
                profiler.after(rows.step)
                profiler.before(rows.step + 1)
            if all(member.trainer.step == member.trainer.n_steps for member in members):
                break  # the one that needed more steps has dropped out
    return profiler.result


def _stop_dominated(store: Store, members: list[_Member], group: _Group, step: int) -> None:
    """Take members out that others dominate at this step, and keep where they were. Ranks log the same, so that all take out the same ones."""
    if group.stop is None:
        return
    trainers = {member.trainer.config.name: member.trainer for member in members if member.trainer.step == step}
    for name, why in find_dominated(trainers, group.stop).items():
        (member,) = [member for member in members if member.trainer.config.name == name]
        save_checkpoint(store, member.ref, member.trainer, member.times, member.kept)
        members.remove(member)
        group.drop(member.trainer.config, step, StoppedError(why))


def _train_step(trainer: Trainer, x: Tensor, y: Tensor, data: TrainingData) -> LogRow | None:
    """Advance one SAE. Raises `NonFiniteError` that names the rows, `PlanError` that names what to lower when memory runs out."""
    try:
        with _explained_memory(trainer.config, data.device):
            return trainer.train_step(x, y)
    except NonFiniteError as error:
        raise NonFiniteError(
            f"{error}, on {data.describe(trainer.step)}. Lower learning_rate or sparsity_coefficient, or look at these rows."
        ) from error


@contextmanager
def _explained_memory(config: SaeConfig, device: torch.device) -> Iterator[None]:
    """Turn memory that runs out inside the block into a `PlanError` that names what to lower."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        raise_if_out_of_memory(error, config, device)
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


def _open_member(pipeline: Pipeline, store: Store, config: SaeConfig, data: TrainingData, ranks: Ranks) -> _Member:
    keep_code(store, config.code, config.architecture)
    recipe = open_recipe(store, config)
    ref, kept = sae_ref(pipeline, config.name), trace(Digests(store), [sae_lineage(pipeline, config.name)])
    (sample,) = iter_rows(store, data, range(1))
    generator = torch.Generator().manual_seed(stream(pipeline.config.seed, "train", "weights", config.seed).torch_seed())
    with _explained_memory(config, data.device):
        weights = make_weights(config, data.source.apply(sample.x), sum(data.widths), generator, recipe)
        if has_grown(pipeline):
            weights |= unfold_weights(config, load_sae(before(pipeline), store, config.name), data.source, data.target, recipe)
        if recipe.fold:
            fold_weights(config, weights, data.source, data.target, data.widths, recipe)  # what is wrong with it is known before hours of training
        trainer = Trainer(config, weights, data.device, ranks, data.widths, recipe)
    checkpoint = load_checkpoint(store, ref, kept)
    if checkpoint is not None:
        trainer.restore(checkpoint.tensors, checkpoint.step, checkpoint.log, checkpoint.terms)
    return _Member(ref, trainer, TrainingTimes() if checkpoint is None else checkpoint.times, kept)


def _publish_all(pipeline: Pipeline, store: Store, members: list[_Member], data: TrainingData, profile: Profile | None, n_together: int) -> None:
    """Publish all members; those of one length are calibrated on the same rows, read once. Every rank must call it."""

    def add_times(art: ArtifactWriter, member: _Member) -> None:
        art.put(TIMES, describe_times(member.times, member.trainer.ranks, data.device, n_together), is_timed=True)
        if profile is not None:
            save_profile(art, profile, first=members[0].ref.path, is_first=member is members[0])

    for member, blocks in _with_fresh_rows(store, members, data):
        weights = member.trainer.whole_weights()
        if member.trainer.ranks.rank == 0:
            _publish(pipeline, store, member, weights, data, blocks, add_times)


def _with_fresh_rows(store: Store, members: Sequence[_Member], data: TrainingData) -> Iterator[tuple[_Member, list[TrainingRows]]]:
    """Yield each member with the rows that follow its own, read once for those of one length, and by the first rank alone."""
    n_blocks = max(1, min(CALIBRATION_ROWS, data.order.n_rows) // data.batch_rows)
    for n, alike in groupby(sorted(members, key=lambda member: member.trainer.n_steps), key=lambda member: member.trainer.n_steps):
        steps = range(n, n + n_blocks) if members[0].trainer.ranks.rank == 0 else range(0)
        blocks = [rows._replace(x=rows.x.to(data.device), y=rows.y.to(data.device)) for rows in iter_rows(store, data, steps)]
        for member in alike:
            yield member, blocks


def _finish(trainer: Trainer, weights: Weights, data: TrainingData, blocks: Sequence[TrainingRows]) -> tuple[Sae, SaeMeasures]:
    """Fold trained weights, and calibrate and measure them on rows that follow."""
    x, y, config, recipe = [block.x for block in blocks], [block.y for block in blocks], trainer.config, trainer.recipe
    sae = fold_weights(config, weights, data.source, data.target, data.widths, recipe).to(data.device)
    if recipe.is_calibrated:
        sae = calibrate_threshold(sae, x, config.k)
    return sae, measure_sae(sae, x, y)


def _publish(
    pipeline: Pipeline,
    store: Store,
    member: _Member,
    weights: Weights,
    data: TrainingData,
    blocks: list[TrainingRows],
    add_times: Callable[[ArtifactWriter, _Member], None],
) -> None:
    ref, trainer, _, kept = member
    config = trainer.config
    sae, measures = _finish(trainer, weights, data, blocks)
    with create_current(store, ref, kept) as art:
        save_sae(art, sae.to("cpu"), pipeline, config, l0=measures.l0)
        table = io.BytesIO()
        curve = pl.DataFrame(trainer.log, schema=list(LogRow._fields), orient="row")
        (curve.hstack(pl.DataFrame(trainer.terms)) if trainer.terms else curve).write_parquet(table)
        art.put(TRAINING, table.getvalue(), n_rows=len(trainer.log))
        add_times(art, member)
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
            "threshold": float(sae.threshold[0]) if trainer.recipe.is_calibrated else None,
            "normalization_scale": float(data.source.scale[0]),
        }
    remove_checkpoints(store, ref)
