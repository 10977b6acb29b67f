"""Rows of planted directions become the states that a real training passes through, for `bench_train.py --states` to time.

    python benchmarks/train_states.py states/ --architectures relu gated        trains 2,000 steps each and saves the weights at some of them

How long a step takes depends on how many latents can fire, and at the start of a training that is half of them. A training's time is
that of all its steps, so single states say little: these are real ones, and `bench_train.py` weighs each by the steps it stands for.

Rows are sums of directions that fire seldom (frequencies fall as a power law, strengths are exponential) plus noise, normalised as the
stage does. Batches are smaller than those that are timed: what fires depends on the steps, hardly on the batch. No timing happens here.
"""

import argparse
import sys
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor

from interp_assets.compute.products import use_fastest_products
from interp_assets.planning.config import SaeConfig
from interp_assets.planning.options import Architecture
from interp_assets.train.recipes import RECIPES, make_weights
from interp_assets.train.trainer import Trainer

COEFFICIENTS: Final[dict[Architecture, float]] = {"relu": 5.0, "gated": 2.0, "jump_relu": 1.0, "jump_relu_tanh": 3.0, "jump_relu_step": 2e-3}
"""Sparsity coefficients that lead to a final L0 between 20 and 100 on these rows."""
SAVED: Final = (0, 10, 25, 50, 100, 150, 200, 300, 500, 1000, 2000)
"""Steps before which the weights are saved."""
_ACTIVE: Final = 25
_NOISE: Final = 0.1


class Planted:
    """Rows with known structure: `n` directions in `d_in` dimensions, of which 25 are in each row."""

    def __init__(self, d_in: int, n_rows: int = 1 << 16, n: int = 6144, seed: int = 0) -> None:
        """Draw directions, frequencies and all rows."""
        self._generator = torch.Generator().manual_seed(seed)
        directions = torch.nn.functional.normalize(torch.randn(n, d_in, generator=self._generator), dim=1)
        rate = torch.arange(1, n + 1).float().pow(-0.8)
        places = torch.multinomial(rate, n_rows * _ACTIVE, replacement=True, generator=self._generator).view(n_rows, _ACTIVE)
        strengths = 0.5 + torch.empty(n_rows, _ACTIVE).exponential_(generator=self._generator)
        rows = torch.nn.functional.embedding_bag(places, directions, per_sample_weights=strengths, mode="sum")
        rows += _NOISE * torch.randn(rows.shape, generator=self._generator)
        rows -= rows.mean(0)
        self.rows = rows.mul_((d_in / rows.square().sum(1).mean()).sqrt())

    def draw(self, n_rows: int) -> Tensor:
        """Return a random batch."""
        return self.rows[torch.randint(len(self.rows), (n_rows,), generator=self._generator)]


def make_config(architecture: Architecture, *, d_sae: int, k: int, batch_rows: int, n_steps: int, **others: Any) -> SaeConfig:
    """Return the configuration of a state: that of the training it comes from, with another batch."""
    return SaeConfig.model_validate(
        {
            "architecture": architecture,
            "d_sae": d_sae,
            "k": k,
            "batch_rows": batch_rows,
            "n_rows": n_steps * batch_rows,
            "sparsity_coefficient": COEFFICIENTS.get(architecture, 0.0),
            "dead_after_rows": 250 * batch_rows,
        }
        | others
    )


def train(chosen: argparse.Namespace, architecture: Architecture) -> None:
    """Train one SAE and save its states."""
    rows = Planted(chosen.d_in)
    others: dict[str, Any] = {"learning_rate": chosen.learning_rate}
    if chosen.coefficient is not None:
        others["sparsity_coefficient"] = chosen.coefficient
    config = make_config(architecture, d_sae=chosen.d_sae, k=chosen.k, batch_rows=chosen.batch_rows, n_steps=chosen.steps, **others)
    weights = make_weights(config, rows.draw(4096), chosen.d_in, torch.Generator().manual_seed(0))
    trainer = Trainer(config, weights, torch.device("cpu"))
    n_steps = trainer.n_steps
    for step in range(n_steps + 1):
        if step in SAVED or step == n_steps:
            metadata = {"step": str(step), "n_steps": str(n_steps)}
            path = Path(chosen.folder) / f"{architecture}_{chosen.d_sae}_{step:06d}.safetensors"
            state = {f"weights.{name}": value for name, value in trainer.weights.items()} | {"is_dead": trainer.is_dead}
            save_file({name: value.contiguous() for name, value in state.items()}, path, metadata=metadata)
        if step == n_steps:
            break
        row = trainer.train_step(rows.draw(chosen.batch_rows))
        if row is not None and (row.step - 1) % 50 == 0:
            sys.stderr.write(f"{architecture} {row.step} l0 {row.l0:.1f} fvu {row.fvu:.3f} dead {row.dead_share:.3f}\n")


def main() -> None:
    """Train every chosen architecture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--architectures", nargs="+", default=list(RECIPES))
    parser.add_argument("--d-in", type=int, default=512)
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch-rows", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--coefficient", type=float, help="of the sparsity loss, instead of the one that this file has for an architecture")
    chosen = parser.parse_args()
    use_fastest_products()
    Path(chosen.folder).mkdir(parents=True, exist_ok=True)
    for architecture in chosen.architectures:
        train(chosen, architecture)


if __name__ == "__main__":
    main()
