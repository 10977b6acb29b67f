"""Requests of several people become forwards of one model: whoever asks at the same time shares one.

One thread owns a model. Again and again it

1. takes the oldest request, and with it all that fit: of the same kind (forward or gradient), padded to at most twice the shorter length,
   within the batch's bounds;
2. waits `COMPANY_S` for company first, but only if somebody else came within the last `RECENT_S`: who is alone waits for nobody;
3. runs them as rows of one forward (`run_together`) and gives everybody what is theirs.

What is refused is refused before it gets in line, alone. What fails inside a shared forward fails for everybody, so each is then run by itself.
Who went away, or whose time is over, is dropped at the next block of the forward or its backward: his acts no longer take place, and if nobody else
waits it ends there.
What does not fit the memory is halved. A job (a sweep) comes in steps, between which others have their turn.

A hook that a run leaves behind would change everybody's later answers, so a count of hooks that differs after a run stops the model.
"""

import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from interp_assets.errors import BusyError, CancelledError, NoRoomError, OverdueError, ServiceError
from interp_assets.garcon.crosscoders import uses_crosscoder
from interp_assets.garcon.features import AttachedSae
from interp_assets.garcon.plan import Plan
from interp_assets.garcon.run import Run, run_plan, run_together
from interp_assets.garcon.subject import SubjectModel
from interp_assets.garcon.taps import watched_blocks
from interp_assets.planning.progress import format_count

COMPANY_S: Final = 0.002
RECENT_S: Final = 0.05
BATCH_ROWS: Final = 64
BATCH_TOKENS: Final = 32_768
"""Positions of a shared forward, padding too. A request that is larger runs alone."""
_logger = logging.getLogger(__name__)

Steps = Generator[tuple[int, int], None, Any]
"""A job: what is done, and of how much, after each step; what it returns is its result."""


class Line(NamedTuple):
    """How much one model takes on."""

    seconds: float = 60.0
    """From a request's arrival to its answer."""
    in_flight: int = 4
    """Requests of one user that wait or run."""
    queued: int = 64
    """Requests of all users that wait."""


class Ticket:
    """A request that was taken on: its answer comes as `future`."""

    def __init__(self, user: str, clock: Callable[[], float], seconds: float) -> None:
        """`seconds` is the time it has."""
        self.user, self.future = user, Future[Any]()
        self.future.set_running_or_notify_cancel()  # from now on only the thread decides how it ends
        self.progress: tuple[int, int] = (0, 0)
        """What is done, and of how much."""
        self.is_running = False
        self.ended: float | None = None
        """When its answer came."""
        self.is_cancelled = threading.Event()
        self._clock, self._seconds, self._end = clock, seconds, clock() + seconds

    @property
    def state(self) -> str:
        """`waiting`, `running`, `done` or `failed`."""
        if self.future.done():
            return "failed" if self.future.exception() else "done"
        return "running" if self.is_running else "waiting"

    def find_end(self) -> ServiceError | None:
        """Return why it must not go on, if so."""
        if self.is_cancelled.is_set():
            return CancelledError("The request was taken back before it was answered.")
        if self._clock() > self._end:
            return OverdueError(f"There was no answer within {self._seconds:g} s. Ask for less: fewer rows, points or tokens; or come again.")
        return None

    def answer(self, value: object) -> None:
        """Give the answer, or the error."""
        self.ended = self._clock()
        if isinstance(value, BaseException):
            self.future.set_exception(value)
        else:
            self.future.set_result(value)


class _Asked(Ticket):
    """A plan."""

    def __init__(self, user: str, clock: Callable[[], float], seconds: float, make: Callable[[], Run]) -> None:
        super().__init__(user, clock, seconds)
        run = make()
        self._make = make
        self._run: Run | None = run
        self.is_alone = run.exact or not run.can_share
        self.is_gradient, self.n_rows, self.longest = bool(run.derived), len(run.lengths), max(run.lengths)

    def take_run(self) -> Run:
        """Return a run that has not been used."""
        run = self._run or self._make()
        self._run = None
        return run


