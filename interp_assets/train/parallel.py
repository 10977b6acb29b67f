"""The ranks that train together, seen by the rest of the stage as a few exact collective operations.

Data parallel: every rank holds all weights and takes its contiguous share of each global batch; losses are sums over rows divided by
the global number of rows, so that adding the ranks' gradients gives the global gradient. What must be global is global: the batch
top-k threshold, the firing counts that decide which latents are dead, and the variances that normalise a loss.

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
    """This process among those that train together."""

    rank: int = 0
    size: int = 1

    def share(self, n_rows: int) -> slice:
        """Return this rank's rows of a global batch. Raises `ConfigError` when the ranks don't divide it."""
        if n_rows % self.size:
            fitting = [size for size in range(1, min(n_rows, 64) + 1) if n_rows % size == 0][-_MAX_SHOWN:]
            raise ConfigError(
                f"{self.size} training processes don't divide batch_rows = {n_rows:,}. Set execution.processes to one of {fitting}, "
                "or change batch_rows."
            )
        n = n_rows // self.size
        return slice(self.rank * n, (self.rank + 1) * n)

    def sum(self, value: Tensor) -> Tensor:
        """Add a tensor over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def sum_all(self, values: list[Tensor]) -> None:
        """Add several tensors over all ranks, in place, as one message."""
        if self.size > 1:
            flat = self.sum(torch.cat([value.reshape(-1) for value in values]))
            for value, part in zip(values, flat.split([value.numel() for value in values]), strict=True):
                value.copy_(part.view_as(value))

    def gather_rows(self, value: Tensor) -> Tensor:
        """Concatenate tensors of any lengths along the first dimension, in order of rank."""
        if self.size == 1:
            return value
        lengths = [torch.zeros(1, dtype=torch.int64, device=value.device) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(value)], device=value.device))
        n = max(int(length) for length in lengths)
        padded = torch.cat([value, value.new_zeros(n - len(value), *value.shape[1:])])
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        return torch.cat([part[: int(length)] for part, length in zip(parts, lengths, strict=True)])

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        if self.size > 1:
            dist.barrier()


ONE_RANK: Final = Ranks()
"""Training in one process."""
