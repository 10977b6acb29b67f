"""A function of one's own becomes a loss as the trainer takes them: its terms, by autograd, in blocks of rows that stay in a processor's caches.

    loss = squared error (summed or averaged over dimensions) + penalty + further terms,     each a mean over the rows of the global batch

Each block weighs as much as it has rows, so that blocks, ranks and batches add up to the same whatever their sizes; what looks at all rows of a batch
at once declares `whole_batch`, is given them all, and is trained by one process of rows.

What is wrong with an answer is said with term and step. Finding the line that made the first number that is not finite costs a second forward, looked
at operator by operator, and only then (`explain`).
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from interp_assets.errors import OwnCodeError
from interp_assets.planning.own import Declared
from interp_assets.train.losses.loss import LossContext, StepLoss, Weights, latent_norms, make_gradients
from interp_assets.train.own.terms import Terms
from interp_assets.train.refs import LogRow

_BLOCK_VALUES: Final = 1 << 20
"""Pre-activations of a block of rows on a CPU (4 MiB): a dozen tensors of this size go forward and back."""
_DEVICE_BLOCK_VALUES: Final = 1 << 27
_WHOLE: Final = "it looks at a whole batch at once (whole_batch): set execution.processes to 1"
_ERROR: Final = "mean_squared_error"
Function = Callable[[Weights, Tensor, Tensor, "Step"], Any]


class Step:
    """What a function of one's own may ask of a step of its training."""

    def __init__(self, context: LossContext) -> None:
        self._context = context

    @property
    def k(self) -> int:
        """The SAE's `k`."""
        return self._context.k

    @property
    def coefficient(self) -> float:
        """The SAE's sparsity coefficient, after its warm-up."""
        return self._context.coefficient

    @property
    def number(self) -> int:
        """Which step it is, from 0."""
        return self._context.step

    @property
    def progress(self) -> float:
        """0 at the first step of the training, 1 at the last."""
        return self._context.step / max(1, self._context.n_steps - 1)

    @property
    def n_rows(self) -> int:
        """Rows of the global batch; a function is given some of them at a time."""
        return self._context.n_rows

    @property
    def is_dead(self) -> Tensor:
        """Which latents have not fired for `dead_after_rows` rows: bool `[d_sae]`."""
        return self._context.is_dead

    @property
    def is_crosscoder(self) -> bool:
        """Whether several hook points are reconstructed side by side."""
        return len(self._context.widths) > 1

    def norms(self, w: Weights) -> Tensor:
        """Return the norm of each latent's decoder row; of a crosscoder the sum of those of its parts."""
        return latent_norms(w["W_dec"], self._context.widths)


