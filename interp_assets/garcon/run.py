"""A plan and its tensors become answers: one forward that reads and writes at named points, and one backward if derivatives are asked for.

1. Everything that can be refused is refused before the forward: points that are not there, positions outside a row, a patch whose source
   lies after it.
2. At a point, derivatives and reads come first, on what arrives; then the writes, as listed; then the reads that ask to be after them.
3. A forward without metrics ends at its last point. Metrics need the logits of their positions, and no others are computed.
4. All derivatives of a metric come from one backward. They are taken at edges of the graph, so that a tensor that is overwritten later
   (`taps.py`) keeps the derivative of what it was.
5. What did not happen is an error: a point that did not fire, a source that had not been read, a number that is not finite.

Rows are padded on the right, and padding is no position: no write reaches it, what is read of it is zero.

Plans of several people may share a forward. Each sees a window of every activation, its own rows cut to its own length, and nothing tells it from a
forward of its own but rounding: bits follow the batch's shape. What goes wrong with one is its error alone. One backward serves all: it is of the
sum of their metrics, and rows do not depend on each other.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from interp_assets.compute.any_threads import AnyThreads
from interp_assets.errors import InputError, InterpError, NonFiniteError
from interp_assets.garcon.backend import Answer
from interp_assets.garcon.crosscoders import expand_crosscoders
from interp_assets.garcon.features import AttachedSae, encode_part
from interp_assets.garcon.metrics import MetricOp, measure, places_of
from interp_assets.garcon.parts import Part, find_part
from interp_assets.garcon.plan import (
    Attribute,
    Grad,
    Patch,
    Plan,
    Read,
    ReadName,
    SaeAdd,
    SaeClamp,
    SaeRead,
    Write,
    is_answered,
    is_derivative,
    is_of_sae,
    is_write,
)
from interp_assets.garcon.points import HookPoint, find_point
from interp_assets.garcon.rope import own_lengths
from interp_assets.garcon.subject import SubjectModel, token_losses
from interp_assets.garcon.taps import Tap, order_of, tapped
from interp_assets.garcon.writes import Beside, apply_write, input_of


def run_plan(
    subject: SubjectModel, plan: Plan, tensors: Mapping[str, Tensor], saes: Mapping[str, AttachedSae] | None = None, *, exact: bool = False
) -> Answer:
    """Execute a plan; `tensors` holds what it names, by digest, `saes` the SAEs by name. `exact`: its bits do not follow the number of threads.

    Raises `InputError` for what does not fit the model, and `NonFiniteError`, with the first place, for what it computes.
    """
    (answer,) = run_together([Run(subject, plan, tensors, saes, exact=exact)])
    if isinstance(answer, InterpError):
        raise answer
    return answer


def run_together(runs: "Sequence[Run]") -> list[Answer | InterpError]:
    """Execute runs of one model in one forward, each once; an error is the answer of the run that it belongs to."""
    with AnyThreads() if any(run.exact for run in runs) else nullcontext():
        return _Forward(runs).execute()


def _with_unedited_rows(plan: Plan) -> Plan:
    """Return a plan with freezes as one over its rows and as many again that no write reaches, from which the frozen points are taken."""
    frozen = dict.fromkeys(name for operation in plan.operations if operation.op == "freeze" for name in operation.points)
    if not frozen:
        return plan
    n = len(plan.rows)
    own, copies = tuple(range(n)), tuple(range(n, 2 * n))
    operations: list[Any] = []
    for point in frozen:
        name = f"unedited {point}"
        operations += [Read(name=name, point=point, rows=copies), Patch(point=point, rows=own, value=ReadName(read=name))]
    for operation in plan.operations:
        if operation.op != "freeze":
            is_on_all = (is_answered(operation) or is_write(operation)) and operation.rows is None
            operations.append(operation.model_copy(update={"rows": own}) if is_on_all else operation)
    return plan.model_copy(update={"rows": plan.rows * 2, "operations": tuple(operations)})


class _AllReadError(Exception):
    """Ends a forward of which nothing more is wanted."""


class _AtPoint:
    """What a plan does at one point, and what it met there."""

    def __init__(self, point: HookPoint) -> None:
        self.point = point
        self.before: list[tuple[Read | SaeRead, Part]] = []
        self.writes: list[tuple[Write, Part]] = []
        self.after: list[tuple[Read | SaeRead, Part]] = []
        self.wants_edge, self.wants_value = False, False
        """A derivative is taken there, and is of a change from what arrived."""
        self.value: Tensor | None = None
        """What arrived, where it is wanted."""
        self.n_fired = 0

    @property
    def is_idle(self) -> bool:
        """Tell whether nothing is read or written."""
        return not (self.before or self.writes or self.after)


class Run:
    """One plan in a forward: its points, and what has been read so far. It is used once."""

    def __init__(
        self, subject: SubjectModel, plan: Plan, tensors: Mapping[str, Tensor], saes: Mapping[str, AttachedSae] | None = None, *, exact: bool = False
    ) -> None:
        """Resolve a plan. Raises `InputError` for what does not fit the model."""
        self.subject, self.asked, self.beside, self.exact = subject, plan, Beside(tensors, saes or {}), exact
        self.found: dict[str, Tensor] = {}
        plan, read, moved = expand_crosscoders(subject, plan, self.beside, partial(run_plan, exact=exact))
        self.found |= read
        self.beside = self.beside._replace(tensors={**tensors, **moved})
        self.plan = _with_unedited_rows(plan)
        self.n_rows = len(plan.rows)
        self.lengths = [len(row) for row in self.plan.rows]
        if min(self.lengths) == 0:
            raise InputError(f"Row {self.lengths.index(0)} of the plan has no tokens: give at least one.")
        self.metrics = [operation for operation in self.plan.operations if operation.op == "metric"]
        self.derived = [operation for operation in self.plan.operations if is_derivative(operation)]
        self.points: dict[str, _AtPoint] = {}
        self.derived_at: dict[str, list[_AtPoint]] = {}
        """Of each derivative."""
        self.values: dict[str, Tensor] = {}
        self.derivatives: dict[str, dict[str, Tensor]] = {}
        self.error: InterpError | None = None
        """Why it goes on no longer."""
        self._at_work: Any = None
        try:
            self._resolve()
        except InputError as error:
            error.op, error.point = getattr(self._at_work, "op", ""), getattr(self._at_work, "point", "")
            raise
        self.places = {metric.name: places_of(metric, self.lengths) for metric in self.metrics}

    @property
    def can_share(self) -> bool:
        """Tell whether others' rows may run beside it: what a module returns may have no rows to tell apart."""
        return all(at.point.kind != "module" for at in self.points.values())

    @property
    def wants_all_logits(self) -> bool:
        """Tell whether logits of more positions than those of its metrics are wanted."""
        return "logits" in self.points or any(metric.metric == "loss" for metric in self.metrics)

    def finish(self, batch: tuple[int, int]) -> Answer:
        """Return copies of what was asked for. Raises `NonFiniteError`."""
        wanted = [operation.name for operation in self.asked.operations if is_answered(operation)]
        tensors = {name: value.detach() for name, value in {**self.found, **self.values}.items()}
        for name, value in tensors.items():
            _check_finite(value, name)
        return Answer({name: tensors[name] for name in wanted}, self.derivatives, batch)

    def _resolve(self) -> None:
        """Find every point and part, and refuse sources that lie after their target."""
        reads = {operation.name: operation for operation in self.plan.operations if operation.op == "read"}
        for operation in self.plan.operations:
            self._at_work = operation
            if is_derivative(operation):
                self.derived_at[operation.name] = [self._at(name) for name in operation.at]
                for at in self.derived_at[operation.name]:
                    at.wants_edge, at.wants_value = True, at.wants_value or operation.op == "attribute"
                continue
            if operation.op == "metric" or operation.op == "freeze":  # noqa: PLR1714 - as below
                continue
            at = self._at(operation.point)
            part = find_part(self.subject.net, at.point, operation, self.lengths)
            if is_of_sae(operation):
                self._check_sae(operation, at.point)
            if operation.op == "read" or operation.op == "sae_read":  # noqa: PLR1714 - so the type is known below
                (at.after if operation.after else at.before).append((operation, part))
                continue
            at.writes.append((operation, part))
            if operation.when is not None:
                self._watch(operation.when.sae, (operation.when.latent,), at.point)
            if operation.op == "patch" and isinstance(operation.value, ReadName):
                source = reads[operation.value.read]
                here, there = order_of(at.point.name), order_of(self._at(source.point).point.name)
                if there > here or (there == here and source.after):
                    raise InputError(
                        f"A patch at {operation.point!r} takes what is read at {source.point!r}, but a forward reaches that later. Read it in "
                        "another run and patch from its result."
                    )
        self._at_work = self.metrics[0] if self.metrics else None
        if self.metrics and self.subject.net.get_output_embeddings() is None:
            raise InputError(f"{self.subject.name} ({self.subject.net.config.model_type}) has no language-model head: there is nothing to measure.")

    def _check_sae(self, operation: SaeRead | SaeClamp | SaeAdd, point: HookPoint) -> None:
        """Refuse an SAE at another point than its own, and have a transcoder's latents read before they are set."""
        attached = self.beside.sae(operation.sae)
        own = self._at(attached.hook_point if isinstance(operation, SaeRead) else attached.written_at).point
        if own != point:
            raise InputError(f"The SAE {operation.sae!r} belongs to {own.name!r}; the plan has it at {point.name!r}.")
        if isinstance(operation, SaeClamp) and attached.is_transcoder:
            self._watch(operation.sae, operation.latents, point)

    def _watch(self, sae: str, latents: tuple[int, ...], target: HookPoint) -> None:
        """Read latents that a later write waits for, at their SAE's point, in all rows."""
        at = self._at(self.beside.sae(sae).hook_point)
        if order_of(at.point.name) > order_of(target.name):
            raise InputError(f"A write at {target.name!r} waits for a latent at {at.point.name!r}, which a forward reaches later.")
        read = SaeRead(name=input_of(sae, latents), point=at.point.name, sae=sae, latents=latents)
        at.before.append((read, find_part(self.subject.net, at.point, read, self.lengths)))

    def _at(self, name: str) -> _AtPoint:
        if name not in self.points:  # else it is canonical, and known
            point = find_point(self.subject.net, name)
            return self.points.setdefault(point.name, _AtPoint(point))
        return self.points[name]

    def meet(self, at: _AtPoint, arrived: Tensor, value: Tensor, cut: Callable[[Tensor], Tensor]) -> None:
        """Do at a point what the plan wants there: its part, by `cut`, of `value` is overwritten; where nobody writes that is what `arrived`."""
        at.n_fired += 1
        if at.n_fired > 1:
            raise InputError(f"Hook point {at.point.name!r} fired more than once in one forward: name a module that is called once.")
        at.value = cut(arrived) if at.wants_value else None
        if at.is_idle:
            return
        own = cut(value)
        shown = own.transpose(1, 2) if at.point.kind == "pattern" else own  # positions stand second in every part
        for read, part in at.before:
            self.found[read.name] = self._read(read, part, shown)
        for write, part in at.writes:
            fires = None if write.when is None else self.found[input_of(write.when.sae, (write.when.latent,))][..., 0] > write.when.above
            apply_write(write, part, shown, self.beside, self.found, fires)
        for read, part in at.after:
            self.found[read.name] = self._read(read, part, shown)

    def _read(self, read: Read | SaeRead, part: Part, shown: Tensor) -> Tensor:
        if read.op == "read":
            return part.take(shown)
        found = encode_part(self.beside.sae(read.sae), part.select(shown), read.latents)
        return found if part.is_single else part.arrange(found)

    def check_fired(self) -> None:
        """Raise `InputError` for points that the forward did not reach."""
        silent = [f"{at.point.name!r} (module {at.point.module_path!r})" for at in self.points.values() if not at.n_fired]
        if silent:
            raise InputError(f"Hook point {', '.join(silent)} did not fire: it took no part in the forward of {self.subject.name}.")

    def measure(self, logits: Tensor, kept: list[int] | None) -> None:
        """Take the metrics of its rows' logits, at all positions or at those that were kept."""
        for metric in self.metrics:
            self.values[metric.name] = self._measure(metric, logits, kept)

    def _measure(self, metric: MetricOp, logits: Tensor, kept: list[int] | None) -> Tensor:
        if metric.metric == "loss":
            rows = list(range(len(self.lengths)) if metric.rows is None else metric.rows)
            token_ids, mask = _pad(self.plan.rows)
            losses = token_losses(logits[rows], token_ids[rows], None if mask is None else mask[rows])
            return losses.sum(1) / torch.tensor([self.lengths[row] - 1 for row in rows], device=losses.device)
        rows, places = (list(column) for column in zip(*self.places[metric.name], strict=True))
        there = places if kept is None else [kept.index(place) for place in places]
        is_column = rows == list(range(len(self.lengths))) and len(set(there)) == 1  # then no index has to be made and sent
        chosen = logits.select(1, there[0]) if is_column else logits[rows, there]
        return measure(metric, chosen, self.beside.tensor(metric.other) if metric.metric == "kl" else None)

    def derive(self, operation: Grad | Attribute, gradients: Mapping[str, Tensor | None], suspicious: set[str]) -> None:
        """Take the derivatives of an operation, which are given by point; the suspicious ones may not be finite."""
        answers: dict[str, Tensor] = {}
        for i, at in enumerate(self.derived_at[operation.name]):
            name = at.point.name
            gradient = gradients[name]
            if gradient is None:
                raise InputError(f"Metric {operation.of!r} does not depend on {name!r}: there is no derivative.")
            own = gradient if len(gradient) == self.n_rows else gradient[: self.n_rows]
            if name in suspicious:
                _check_finite(own, f"{operation.name} at {name}")
            if operation.op == "attribute":
                own = self._attribute(at, own, operation.source if operation.source == "zero" else operation.source[i])
            answers[name] = own.clone() if own.grad_fn is None else own.detach().clone()
        self.derivatives[operation.name] = answers

    def _attribute(self, at: _AtPoint, gradient: Tensor, source: Any) -> Tensor:
        """Return the derivative along the way from each vector to its source's, [rows, positions] or by head."""
        assert at.value is not None
        now = at.value[: self.n_rows]
        wanted = torch.zeros_like(now) if source == "zero" else self.beside.tensor(source)
        if wanted.shape != now.shape:
            raise InputError(f"The source at {at.point.name!r} has shape {list(wanted.shape)}, the activation {list(now.shape)}; give one as long.")
        return (gradient * (wanted.to(now) - now)).sum(-1)


