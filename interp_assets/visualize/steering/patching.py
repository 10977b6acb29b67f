"""Pairs of prompts become what each place of a model carries: activations of a clean prompt, put into a corrupted one a cell at a time, and measured.

1. The clean prompt runs once: its activations are kept, and the metric is measured.
2. `exact`: one growing batch (`garcon/sweep.py`) holds a run of the corrupted prompt for each cell, in which one position, or one head at all
   positions, has the clean run's activation. A cell's effect is its metric less that of the corrupted prompt.
3. `gradient`: the same to first order, by one backward of the corrupted run: derivative times change, summed over what belongs to a cell.
4. Over a set, effects are averaged. Their share of what the clean prompts are ahead by is what a cell *recovers*.

Format: `docs/formats/patching_sweep.md`
"""

import io
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import polars as pl
import torch
from torch import Tensor

from interp_assets.errors import InputError, NonFiniteError
from interp_assets.garcon.results import Results, draw_heat_map
from interp_assets.garcon.session import Model
from interp_assets.garcon.subject import SubjectModel
from interp_assets.garcon.sweep import count_columns
from interp_assets.planning.pipeline import Pipeline
from interp_assets.planning.steering import PairConfig, PatchingConfig
from interp_assets.storage.manifest import Produced, create_artifact, find_manifest, load_manifest, read_file, timed
from interp_assets.storage.store import Store
from interp_assets.visualize.steering.refs import patching_of, patching_ref

CELLS: Final = "cells.parquet"
PAIRS: Final = "pairs.parquet"


class Patched(NamedTuple):
    """What patching did over one pair."""

    n_tokens: int
    clean: float
    """The metric after the clean prompt."""
    corrupted: float
    points: list[str]
    labels: list[str]
    effects: Tensor
    """[points, positions or heads]."""


class Patching:
    """What patching does over a set of prompts."""

    def __init__(self, cells: pl.DataFrame, pairs: pl.DataFrame, what: str) -> None:
        """`cells` has one line a pair, point and column, `pairs` the metric of both prompts of each pair; `what` says what was done in a cell."""
        self.cells, self.pairs, self.what = cells, pairs, what

    @property
    def lead(self) -> float:
        """What the clean prompts' metric is ahead of the corrupted ones' by, on average."""
        return float((self.pairs["clean"] - self.pairs["corrupted"]).sum()) / self.pairs.height

    def table(self) -> pl.DataFrame:
        """Return one line a cell: means over the pairs, and the share of the lead that comes back; null where there is no lead."""
        label = pl.when(pl.col("label").n_unique() == 1).then(pl.col("label").first()).otherwise(pl.col("label").first() + " …")
        means = self.cells.group_by("point", "column", maintain_order=True).agg(label.alias("label"), pl.col("effect").mean())
        return means.with_columns(recovered=pl.col("effect") / self.lead if self.lead else pl.lit(None, pl.Float64))

    def grid(self) -> tuple[Tensor, list[str], list[str]]:
        """Return what each cell recovers, [points, columns], with the names of both; effects where there is no lead."""
        table = self.table()
        points = table["point"].unique(maintain_order=True).to_list()
        values = torch.from_numpy(table["recovered" if self.lead else "effect"].to_numpy().copy()).reshape(len(points), -1)
        return values, points, table["label"].to_list()[: values.shape[1]]

    def __repr__(self) -> str:
        """Say what it is."""
        return f"{self.what}: {self.pairs.height} pairs, the clean prompts ahead by {self.lead:.4g}"

    def _repr_html_(self) -> str:
        """Draw a heat map. Names are escaped."""
        return draw_heat_map(*self.grid(), repr(self))


@timed
def write_patching(pipeline: Pipeline, store: Store, subject: SubjectModel, tokenizer: Any, name: str, progress: Callable[[int], None]) -> Produced:
    """Patch over a set of prompts; `progress` is advanced by pairs. Raises `InputError` for prompts, answers and points that do not fit."""
    ref = patching_ref(pipeline, name)
    if (manifest := find_manifest(store, ref)) is not None:
        return Produced(ref, manifest, is_cached=True)
    asked, llm, found = patching_of(pipeline, name), Model(subject, tokenizer), []
    for number in range(len(asked.pairs)):
        found.append(patch_pair(llm, asked, number))
        progress(1)
    _check_lengths(asked, found)
    pairs = pl.DataFrame([{"pair": i, "n_tokens": pair.n_tokens, "clean": pair.clean, "corrupted": pair.corrupted} for i, pair in enumerate(found)])
    patching = Patching(pl.concat([_tabulate(i, pair) for i, pair in enumerate(found)]), pairs, _describe(asked))
    with create_artifact(store, ref) as art:
        for file, table in ((CELLS, patching.cells), (PAIRS, pairs)):
            content = io.BytesIO()
            table.write_parquet(content)
            art.put(file, content.getvalue(), n_rows=table.height)
        strongest = patching.table().sort(pl.col("effect").abs(), descending=True, maintain_order=True).row(0, named=True)
        facts = {"strongest": f"{strongest['point']}, {asked.by} {strongest['column']}", "effect": strongest["effect"], "lead": patching.lead}
        art.facts |= {"what": patching.what, "n_pairs": len(found), "n_cells": patching.cells.height, **facts}
    return art.produced


