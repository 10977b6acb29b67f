"""Features that stand together on the map become clusters, named by the tokens that they share far beyond chance, for every zoom of a page.

1. Blocks: on a grid of 8, 16, ... 256 cells each way, every cell with its eight neighbours, where these have at least `LEAST` latents: the
   `MAX_BLOCKS` fullest of each grid.
2. Names: a token that n of the m latents in a block fire on (or raise), where E = m * (those of all N that do) / N are expected. Were tokens dealt
   out at random, n or more would come with a chance of at most exp(-(n ln(n / E) - n + E)): Chernoff's bound, which holds for draws without
   replacement too (Hoeffding 1963, sections 2 and 6). A token is told where this bound, times the number of questions asked, is below `CHANCE`: a map
   whose tokens mean nothing has no name at all, 99 times in 100.
3. A cluster has at most `NAMES` names, the least likely first, and stands at the median of the latents that have the first. Of blocks that overlap
   the one with the least likely name is a cluster; none is where a coarser grid has one of that name.

    map/clusters.json    {"format", "version", "clusters": [{"x", "y", "cells", "n_latents", "names": [[kind, text], ...]}, ...]}, coarse grids first

Letter case and spaces around a token do not tell tokens apart; the commonest spelling is shown. Cost: a sort of the latents for each grid, of at
most `MAX_LATENTS` of them. Of two dimensions: what they do not show has no name here.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from interp_assets.storage.manifest import ArtifactWriter

CLUSTERS: Final = "map/clusters.json"
FORMAT: Final = "interp-assets/map-clusters"
VERSION: Final = 1
GRIDS: Final = (8, 16, 32, 64, 128, 256)
LEAST: Final = 8
"""Latents of a block that may be a cluster."""
MAX_BLOCKS: Final = 128
"""Blocks of one grid that are asked for names."""
MAX_LATENTS: Final = 1 << 18
"""Latents that clusters are sought in: the first of the map's points, which are a fair sample."""
CHANCE: Final = 0.01
"""How likely a map without meaning is to have a name."""
NAMES: Final = 2
KINDS: Final = ("peaks", "raised")
"""Fires on, raises."""


class Held(NamedTuple):
    """Which tokens each latent has, each once: those of latent i are `tokens[starts[i]:starts[i + 1]]`."""

    starts: NDArray[np.int64]
    tokens: NDArray[np.int64]
    """Numbers of spellings that count as one, those of the second kind after those of the first."""
    words: NDArray[np.int64]
    """The spelling of each."""
    totals: NDArray[np.int64]
    """Latents that have each token."""


class _Block(NamedTuple):
    cells: int
    row: int
    column: int
    members: NDArray[np.int64]


class _Told(NamedTuple):
    """A token, and the members that have it, each in its spelling."""

    token: int
    latents: NDArray[np.int64]
    words: NDArray[np.int64]
    surprise: float


def write_clusters(
    art: ArtifactWriter, x: NDArray[np.uint16], y: NDArray[np.uint16], words: NDArray[np.uint32], texts: Sequence[str]
) -> dict[str, int]:
    """Write the clusters of points at `x`, `y`; return what `bundle.json` says of them.

    `words` are numbers of `texts`, `[points, kinds, tokens]`; those beyond are none.
    """
    found = find_clusters(x[:MAX_LATENTS], y[:MAX_LATENTS], words[:MAX_LATENTS], texts)
    content = {"format": FORMAT, "version": VERSION, "clusters": found}
    art.put(CLUSTERS, json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode(), n_rows=len(found))
    return {"n_clusters": len(found)}


