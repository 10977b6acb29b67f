"""What is global is exact: ranks as threads, from the same weights, choose the same latents and count the same dead ones as one process does."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from interp_assets.planning.config import Architecture, make_config
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

    def _all(self, value: Tensor, members: Callable[[int], bool]) -> list[Tensor]:
        found = self.meeting.exchange(self.rank, value.clone())
        return [found[rank] for rank in range(self.size) if members(rank)]

    def _is_replica(self, rank: int) -> bool:
        return rank % self.n_slices == self.rank % self.n_slices

    def _is_slice(self, rank: int) -> bool:
        return rank // self.n_slices == self.rank // self.n_slices

    def sum(self, value: Tensor) -> Tensor:
        """Add over all."""
        return value.copy_(torch.stack(self._all(value, lambda _rank: True)).sum(0))

    def sum_replicas(self, value: Tensor) -> Tensor:
        """Add over the ranks with the same latents."""
        return value.copy_(torch.stack(self._all(value, self._is_replica)).sum(0))

    def sum_slices(self, value: Tensor) -> Tensor:
        """Add over the ranks with the same rows."""
        return value.copy_(torch.stack(self._all(value, self._is_slice)).sum(0))

    def gather_rows(self, value: Tensor) -> Tensor:
        """Concatenate over all."""
        return torch.cat(self._all(value, lambda _rank: True))

    def gather_slices(self, value: Tensor, dim: int = 0) -> Tensor:
        """Concatenate over the ranks with the same rows."""
        return torch.cat(self._all(value, self._is_slice), dim=dim)

    def barrier(self) -> None:
        """Meet."""
        self.meeting.barrier.wait(60)


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
    found: dict[int, tuple[Tensor, Tensor, float]] = {}
    meeting, failures = Meeting(size), []

    def work(rank: int) -> None:
        try:
            ranks = ThreadRanks(rank, size, n_slices, meeting=meeting) if size > 1 else ONE_RANK
            trainer = Trainer(config, {name: value.clone() for name, value in weights.items()}, CPU, ranks)
            row = trainer.train_step(x[ranks.share(BATCH)])
            assert row is not None
            found[rank] = (ranks.gather_slices(trainer.rows_since_fired), ranks.gather_slices(trainer.is_dead.to(torch.int64)), row.l0)
        except BaseException as error:  # noqa: BLE001 - raised below, where pytest sees it
            failures.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    for rank in range(1, size):
        assert torch.equal(found[rank][0], found[0][0])
        assert found[rank][2] == found[0][2]
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
