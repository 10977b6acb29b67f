"""The ranks that train together, seen by the rest of the stage as a few exact collective operations.

Ranks form a grid: `replicas` (data parallel) x `slices` (latent parallel). Ranks of one replica hold the same rows and different
contiguous slices of the latents; ranks of one slice hold the same latents and different contiguous shares of each global batch.

    what is global                          how it is found
    gradients                               summed over replicas; losses are sums over rows divided by the global number of rows
    reconstruction, AuxK, gradient norm     summed over slices
    top k of a row / of the batch           threshold found from the ranks' own largest values, of the slices / of all ranks
    firing counts, which decide who is dead summed over replicas
    L0, variances, logged numbers           summed over all ranks

One rank needs no process group: `Ranks()` answers each operation with its input.
"""

from dataclasses import dataclass
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor

from interp_assets.errors import ConfigError

_MAX_SHOWN: Final = 8


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together; rank = replica * n_slices + slice."""

    rank: int = 0
    size: int = 1
    n_slices: int = 1
    """Ranks that the latents are divided over."""
    replica_group: dist.ProcessGroup | None = None
    """The ranks that hold the same slice of latents."""
    slice_group: dist.ProcessGroup | None = None
    """The ranks that hold the same rows."""

    @property
    def n_replicas(self) -> int:
        """Ranks that the rows of a batch are divided over."""
        return self.size // self.n_slices

    @property
    def slice_index(self) -> int:
        """Which slice of the latents is here."""
        return self.rank % self.n_slices

    def share(self, n_rows: int) -> slice:
        """Return this rank's rows of a global batch. Raises `ConfigError` when the replicas don't divide it."""
        if n_rows % self.n_replicas:
            raise ConfigError(
                f"{self.n_replicas} training processes that share rows don't divide batch_rows = {n_rows:,}. Set execution.processes to one of "
                f"{[size * self.n_slices for size in _divisors(n_rows)]}, or change batch_rows."
            )
        n = n_rows // self.n_replicas
        replica = self.rank // self.n_slices
        return slice(replica * n, (replica + 1) * n)

    def latents(self, d_sae: int) -> slice:
        """Return this rank's slice of the latents. Raises `ConfigError` when the slices don't divide them."""
        if d_sae % self.n_slices:
            raise ConfigError(
                f"{self.n_slices} latent slices don't divide d_sae = {d_sae:,}. Set execution.latent_processes to one of {_divisors(d_sae)}, "
                "or change d_sae."
            )
        n = d_sae // self.n_slices
        return slice(self.slice_index * n, (self.slice_index + 1) * n)

    def sum(self, value: Tensor) -> Tensor:
        """Add a tensor over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def sum_replicas(self, value: Tensor) -> Tensor:
        """Add a tensor over the ranks that hold the same latents, in place."""
        if self.n_replicas > 1:
            dist.all_reduce(value, group=self.replica_group)
        return value

    def sum_slices(self, value: Tensor) -> Tensor:
        """Add a tensor over the ranks that hold the same rows, in place."""
        if self.n_slices > 1:
            dist.all_reduce(value, group=self.slice_group)
        return value

    def gather_rows(self, value: Tensor) -> Tensor:
        """Concatenate tensors of any lengths along the first dimension over all ranks, in order of rank."""
        if self.size == 1:
            return value
        lengths = [torch.zeros(1, dtype=torch.int64, device=value.device) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(value)], device=value.device))
        n = max(int(length) for length in lengths)
        padded = torch.cat([value, value.new_zeros(n - len(value), *value.shape[1:])])
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        return torch.cat([part[: int(length)] for part, length in zip(parts, lengths, strict=True)])

    def gather_slices(self, value: Tensor, dim: int = 0) -> Tensor:
        """Concatenate tensors of one shape over the ranks that hold the same rows, along `dim`, in order of slice."""
        if self.n_slices == 1:
            return value
        parts = [torch.empty_like(value) for _ in range(self.n_slices)]
        dist.all_gather(parts, value.contiguous(), group=self.slice_group)
        return torch.cat(parts, dim=dim)

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        if self.size > 1:
            dist.barrier()


ONE_RANK: Final = Ranks()
"""Training in one process."""


def make_ranks(rank: int, size: int, n_slices: int) -> Ranks:
    """Arrange the processes of the default group in a grid. Every process must call it. Raises `ConfigError` when it has no such grid."""
    check_grid(size, n_slices)
    replicas = _own_group(rank, [list(range(index, size, n_slices)) for index in range(n_slices)])
    slices = _own_group(rank, [list(range(first, first + n_slices)) for first in range(0, size, n_slices)])
    return Ranks(rank, size, n_slices, replicas, slices)


def check_grid(size: int, n_slices: int) -> None:
    """Raise `ConfigError` when `size` processes can't be divided over `n_slices`."""
    if size % n_slices:
        raise ConfigError(
            f"execution.latent_processes = {n_slices} doesn't divide execution.processes = {size}. Set latent_processes to one of {_divisors(size)}, "
            f"or processes to a multiple of {n_slices}."
        )


def _own_group(rank: int, groups: list[list[int]]) -> dist.ProcessGroup:
    """Make all groups, as every rank must, and return the one that `rank` is in."""
    made = [dist.new_group(members) for members in groups]
    (own,) = [group for group, members in zip(made, groups, strict=True) if rank in members]
    assert isinstance(own, dist.ProcessGroup)
    return own


def _divisors(n: int) -> list[int]:
    return [size for size in range(1, min(n, 64) + 1) if n % size == 0][-_MAX_SHOWN:]
