"""SAEs of one space become pairs of latents: each beside the one of another SAE that writes most like it, and how alike the two fire.

1. For every pair of SAEs that reconstruct the same rows: the cosine of all decoder rows with all others, block by block, and of each the nearest.
   Two that are each other's nearest are *mutual*. The mean over latents of the largest cosine is the MMCS of the pair (Sharkey et al. 2022).
2. Where both read the same rows: the correlation of the activations of such a pair over the first held-out rows, in float64. Null where either
   never fires there.

3. Up to 16,384 latents: all of one SAE are paired with those of the other, each once, so that cosines add up to the most (`truth/matching.py`).
   Of two SAEs that found the same features, some of them twice, only this tells which are left over.

A cosine alone may be chance: of 16,384 random directions in 768 dimensions the nearest to another one has about 0.16. Correlation errs otherwise.
Format: `docs/formats/sae_matches.md`.
"""

import io
import math
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any, Final, NamedTuple

import polars as pl
import torch
from torch import Tensor

from interp_assets.errors import ArtifactMissingError, InputError
from interp_assets.planning.config import SaeConfig
from interp_assets.planning.pipeline import Pipeline
from interp_assets.planning.progress import Advance, unheard
from interp_assets.storage.manifest import Produced, create_artifact, find_made_from, load_manifest, read_file, timed
from interp_assets.storage.store import Store
from interp_assets.train.checkpoint import load_sae
from interp_assets.train.evaluate import iter_held_out_rows
from interp_assets.train.refs import MATCHES, matches_ref, sae_ref
from interp_assets.train.sae import Sae
from interp_assets.train.truth.matching import pair_best

SCHEMA: Final[dict[str, pl.DataType]] = {
    "sae": pl.String(),
    "other_sae": pl.String(),
    "latent": pl.UInt32(),
    "other_latent": pl.UInt32(),
    "cosine": pl.Float32(),
    "is_mutual": pl.Boolean(),
    "correlation": pl.Float64(),
    "n_fired": pl.UInt32(),
    "n_other_fired": pl.UInt32(),
    "paired_latent": pl.UInt32(),
    "paired_cosine": pl.Float32(),
}
MAX_PAIRED: Final = 16_384
"""Latents of the larger of two SAEs up to which all are paired: a table of 1 GiB."""
_BLOCK: Final = 2048
"""Decoder rows that are multiplied with all others at once."""


class Nearest(NamedTuple):
    """For each latent of one SAE the one of another whose decoder row is nearest."""

    latents: Tensor
    cosines: Tensor
    is_mutual: Tensor


class _Sums(NamedTuple):
    """Sums over rows for pairs of latents, in float64."""

    x: Tensor
    y: Tensor
    xx: Tensor
    yy: Tensor
    xy: Tensor
    n_x: Tensor
    n_y: Tensor
    n_rows: Tensor


@timed
def match_saes(pipeline: Pipeline, store: Store, progress: Advance = unheard) -> Produced:
    """Match every pair of the configured SAEs that is of one space; `progress` advances by rows. Raises `InputError` where there is no such pair."""
    ref, matches = matches_ref(pipeline), pipeline.config.matches
    assert matches
    manifests = [load_manifest(store, sae_ref(pipeline, name)) for name in matches.saes]
    if existing := find_made_from(store, ref, manifests):
        return Produced(ref, existing, is_cached=True)
    configs = [pipeline.config.sae(name) for name in matches.saes]
    pairs = [(a, b) for a, b in combinations(configs, 2) if a.targets == b.targets]
    if not pairs:
        raise InputError(f"No two of the SAEs {matches.saes} reconstruct the same hook points: their decoders cannot be compared.")
    parts = [_match(pipeline, store, pair, progress) for pair in pairs]
    table = pl.concat(parts)
    with create_artifact(store, ref, made_from=manifests) as art:
        buffer = io.BytesIO()
        table.write_parquet(buffer)
        art.put(MATCHES, buffer.getvalue(), n_rows=table.height)
        art.facts |= {
            "n_rows": table.height,
            "n_held_out": _count(pipeline, store, pairs[0][0]),
            "pairs": [_summarize(part) for part in _split(table)],
        }
    return art.produced


