"""What is global is exact: ranks as threads, from the same weights, choose the same latents and count the same dead ones as one process does."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from interp_assets.planning.config import make_config
from interp_assets.planning.options import Architecture
from interp_assets.train.losses.sparsify import candidates_above, keep_largest, level_rows, pick_per_row
from interp_assets.train.parallel import ONE_RANK, Ranks
from interp_assets.train.recipes import RECIPES, make_weights
from interp_assets.train.trainer import Trainer

D_IN, D_SAE, BATCH = 8, 48, 96
CPU = torch.device("cpu")


@dataclass
class Meeting:
    """Where threads leave a value and read those of all others."""

    size: int
    values: dict[int, Any] = field(default_factory=dict)
    barrier: threading.Barrier = field(init=False)

    def __post_init__(self) -> None:
        """Make the barrier."""
        self.barrier = threading.Barrier(self.size)

    def exchange(self, rank: int, value: Any) -> dict[int, Any]:
        """Return what every rank brought."""
        self.values[rank] = value
        self.barrier.wait(60)
        found = dict(self.values)
        self.barrier.wait(60)
        return found


@dataclass(frozen=True)
class ThreadRanks(Ranks):
    """Ranks that meet in memory: the same operations, without a process group."""

    meeting: Meeting = field(default_factory=lambda: Meeting(1))
    replica: Meeting = field(default_factory=lambda: Meeting(1))
    """Where only the ranks with the same rows meet: what they find there decides what they ask each other next."""

    def _all(self, value: Tensor, members: Callable[[int], bool]) -> list[Tensor]:
        found = self.meeting.exchange(self.rank, value.clone())
        return [found[rank] for rank in range(self.size) if members(rank)]

    def _slices(self, value: Tensor) -> list[Tensor]:
        found = self.replica.exchange(self.rank, value.clone())
        return [found[rank] for rank in sorted(found)]

    def _is_replica(self, rank: int) -> bool:
        return rank % self.n_slices == self.rank % self.n_slices

    def sum(self, value: Tensor) -> Tensor:
        """Add over all."""
        return value.copy_(torch.stack(self._all(value, lambda _rank: True)).sum(0))

    def sum_replicas(self, value: Tensor) -> Tensor:
        """Add over the ranks with the same latents."""
        return value.copy_(torch.stack(self._all(value, self._is_replica)).sum(0))

    def sum_slices(self, value: Tensor) -> Tensor:
        """Add over the ranks with the same rows."""
        return value.copy_(torch.stack(self._slices(value)).sum(0))

    def gather_rows(self, value: Tensor) -> Tensor:
        """Concatenate over all."""
        return torch.cat(self._all(value, lambda _rank: True))

    def gather_slices(self, value: Tensor, dim: int = 0) -> Tensor:
        """Concatenate over the ranks with the same rows."""
        return torch.cat(self._slices(value), dim=dim)

    def barrier(self) -> None:
        """Meet."""
        self.meeting.barrier.wait(60)


def on_ranks(size: int, n_slices: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """Return what `work` returns on each rank, in order."""
    if size == 1:
        return [work(ONE_RANK)]
    meeting, replicas, failures, found = Meeting(size), [Meeting(n_slices) for _ in range(size // n_slices)], [], {}

    def run(rank: int) -> None:
        try:
            found[rank] = work(ThreadRanks(rank, size, n_slices, meeting=meeting, replica=replicas[rank // n_slices]))
        except BaseException as error:  # noqa: BLE001 - raised below, where pytest sees it
            failures.append(error)
            for each in (meeting, *replicas):
                each.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return [found[rank] for rank in range(size)]


def run_step(architecture: Architecture, size: int, n_slices: int) -> tuple[Tensor, Tensor, float]:
    """Train one step on `size` ranks; return rows since each latent fired, who is dead, and L0.

    Weights and rows are multiples of 1/8, so that pre-activations are exact in any order of summation, and ties are everywhere. A fifth of
    the latents never fire, and another fifth in the second half of the rows only.
    """
    sae = {"name": "a", "architecture": architecture, "d_sae": D_SAE, "k": 3, "batch_rows": BATCH, "n_rows": 1000, "dead_after_rows": BATCH}
    config = make_config({"saes": [sae], "features": {"saes": []}}).saes[0]
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(BATCH, D_IN, generator=generator) * 4).round() / 8
    weights = {name: (value * 8).round() / 8 for name, value in make_weights(config, x, D_IN, generator).items()}
    weights["b_enc"][::5] -= 100
    weights["b_enc"][1::5] = -0.25
    weights["W_enc_T"][1::5] *= 4
    weights["W_enc_T"][1::5, :4], x[: BATCH // 2, 4:] = 0, 0

    def work(ranks: Ranks) -> tuple[Tensor, Tensor, float]:
        trainer = Trainer(config, {name: value.clone() for name, value in weights.items()}, CPU, ranks)
        row = trainer.train_step(x[ranks.share(BATCH)])
        assert row is not None
        return ranks.gather_slices(trainer.rows_since_fired), ranks.gather_slices(trainer.is_dead.to(torch.int64)), row.l0

    found = on_ranks(size, n_slices, work)
    for other in found[1:]:
        assert torch.equal(other[0], found[0][0])
        assert other[2] == found[0][2]
    return found[0]


@pytest.mark.parametrize(("size", "n_slices"), [(2, 1), (2, 2), (4, 2), (6, 3)])
@pytest.mark.parametrize("architecture", list(RECIPES))
def test_the_top_k_and_the_dead_are_those_of_the_whole_batch_and_width(architecture: Architecture, size: int, n_slices: int) -> None:
    """Counted per rank, a latent that fires elsewhere would look dead, and AuxK would start `world size` times too late or too early."""
    since_fired, dead, l0 = run_step(architecture, 1, 1)
    assert architecture == "gated" or 0 < int(dead.sum()) < D_SAE
    assert not dead[1::5].all()
    found = run_step(architecture, size, n_slices)
    assert torch.equal(found[0], since_fired)
    assert torch.equal(found[1], dead)
    assert found[2] == l0


@pytest.mark.parametrize(("size", "n_slices"), [(2, 1), (2, 2), (4, 2), (6, 3)])
@pytest.mark.parametrize("grain", [1.0, 0.25, 0.0])
def test_of_equal_values_the_first_of_the_whole_batch_and_width_are_active(size: int, n_slices: int, grain: float) -> None:
    """Were they the first of each rank, other latents would learn on another number of processes."""
    pre = torch.randn(BATCH, D_SAE, generator=torch.Generator().manual_seed(1)).double()
    pre = (pre / grain).round() * grain if grain else pre
    pre[7], pre[9], k = 1.0, -1.0, 3

    def pick(ranks: Ranks) -> list[Tensor]:
        rows, latents = ranks.share(BATCH), ranks.latents(D_SAE)
        own = pre[rows, latents].contiguous()
        shape, left = (len(own), own.shape[1]), own.clone()
        batch = keep_largest(candidates_above(own, 0.0), k * BATCH, ranks, shape)
        masks = [torch.zeros(own.numel()).index_fill(0, found.places, 1.0) for found in (pick_per_row(own, k, ranks, D_SAE), batch)]
        return [mask.view(shape) for mask in masks] + [(left >= level_rows(left, k, ranks, D_SAE)).float()]

    def join(parts: list[list[Tensor]], n: int) -> list[Tensor]:
        return [torch.cat([torch.cat([part[i] for part in parts[r : r + n]], dim=1) for r in range(0, len(parts), n)]) for i in range(3)]

    expected = join(on_ranks(1, 1, pick), 1)
    assert [int(mask.sum()) for mask in expected] == [sum(min(k, int(n)) for n in (pre > 0).sum(1)), k * BATCH, int(expected[0].sum())]
    for found, mask in zip(join(on_ranks(size, n_slices, pick), n_slices), expected, strict=True):
        assert torch.equal(found, mask)
