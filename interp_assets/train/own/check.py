"""An architecture of one's own becomes a list of findings: what training will ask of it, tried on planted rows in seconds.

    declared        kind, options and functions, read off the file; it runs, and answers with the shapes that it has to
    gradients       of each weight, against central differences of the loss in float64, along random directions
    resume          eight steps are four, a checkpoint, and four more: bit for bit
    ranks           the gradients of two halves of a batch add up to those of the batch
    found           directions that rows were made of, beside what the built-in architecture of its kind finds in as many steps
    folded          the SAE that is saved reconstructs raw rows as training did, to 1e-5
    saelens         that SAE as SAELens' folder, read back
    finite          a row with a NaN stops the training before it reaches a weight
    time            a step beside one of its kind's, in CPU seconds of one process, from initial weights

Whatever it is, a failed check says what was expected and found. Nothing is kept.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from interp_assets.compute.kernels import Scratch
from interp_assets.errors import InterpError, NonFiniteError
from interp_assets.planning.config import SaeConfig, make_config
from interp_assets.planning.pipeline import Pipeline, PipelinePlan
from interp_assets.storage.manifest import create_artifact, make_ref
from interp_assets.storage.store import open_store
from interp_assets.train.checkpoint import CONFIG, WEIGHTS, save_sae
from interp_assets.train.exchange.folders import read_foreign
from interp_assets.train.fold import fold_weights
from interp_assets.train.losses.calibrate import calibrate_threshold
from interp_assets.train.losses.loss import LossContext, StepLoss, Weights
from interp_assets.train.own.load import load_recipe
from interp_assets.train.own.loss import OwnLoss
from interp_assets.train.parallel import ONE_RANK
from interp_assets.train.recipes import RECIPES, Normalization, Recipe, make_weights, vary
from interp_assets.train.sae import Sae
from interp_assets.train.trainer import Trainer, n_steps

D_IN: Final = 16
N_FEATURES: Final = 24
SIZES: Final = {
    "d_sae": 48,
    "k": 2,
    "batch_rows": 256,
    "n_rows": 80_000,
    "dead_after_rows": 10_000,
    "learning_rate": 8e-3,
    "sparsity_coefficient": 2.0,
}
"""Of the trainings that check, unless the caller says otherwise."""
_N_ROWS: Final = 20_000
_SCALE, _NOISE = 0.37, 0.01
_DIFFERENCE: Final = 1e-6
"""Relative step of a difference in float64."""
_DIRECTIONS: Final = 5
_OFF: Final = 1e-3
_FOLDED: Final = 1e-5
_FOUND: Final = 0.9
"""Cosine from which on a decoder row has found a direction."""
_SHARE: Final = 0.8
"""Of what its kind finds, an architecture has to find this much."""
_CPU: Final = torch.device("cpu")
_TIMED: Final = {"d_sae": 2048, "k": 32, "batch_rows": 4096, "n_rows": 1 << 40, "dead_after_rows": 1 << 50}
_TIMED_WIDTH, _TIMED_STEPS = 256, 4


class Finding(NamedTuple):
    """What became of one check."""

    check: str
    is_sound: bool
    said: str


class _FailedError(InterpError):
    """A check was not passed."""


@dataclass(frozen=True)
class _Case:
    """What all checks share."""

    source: bytes
    config: SaeConfig

    @cached_property
    def recipe(self) -> Recipe:
        return load_recipe(self.source, self.config)

    @property
    def loss(self) -> OwnLoss:
        assert isinstance(self.recipe.loss, OwnLoss)
        return self.recipe.loss

    @cached_property
    def base(self) -> Recipe:
        """The built-in architecture of its kind, with what of the options is the trainer's."""
        return vary(RECIPES[self.recipe.base], {name: value for name, value in self.config.options.items() if name not in self.loss.declared.options})

    @cached_property
    def directions(self) -> Tensor:
        return normalize(torch.randn(N_FEATURES, D_IN, generator=_draws(0)), dim=1)

    @cached_property
    def rows(self) -> Tensor:
        """Rows as training sees them: sparse sums of the directions, centred, of mean squared norm `D_IN`."""
        draws = _draws(1)
        fires = torch.rand(_N_ROWS, N_FEATURES, generator=draws) < 2 / N_FEATURES
        rows = fires * (1 + torch.rand(_N_ROWS, N_FEATURES, generator=draws)) @ self.directions + _NOISE * torch.randn(_N_ROWS, D_IN, generator=draws)
        rows = rows - rows.mean(0)
        return rows * (D_IN / rows.square().sum(1).mean()).sqrt()

    def weights(self, recipe: Recipe | None = None) -> Weights:
        return make_weights(self.config, self.rows[:4096], D_IN, _draws(2), recipe or self.recipe)

    def trainer(self, recipe: Recipe) -> Trainer:
        return Trainer(self.config, self.weights(recipe), _CPU, recipe=recipe)

    def context(self, n_rows: int, *, at_end: bool = False) -> LossContext:
        """Describe a step in the middle of the training, or its last one."""
        last = n_steps(self.config) - 1
        dead = torch.zeros(self.config.d_sae, dtype=torch.bool)
        coefficient = self.config.sparsity_coefficient
        step = last if at_end else last // 2
        return LossContext(self.config.k, coefficient, n_rows, dead, ONE_RANK, Scratch(), (D_IN,), step=step, n_steps=last + 1)

    def ask(self, weights: Weights, rows: Tensor, n_rows: int | None = None) -> StepLoss:
        """Return loss and gradients of some rows, of a global batch of `n_rows`, in buffers of its own."""
        with torch.no_grad():
            return self.loss(weights, rows, rows, self.context(n_rows or len(rows)))

    @cached_property
    def trained(self) -> dict[str, Trainer]:
        """A whole training of it, and one of its kind."""
        return {name: _train(self.trainer(recipe), self.rows) for name, recipe in (("own", self.recipe), ("base", self.base))}