def find_nearest(a: Tensor, b: Tensor) -> tuple[Nearest, Nearest]:
    """Return the nearest row in `b` of each row of `a`, and the reverse; rows of zeros have none and get cosine 0."""
    a, b = (torch.nn.functional.normalize(rows.double(), dim=1) for rows in (a, b))
    best_a, place_a = torch.empty(len(a), dtype=torch.float64), torch.empty(len(a), dtype=torch.int64)
    best_b, place_b = torch.full((len(b),), -2.0, dtype=torch.float64), torch.zeros(len(b), dtype=torch.int64)
    for start in range(0, len(a), _BLOCK):
        cosines = a[start : start + _BLOCK] @ b.T
        found = cosines.max(1)
        best_a[start : start + _BLOCK], place_a[start : start + _BLOCK] = found.values, found.indices
        over = cosines.max(0)
        is_better = over.values > best_b
        best_b = torch.where(is_better, over.values, best_b)
        place_b = torch.where(is_better, over.indices + start, place_b)
    return (
        Nearest(place_a, best_a, place_b[place_a] == torch.arange(len(a))),
        Nearest(place_b, best_b, place_a[place_b] == torch.arange(len(b))),
    )


def pair_latents(a: Tensor, b: Tensor) -> tuple[list[int | None], list[float | None]]:
    """Return for each row of `a` the row of `b` that it is paired with, and their cosine; null for who is left over, and beyond `MAX_PAIRED`."""
    latents: list[int | None] = [None] * len(a)
    cosines: list[float | None] = [None] * len(a)
    if max(len(a), len(b)) <= MAX_PAIRED:
        table = torch.nn.functional.normalize(a.float(), dim=1) @ torch.nn.functional.normalize(b.float(), dim=1).T
        rows, columns = pair_best(table.numpy())
        for row, column, cosine in zip(rows.tolist(), columns.tolist(), table[rows, columns].tolist(), strict=True):
            latents[row], cosines[row] = column, cosine
    return latents, cosines


def read_matches(pipeline: Pipeline, store: Store) -> pl.DataFrame:
    """Read the table of matches. Raises `ArtifactMissingError` before it is made, and where the configuration has no section `matches`."""
    if pipeline.config.matches is None:
        raise ArtifactMissingError(f"Pipeline {pipeline.config.name!r} matches no SAEs: name some in `matches: {{saes: [a, b]}}`, then `interp run`.")
    ref = matches_ref(pipeline)
    return pl.read_parquet(io.BytesIO(read_file(store, ref.path, load_manifest(store, ref), MATCHES)))


def _match(pipeline: Pipeline, store: Store, pair: tuple[SaeConfig, SaeConfig], progress: Advance) -> pl.DataFrame:
    """Return the rows of a pair of SAEs, in both directions."""
    saes = [load_sae(pipeline, store, config.name) for config in pair]
    nearest = find_nearest(saes[0].W_dec, saes[1].W_dec)
    sums = _correlate(pipeline, store, pair, (saes[0], saes[1]), nearest, progress) if pair[0].sources == pair[1].sources else None
    paired = pair_latents(saes[0].W_dec, saes[1].W_dec)
    parts = []
    for direction, (own, other) in enumerate(((pair[0], pair[1]), (pair[1], pair[0]))):
        found, n_latents = nearest[direction], len(nearest[direction].latents)
        measured: dict[str, Any] = (
            _describe(sums[direction]) if sums else dict.fromkeys(("correlation", "n_fired", "n_other_fired"), [None] * n_latents)
        )
        columns: dict[str, Any] = {
            "sae": [own.name] * n_latents,
            "other_sae": [other.name] * n_latents,
            "latent": range(n_latents),
            "other_latent": found.latents.tolist(),
            "cosine": found.cosines.tolist(),
            "is_mutual": found.is_mutual.tolist(),
            **dict(zip(("paired_latent", "paired_cosine"), paired if direction == 0 else _turn(*paired, n_latents), strict=True)),
        }
        parts.append(pl.DataFrame({**columns, **measured}, schema=SCHEMA))
    return pl.concat(parts)