def find_clusters(x: NDArray[np.uint16], y: NDArray[np.uint16], words: NDArray[np.uint32], texts: Sequence[str]) -> list[dict[str, Any]]:
    """Return the clusters as they are written."""
    held = hold_tokens(words, texts)
    grids = [list(_find_blocks(x, y, cells)) for cells in GRIDS]
    n_questions = sum(map(len, grids)) * max(1, int((held.totals > 0).sum()))
    clusters: list[dict[str, Any]] = []
    for blocks in grids:
        told = [(block, found) for block in blocks if (found := _tell(held, block.members, np.log(n_questions / CHANCE)))]
        told.sort(key=lambda pair: -pair[1][0].surprise)
        kept: list[_Block] = []
        for block, found in told:
            if any(max(abs(block.row - other.row), abs(block.column - other.column)) <= 2 for other in kept):
                continue
            kept.append(block)
            names = [_spell(item, texts, len(held.totals) // len(KINDS)) for item in found]
            place = [int(np.median(values[found[0].latents])) for values in (x, y)]
            if not any(_is_same(other, names[0], place) for other in clusters if other["cells"] < block.cells):
                clusters.append({"x": place[0], "y": place[1], "cells": block.cells, "n_latents": len(block.members), "names": names})
    return clusters


def hold_tokens(words: NDArray[np.uint32], texts: Sequence[str]) -> Held:
    """Return which tokens each latent has: `words` are numbers of `texts`, `[latents, kinds, tokens]`; those beyond are none."""
    folded: dict[str, int] = {}
    same = np.array([folded.setdefault(text.strip().casefold() or text, len(folded)) for text in texts], np.int64)
    n_latents, n_kinds, _ = words.shape
    rows, kinds, places = np.nonzero(words < len(texts))
    chosen = words[rows, kinds, places].astype(np.int64)
    tokens = same[chosen] + len(folded) * kinds
    _, firsts = np.unique(rows * (len(folded) * n_kinds) + tokens, return_index=True)
    rows, tokens, chosen = rows[firsts], tokens[firsts], chosen[firsts]
    starts = np.searchsorted(rows, np.arange(n_latents + 1))
    return Held(starts, tokens, chosen, np.bincount(tokens, minlength=len(folded) * n_kinds))


def surprise(n: NDArray[np.int64], expected: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how badly chance explains `n` where `expected` were; exp(-surprise) bounds the probability of as many or more."""
    return np.where(n > expected, n * np.log(np.maximum(n, 1) / expected) - n + expected, 0)


def _find_blocks(x: NDArray[np.uint16], y: NDArray[np.uint16], cells: int) -> Iterator[_Block]:
    """Yield the blocks of one grid that may be a cluster, the fullest first."""
    width = cells + 2  # a ring of empty cells around
    cell_of = ((y.astype(np.int64) * cells >> 16) + 1) * width + (x.astype(np.int64) * cells >> 16) + 1
    counts = np.bincount(cell_of, minlength=width * width)
    order = np.argsort(cell_of, kind="stable")
    starts = np.cumsum(counts) - counts
    inner = np.arange(width * width).reshape(width, width)[1:-1, 1:-1].ravel()
    beside = [row * width + column for row in (-1, 0, 1) for column in (-1, 0, 1)]
    n_latents = np.sum([counts[inner + step] for step in beside], axis=0)
    for i in np.argsort(-n_latents, kind="stable")[:MAX_BLOCKS].tolist():
        if n_latents[i] < LEAST:
            return
        parts = [order[starts[inner[i] + step] : starts[inner[i] + step] + counts[inner[i] + step]] for step in beside]
        yield _Block(cells, i // cells, i % cells, np.concatenate(parts))


def _tell(held: Held, members: NDArray[np.int64], limit: float) -> list[_Told]:
    """Return the tokens that members have far beyond chance, the least likely first."""
    counts = held.starts[members + 1] - held.starts[members]
    rows = np.repeat(members, counts)
    places = np.repeat(held.starts[members] - (np.cumsum(counts) - counts), counts) + np.arange(len(rows))
    tokens, n_having = np.unique(held.tokens[places], return_counts=True)
    expected = len(members) * held.totals[tokens] / (len(held.starts) - 1)
    surprises = surprise(n_having, expected)
    best = np.argsort(-surprises, kind="stable")[:NAMES]
    told = []
    for i in best[surprises[best] > limit].tolist():
        has = held.tokens[places] == tokens[i]
        told.append(_Told(int(tokens[i]), rows[has], held.words[places[has]], float(surprises[i])))
    return told


def _spell(told: _Told, texts: Sequence[str], n_tokens: int) -> list[str]:
    """Return kind and commonest spelling of a token."""
    words, counts = np.unique(told.words, return_counts=True)
    return [KINDS[told.token // n_tokens], texts[int(words[counts.argmax()])]]


def _is_same(other: dict[str, Any], name: list[str], place: list[int]) -> bool:
    """Say whether a cluster of a coarser grid has the same name at the same place, within one of its cells."""
    near = 65536 / other["cells"]
    return other["names"][0] == name and abs(other["x"] - place[0]) <= near and abs(other["y"] - place[1]) <= near