class OwnLoss:
    """The loss of an architecture of one's own, as `recipes.py` has them for the built-in ones."""

    def __init__(self, function: Function, declared: Declared, name: str) -> None:
        self._function, self.declared, self.name = function, declared, name

    def __call__(self, weights: Weights, x: Tensor, y: Tensor, context: LossContext) -> StepLoss:
        """Return this rank's share of the loss, and its gradients. Raises `OwnCodeError`, on all ranks where it does on one."""
        try:
            found = self._go(weights, x, y, context)
        except OwnCodeError as error:
            self._agree(context, x, failed=True)
            raise OwnCodeError(f"{str(error).rstrip('.')}, at step {context.step}.") from error
        self._agree(context, x, failed=False)
        return found

    def _agree(self, context: LossContext, x: Tensor, *, failed: bool) -> None:
        """Let all ranks leave together: whoever went on alone would wait for the others for ever."""
        if context.ranks.size > 1 and float(context.ranks.sum(torch.tensor([float(failed)], device=x.device))) and not failed:
            raise OwnCodeError(f"{self.name} failed on another rank, at step {context.step}.")

    def _go(self, weights: Weights, x: Tensor, y: Tensor, context: LossContext) -> StepLoss:
        if context.ranks.n_slices > 1 or (self.declared.whole_batch and context.ranks.n_replicas > 1):
            why = "its latents are not divided: set execution.latent_processes to 1" if context.ranks.n_slices > 1 else _WHOLE
            raise OwnCodeError(f"{self.name} is an architecture of your own, and {why}")
        leaves = {name: value.detach().requires_grad_() for name, value in weights.items()}
        gradients, reached = make_gradients(weights, context.scratch), set[str]()
        sums = {name: x.new_zeros((), dtype=torch.float64) for name in ("loss", _ERROR, "penalty")}
        n_fired = torch.zeros_like(context.is_dead, dtype=torch.int64)
        for rows in self._blocks(x, len(weights["b_enc"])):
            with torch.enable_grad():
                terms = self.answer(leaves, x[rows], y[rows], context)
                error = (terms.y_hat.to(y.dtype) - y[rows]).square().sum()
                parts = self._parts(terms)
                share = (rows.stop - rows.start) / context.n_rows
                loss = error * (self._error_scale(y) / context.n_rows)
                for part in parts.values():
                    loss = loss + part * share if part.requires_grad else loss
            found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            for name, gradient in zip(leaves, found, strict=True):
                if gradient is not None:
                    gradients[name].add_(gradient)  # into buffers of our own: two weights may be handed one tensor
                    reached.add(name)
            for name, value in {"loss": loss, _ERROR: error, **{name: part * share for name, part in parts.items()}}.items():
                sums[name] = sums.get(name, 0.0) + value.detach().double()
            latents = terms.latents.detach()
            fired = torch.gt(latents, 0, out=context.scratch.take("fired", tuple(latents.shape), latents, torch.float32))
            n_fired += fired.sum(0).long()  # of numbers, which takes a quarter of the time of truth values
        if missing := [name for name in leaves if name not in reached]:
            raise OwnCodeError(f"{self.name} gives {', '.join(missing)} no gradient: its terms do not depend on it. Use it, or detach nothing of it")
        damage = sum(gradient.sum().double() for gradient in gradients.values()) * 0  # NaN where one is not finite: the trainer refuses such a loss
        totals = {name: value + damage for name, value in sums.items()}
        loss, error, penalty = totals.pop("loss"), totals.pop(_ERROR), totals.pop("penalty")
        return StepLoss(loss, error, penalty, torch.zeros_like(loss), n_fired, gradients, totals)

    def _error_scale(self, y: Tensor) -> float:
        return 1 / y.shape[1] if self.declared.error == "mean" else 1.0

    def _blocks(self, x: Tensor, n_latents: int) -> Iterator[slice]:
        n_rows, most = len(x), _BLOCK_VALUES if x.device.type == "cpu" else _DEVICE_BLOCK_VALUES
        n = n_rows if self.declared.whole_batch else max(64, most // n_latents)
        return (slice(start, min(start + n, n_rows)) for start in range(0, n_rows, n))

    def answer(self, leaves: Weights, x: Tensor, y: Tensor, context: LossContext) -> Terms:
        """Ask the function, and check the shapes of what it answers."""
        with _rounding(x, context.dtype):
            terms = self._function(leaves, x, y, Step(context))
        if not isinstance(terms, Terms):
            raise OwnCodeError(f"{self.name} has to return lab.Terms(y_hat, latents=...), and returned {type(terms).__name__}")
        for name, value, shape in (("y_hat", terms.y_hat, tuple(y.shape)), ("latents", terms.latents, (len(x), len(leaves["b_enc"])))):
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            if found != shape:
                raise OwnCodeError(f"{self.name} returned {name} of shape {found}, expected {shape}")
        return terms

    def _parts(self, terms: Terms) -> dict[str, Tensor]:
        """Return the terms besides the error. A tensor without a way back to the weights is an error, a plain number is not."""
        parts: dict[str, Tensor] = {}
        for name, value in {"penalty": terms.penalty, **terms.terms}.items():
            if value is None:
                continue
            if name in LogRow._fields:
                raise OwnCodeError(f"The term {name!r} of {self.name} has the name of a column that every training logs. Call it otherwise")
            if isinstance(value, Tensor) and (value.dim() or not value.requires_grad):
                shape = f"has the shape {tuple(value.shape)}: return its mean over the rows"
                what = shape if value.dim() else "has no gradient: it does not depend on w"
                raise OwnCodeError(f"The term {name!r} of {self.name} {what}; what shall only be logged is a plain number")
            parts[name] = value if isinstance(value, Tensor) else terms.y_hat.new_tensor(float(value))
        return parts

    def explain(self, weights: Weights, x: Tensor, y: Tensor, context: LossContext) -> str:
        """Say which term is not finite and which line made the first number that is not; nothing where all is finite here."""
        watch = _FirstNonFinite(self.name.partition(":")[0])
        leaves = {name: value.detach().requires_grad_() for name, value in weights.items()}
        if not all(bool(value.isfinite().all()) for value in (x, y, *weights.values())):
            return "rows or weights are not finite before it"
        for rows in self._blocks(x, len(weights["b_enc"])):
            with watch, torch.enable_grad():
                terms = self.answer(leaves, x[rows], y[rows], context)
            named = {"y_hat": terms.y_hat, "latents": terms.latents, **self._parts(terms)}
            if bad := [name for name, value in named.items() if not bool(value.isfinite().all())]:
                return f"{bad[0]} is not finite{watch.found and f', from {watch.found} on'}"
            for name, value in named.items():
                if not value.requires_grad:
                    continue
                found = torch.autograd.grad(value, list(leaves.values()), torch.ones_like(value), retain_graph=True, allow_unused=True)
                if lost := [weight for weight, grad in zip(leaves, found, strict=True) if grad is not None and not bool(grad.isfinite().all())]:
                    return f"the gradient of {name} for {lost[0]} is not finite, though {name} is"
        return ""


def _rounding(x: Tensor, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Round operands of products as `product_dtype` says."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(x.device.type, dtype)


class _FirstNonFinite(TorchDispatchMode):
    """Finds the line of a file that made the first number that is not finite."""

    def __init__(self, file: str) -> None:
        super().__init__()
        self.file, self.found = file, ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self.found and isinstance(out, Tensor) and out.is_floating_point() and not bool(out.isfinite().all()):
            self.found = self._line()
        return out

    def _line(self) -> str:
        frame = sys._getframe()  # noqa: SLF001 - the only way to the caller's line
        while frame is not None and frame.f_code.co_filename != self.file:
            frame = frame.f_back
        return f"line {frame.f_lineno}" if frame is not None else ""
