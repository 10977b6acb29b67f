"""One SAE in training: its weights, optimizer, dead-latent counters and log, advanced by one batch at a time.

A step: loss and gradients of this rank's rows; gradients added over ranks; the decoder's gradient projected where the recipe keeps
unit norms; clip; Adam; renormalise; dead counters. Nothing random happens after the initial weights, so the state below is all there is
to a checkpoint. Weights and optimizer state are float32.
"""

import math
from typing import Final, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from interp_assets.config import SaeConfig
from interp_assets.errors import NonFiniteError
from interp_assets.train.losses import LossContext, Weights
from interp_assets.train.parallel import Ranks
from interp_assets.train.recipes import (
    GRADIENT_CLIP,
    RECIPES,
    coefficient_at,
    learning_rate_at,
    normalize_decoder,
    project_decoder_gradient,
)

_LOGGED_STEPS: Final = 200
"""About how many steps of a training are logged."""


class LogRow(NamedTuple):
    """One logged step, over the global batch. One row of `training.parquet`."""

    step: int
    n_rows: int
    """Rows seen, this batch included."""
    loss: float
    mean_squared_error: float
    """Per dimension, in normalised units."""
    sparsity_loss: float
    auxk_loss: float
    l0: float
    fvu: float
    dead_share: float
    learning_rate: float
    gradient_norm: float


class Trainer:
    """The state of one SAE in training."""

    def __init__(self, config: SaeConfig, weights: Weights, device: torch.device) -> None:
        """Start from `weights`, moved to `device`."""
        self.config, self.recipe = config, RECIPES[config.architecture]
        self.weights: Weights = {name: value.to(device, torch.float32).clone().requires_grad_() for name, value in weights.items()}
        self.optimizer = torch.optim.Adam(
            list(self.weights.values()), lr=config.learning_rate, betas=self.recipe.betas, eps=self.recipe.epsilon, fused=True
        )
        self.rows_since_fired = torch.zeros(config.d_sae, dtype=torch.int64, device=device)
        self.step = 0
        self.log: list[LogRow] = []

    @property
    def n_steps(self) -> int:
        """Steps of the whole training: enough batches for `n_rows`."""
        return n_steps(self.config)

    @property
    def is_dead(self) -> Tensor:
        """Which latents have not fired for `dead_after_rows` rows, over all ranks: bool `[d_sae]`."""
        return self.rows_since_fired >= self.config.dead_after_rows

    def train_step(self, z: Float[Tensor, "batch d_in"], ranks: Ranks) -> LogRow | None:
        """Advance by one global batch, of which `z` is this rank's share, normalised; return what was logged.

        Raises `NonFiniteError` when the global loss is not finite; weights are then those before the step.
        """
        context = LossContext(
            k=self.config.k,
            coefficient=coefficient_at(self.config, self.step, self.n_steps),
            n_rows=self.config.batch_rows,
            is_dead=self.is_dead,
            ranks=ranks,
        )
        self.optimizer.zero_grad(set_to_none=True)
        result = self.recipe.loss(self.weights, z, context)
        result.loss.backward()
        gradients = [weight.grad for weight in self.weights.values() if weight.grad is not None]
        ranks.sum_all(gradients)
        scalars = [result.loss.detach(), result.squared_error, result.sparsity_loss, result.auxk_loss, z.square().sum()]
        totals: list[float] = ranks.sum(torch.stack(scalars)).tolist()
        n_fired = ranks.sum(result.n_fired.clone())
        if not math.isfinite(totals[0]):
            raise NonFiniteError(f"The loss of SAE {self.config.name!r} is {totals[0]} at step {self.step}")
        learning_rate, gradient_norm = self._update()
        self.rows_since_fired = torch.where(n_fired > 0, 0, self.rows_since_fired + self.config.batch_rows)
        self.step += 1
        return self._log(totals, n_fired, learning_rate, gradient_norm)

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that, with `step` and `log`, are the whole state."""
        tensors = {f"weights.{name}": value.detach() for name, value in self.weights.items()}
        for name, value in self.weights.items():
            moments = self.optimizer.state[value]
            tensors[f"first_moments.{name}"] = moments["exp_avg"]
            tensors[f"second_moments.{name}"] = moments["exp_avg_sq"]
        return tensors | {"rows_since_fired": self.rows_since_fired}

    def restore(self, tensors: dict[str, Tensor], step: int, log: list[LogRow]) -> None:
        """Take over a state as `state()` returned it."""
        device = self.rows_since_fired.device
        for name, value in self.weights.items():
            value.data.copy_(tensors[f"weights.{name}"])
            self.optimizer.state[value] = {
                "step": torch.tensor(float(step), dtype=torch.float32, device=device),
                "exp_avg": tensors[f"first_moments.{name}"].to(device).clone(),
                "exp_avg_sq": tensors[f"second_moments.{name}"].to(device).clone(),
            }
        self.rows_since_fired = tensors["rows_since_fired"].to(device).clone()
        self.step, self.log = step, list(log)

    def _update(self) -> tuple[float, float]:
        learning_rate = learning_rate_at(self.config, self.step, self.n_steps)
        W_dec = self.weights["W_dec"]
        if self.recipe.is_unit_norm and W_dec.grad is not None:
            project_decoder_gradient(W_dec.detach(), W_dec.grad)
        gradient_norm = torch.nn.utils.clip_grad_norm_(list(self.weights.values()), GRADIENT_CLIP)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        if self.recipe.is_unit_norm:
            normalize_decoder(W_dec.data)
        return learning_rate, float(gradient_norm)

    def _log(self, totals: list[float], n_fired: Tensor, learning_rate: float, gradient_norm: float) -> LogRow | None:
        every = max(1, self.n_steps // _LOGGED_STEPS)
        if (self.step - 1) % every and self.step != self.n_steps:
            return None
        loss, squared_error, sparsity_loss, auxk_loss, squared_norm = totals
        batch_rows, d_in = self.config.batch_rows, self.weights["b_dec"].numel()
        row = LogRow(
            step=self.step,
            n_rows=self.step * batch_rows,
            loss=loss,
            mean_squared_error=squared_error / (batch_rows * d_in),
            sparsity_loss=sparsity_loss,
            auxk_loss=auxk_loss,
            l0=int(n_fired.sum()) / batch_rows,
            fvu=squared_error / squared_norm if squared_norm else 0.0,
            dead_share=float(self.is_dead.double().mean()),
            learning_rate=learning_rate,
            gradient_norm=gradient_norm,
        )
        self.log.append(row)
        return row


def n_steps(config: SaeConfig) -> int:
    """Return how many batches an SAE is trained on: enough for `n_rows`."""
    return -(-config.n_rows // config.batch_rows)