def check_architecture(source: bytes, config: SaeConfig) -> Iterator[Finding]:
    """Try an architecture of one's own, check after check; a file that cannot be executed has one finding."""
    case = _Case(source, config)
    for name, check in _CHECKS.items():
        try:
            yield Finding(name, is_sound=True, said=check(case))
        except InterpError as error:
            yield Finding(name, is_sound=False, said=str(error))
            if name == "declared":
                return


def _check_declared(case: _Case) -> str:
    declared = case.loss.declared
    case.ask(case.weights(), case.rows[:64])
    options = ", ".join(f"{name}={value}" for name, value in declared.options.items()) or "no options"
    constants = "".join(f", {name}={value}" for name, value in declared.constants.items())
    return f"kind {declared.kind}{constants}; {options}{''.join(f'; {role}={name}' for role, name in declared.functions.items())}"


def _check_gradients(case: _Case) -> str:
    """Move each weight along random directions: by the median of what is found, because one of them may cross a kink."""
    if case.loss.declared.surrogate_gradient:
        return "not compared: its gradient is meant to differ (surrogate_gradient)"
    draws, rows = _draws(3), case.rows[:128].double()
    weights = {name: value.double() + 0.1 * torch.randn(value.shape, generator=draws).double() for name, value in case.weights().items()}
    found = {name: value.clone() for name, value in case.ask(weights, rows).gradients.items()}
    off: dict[str, float] = {}
    for name, value in weights.items():
        errors = []
        for _ in range(_DIRECTIONS):
            way = normalize(torch.randn(value.shape, generator=draws).double().flatten(), dim=0).view_as(value)
            step = _DIFFERENCE * max(1.0, float(value.norm()))
            ends = [float(case.ask({**weights, name: value + sign * step * way}, rows).loss) for sign in (1, -1)]
            expected, analytic = (ends[0] - ends[1]) / (2 * step), float((found[name] * way).sum())
            size = max(abs(expected), abs(analytic), float(found[name].norm()) / value.numel() ** 0.5, 1e-9)
            errors.append(abs(expected - analytic) / size)
        off[name] = sorted(errors)[_DIRECTIONS // 2]
    worst = max(off, key=lambda name: off[name])
    if off[worst] > _OFF:
        raise _FailedError(
            f"the gradient of {worst} is off by {off[worst]:.1e} of its size, at most {_OFF:g}: something is detached or not differentiable. "
            "Declare surrogate_gradient=True where that is meant"
        )
    return f"differ from float64 differences by {off[worst]:.0e} at most ({worst})"


def _check_resume(case: _Case) -> str:
    batches = case.rows[: 8 * case.config.batch_rows].split(case.config.batch_rows)
    whole, first, rest = (case.trainer(case.recipe) for _ in range(3))
    with torch.no_grad():
        for x in batches:
            whole.train_step(x)
        for x in batches[:4]:
            first.train_step(x)
        rest.restore(first.state(), first.step, first.log, first.terms)
        for x in batches[4:]:
            rest.train_step(x)
    if bad := [name for name, value in whole.weights.items() if not torch.equal(value, rest.weights[name])]:
        raise _FailedError(f"after a checkpoint {', '.join(bad)} have other bits: something is kept between steps, or drawn at random")
    if whole.log != rest.log or whole.terms != rest.terms:
        raise _FailedError("after a checkpoint the log is another one")
    return "equal bits after a checkpoint"


def _check_ranks(case: _Case) -> str:
    weights, rows = case.weights(), case.rows[:512]
    whole = case.ask(weights, rows)
    halves = [case.ask(weights, part, len(rows)) for part in rows.split(256)]
    off = max(
        float((sum(half.gradients[name] for half in halves) - value).norm() / value.norm().clamp(min=1e-12))
        for name, value in whole.gradients.items()
    )
    if case.loss.declared.whole_batch:
        return f"not sliceable (whole_batch): trained by one process of rows; halves differ by {off:.0e}"
    if off > 1e-4:
        raise _FailedError(f"two halves of a batch differ from the batch by {off:.0e}: a term is no mean over rows. Declare whole_batch=True")
    return f"two halves make the batch, to {off:.0e}"


def _check_found(case: _Case) -> str:
    shares = {}
    for name, trainer in case.trained.items():
        W_dec = normalize(trainer.weights["W_dec"], dim=1)
        shares[name] = float(((W_dec @ case.directions.T).max(0).values > _FOUND).double().mean())
    last = case.trained["own"].log[-1]
    said = f"{shares['own']:.0%} of {N_FEATURES} directions in {n_steps(case.config)} steps ({case.recipe.base} {shares['base']:.0%})"
    said += f"; FVU {last.fvu:.3f}, L0 {last.l0:.1f}"
    if shares["own"] < _SHARE * shares["base"]:
        raise _FailedError(f"{said}. Try another sparsity_coefficient, k or learning_rate: --set learning_rate=0.001")
    return said


def _fold(case: _Case) -> tuple[Sae, Tensor, Normalization]:
    """Fold what was trained; return it with raw rows."""
    mean = torch.randn(D_IN, generator=_draws(4)).double()
    normalization = Normalization(mean, torch.full((D_IN,), _SCALE, dtype=torch.float64))
    raw = (case.rows[:2048].double() / _SCALE + mean).float()
    sae = fold_weights(case.config, case.trained["own"].weights, normalization, normalization, (D_IN,), case.recipe)
    return (calibrate_threshold(sae, [raw], case.config.k) if case.recipe.is_calibrated else sae), raw, normalization


def _check_folded(case: _Case) -> str:
    sae, raw, normalization = _fold(case)
    z = normalization.apply(raw)
    terms = case.loss.answer(case.trained["own"].weights, z, z, case.context(len(z), at_end=True))
    expected = terms.y_hat.double() / _SCALE + normalization.mean
    latents = sae.encode(raw)
    off = float((sae.reconstruct(raw, latents).double() - expected).norm() / expected.norm())
    l0 = [float((value > 0).double().sum(1).mean()) for value in (latents, terms.latents)]
    if off > _FOLDED:
        raise _FailedError(
            f"the saved {sae.kind} SAE reconstructs otherwise than training did, by {off:.0e} (L0 {l0[0]:.2f}, in training {l0[1]:.2f}): "
            f"its kind is another one than {case.recipe.base}, or it needs fold="
        )
    return f"{sae.kind}, as in training to {off:.0e}; L0 {l0[0]:.2f}"


def _check_saelens(case: _Case) -> str:
    sae, raw, _ = _fold(case)
    config = make_config(
        {"saes": [{"name": "checked", "hook_point": "resid_post.0"}], "harvest": {"hook_points": ["resid_post.0"]}, "features": {"saes": []}}
    )
    sizes = {"hook_widths": {"resid_post.0": D_IN}, "vocabulary_size": 1, "max_context": 1}
    plan = PipelinePlan(shards=[], tokenizer_fingerprint="", model_fingerprint="", **sizes)
    store, out = open_store("memory://"), open_store("memory://")
    ref = make_ref("sae", "checked", identity={}, inputs={}, label="checked")
    with create_artifact(store, ref) as art:
        save_sae(art, sae, Pipeline(config, plan), config.saes[0], l0=None)
    for name in (CONFIG, WEIGHTS):
        out.put(name, store.get(f"{ref.path}/{name}"))
    again = read_foreign(out).sae
    off = float((again.encode(raw) - sae.encode(raw)).abs().max())
    if off > _FOLDED:
        raise _FailedError(f"read back from SAELens' folder it encodes otherwise, by {off:.0e}")
    return f"comes back from SAELens' folder; latents differ by {off:.0e}"


def _check_finite(case: _Case) -> str:
    trainer, x = case.trainer(case.recipe), case.rows[: case.config.batch_rows].clone()
    before = {name: value.clone() for name, value in trainer.weights.items()}
    x[3, 1] = torch.nan
    try:
        trainer.train_step(x)
    except NonFiniteError:
        if all(torch.equal(value, before[name]) for name, value in trainer.weights.items()):
            return "a NaN in a row stops the training, and no weight has it"
    raise _FailedError("a row with a NaN was trained on: the error has to depend on every row")


def _check_time(case: _Case) -> str:
    """Alternate steps of both, so that a busy machine slows both."""
    draws = _draws(5)
    config = case.config.model_copy(update=_TIMED)
    x = torch.randn(_TIMED["batch_rows"], _TIMED_WIDTH, generator=draws)
    taken: dict[str, list[float]] = {"own": [], "base": []}
    trainers = {
        name: Trainer(config, make_weights(config, x, _TIMED_WIDTH, _draws(6), recipe), _CPU, recipe=recipe)
        for name, recipe in (("own", case.recipe), ("base", case.base))
    }
    for _ in range(_TIMED_STEPS + 1):
        for name, trainer in trainers.items():
            started_s = time.process_time()
            trainer.train_step(x)
            taken[name].append(time.process_time() - started_s)
    own, base = (sorted(taken[name][1:])[_TIMED_STEPS // 2] for name in ("own", "base"))
    where = f"{own:.2f} s; {_TIMED['d_sae']:,} latents, {_TIMED_WIDTH} wide, initial weights"
    return f"{own / base:.1f} times the CPU of a step of {case.recipe.base} ({where})"


def _train(trainer: Trainer, rows: Tensor) -> Trainer:
    batches = rows.split(trainer.config.batch_rows)[: len(rows) // trainer.config.batch_rows]
    for step in range(trainer.n_steps):
        trainer.train_step(batches[step % len(batches)])
    return trainer


def _draws(place: int) -> torch.Generator:
    return torch.Generator().manual_seed(place)


_CHECKS: Final[dict[str, Callable[[_Case], str]]] = {
    "declared": _check_declared,
    "gradients": _check_gradients,
    "resume": _check_resume,
    "ranks": _check_ranks,
    "found": _check_found,
    "folded": _check_folded,
    "saelens": _check_saelens,
    "finite": _check_finite,
    "time": _check_time,
}