class _Job(Ticket):
    """Steps."""

    def __init__(self, user: str, clock: Callable[[], float], seconds: float, steps: Steps) -> None:
        super().__init__(user, clock, seconds)
        self.steps = steps


class ModelThread:
    """A model and the thread that runs it. Every method may be called from any thread."""

    def __init__(
        self,
        subject: SubjectModel,
        saes: Mapping[str, AttachedSae] | None = None,
        line: Line | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the thread."""
        self.subject, self.saes, self.line = subject, saes or {}, line or Line()
        self.stopped = ""
        """Why nothing is run any more; empty while all is well."""
        self.n_forwards, self.n_answered = 0, 0
        self._clock = clock
        self._changed = threading.Condition()
        self._waiting: deque[_Asked | _Job] = deque()
        self._in_flight: Counter[str] = Counter()
        self._came: deque[tuple[float, str]] = deque(maxlen=64)
        self._is_open = True
        self._thread = threading.Thread(target=self._work, name=f"model {subject.name}", daemon=True)
        self._thread.start()

    @property
    def n_waiting(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    def ask(self, user: str, plan: Plan, tensors: Mapping[str, Tensor], *, exact: bool = False) -> Ticket:
        """Get in line with a plan. Raises `InputError` for what does not fit the model, and `BusyError` when too many wait."""
        if uses_crosscoder(plan, self.saes):

            def steps() -> Steps:
                yield 0, 1  # from here on in the thread: to resolve this plan takes a forward
                return run_plan(self.subject, plan, tensors, self.saes, exact=exact)

            return self._enter(_Job(user, self._clock, self.line.seconds, steps()))
        return self._enter(_Asked(user, self._clock, self.line.seconds, lambda: Run(self.subject, plan, tensors, self.saes, exact=exact)))

    def start(self, user: str, steps: Steps) -> Ticket:
        """Get in line with a job. Raises `BusyError` when too many wait."""
        return self._enter(_Job(user, self._clock, math.inf, steps))

    def cancel(self, ticket: Ticket) -> None:
        """Take a request back: out of the line, or at the next block. Nothing happens to one that was answered."""
        ticket.is_cancelled.set()
        with self._changed:
            is_waiting = ticket in self._waiting
            if is_waiting:
                self._waiting.remove(ticket)  # type: ignore[arg-type]
        if is_waiting:
            self._is_over(ticket)

    def close(self) -> None:
        """End the thread after what it is doing."""
        with self._changed:
            self._is_open = False
            self._changed.notify_all()
        self._thread.join()
        for ticket in self._waiting:
            ticket.answer(ServiceError("The server is stopping."))

    def _enter(self, ticket: "_Asked | _Job") -> Ticket:
        with self._changed:
            if self.stopped or not self._is_open:
                raise ServiceError(self.stopped or "The server is stopping.")
            if self._in_flight[ticket.user] >= self.line.in_flight:
                raise BusyError(f"You have {self.line.in_flight} requests here that are not answered yet. Wait for one of them.")
            if len(self._waiting) >= self.line.queued:
                raise BusyError(f"{format_count(len(self._waiting), 'request')} wait for this model. Come again in a second.")
            self._in_flight[ticket.user] += 1
            self._waiting.append(ticket)
            self._came.append((self._clock(), ticket.user))
            self._changed.notify_all()
        ticket.future.add_done_callback(lambda _: self._leave(ticket.user))
        return ticket

    def _leave(self, user: str) -> None:
        with self._changed:
            self._in_flight -= Counter([user])
            self.n_answered += 1

    def _work(self) -> None:
        while tickets := self._take():
            before = _count_hooks(self.subject.net)
            first = tickets[0]
            outcomes = self._step(first) if isinstance(first, _Job) else self._run([ticket for ticket in tickets if isinstance(ticket, _Asked)])
            after = _count_hooks(self.subject.net)
            for ticket, answer in outcomes:
                ticket.answer(answer)
            if after != before:
                counts = f"after a run it had {after} hooks, before it {before}"
                self._stop(f"The model {self.subject.name} is served no more: {counts}. Start the server again.")

    def _stop(self, reason: str) -> None:
        _logger.error(reason)
        with self._changed:
            self.stopped = reason
            left = list(self._waiting)
            self._waiting.clear()
        for ticket in left:
            ticket.answer(ServiceError(reason))

    def _take(self) -> "list[_Asked | _Job]":
        """Wait for a request and return it with its company; nothing when the thread shall end."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or not self._is_open)
                if not self._is_open:
                    return []
                first = self._waiting.popleft()
                if isinstance(first, _Asked) and not first.is_alone and not self._waiting and self._is_company_near(first.user):
                    self._changed.wait(COMPANY_S)
                company = self._choose(first) if isinstance(first, _Asked) else []
            taken = [ticket for ticket in (first, *company) if not self._is_over(ticket)]
            if taken:
                for ticket in taken:
                    ticket.is_running = True
                return taken

    def _is_company_near(self, user: str) -> bool:
        since = self._clock() - RECENT_S
        return any(came > since and other != user for came, other in self._came)

    def _choose(self, first: "_Asked") -> "list[_Asked | _Job]":
        """Take those that fit out of the line, the oldest first."""
        if first.is_alone:
            return []
        chosen: list[_Asked | _Job] = []
        n_rows, shortest, longest = first.n_rows, first.longest, first.longest
        for ticket in list(self._waiting):
            if not isinstance(ticket, _Asked) or ticket.is_alone or ticket.is_gradient != first.is_gradient:
                continue
            low, high = min(shortest, ticket.longest), max(longest, ticket.longest)
            rows = n_rows + ticket.n_rows
            if high <= 2 * low and rows <= BATCH_ROWS and rows * high <= BATCH_TOKENS:
                n_rows, shortest, longest = rows, low, high
                chosen.append(ticket)
                self._waiting.remove(ticket)
        return chosen

    def _is_over(self, ticket: Ticket) -> bool:
        if error := ticket.find_end():
            ticket.answer(error)
        return error is not None

    def _step(self, job: "_Job") -> "list[tuple[Ticket, Any]]":
        """Do the next step of a job, and put it back into the line; return how it ended, if so."""
        try:
            with watched_blocks(self.subject.net, lambda: _raise(job.find_end())):
                job.progress = next(job.steps)
        except StopIteration as done:
            return [(job, done.value)]
        except Exception as error:  # noqa: BLE001 - it is the job's answer
            return [(job, _explain(error))]
        with self._changed:
            self._waiting.append(job)
        return []

    def _run(self, tickets: "Sequence[_Asked]") -> "list[tuple[Ticket, Any]]":
        """Return the answers, or errors, of some requests by one forward; if it fails as a whole, each by one of its own."""
        runs = [ticket.take_run() for ticket in tickets]
        try:
            with watched_blocks(self.subject.net, lambda: _drop_ended(tickets, runs)):
                self.n_forwards += 1
                answers = run_together(runs)
        except _NobodyWaitsError:
            answers = [run.error for run in runs]
        except Exception as error:  # noqa: BLE001 - it is the answer, or a reason to run each by itself
            if len(tickets) > 1:
                n_beside = (len(tickets) + 1) // 2 if _is_no_room(error) else 1
                parts = [tickets[first : first + n_beside] for first in range(0, len(tickets), n_beside)]
                return [outcome for part in parts for outcome in self._run(part)]
            answers = [_explain(error)]
        return list(zip(tickets, answers, strict=True))


class _NobodyWaitsError(Exception):
    """Ends a forward of which nobody wants anything any more."""


def _drop_ended(tickets: "Sequence[_Asked]", runs: Sequence[Run]) -> None:
    for ticket, run in zip(tickets, runs, strict=True):
        run.error = run.error or ticket.find_end()
    if all(run.error for run in runs):
        raise _NobodyWaitsError


def _raise(error: Exception | None) -> None:
    if error:
        raise error


def _is_no_room(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _explain(error: Exception) -> Exception:
    if _is_no_room(error):
        return NoRoomError(
            "The forward does not fit the memory of the model's device. Ask for fewer or shorter rows, or for derivatives at fewer points."
        )
    return error


def _count_hooks(net: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) + ("_attn" in vars(module)) for module in net.modules())  # noqa: SLF001 - torch tells it nowhere else
