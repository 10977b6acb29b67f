"""SAEs that differ in their seed alone become one row: means, deviations and how many they are; and what of a difference is more than noise.

A deviation is that of single trainings (n - 1 in its denominator), so it has to be told from the error of the mean: it answers whether one more
training of the worse recipe could well beat one of the better. Two recipes differ by more than noise where their means do by at least two
deviations, the root of the mean of both variances. Of a recipe that was trained once nothing is known of the kind, and nothing is said.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import polars as pl

from interp_assets.train.sweep import COMPARED, CONFIGURATION, HELD_OUT, TRAINED

SEED: Final = "seed"
NOISE: Final = 2.0
"""Deviations that two means must be apart to be told from each other."""
BEST: Final = "best"
WITHIN: Final = "within noise"
UNKNOWN: Final = "one seed"
MEASURES: Final = (*TRAINED, *HELD_OUT)
DEVIATION: Final = "_deviation"


def has_replicas(table: pl.DataFrame) -> bool:
    """Say whether some SAEs of a table differ in their seed alone."""
    return table.height > 0 and table.select(_recipe(table)).is_duplicated().any()


def over_seeds(table: pl.DataFrame) -> pl.DataFrame:
    """Return a row for each recipe: `n`, the mean of every measure, beside it its deviation (null of one SAE), and `versus_best`.

    `versus_best` compares FVU with the least of those that do the same at the same sparsity settings or not: it says `best`, `within noise`, by how
    much it is more, or `one seed`.
    """
    recipe = _recipe(table)
    measures = [name for name in table.columns if name in MEASURES or "." in name]  # one's own metrics are called `my.half_norm`
    means = [pl.col(name).mean() for name in measures]
    deviations = [pl.col(name).std().alias(f"{name}{DEVIATION}") for name in measures]
    grouped = table.group_by(recipe, maintain_order=True).agg(pl.len().cast(pl.Int64()).alias("n"), *means, *deviations)
    names = pl.Series("name", [shared_name(members) for members in list_replicas(table)], pl.String())
    grouped = grouped.with_columns(names)
    ordered = [name for name in table.columns if name in (*recipe, "name", *measures)]
    beside = [each for name in ordered for each in ((name, f"{name}{DEVIATION}") if name in measures else (name, "n") if name == "name" else (name,))]
    return compare(grouped.select(beside))


def list_replicas(table: pl.DataFrame) -> list[list[str]]:
    """Return the names of the SAEs behind each row of `over_seeds`."""
    return table.group_by(_recipe(table), maintain_order=True).agg(pl.col("name"))["name"].to_list()


def compare(table: pl.DataFrame, measure: str = "fvu") -> pl.DataFrame:
    """Add `versus_best`: how the mean of a measure stands to the least of its group, in the light of both deviations."""
    deviation = f"{measure}{DEVIATION}"
    best = (
        table.filter(pl.col(measure).is_not_null())
        .sort(measure, maintain_order=True)
        .group_by(COMPARED, maintain_order=True)
        .agg(pl.col("name").first().alias("_best"), pl.col(measure).first().alias("_mean"), pl.col(deviation).first().alias("_deviation"))
    )
    joined = table.join(best, on=list(COMPARED), how="left", nulls_equal=True, maintain_order="left")
    more = pl.col(measure) - pl.col("_mean")
    noise = NOISE * ((pl.col(deviation) ** 2 + pl.col("_deviation") ** 2) / 2).sqrt()
    said = (
        pl.when(pl.col(measure).is_null())
        .then(None)
        .when(pl.col("name") == pl.col("_best"))
        .then(pl.lit(BEST))
        .when(noise.is_null())
        .then(pl.lit(UNKNOWN))
        .when(more < noise)
        .then(pl.lit(WITHIN))
        .otherwise(pl.lit("+") + more.round_sig_figs(3).cast(pl.String()))
    )
    return joined.with_columns(said.alias("versus_best")).drop("_best", "_mean", "_deviation")


def find_replicas(table: pl.DataFrame, row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row of `over_seeds` that an SAE of a table belongs to."""
    alike = table.filter(pl.all_horizontal(pl.col(name).eq_missing(pl.lit(row[name], table.schema[name])) for name in _recipe(table)))
    return over_seeds(alike).row(0, named=True)


def are_told_apart(a: Mapping[str, Any], b: Mapping[str, Any], measure: str = "fvu") -> bool:
    """Say whether the means of two rows with deviations are further from each other than noise."""
    noise = NOISE * ((a[f"{measure}{DEVIATION}"] ** 2 + b[f"{measure}{DEVIATION}"] ** 2) / 2) ** 0.5
    return abs(a[measure] - b[measure]) >= noise


def shared_name(names: Sequence[str]) -> str:
    """Name SAEs that differ in their seed: `k-k16` for `k-k16-seed0` and `k-k16-seed1`."""
    without = {re.sub(rf"[-_.]?{SEED}-?\d+", "", name) for name in names}
    if len(names) == 1 or (len(without) == 1 and without != {""}):
        return names[0] if len(names) == 1 else without.pop()
    alike = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in alike).rstrip("-_.") or names[0]


def _recipe(table: pl.DataFrame) -> list[str]:
    """Return the columns in which replicas agree: how they are configured, by which code, and on which rows they were trained."""
    return [name for name in (*CONFIGURATION, "code", "mixed_shards_id") if name in table.columns and name not in ("name", SEED)]
