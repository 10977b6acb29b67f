"""An SAE and labelled held-out rows become how well few latents tell a label: k-sparse probes, beside probes that read the activation itself.

1. Each value of each label is a task: has a row this value, or another one? Rows are divided into halves by their documents, `seeds` times.
2. Of each task and division the `k` latents are taken whose means over both classes of the first half differ most (Gurnee et al. 2023, as SAEBench's
   `sparse_probing`), a logistic regression is fitted to them there, and its balanced accuracy is that on the other half: chance is 0.5.
3. The same with the `k` numbers of the activation whose means differ most, and with all of them: what an SAE has to be compared with.

A task has at least `LEAST` rows of either class in both halves of every division, else it is left out and named.
Format: `docs/formats/sae_probes.md`.
"""

import io
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import polars as pl
import torch
from torch import Tensor

from interp_assets.compute.seeds import stream
from interp_assets.errors import ArtifactMissingError, InputError, InterpError
from interp_assets.planning.config import SaeConfig
from interp_assets.planning.pipeline import Pipeline
from interp_assets.planning.progress import Advance, unheard
from interp_assets.storage.lineage import Digests, create_current, find_current, trace
from interp_assets.storage.manifest import Produced, load_manifest, read_file
from interp_assets.storage.store import Store
from interp_assets.train.checkpoint import load_sae
from interp_assets.train.evaluate import iter_held_out_rows
from interp_assets.train.lineage import probes_lineage
from interp_assets.train.probes.fit import Score, balance, choose, fit, measure, read_all, read_chosen, scale
from interp_assets.train.probes.labels import Labelled, load_labels
from interp_assets.train.refs import PROBES, probes_ref
from interp_assets.train.sae import Sae

LEAST: Final = 20
LATENTS, ACTIVATION = "latents", "activation"
SCHEMA: Final[dict[str, Any]] = {
    "label": pl.String(),
    "value": pl.String(),
    "reads": pl.String(),
    "k": pl.UInt32(),
    "accuracy": pl.Float64(),
    "deviation": pl.Float64(),
    "n_seeds": pl.UInt32(),
    "n_train": pl.UInt32(),
    "n_test": pl.UInt32(),
    "n_positive": pl.UInt32(),
    "chosen": pl.List(pl.UInt32()),
}


class _Task(NamedTuple):
    label: str
    value: str
    is_positive: np.ndarray
    is_said: np.ndarray


class Problem(NamedTuple):
    """All tasks in all divisions: a column is a task in one of them, those of one task side by side."""

    tasks: list[tuple[str, str]]
    n_seeds: int
    is_positive: Tensor
    train: Tensor
    """Weights of the rows that are fitted on."""
    test: Tensor
    n_train: Tensor
    n_test: Tensor
    n_positive: Tensor
    left_out: list[str]

    @property
    def n_rows(self) -> int:
        """Rows that are probed."""
        return len(self.is_positive)


def probe_saes(pipeline: Pipeline, store: Store, names: Sequence[str], progress: Advance = unheard) -> dict[str, Produced | InterpError]:
    """Probe SAEs; those of one place share labels and the probes of the activation. Returns for each its artifact, or why there is none."""
    problem: Problem | None = None
    beside: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    made: dict[str, Produced | InterpError] = {}
    for name in names:
        ref, config = probes_ref(pipeline, name), pipeline.config.sae(name)
        kept = trace(Digests(store), probes_lineage(pipeline, name))
        if (manifest := find_current(store, ref, kept)) is not None:
            made[name] = Produced(ref, manifest, is_cached=True)
            continue
        try:
            problem = problem or pose(pipeline, load_labels(pipeline, store, _config(pipeline).rows))
            if config.sources not in beside:
                beside[config.sources] = list(_probe_activation(pipeline, store, config, problem))
            rows = [*_probe_latents(pipeline, store, config, problem, progress), *beside[config.sources]]
        except InterpError as error:
            made[name] = error
            continue
        table, buffer = pl.DataFrame(rows, schema=SCHEMA, orient="row"), io.BytesIO()
        table.write_parquet(buffer)
        with create_current(store, ref, kept) as art:
            art.put(PROBES, buffer.getvalue(), n_rows=table.height)
            art.facts |= {"n_rows": problem.n_rows, "n_tasks": len(problem.tasks), "n_seeds": problem.n_seeds, "left_out": problem.left_out}
            art.facts["values"] = summarize(table)
        made[name] = art.produced
    return made


def read_probes(pipeline: Pipeline, store: Store, name: str) -> pl.DataFrame:
    """Read the probes of an SAE. Raises `ArtifactMissingError` before they are made, and where the configuration has no section `probes`."""
    pipeline.config.sae(name)
    if pipeline.config.probes is None:
        raise ArtifactMissingError(f"Pipeline {pipeline.config.name!r} probes no SAEs: say `probes: {{labels: python}}`, then `interp run`.")
    ref = probes_ref(pipeline, name)
    return pl.read_parquet(io.BytesIO(read_file(store, ref.path, load_manifest(store, ref), PROBES)))