def _turn(latents: list[int | None], cosines: list[float | None], n: int) -> tuple[list[int | None], list[float | None]]:
    """Return the same pairs as the other side, of `n` latents, has them."""
    turned: tuple[list[int | None], list[float | None]] = [None] * n, [None] * n
    for latent, (other, cosine) in enumerate(zip(latents, cosines, strict=True)):
        if other is not None:
            turned[0][other], turned[1][other] = latent, cosine
    return turned


def _correlate(
    pipeline: Pipeline, store: Store, pair: tuple[SaeConfig, SaeConfig], saes: tuple[Sae, Sae], nearest: tuple[Nearest, Nearest], progress: Advance
) -> list[_Sums]:
    """Add up activations of both SAEs over the held-out rows, for each latent of either and its nearest."""
    totals: list[_Sums] = []
    for x in _first_rows(pipeline, store, pair[0]):
        fired = [sae.encode(x).double() for sae in saes]
        found = [_add(fired[0], fired[1][:, nearest[0].latents]), _add(fired[1], fired[0][:, nearest[1].latents])]
        totals = [_plus(total, part) for total, part in zip(totals, found, strict=True)] if totals else found
        progress(len(x))
    return totals


def _first_rows(pipeline: Pipeline, store: Store, config: SaeConfig) -> Iterator[Tensor]:
    """Yield the first held-out rows that an SAE encodes, as many as are configured."""
    assert pipeline.config.matches
    n_left = pipeline.config.matches.rows
    for block in iter_held_out_rows(pipeline, store, config):
        if len(block.x):
            yield block.x[:n_left].float()
            n_left -= len(block.x)
        if n_left <= 0:
            return


def _count(pipeline: Pipeline, store: Store, config: SaeConfig) -> int:
    return sum(len(x) for x in _first_rows(pipeline, store, config))


def _add(x: Tensor, y: Tensor) -> _Sums:
    return _Sums(x.sum(0), y.sum(0), x.square().sum(0), y.square().sum(0), (x * y).sum(0), (x > 0).sum(0), (y > 0).sum(0), torch.tensor(len(x)))


def _plus(a: _Sums, b: _Sums) -> _Sums:
    return _Sums(*(x + y for x, y in zip(a, b, strict=True)))


def _describe(sums: _Sums) -> dict[str, list[Any]]:
    """Return Pearson's correlation of each pair, null where either is constant, and how often both fired. All rows count, the silent ones too."""
    n = sums.n_rows
    spread = ((sums.xx - sums.x.square() / n).clamp_min(0) * (sums.yy - sums.y.square() / n).clamp_min(0)).sqrt()
    correlation = (sums.xy - sums.x * sums.y / n) / spread
    values = [value if math.isfinite(value) else None for value in correlation.tolist()]
    return {"correlation": values, "n_fired": sums.n_x.tolist(), "n_other_fired": sums.n_y.tolist()}


def _mean(values: pl.Series) -> float | None:
    """Return the mean of what is not null."""
    mean = values.cast(pl.Float64()).mean()
    return mean if isinstance(mean, float) else None


def _split(table: pl.DataFrame) -> Sequence[pl.DataFrame]:
    return table.partition_by("sae", "other_sae", maintain_order=True)


def _summarize(part: pl.DataFrame) -> dict[str, Any]:
    """Return what is known of one direction of a pair, in numbers."""
    return {
        "sae": part["sae"][0],
        "other_sae": part["other_sae"][0],
        "n_latents": part.height,
        "mean_cosine": float(part["cosine"].cast(pl.Float64()).mean() or 0.0),  # pyright: ignore[reportArgumentType]
        **{f"share_above_{level}": int((part["cosine"] > level).sum()) / part.height for level in (0.7, 0.9)},
        "n_paired": part.height - part["paired_cosine"].null_count(),
        "mean_paired_cosine": _mean(part["paired_cosine"]),
        "share_mutual": int(part["is_mutual"].sum()) / part.height,
    }
