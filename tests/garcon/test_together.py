"""Plans of several people in one forward: each gets what it gets alone, and what goes wrong with one is its own."""

import re
from typing import Any

import pytest
import torch
from tiny_models import D_MODEL, ENCODERS, INSIDE, make_subject, make_tokenizer

from interp_assets.errors import CancelledError, InputError, NonFiniteError
from interp_assets.garcon.backend import Answer
from interp_assets.garcon.plan import (
    Add,
    Attribute,
    Freeze,
    Grad,
    LogitDiff,
    LogProb,
    Loss,
    Patch,
    Plan,
    ProjectOut,
    Read,
    ReadName,
    Scale,
    TensorName,
    name_tensor,
)
from interp_assets.garcon.run import Run, run_plan, run_together
from interp_assets.garcon.session import Model
from interp_assets.garcon.subject import SubjectModel

VECTOR = torch.linspace(-1, 1, D_MODEL)
TENSORS: dict[str, torch.Tensor] = {}


def _name(tensor: torch.Tensor) -> TensorName:
    name = name_tensor(tensor)
    TENSORS[name.tensor] = tensor
    return name


def _rows(*texts: str) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(text.encode()) for text in texts)


def _plans(subject: SubjectModel, *, derived: bool = False) -> list[Plan]:
    """Return different plans over different texts, of unequal length, some of several rows."""
    whole = run_plan(subject, Plan(rows=_rows("hallo"), operations=(Read(name="a", point="z.1"), Read(name="p", point="pattern.1"))), {}).tensors
    vector = _name(VECTOR)
    d = LogitDiff(name="d", token=5, other=9)
    plans: list[tuple[tuple[str, ...], list[Any]]] = [
        (("hello wine",), [Read(name="a", point="resid_post.1"), Read(name="p", point="pattern.1"), Add(point="resid_pre.1", value=vector)]),
        (("hello", "hello wine"), [Scale(point="z.0", times=0.5, rows=(1,)), Read(name="a", point="z.1", pos=-1, heads=(1,)), d]),
        (("hello",), [Patch(point="z.1", value=_name(whole["a"]), pos=(0, 3)), Read(name="a", point="z.1", after=True), Loss(name="l")]),
        (("hello",), [Patch(point="pattern.1", value=_name(whole["p"])), Read(name="a", point="resid_post.1"), LogProb(name="o", token=7)]),
        (
            ("hello", "wine!"),
            [Read(name="a", point="resid_post.0", rows=(1,)), Patch(point="resid_post.0", value=ReadName(read="a"), rows=(0,)), d],
        ),
        (("hello wi",), [Freeze(points=("pattern.0", "pattern.1")), ProjectOut(point="resid_pre.0", value=vector), d]),
        (("wines",), [Patch(point="mlp_out.0", value="mean"), Read(name="a", point="logits")]),
    ]
    made = []
    for texts, operations in plans:
        asked = [operation for operation in operations if operation is not d or not derived]
        if derived:
            asked += [d, Grad(name="g", of="d", at=("resid_post.0", "z.1", "pattern.1"))]
            asked += [Attribute(name="t", of="d", at=("z.0",), source="zero")]
        made.append(Plan(rows=_rows(*texts), operations=tuple(asked)))
    return made


def _run(subject: SubjectModel, plan: Plan) -> Run:
    return Run(subject, plan, TENSORS)


def _assert_alike(found: Answer, expected: Answer) -> None:
    torch.testing.assert_close(found.tensors, expected.tensors, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.derivatives, expected.derivatives, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "derived"),
    [*((kind, False) for kind in INSIDE if kind not in ENCODERS), *((kind, True) for kind in ("gpt2", "gptj", "gemma2", "gpt_oss", "opt"))],
)
def test_every_plan_gets_what_it_gets_alone(kind: str, derived: bool) -> None:
    """Reads, writes, freezes and metrics, over rows of unequal length; derivatives from one backward."""
    subject = make_subject(kind)
    plans = _plans(subject, derived=derived)
    answers = run_together([_run(subject, plan) for plan in plans])
    for plan, answer in zip(plans, answers, strict=True):
        assert isinstance(answer, Answer)
        assert answer.batch == (10, 10)
        _assert_alike(answer, run_plan(subject, plan, TENSORS))


