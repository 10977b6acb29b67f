"""Mixed shards of one or several hook points become the aligned batches that all SAEs of a group share.

The shuffle gave all hook points one order, and batches don't depend on widths, so batch i of every hook point holds the same token
positions. Rows of several hook points lie side by side: what a transcoder reads and reconstructs, and a crosscoder's whole row.
"""

from collections.abc import Generator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from interp_assets.errors import InputError
from interp_assets.garcon.device import choose_device
from interp_assets.harvest.statistics import load_statistics
from interp_assets.planning.config import SaeConfig
from interp_assets.planning.pipeline import Pipeline
from interp_assets.shuffle.mixed import MixedShard, open_mixed
from interp_assets.storage.store import Store
from interp_assets.train.batches import RowOrder, describe_batch, iter_batches, make_row_order
from interp_assets.train.recipes import Normalization, make_normalization


@dataclass(frozen=True)
class TrainingData:
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
    def is_same(self) -> bool:
        """Tell whether the rows that are encoded are those that are reconstructed."""
        return self.sources == self.targets

    def normalize(self, rows: "TrainingRows", share: slice) -> tuple[Tensor, Tensor]:
        """Return this rank's share of a batch on the device, normalised: what is encoded and what is reconstructed."""
        x = self.source.apply(rows.x[share].to(self.device))
        return x, x if self.is_same else self.target.apply(rows.y[share].to(self.device))

    def describe(self, step: int) -> str:
        """Name the shards and rows of a batch, for messages."""
        return describe_batch(self.shards[self.sources[0]], self.order, self.batch_rows, step)


class TrainingRows(NamedTuple):
    """One global batch of raw rows: what is encoded and what is reconstructed."""

    step: int
    x: Tensor
    y: Tensor


def open_training_data(pipeline: Pipeline, store: Store, config: SaeConfig) -> TrainingData:
    """Open what an SAE is trained on. Raises `InputError` when there are fewer rows than a batch holds."""
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
    return TrainingData(
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


def iter_rows(store: Store, data: TrainingData, steps: range) -> Generator[TrainingRows]:
    """Yield the global batches of consecutive steps, read ahead in the background."""
    names = list(data.shards)
    readers = [iter_batches(store, data.shards[name], data.order, data.batch_rows, steps) for name in names]
    with ExitStack() as stack:
        for reader in readers:
            stack.enter_context(closing(reader))
        for batches in zip(*readers, strict=True):
            rows = {name: batch.rows for name, batch in zip(names, batches, strict=True)}
            x = _side_by_side([rows[name] for name in data.sources])
            y = x if data.is_same else _side_by_side([rows[name] for name in data.targets])
            yield TrainingRows(batches[0].step, x, y)


def _side_by_side(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
