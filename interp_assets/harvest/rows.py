"""Activation shards are read back as tensors: any range of rows, or block after block.

Row i of an activation shard belongs to row i of its token shard, so nothing but the index identifies it. Reads are verified block by
block (manifest.py); `iter_row_blocks` reads several checksum blocks at once, so that small row blocks cost no repeated reads. Where the rows lie in
the file follows from the manifest, so opening costs no block.
"""

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from interp_assets.errors import ArtifactCorruptError
from interp_assets.harvest.refs import activation_shard_ref
from interp_assets.planning.pipeline import Pipeline
from interp_assets.storage.manifest import Manifest, load_manifest
from interp_assets.storage.store import Store
from interp_assets.storage.tensors import TensorSpan, TensorSpec, make_header, parse_header, read_rows

ROWS: Final = "rows.safetensors"
READ_BYTES: Final = 32 << 20
"""What `iter_row_blocks` reads at once."""


class RowBlock(NamedTuple):
    """Consecutive rows of one activation shard."""

    first_row: int
    """Row in the shard of `rows[0]`."""
    rows: Tensor
    """`[n, d_in]` in the stored dtype."""


class OpenedRows(NamedTuple):
    """One activation shard: its manifest, and where its rows lie in the file."""

    store: Store
    path: str
    manifest: Manifest
    span: TensorSpan

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return self.span.shape[0]

    def read(self, start: int, stop: int) -> Tensor:
        """Read and verify rows [start, stop), in the stored dtype."""
        return read_rows(self.store, self.path, self.manifest, ROWS, self.span, start, stop)

    def read_each(self, rows: Sequence[int]) -> Tensor:
        """Read and verify single rows, in the order given: each checksum block that holds one is read once."""
        block_bytes, wanted = self.manifest.file(ROWS).block_bytes, sorted(set(rows))
        runs: list[list[int]] = []
        for row in wanted:
            start = self.span.start + row * self.span.row_bytes
            last_end = self.span.start + (runs[-1][-1] + 1) * self.span.row_bytes if runs else 0
            if runs and start // block_bytes <= (last_end - 1) // block_bytes:
                runs[-1].append(row)
            else:
                runs.append([row])
        found = torch.cat([self.read(run[0], run[-1] + 1)[torch.tensor(run) - run[0]] for run in runs])
        return found[torch.from_numpy(np.searchsorted(wanted, rows))]


def open_rows(pipeline: Pipeline, store: Store, hook_point: str, index: int) -> OpenedRows:
    """Open corpus shard `index` at `hook_point`. Raises `ArtifactMissingError` before it is harvested."""
    ref = activation_shard_ref(pipeline, hook_point, index)
    manifest = load_manifest(store, ref)
    entry, where = manifest.file(ROWS), f"{store.url}/{ref.path}/{ROWS}"
    span = parse_header(make_header({"rows": TensorSpec(str(entry.dtype), tuple(entry.shape or ()))}), where)["rows"]
    if span.start + span.n_bytes != entry.n_bytes:
        raise ArtifactCorruptError(
            f"{where} has {entry.n_bytes:,} bytes by its manifest; {entry.shape} x {entry.dtype} need {span.start + span.n_bytes:,}. "
            "Re-materialize this shard."
        )
    return OpenedRows(store, ref.path, manifest, span)


def iter_row_blocks(pipeline: Pipeline, store: Store, hook_point: str, index: int, n_rows: int) -> Iterator[RowBlock]:
    """Yield all rows of corpus shard `index` at `hook_point` in order, in blocks of at most `n_rows`. Holds `READ_BYTES` and one block."""
    opened = open_rows(pipeline, store, hook_point, index)
    n_read = n_rows * max(1, READ_BYTES // max(1, n_rows * opened.span.row_bytes))
    for first in range(0, opened.n_rows, n_read):
        rows = opened.read(first, min(first + n_read, opened.n_rows))
        for offset in range(0, len(rows), n_rows):
            yield RowBlock(first + offset, rows[offset : offset + n_rows])
