"""One thread, many people: forwards are shared, mistakes and departures are not."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import pytest
import torch
from model_server import Clock
from tiny_models import D_MODEL, make_net
from torch import nn

from interp_assets.errors import BusyError, CancelledError, InputError, NoRoomError, OverdueError, ServiceError
from interp_assets.garcon.features import AttachedSae
from interp_assets.garcon.plan import Add, Grad, LogitDiff, Operation, Plan, Read, SaeClamp, Scale, name_tensor
from interp_assets.garcon.points import find_point, module_of
from interp_assets.garcon.remote.batch import Line, ModelThread, Ticket
from interp_assets.garcon.run import run_plan
from interp_assets.garcon.subject import SubjectModel
from interp_assets.garcon.sweep import begin_sweep, run_sweep
from interp_assets.train.sae import Sae

READ = (Read(name="a", point="resid_post.1"),)
D = LogitDiff(name="d", token=5, other=9)
LONG = 60.0


class Gate:
    """Holds a model's forward at its first block until the test lets it go on."""

    def __init__(self, subject: SubjectModel) -> None:
        """Stand before block 0."""
        self.entered, self.open, self.rows = threading.Semaphore(0), threading.Event(), list[int]()
        module_of(subject.net, find_point(subject.net, "resid_pre.0")).register_forward_pre_hook(self._wait)

    def _wait(self, _module: Any, args: Any) -> None:
        self.rows.append(len(args[0]))
        self.entered.release()
        assert self.open.wait(LONG)


class Desk:
    """A model's thread, a gate before its first block, and a clock."""

    def __init__(self, line: Line | None = None, *, is_gated: bool = True, trap: Callable[[nn.Module, Any], None] | None = None) -> None:
        """Begin; a trap is called with the last block and what enters it."""
        self.subject, self.clock = SubjectModel(make_net("gpt2"), "tiny gpt2"), Clock()
        if trap:
            module_of(self.subject.net, find_point(self.subject.net, "resid_pre.1")).register_forward_pre_hook(trap)
        self.gate = Gate(self.subject)
        if not is_gated:
            self.gate.open.set()
        self.thread = ModelThread(self.subject, line=line, clock=self.clock)

    def ask(self, user: str, text: str = "hello", *operations: Operation, **options: Any) -> Ticket:
        """Ask for a plan over a text."""
        return self.thread.ask(user, _plan(text, *operations), {}, **options)

    def hold(self) -> Ticket:
        """Have a first request stand at the gate, so that what comes after it waits together."""
        ticket = self.ask("first")
        assert self.gate.entered.acquire(timeout=LONG)
        return ticket

    def go(self) -> None:
        """Let everybody through."""
        self.gate.open.set()


@pytest.fixture
def make_desk() -> Iterator[Callable[..., Desk]]:
    """What makes desks, and ends their threads."""
    made: list[Desk] = []

    def make(line: Line | None = None, **options: Any) -> Desk:
        made.append(Desk(line, **options))
        return made[-1]

    yield make
    for desk in made:
        desk.go()
        desk.thread.close()


def _plan(text: str, *operations: Operation) -> Plan:
    return Plan(rows=(tuple(text.encode()),), operations=operations or READ)


def test_those_who_wait_share_one_forward(make_desk: Callable[..., Desk]) -> None:
    """Same kind, within twice the length; the answer says the batch's shape."""
    desk = make_desk()
    first = desk.hold()
    texts = ["hello", "hello wine", "hallo", "wine!"]
    tickets = [desk.ask(f"user {i}", text) for i, text in enumerate(texts)]
    far = desk.ask("user 9", "x" * 25)
    gradient = desk.ask("user 8", "hello", D, Grad(name="g", of="d", at=("z.0",)))
    alone = desk.ask("user 7", "hello", exact=True)
    desk.go()
    answers = [ticket.future.result(LONG) for ticket in tickets]
    assert {answer.batch for answer in answers} == {(4, 10)}
    assert [ticket.future.result(LONG).batch for ticket in (first, far, gradient, alone)] == [(1, 5), (1, 25), (1, 5), (1, 5)]
    assert desk.thread.n_forwards == 5
    for text, answer in zip(texts, answers, strict=True):
        torch.testing.assert_close(answer.tensors, run_plan(desk.subject, _plan(text), {}).tensors, rtol=1e-5, atol=1e-5)
    expected = run_plan(desk.subject, _plan("hello"), {}).tensors["a"]
    assert torch.equal(alone.future.result().tensors["a"], expected)