def pose(pipeline: Pipeline, labelled: Labelled) -> Problem:
    """Make tasks of labels, and divide the rows. Raises `InputError` where no label has enough rows of two classes."""
    n_seeds, draws = _config(pipeline).seeds, stream(pipeline.config.seed, "train", "probes")
    n_groups = int(labelled.groups.max(initial=-1)) + 1
    first = np.stack([draws.permutation(n_groups)[labelled.groups] < (n_groups + 1) // 2 for _ in range(n_seeds)], axis=1)
    tasks, left_out = [], []
    for task in _iter_tasks(labelled):
        said, positive = task.is_said[:, None], task.is_positive[:, None]
        counts = [(said & half & (positive == side)).sum(0).min() for half in (first, ~first) for side in (True, False)]
        if min(counts) >= LEAST:
            tasks.append(task)
        else:
            left_out.append(f"{task.label}={task.value}")
    if not tasks:
        raise InputError(
            f"No label of {_config(pipeline).labels!r} has {LEAST} rows of two classes in both halves of {len(labelled.groups):,} held-out rows "
            f"(left out: {', '.join(left_out[:8]) or 'none'}). Raise probes.rows or corpus.held_out_shards."
        )
    is_positive = torch.from_numpy(np.repeat(np.stack([task.is_positive for task in tasks], 1), n_seeds, axis=1))
    is_said = torch.from_numpy(np.repeat(np.stack([task.is_said for task in tasks], 1), n_seeds, axis=1))
    halves = torch.from_numpy(np.tile(first, (1, len(tasks))))
    train, test = is_said & halves, is_said & ~halves
    names = [(task.label, task.value) for task in tasks]
    numbers = train.sum(0), test.sum(0), (is_positive & is_said).sum(0)
    return Problem(names, n_seeds, is_positive, balance(is_positive, train), balance(is_positive, test), *numbers, left_out)


def summarize(table: pl.DataFrame) -> dict[str, float]:
    """Return the mean accuracy over tasks of each kind of probe, as columns of a table of SAEs."""
    means = table.group_by("reads", "k", maintain_order=True).agg(pl.col("accuracy").mean()).rows()
    return {f"probe.{_name(reads, k)}": float(mean) for reads, k, mean in means}


def _name(reads: str, k: int) -> str:
    if reads == LATENTS:
        return f"k{k}"
    return f"activation_k{k}" if k else ACTIVATION


def _config(pipeline: Pipeline) -> Any:
    assert pipeline.config.probes
    return pipeline.config.probes


def _iter_tasks(labelled: Labelled) -> Iterator[_Task]:
    """Yield a task for each value; of two values one says all."""
    for column in labelled.columns:
        for code in range(1 if len(column.classes) == 2 else 0, len(column.classes)):
            yield _Task(column.name, column.classes[code], column.codes == code, column.codes >= 0)


def _probe_latents(pipeline: Pipeline, store: Store, config: SaeConfig, problem: Problem, progress: Advance) -> Iterator[dict[str, Any]]:
    """Encode the rows twice: to choose latents, and to keep those that were chosen, because all at once would fill memory."""
    sae = load_sae(pipeline, store, config.name)
    difference = torch.zeros(sae.d_sae, problem.train.shape[1])
    signed = torch.where(problem.is_positive, problem.train, -problem.train)
    for start, latents in _encode(pipeline, store, config, sae, problem.n_rows):
        difference += latents.T @ signed[start : start + len(latents)]
        progress(len(latents))
    chosen = choose(difference, max(_config(pipeline).k))
    used, places = chosen.unique(return_inverse=True)
    kept = torch.cat([latents[:, used] for _, latents in _encode(pipeline, store, config, sae, problem.n_rows)])
    for k in _config(pipeline).k:
        some = chosen[: min(k, len(chosen))]
        yield from _describe(problem, LATENTS, k, read_chosen(scale(kept), places[: len(some)]), some)


def _probe_activation(pipeline: Pipeline, store: Store, config: SaeConfig, problem: Problem) -> Iterator[dict[str, Any]]:
    x = torch.cat([block for _, block in _iter_rows(pipeline, store, config, problem.n_rows)])
    x = scale(x - x.mean(0))
    chosen = choose(x.T @ torch.where(problem.is_positive, problem.train, -problem.train), max(_config(pipeline).k))
    for k in _config(pipeline).k:
        some = chosen[: min(k, len(chosen))]
        yield from _describe(problem, ACTIVATION, k, read_chosen(x, some), some)
    yield from _describe(problem, ACTIVATION, 0, read_all(x), torch.zeros(x.shape[1], 0))


def _describe(problem: Problem, reads: str, k: int, score: Score, chosen: Tensor) -> Iterator[dict[str, Any]]:
    """Fit all probes of one kind; yield a row a task, over the divisions."""
    n_weights = len(chosen)
    said = fit(score, n_weights, problem.is_positive, problem.train, problem.n_train.float())
    accuracy = measure(said, problem.is_positive, problem.test).view(len(problem.tasks), problem.n_seeds)
    deviation = accuracy.std(1) if problem.n_seeds > 1 else torch.full((len(accuracy),), torch.nan)
    for place, (label, value) in enumerate(problem.tasks):
        first = place * problem.n_seeds
        yield {
            "label": label,
            "value": value,
            "reads": reads,
            "k": k,
            "accuracy": float(accuracy[place].mean()),
            "deviation": None if problem.n_seeds == 1 else float(deviation[place]),
            "n_seeds": problem.n_seeds,
            "n_train": int(problem.n_train[first]),
            "n_test": int(problem.n_test[first]),
            "n_positive": int(problem.n_positive[first]),
            "chosen": chosen[:, first].tolist() if chosen.numel() else [],
        }


def _encode(pipeline: Pipeline, store: Store, config: SaeConfig, sae: Sae, n_rows: int) -> Iterator[tuple[int, Tensor]]:
    return ((start, sae.encode(x)) for start, x in _iter_rows(pipeline, store, config, n_rows))


def _iter_rows(pipeline: Pipeline, store: Store, config: SaeConfig, n_rows: int) -> Iterator[tuple[int, Tensor]]:
    """Yield the valid held-out rows that are probed, block by block, each with the place of its first."""
    start = 0
    for block in iter_held_out_rows(pipeline, store, config):
        x = block.x[: n_rows - start].float()
        if len(x):
            yield start, x
        start += len(x)
        if start >= n_rows:
            return