def patch_pair(llm: Model, asked: PatchingConfig, number: int) -> Patched:
    """Patch over one pair of a set."""
    pair = asked.pairs[number]
    clean, corrupted = (llm.tokenize(text)[0] for text in (pair.clean, pair.corrupted))
    if len(clean) != len(corrupted):
        raise InputError(
            f"Pair {number} of the set {asked.name!r} has {len(clean)} clean and {len(corrupted)} corrupted tokens: {llm.pieces(clean)} and "
            f"{llm.pieces(corrupted)}. Activations are patched position by position: make the prompts as long."
        )
    names, metric = llm.names(asked.points), _metric_of(llm, pair)
    n_columns = count_columns(llm.subject, names, len(clean), asked.by)
    with llm.trace(clean) as t:
        source, measured = Results({point: t.read(point) for point in names}), t.measure(metric)
    if asked.method == "exact":
        grid = llm.sweep(names, corrupted, source, metric, by=asked.by)
        base, effects = grid.base, grid.tensor.double() - grid.base
    else:
        with llm.trace(corrupted) as t:
            now = t.measure(metric)
            estimated = t.attribute(now, names, source)
        base, effects = now.value, torch.stack([_sum_up(estimated[point], asked.by) for point in names])
    if not bool(torch.isfinite(effects).all()):
        point, column = (~torch.isfinite(effects)).nonzero()[0].tolist()
        where = f"{asked.by} {column} of {names[point]!r}"
        raise NonFiniteError(f"Pair {number} of the set {asked.name!r}: with {where} patched the metric is not finite. Run the model in float32.")
    pieces = zip(llm.pieces(clean), llm.pieces(corrupted), strict=True)
    by_position = [one if one == other else f"{one} → {other}" for one, other in pieces]
    labels = by_position if asked.by == "position" else [f"head {head}" for head in range(n_columns)]
    return Patched(len(clean), float(measured.value), float(base), names, labels, effects)


def read_patching(pipeline: Pipeline, store: Store, name: str) -> Patching:
    """Read what patching did. Raises `ConfigError` for a set that the configuration does not have, `ArtifactMissingError` before it is made."""
    ref = patching_ref(pipeline, name)
    manifest = load_manifest(store, ref)
    cells, pairs = (pl.read_parquet(io.BytesIO(read_file(store, ref.path, manifest, file))) for file in (CELLS, PAIRS))
    return Patching(cells, pairs, str(manifest.facts["what"]))


def _metric_of(llm: Model, pair: PairConfig) -> Any:
    return llm.logit_diff(pair.answer, pair.other) if pair.other else llm.logprob(pair.answer)


def _describe(asked: PatchingConfig) -> str:
    metric = "logit difference" if asked.pairs[0].other else "log probability"
    return f"{metric} with one {asked.by} of the clean prompt{', to first order' if asked.method == 'gradient' else ''}"


def _check_lengths(asked: PatchingConfig, found: Sequence[Patched]) -> None:
    """Raise `InputError` where a position of one pair is none of another's: there is no mean over them."""
    lengths = [pair.n_tokens for pair in found]
    if asked.by == "position" and len(set(lengths)) > 1:
        raise InputError(
            f"The pairs of the set {asked.name!r} have {lengths} tokens, so position 3 is not the same in all. Make a set of each length."
        )


def _sum_up(result: Any, by: str) -> Tensor:
    """Return the parts of an attribution that belong to each position, or to each head."""
    kept = result.axes.index(by)
    return result.tensor.double().cpu().sum([axis for axis in range(result.tensor.ndim) if axis != kept])


def _tabulate(number: int, pair: Patched) -> pl.DataFrame:
    n, n_points = len(pair.labels), len(pair.points)
    columns = {
        "pair": [number] * n * n_points,
        "point": [point for point in pair.points for _ in range(n)],
        "column": list(range(n)) * n_points,
        "label": pair.labels * n_points,
        "effect": pair.effects.flatten().tolist(),
    }
    return pl.DataFrame(columns, {"pair": pl.Int64, "point": pl.String, "column": pl.Int64, "label": pl.String, "effect": pl.Float64})