def test_eight_threads_of_different_plans_get_what_serial_ones_get(make_desk: Callable[..., Desk]) -> None:
    """Reads, writes and gradients of people who know nothing of each other."""
    desk = make_desk(is_gated=False)
    vector = torch.linspace(-1, 1, D_MODEL)
    name = name_tensor(vector)
    plans = []
    for i in range(8):
        operations = [Add(point="resid_pre.1", value=name, times=i / 4, pos=-1), Read(name="a", point=f"z.{i % 2}"), D]
        plans.append(_plan("hello wine, and more"[: 10 + i], *operations, *((Grad(name="g", of="d", at=("resid_post.0",)),) if i % 3 else ())))

    def ask(i: int) -> list[Any]:
        return [desk.thread.ask(f"user {i}", plans[i], {name.tensor: vector}).future.result(LONG) for _ in range(5)]

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(8)))
    for plan, found in zip(plans, answers, strict=True):
        expected = run_plan(desk.subject, plan, {name.tensor: vector})
        for answer in found:
            torch.testing.assert_close(answer.tensors, expected.tensors, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(answer.derivatives, expected.derivatives, rtol=1e-5, atol=1e-5)
    assert desk.thread.n_forwards <= 40


def test_a_mistake_is_refused_alone(make_desk: Callable[..., Desk]) -> None:
    """Before the line where it can be seen there; inside the forward it is its owner's."""
    desk = make_desk()
    desk.hold()
    with pytest.raises(InputError, match=r"Positions \[99\]"):
        desk.ask("wrong", "hello", Read(name="a", point="z.1", pos=99))
    overflow = desk.ask("b", "hello", Scale(point="resid_post.0", times=1e38), Scale(point="resid_post.0", times=1e38), *READ)
    right = desk.ask("a")
    desk.go()
    assert right.future.result(LONG).batch == (2, 5)
    with pytest.raises(InputError, match="a is"):
        overflow.future.result(LONG)


def test_what_fails_as_a_whole_is_run_one_by_one(make_desk: Callable[..., Desk]) -> None:
    """Only whose own forward fails too is told so."""

    def fail(_block: nn.Module, args: Any) -> None:
        if args[0].shape[1] == 7:
            message = "a kernel gave up"
            raise RuntimeError(message)

    desk = make_desk(trap=fail)
    desk.hold()
    short, long = desk.ask("a", "hello"), desk.ask("b", "1234567")
    desk.go()
    with pytest.raises(RuntimeError, match="a kernel gave up"):
        long.future.result(LONG)
    assert short.future.result(LONG).batch == (1, 5)


def test_what_does_not_fit_the_memory_is_halved(make_desk: Callable[..., Desk]) -> None:
    """Down to one; who alone is too large is told to ask for less."""

    def fill(_block: nn.Module, args: Any) -> None:
        if len(args[0]) > 2:
            raise torch.OutOfMemoryError

    desk = make_desk(trap=fill)
    desk.hold()
    tickets = [desk.ask(f"user {i}") for i in range(4)]
    rows = tuple(tuple(b"hello") for _ in range(3))
    large = desk.thread.ask("large", Plan(rows=rows, operations=READ), {}, exact=True)
    desk.go()
    assert [ticket.future.result(LONG).batch for ticket in tickets] == [(2, 5)] * 4
    with pytest.raises(NoRoomError, match="does not fit the memory"):
        large.future.result(LONG)


def test_who_goes_away_is_dropped_at_the_next_block(make_desk: Callable[..., Desk]) -> None:
    """The others get theirs; when nobody is left the forward ends there, and no hook stays."""
    late: list[int] = []
    desk = make_desk(trap=lambda _, args: late.append(len(args[0])))
    gone = desk.hold()
    desk.thread.cancel(gone)
    desk.go()
    with pytest.raises(CancelledError):
        gone.future.result(LONG)
    assert not late
    desk.gate.open.clear()
    desk.hold()
    tickets = [desk.ask("a"), desk.ask("b")]
    desk.go()
    assert [ticket.future.result(LONG).batch for ticket in tickets] == [(2, 5)] * 2
    assert late == [1, 2]
    assert not desk.thread.stopped


def test_who_goes_away_during_a_backward_is_dropped_at_the_next_block(make_desk: Callable[..., Desk]) -> None:
    """It would have gone on to the embedding; the others get their derivatives, no hook stays, and the next is answered."""
    leaving: list[Ticket] = []

    def leave(_block: nn.Module, args: Any) -> None:
        if args[0].requires_grad:
            args[0].register_hook(lambda _: [desk.thread.cancel(ticket) for ticket in leaving] and None)

    desk = make_desk(trap=leave)
    reached: list[int] = []
    first = module_of(desk.subject.net, find_point(desk.subject.net, "resid_pre.0"))
    first.register_forward_pre_hook(lambda _, args: args[0].requires_grad and args[0].register_hook(lambda _: reached.append(1)) and None)
    derived = (D, Grad(name="g", of="d", at=("embed", "resid_post.0")))
    desk.hold()
    leaving.append(desk.ask("gone", "hello", *derived))
    desk.go()
    with pytest.raises(CancelledError):
        leaving[0].future.result(LONG)
    assert not reached
    desk.gate.open.clear()
    desk.hold()
    leaving[:] = [desk.ask("gone", "hello", *derived)]
    stays = desk.ask("stays", "hallo", *derived)
    desk.go()
    with pytest.raises(CancelledError):
        leaving[0].future.result(LONG)
    expected = run_plan(desk.subject, _plan("hallo", *derived), {}).derivatives
    assert stays.future.result(LONG).batch == (2, 5)
    torch.testing.assert_close(stays.future.result(LONG).derivatives, expected, rtol=1e-5, atol=1e-5)
    assert reached
    assert not desk.thread.stopped


def test_who_waits_and_goes_away_leaves_the_line_at_once(make_desk: Callable[..., Desk]) -> None:
    """His place is free before the forward that he waited for is over."""
    desk = make_desk(Line(in_flight=1))
    desk.hold()
    waiting = desk.ask("a")
    with pytest.raises(BusyError, match="You have 1 requests here"):
        desk.ask("a")
    desk.thread.cancel(waiting)
    with pytest.raises(CancelledError, match="taken back"):
        waiting.future.result(0)
    assert desk.thread.n_waiting == 0
    again = desk.ask("a")
    desk.go()
    assert again.future.result(LONG).batch == (1, 5)


def test_time_is_over_in_the_line_and_inside_a_forward(make_desk: Callable[..., Desk]) -> None:
    """From a request's arrival on."""
    desk = make_desk(Line(seconds=60.0))
    running = desk.hold()
    waiting = desk.ask("a")
    desk.clock.now += 61
    fresh = desk.ask("b")
    desk.go()
    for ticket in (running, waiting):
        with pytest.raises(OverdueError, match=r"no answer within 60 s\. Ask for less"):
            ticket.future.result(LONG)
    assert fresh.future.result(LONG).batch == (1, 5)


def test_the_line_has_an_end(make_desk: Callable[..., Desk]) -> None:
    """Who comes too late hears it at once instead of after a minute."""
    desk = make_desk(Line(queued=2))
    desk.hold()
    tickets = [desk.ask("a"), desk.ask("b")]
    with pytest.raises(BusyError, match="2 requests wait for this model"):
        desk.ask("c")
    desk.go()
    assert all(ticket.future.result(LONG) for ticket in tickets)
    assert desk.ask("c").future.result(LONG)


def test_a_crosscoders_first_forward_gets_in_line_too(make_desk: Callable[..., Desk]) -> None:
    """It is what the plan is resolved by; run where it was asked for, its hooks met the forward of whoever had the model."""
    desk = make_desk()
    W = torch.linspace(-1, 1, 2 * D_MODEL * 6).reshape(2 * D_MODEL, 6)
    sae = Sae(kind="relu", W_enc=W, b_enc=torch.zeros(6), W_dec=W.T, b_dec=torch.zeros(2 * D_MODEL), threshold=torch.zeros(6), k=0)
    desk.thread.saes = {"c": AttachedSae(sae, "resid_post.0", more=("resid_post.1",))}
    first = desk.hold()
    operations = (SaeClamp(point="resid_post.0", sae="c", latents=(2,), values=(3.0,)), *READ)
    ticket = desk.ask("a", "hello", *operations)
    assert desk.gate.rows == [1]
    desk.go()
    assert first.future.result(LONG)
    answer = ticket.future.result(LONG)
    torch.testing.assert_close(answer.tensors, run_plan(desk.subject, _plan("hello", *operations), {}, desk.thread.saes).tensors)
    wrong = desk.ask("a", "hello", SaeClamp(point="resid_post.1", sae="c", latents=(2,), values=(3.0,)))
    with pytest.raises(InputError, match="The crosscoder 'c' belongs to"):
        wrong.future.result(LONG)


def test_a_hook_that_stays_stops_the_model(make_desk: Callable[..., Desk]) -> None:
    """Everybody's later answers would be wrong."""
    desk = make_desk(is_gated=False, trap=lambda block, _: block.register_forward_hook(lambda *_: None) and None)
    assert desk.ask("a").future.result(LONG)

    def ask_again() -> None:
        desk.ask("b").future.result(LONG)

    with pytest.raises(ServiceError, match=r"is served no more: after a run it had \d+ hooks, before it \d+\. Start the server again"):
        ask_again()
    assert "served no more" in desk.thread.stopped


def test_a_job_lets_others_between_its_steps(make_desk: Callable[..., Desk]) -> None:
    """A sweep of minutes must not hold up a read of milliseconds; it can be ended."""
    desk = make_desk(is_gated=False)
    row, order = tuple(b"hello"), []

    def steps() -> Any:
        inner = begin_sweep(desk.subject, row, ["resid_post.0"], "zero", D, "position")
        order.append("begin")
        yield (0, 5)
        others = [desk.ask("a"), desk.ask("b")]
        while True:
            order.append([ticket.state for ticket in others])
            try:
                next(inner)
            except StopIteration as end:
                return end.value
            yield (1, 5)

    base, cells = desk.thread.start("sweeper", steps()).future.result(LONG)
    expected = run_sweep(desk.subject, row, ["resid_post.0"], "zero", D, "position")
    assert base == expected[0]
    assert torch.equal(cells, expected[1])
    assert order[-1] == ["done", "done"]
    endless = desk.thread.start("sweeper", ((i, 0) for i in count()))
    desk.thread.cancel(endless)
    with pytest.raises(CancelledError):
        endless.future.result(LONG)