class _Forward:
    """One forward, the runs that share it, and each run's window of what passes."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs, self.subject = runs, runs[0].subject
        self.is_shared = len(runs) > 1
        self.sizes = [len(run.lengths) for run in runs]
        self.starts = [0, *accumulate(self.sizes)]
        self.widths = [max(run.lengths) for run in runs]
        self.batch = (sum(self.sizes), max(self.widths))
        self.points: dict[HookPoint, list[tuple[int, _AtPoint]]] = {}
        for i, run in enumerate(runs):
            for at in run.points.values():
                self.points.setdefault(at.point, []).append((i, at))
        self.left = {point.name for point in self.points}
        self.edges: dict[str, Any] = {}
        self.is_derived, self.is_measured = (any(getattr(run, what) for run in runs) for what in ("derived", "metrics"))

    def execute(self) -> list[Answer | InterpError]:
        """Run the forward, the metrics and the backwards."""
        net: Any = self.subject.net
        taps = [Tap(point, partial(self._meet, point, asked)) for point, asked in self.points.items()]
        token_ids, mask = _pad([row for run in self.runs for row in run.plan.rows])
        arguments = self.subject.arguments(token_ids, mask)
        kept = self._kept_positions()
        if kept is not None:
            is_last = kept == [token_ids.shape[1] - 1]
            arguments["logits_to_keep"] = 1 if is_last else torch.tensor(kept, device=self.subject.device)
        start = net.get_input_embeddings().register_forward_hook(_start_graph) if self.is_derived else None
        try:
            with torch.set_grad_enabled(self.is_derived):
                with own_lengths(net, mask), tapped(net, taps, token_ids.shape[1]), suppress(_AllReadError):
                    output = net(**arguments) if self._needs_head() else net.base_model(**arguments)
                    if self.is_measured:
                        logits = self._windows(output.logits, "logits" if kept is None else "kept")
                        self._each(lambda i, run: run.measure(logits[i], kept))
                self._each(lambda _, run: run.check_fired())
                for number in range(max(len(run.derived) for run in self.runs)):
                    self._derive(number)
        finally:
            if start is not None:
                start.remove()
        answers: dict[int, Answer] = {}
        self._each(lambda i, run: answers.update({i: run.finish(self.batch)}))
        return [run.error or answers[i] for i, run in enumerate(self.runs)]

    def _each(self, do: Callable[[int, Run], None]) -> None:
        """Do something with every run that goes on; what goes wrong ends that run."""
        for i, run in enumerate(self.runs):
            if run.error is None:
                try:
                    do(i, run)
                except InterpError as error:
                    run.error = error

    def _needs_head(self) -> bool:
        """Tell whether a point, or a metric, lies above the base model: its blocks alone run faster."""
        net = self.subject.net
        below = "" if net.base_model is net else f"{net.base_model_prefix}."
        return self.is_measured or not all(point.module_path and point.module_path.startswith(below) for point in self.points)

    def _kept_positions(self) -> list[int] | None:
        """Return the positions whose logits are wanted; None for all of them."""
        if not self.is_measured or any(run.wants_all_logits for run in self.runs) or not self.subject.can_choose_logits:
            return None
        return sorted({place for run in self.runs for places in run.places.values() for _, place in places})

    def _windows(self, value: Tensor, kind: str) -> Sequence[Tensor]:
        """Return every run's window of a tensor that nobody overwrites."""
        if not self.is_shared:
            return (value,)
        return [self._cut(i, own, kind) for i, own in enumerate(value.split(self.sizes))]

    def _window(self, i: int, kind: str, value: Tensor) -> Tensor:
        """Return a run's rows of a tensor, cut to its own length: a view, through which it may be overwritten."""
        return self._cut(i, value.narrow(0, self.starts[i], self.sizes[i]), kind) if self.is_shared else value

    def _cut(self, i: int, own: Tensor, kind: str) -> Tensor:
        width = self.widths[i]
        if kind == "kept" or width == self.batch[1]:
            return own
        return own[:, :, :width, :width] if kind == "pattern" else own[:, :width]

    def _meet(self, point: HookPoint, asked: Sequence[tuple[int, _AtPoint]], value: Tensor) -> Tensor:
        """Let every run do at a point what it wants there; `value` has the point's own shape. Without a write or an edge it is returned itself."""
        if self.is_derived and any(at.wants_edge for _, at in asked):
            value = value.clone() if point.side == "stream" else value.view_as(value)
            self.edges[point.name] = get_gradient_edge(value)
        changed = value.clone() if any(at.writes for _, at in asked) else value
        for i, at in asked:
            run = self.runs[i]
            if run.error is None:
                try:
                    run.meet(at, value, changed, partial(self._window, i, point.kind))
                except InterpError as error:
                    error.point = error.point or point.name
                    run.error = error
        self.left.discard(point.name)
        going = [run for run in self.runs if run.error is None]
        if not going or not (self.left or any(run.metrics for run in going)):
            raise _AllReadError
        return changed

    def _derive(self, number: int) -> None:
        """Take the derivatives of every run's operation of this number, by one backward."""
        asked = [(run, run.derived[number]) for run in self.runs if run.error is None and number < len(run.derived)]
        if not asked:
            return
        names = list(dict.fromkeys(at.point.name for run, operation in asked for at in run.derived_at[operation.name]))
        is_last = not any(number + 1 < len(run.derived) for run, _ in asked)
        total = torch.cat([run.values[operation.of] for run, operation in asked]).sum()
        found = torch.autograd.grad(total, [self.edges[name] for name in names], retain_graph=not is_last, allow_unused=True)
        gradients: dict[str, Tensor | None] = dict(zip(names, found, strict=True))
        suspicious = {name for name, gradient in gradients.items() if gradient is not None and not math.isfinite(float(gradient.sum()))}
        windows = {
            name: [None] * len(self.runs) if gradient is None else self._windows(gradient, name.partition(".")[0])
            for name, gradient in gradients.items()
        }

        def take(i: int, run: Run) -> None:
            if number < len(run.derived):
                run.derive(run.derived[number], {name: of_runs[i] for name, of_runs in windows.items()}, suspicious)

        self._each(take)


def _pad(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None]:
    """Return token ids padded on the right, and which of them are none; no mask where no row is padded."""
    lengths = [len(row) for row in rows]
    longest = max(lengths)
    if min(lengths) == longest:
        return torch.tensor(rows), None
    token_ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    return token_ids, torch.arange(longest)[None, :] < torch.tensor(lengths)[:, None]


def _start_graph(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
    return output.requires_grad_()


def _check_finite(value: Tensor, name: str) -> None:
    if not value.is_floating_point() or math.isfinite(float(value.sum())):  # a NaN or an infinity leaves no sum finite
        return
    if not bool(torch.isfinite(value).all()):
        place = (~torch.isfinite(value)).nonzero()[0].tolist()
        raise NonFiniteError(f"{name} is {float(value[tuple(place)])} at {place}. Run the model in float32, or write smaller values.")