def test_encoders_share_too() -> None:
    """Their rows see both ways, and no padding, neither their own nor the others'."""
    subject = make_subject("bert")
    reads = (Read(name="a", point="resid_post.1"), Read(name="p", point="pattern.1"), Scale(point="resid_pre.1", times=0.5))
    plans = [Plan(rows=_rows(text), operations=reads) for text in ("hello wine", "hallo", "x")]
    for plan, answer in zip(plans, run_together([_run(subject, plan) for plan in plans]), strict=True):
        assert isinstance(answer, Answer)
        _assert_alike(answer, run_plan(subject, plan, {}))


def test_a_run_alone_says_its_own_shape() -> None:
    """Bits follow the shape of the batch, so an answer names it; rows that a freeze adds count."""
    subject = make_subject("gpt2")
    assert run_plan(subject, Plan(rows=_rows("hello", "hi"), operations=(Read(name="a", point="z.0"),)), {}).batch == (2, 5)
    frozen = Plan(rows=_rows("hello"), operations=(Freeze(points=("pattern.0",)), Read(name="a", point="z.0")))
    assert run_plan(subject, frozen, {}).batch == (2, 5)


@pytest.mark.parametrize(
    ("operations", "kind", "message"),
    [
        ([Scale(point="resid_post.0", times=1e38)] * 2 + [Read(name="a", point="resid_post.1")], NonFiniteError, "a is "),
        ([Patch(point="z.0", value=_name(torch.zeros(2, 7)))], InputError, "at 'z.0' has shape [2, 7]; expected [1, 5, 2, 8]"),
        ([LogitDiff(name="d", token=5, other=9999)], InputError, "names the tokens [9999]"),
        ([Add(point="z.0", value=name_tensor(torch.ones(3)))], InputError, "does not lie beside it"),
    ],
)
@pytest.mark.parametrize("derived", [False, True])
def test_what_goes_wrong_with_one_is_its_error_alone(operations: list[Any], kind: type[InputError], message: str, derived: bool) -> None:
    """Whoever shares a forward with a mistake must not notice."""
    subject = make_subject("gpt2")
    plans = _plans(subject, derived=derived)
    wrong = Plan(rows=_rows("hello"), operations=tuple(operations))
    with pytest.raises(kind, match=re.escape(message)):
        run_plan(subject, wrong, TENSORS)
    answers = run_together([_run(subject, plan) for plan in (plans[0], wrong, plans[1])])
    assert type(answers[1]) is kind
    assert message in str(answers[1])
    for plan, answer in zip(plans[:2], (answers[0], answers[2]), strict=True):
        assert isinstance(answer, Answer)
        _assert_alike(answer, run_plan(subject, plan, TENSORS))


def test_who_is_dropped_on_the_way_reaches_nothing_any_more() -> None:
    """His acts end, the others' numbers are theirs."""
    subject = make_subject("gpt2")
    plans = _plans(subject)[:2]
    runs = [_run(subject, plan) for plan in plans]
    runs[0].error = CancelledError("gone")
    first, second = run_together(runs)
    assert first is runs[0].error
    assert not runs[0].found
    assert isinstance(second, Answer)
    _assert_alike(second, run_plan(subject, plans[1], TENSORS))


def test_all_end_where_the_last_point_of_those_who_go_on_is() -> None:
    """One who only reads early lets the forward end early, also when the one who wanted more has failed."""
    llm = Model(make_subject("llama"), make_tokenizer())
    fired: list[int] = []
    last = llm.subject.net.get_submodule("model.layers.1").register_forward_hook(lambda *_: fired.append(1))
    try:
        early = Plan(rows=_rows("hello"), operations=(Read(name="a", point="resid_post.0"),))
        late = Plan(rows=_rows("hello"), operations=(Patch(point="z.0", value=_name(torch.zeros(7))), Read(name="a", point="resid_post.1")))
        run_together([_run(llm.subject, early), _run(llm.subject, early)])
        assert not fired
        answers = run_together([_run(llm.subject, early), _run(llm.subject, late)])
    finally:
        last.remove()
    assert isinstance(answers[0], Answer)
    assert isinstance(answers[1], InputError)


def test_an_error_names_operation_and_point() -> None:
    """A page or a program can show where, without reading the sentence."""
    subject = make_subject("gpt2")
    for operation in (Read(name="a", point="z.1", pos=10), Scale(point="z.1", times=2.0, heads=(5,))):
        with pytest.raises(InputError) as caught:
            _run(subject, Plan(rows=_rows("hello"), operations=(operation,)))
        assert (caught.value.op, caught.value.point) == (operation.op, "z.1")
