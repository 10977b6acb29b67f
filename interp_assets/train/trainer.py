"""One SAE in training: its weights, optimizer, dead-latent counters and log, advanced by one batch at a time.

A step: loss and gradients of this rank's rows and latents; gradients summed over replicas; the decoder's gradient projected where the
recipe keeps unit norms; clip; Adam; renormalise; dead counters. Nothing random happens after the initial weights, so the state below is all
there is to a checkpoint. Weights and optimizer state are float32, whatever the products are rounded to.

A checkpoint holds all latents: `state` gathers the slices, `restore` takes this rank's.
"""

import math
from collections.abc import Sequence
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.profiler import record_function

from interp_assets.compute.elementwise import sum_squares
from interp_assets.compute.kernels import Scratch
from interp_assets.errors import NonFiniteError
from interp_assets.planning.config import SaeConfig
from interp_assets.train import recipes
from interp_assets.train.losses.loss import REPLICATED, LossContext, StepLoss, Weights
from interp_assets.train.parallel import ONE_RANK, Ranks
from interp_assets.train.profile import COLLECTIVE, LOSS, UPDATE
from interp_assets.train.refs import LogRow

_LOGGED_STEPS: Final = 200
"""About how many steps of a training are logged."""


class Trainer:
    """The state of one SAE in training."""

    def __init__(
        self,
        config: SaeConfig,
        weights: Weights,
        device: torch.device,
        ranks: Ranks = ONE_RANK,
        widths: tuple[int, ...] | None = None,
        recipe: recipes.Recipe | None = None,
    ) -> None:
        """Start from the weights of all latents; `widths` are those of the hook points that are reconstructed, one by default.

        `recipe` is that of the configuration's architecture unless it is given, which one of a person's own has to be.
        """
        self.config, self.recipe, self.ranks = config, recipe or recipes.make_recipe(config), ranks
        self.widths = widths if widths is not None else (weights["W_dec"].shape[1],)
        self._slice = ranks.latents(config.d_sae)
        self.weights: Weights = {name: self._own(name, value).to(device, torch.float32).clone() for name, value in weights.items()}
        self.optimizer = torch.optim.Adam(
            list(self.weights.values()), lr=config.learning_rate, betas=self.recipe.betas, eps=self.recipe.epsilon, fused=True
        )
        self.rows_since_fired = torch.zeros(len(self.weights["b_enc"]), dtype=torch.int64, device=device)
        self.step = 0
        self.log: list[LogRow] = []
        self.terms: list[dict[str, float]] = []
        """What an architecture of one's own logs besides, a row for each of the log; empty for the built-in ones."""
        self._scratch = Scratch()
        self._is_unit_norm = recipes.keeps_unit_norm(config, self.recipe)

    @property
    def n_steps(self) -> int:
        """Steps of the whole training: enough batches for `n_rows`."""
        return n_steps(self.config)

    @property
    def is_dead(self) -> Tensor:
        """Which of this rank's latents have not fired for `dead_after_rows` rows, over all replicas: bool `[latents]`."""
        return self.rows_since_fired >= self.config.dead_after_rows

    @torch.no_grad()
    def train_step(self, x: Float[Tensor, "batch d_in"], y: Float[Tensor, "batch d_out"] | None = None) -> LogRow | None:
        """Advance by one global batch, of which `x` is this rank's share, normalised; reconstruct `y`, or `x` itself. Return what was logged.

        Raises `NonFiniteError` when the global loss is not finite; weights are then those before the step.
        """
        y = x if y is None else y
        with record_function(LOSS):
            result = self.recipe.loss(self.weights, x, y, self._context())
            totals = self._totals(result, y)
        if not math.isfinite(totals[0]):
            explain = getattr(self.recipe.loss, "explain", None)
            why = f": {found}" if explain and (found := explain(self.weights, x, y, self._context())) else ""
            raise NonFiniteError(f"The loss of SAE {self.config.name!r} is {totals[0]} at step {self.step}{why}")
        with record_function(COLLECTIVE):
            for name, weight in self.weights.items():
                weight.grad = self.ranks.sum_replicas(result.gradients[name])
            n_fired = self.ranks.sum_replicas(result.n_fired)
        with record_function(UPDATE):
            learning_rate, gradient_norm = self._update()
        self.rows_since_fired = torch.where(n_fired > 0, 0, self.rows_since_fired + self.config.batch_rows)
        self.step += 1
        return self._log(totals, list(result.terms), learning_rate, gradient_norm)

    def state(self) -> dict[str, Tensor]:
        """Return the tensors of all latents that, with `step` and `log`, are the whole state. Every rank must call it."""
        tensors = {f"weights.{name}": self._whole(name, value) for name, value in self.weights.items()}
        for name, value in self.weights.items():
            moments = self.optimizer.state[value]
            tensors[f"first_moments.{name}"] = self._whole(name, moments["exp_avg"])
            tensors[f"second_moments.{name}"] = self._whole(name, moments["exp_avg_sq"])
        return tensors | {"rows_since_fired": self.ranks.gather_slices(self.rows_since_fired)}

    def whole_weights(self) -> Weights:
        """Return the weights of all latents. Every rank must call it."""
        return {name: self._whole(name, value) for name, value in self.weights.items()}

    def restore(self, tensors: dict[str, Tensor], step: int, log: list[LogRow], terms: Sequence[dict[str, float]] = ()) -> None:
        """Take over a state as `state()` returned it, for any number of slices."""
        device = self.rows_since_fired.device
        for name, value in self.weights.items():
            value.copy_(self._own(name, tensors[f"weights.{name}"]))
            self.optimizer.state[value] = {
                "step": torch.tensor(float(step), dtype=torch.float32, device=device),
                "exp_avg": self._own(name, tensors[f"first_moments.{name}"]).to(device).clone(),
                "exp_avg_sq": self._own(name, tensors[f"second_moments.{name}"]).to(device).clone(),
            }
        self.rows_since_fired = tensors["rows_since_fired"][self._slice].to(device).clone()
        self.step, self.log, self.terms = step, list(log), list(terms)

    def _own(self, name: str, value: Tensor) -> Tensor:
        return value if name in REPLICATED or self.ranks.n_slices == 1 else value[self._slice]

    def _whole(self, name: str, value: Tensor) -> Tensor:
        return value if name in REPLICATED else self.ranks.gather_slices(value)

    def _context(self) -> LossContext:
        return LossContext(
            k=self.config.k,
            coefficient=recipes.coefficient_at(self.config, self.recipe, self.step, self.n_steps),
            n_rows=self.config.batch_rows,
            is_dead=self.is_dead,
            ranks=self.ranks,
            scratch=self._scratch,
            widths=self.widths,
            dtype=getattr(torch, self.config.product_dtype),
            constants=self.recipe.constants,
            step=self.step,
            n_steps=self.n_steps,
        )

    def _totals(self, result: StepLoss, y: Tensor) -> list[float]:
        """Return loss, squared error, sparsity loss, AuxK loss, squared norm and firings of the global batch, and further terms."""
        own = [
            result.loss,
            result.squared_error,
            result.sparsity_loss,
            result.auxk_loss,
            sum_squares(y) / self.ranks.n_slices,
            result.n_fired.sum(),
            *result.terms.values(),
        ]
        return self.ranks.sum(torch.stack([value.double() for value in own])).tolist()

    def _update(self) -> tuple[float, float]:
        learning_rate = recipes.learning_rate_at(self.config, self.recipe, self.step, self.n_steps)
        W_dec = self.weights["W_dec"]
        if self._is_unit_norm and W_dec.grad is not None:
            recipes.project_decoder_gradient(W_dec, W_dec.grad)
        gradient_norm = self._clip()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        if self._is_unit_norm:
            recipes.normalize_decoder(W_dec)
        if "threshold" in self.weights:
            self.weights["threshold"].clamp_(min=0)
        return learning_rate, gradient_norm

    def _clip(self) -> float:
        """Bring the norm of the gradient over all latents to at most the recipe's limit; return what it was."""
        gradients = {name: weight.grad for name, weight in self.weights.items() if weight.grad is not None}
        squares = {name: sum_squares(gradient.view(len(gradient), -1)).double() for name, gradient in gradients.items()}
        sliced = torch.stack([value for name, value in squares.items() if name not in REPLICATED]).sum()
        whole = torch.stack([value for name, value in squares.items() if name in REPLICATED]).sum()
        norm = float((self.ranks.sum_slices(sliced) + whole).sqrt())
        if norm > self.recipe.gradient_clip:
            for gradient in gradients.values():
                gradient.mul_(self.recipe.gradient_clip / norm)
        return norm

    def _log(self, totals: list[float], names: list[str], learning_rate: float, gradient_norm: float) -> LogRow | None:
        every = max(1, self.n_steps // _LOGGED_STEPS)
        if (self.step - 1) % every and self.step != self.n_steps:
            return None
        loss, squared_error, sparsity_loss, auxk_loss, squared_norm, n_fired, *terms = totals
        batch_rows, d_out = self.config.batch_rows, self.weights["b_dec"].numel()
        n_dead = self.ranks.sum_slices(self.is_dead.sum())
        row = LogRow(
            step=self.step,
            n_rows=self.step * batch_rows,
            loss=loss,
            mean_squared_error=squared_error / (batch_rows * d_out),
            sparsity_loss=sparsity_loss,
            auxk_loss=auxk_loss,
            l0=n_fired / batch_rows,
            fvu=squared_error / squared_norm if squared_norm else 0.0,
            dead_share=int(n_dead) / self.config.d_sae,
            learning_rate=learning_rate,
            gradient_norm=gradient_norm,
        )
        self.log.append(row)
        if names:
            self.terms.append(dict(zip(names, terms, strict=True)))
        return row


def n_steps(config: SaeConfig) -> int:
    """Return how many batches an SAE is trained on: enough for `n_rows`."""
    return -(-config.n_rows // config.batch_rows)
