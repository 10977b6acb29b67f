"""The activations around the examples of each latent group become a file of their own: the literal pass C, as an option and as a baseline.

For every latent slice: the union of its windows' rows in one dataset shard, each row once, in order. It serves SAEs whose weights the data
side must not see, and whatever wants raw activations around examples. As the way to make windows it does not scale: a group of many
examples covers the whole data set (a million latents of 220 examples, 65 tokens, 8 kB a row: 117 TB), so work that would write more than
`MOST_TIMES` the shard's own bytes is refused before anything is read. Memory: what is written.
"""

from collections.abc import Iterable, Iterator
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from interp_assets.errors import PlanError
from interp_assets.harvest.rows import RowBlock
from interp_assets.storage.manifest import ArtifactWriter
from interp_assets.storage.tensors import save_tensors

MOST_TIMES: Final = 2
"""Bytes that may be written for each byte of the shard's activations."""


def gathered_name(latent_slice: int) -> str:
    """Name the file of one latent slice: `row` int64 [n], counted from the shard's first, and `activations` [n, d_in]."""
    return f"rows-{latent_slice:03d}.safetensors"


class Gatherer:
    """Collects, from rows that stream by once, those that each latent slice needs."""

    def __init__(self, needed: list[NDArray[np.bool_]], where: str) -> None:
        """Take a mask of the shard's rows for each slice. Raises `PlanError`, naming `where`, when that is more than `MOST_TIMES` the shard."""
        n_rows = len(needed[0])
        total = sum(int(mask.sum()) for mask in needed)
        if total > MOST_TIMES * n_rows:
            raise PlanError(
                f"{where}: the rows around the examples of {len(needed)} latent slices are {total:,}, {total / max(1, n_rows):.1f} times the shard's "
                f"{n_rows:,}; at most {MOST_TIMES} times are gathered. Turn features.gather off (windows need no gathered rows), or take fewer "
                "slices, examples or SAEs."
            )
        self._needed = needed
        self._parts: list[list[Tensor]] = [[] for _ in needed]

    def watch(self, blocks: Iterable[RowBlock]) -> Iterator[RowBlock]:
        """Yield the blocks unchanged and keep what is needed of them."""
        for block in blocks:
            for mask, parts in zip(self._needed, self._parts, strict=True):
                own = mask[block.first_row : block.first_row + len(block.rows)]
                parts.append(block.rows[torch.from_numpy(np.flatnonzero(own))])
            yield block

    def write(self, art: ArtifactWriter) -> int:
        """Write one file for each slice; return the rows in all of them."""
        for i, (mask, parts) in enumerate(zip(self._needed, self._parts, strict=True)):
            rows = torch.from_numpy(np.flatnonzero(mask))
            save_tensors(art, gathered_name(i), {"activations": torch.cat(parts), "row": rows}, n_rows=len(rows))
        return sum(int(mask.sum()) for mask in self._needed)


def rows_of_windows(firsts: NDArray[np.int64], lengths: NDArray[np.int64], n_rows: int) -> NDArray[np.bool_]:
    """Mark the rows that lie in at least one of the windows."""
    changes = np.bincount(firsts, minlength=n_rows + 1) - np.bincount(firsts + lengths, minlength=n_rows + 1)
    return np.cumsum(changes)[:n_rows] > 0
