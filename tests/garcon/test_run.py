"""Plans over models: right values, derivatives that finite differences agree with, and an error for everything that did not happen."""

import re

import pytest
import torch
from tiny_models import D_MODEL, ENCODERS, INSIDE, make_net, make_subject, make_tokenizer
from torch import Tensor, nn

from interp_assets.errors import InputError, NonFiniteError
from interp_assets.garcon.plan import Add, Attribute, Grad, LogitDiff, Patch, Plan, Read, ReadName, name_tensor
from interp_assets.garcon.points import find_point, module_of
from interp_assets.garcon.run import run_plan
from interp_assets.garcon.session import Model
from interp_assets.garcon.subject import SubjectModel

DECODERS = [kind for kind in INSIDE if kind not in ENCODERS]
TEXTS = ["hello wine", "hallo"]
ROWS = tuple(tuple(text.encode()) for text in TEXTS)
STEP = 7e-4
"""Of finite differences: RMS norms and softmaxes compute in float32 even in a float64 model, which leaves an error of some 1e-7 / STEP."""
DIFFERENCE = LogitDiff(name="d", token=5, other=9)


@pytest.fixture
def llm() -> Model:
    """A tiny GPT-2 with one token a byte."""
    return Model(make_subject("gpt2"), make_tokenizer())


def _n_hooks(net: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) + ("_attn" in vars(module)) for module in net.modules())


@pytest.mark.parametrize("kind", DECODERS)
def test_derivatives_are_those_of_finite_differences_at_every_point(kind: str) -> None:
    """In float64, over rows of unequal length; in the middle of a block too, where the stream goes two ways."""
    net = make_net(kind).double()
    if kind == "gpt_oss":
        net.set_experts_implementation("eager")  # the fast one takes no float64
    subject = SubjectModel(net)
    names = [point.name for point in subject.points() if point.kind != "logits"]
    found = run_plan(subject, Plan(rows=ROWS, operations=(DIFFERENCE, Grad(name="g", of="d", at=tuple(names)))), {}).derivatives["g"]
    generator = torch.Generator().manual_seed(3)
    for name in (name for name in names if not name.endswith(".0")):
        direction = torch.randn(found[name].shape, generator=generator)
        given = name_tensor(direction)
        ends = []
        for times in (STEP, -STEP):
            operations = (Add(point=name, value=given, times=times), DIFFERENCE)
            ends.append(run_plan(subject, Plan(rows=ROWS, operations=operations), {given.tensor: direction}).tensors["d"].sum())
        along = found[name] * direction
        (along[1, :, 5:] if name.startswith("pattern") else along[1, 5:]).zero_()  # padding is not written
        torch.testing.assert_close((ends[0] - ends[1]) / (2 * STEP), along.sum(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", INSIDE)
def test_rows_of_a_batch_are_what_each_is_alone(kind: str) -> None:
    """Shorter rows are padded: no number of theirs may come from padding, no write of one row may reach another."""
    subject = make_subject(kind)
    names = ["resid_pre.1", "z.0", "q.1", "resid_post.1", "attn_in.1"]
    vector = torch.linspace(-1, 1, D_MODEL)
    given = name_tensor(vector)
    reads = tuple(Read(name=name, point=name, after=True) for name in names)
    both = run_plan(
        subject, Plan(rows=ROWS, operations=(*reads, Add(point="resid_pre.1", value=given, rows=(1,), pos=(0, -1)))), {given.tensor: vector}
    ).tensors
    alone = [
        run_plan(subject, Plan(rows=ROWS[:1], operations=reads), {}).tensors,
        run_plan(
            subject, Plan(rows=ROWS[1:], operations=(*reads, Add(point="resid_pre.1", value=given, pos=(0, -1)))), {given.tensor: vector}
        ).tensors,
    ]
    for name in names:
        torch.testing.assert_close(both[name][0], alone[0][name][0], rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(both[name][1, :5], alone[1][name][0], rtol=1e-5, atol=2e-6)
        assert both[name][1, 5:].eq(0).all()


def test_parts_are_read_as_python_counts_them(llm: Model) -> None:
    """Negative positions count from the end of each row, padded or not; a single one takes its axis away."""
    with llm.trace(TEXTS) as t:
        whole, last, some = t.read("z.1"), t.read("z.1", pos=-1), t.read("z.1", pos=slice(-2, None), heads=[1])
        token, one = t.read("z.1", pos="w", rows=0), t.read("z.1", pos=[3, 0], rows=[1])
        pattern, query = t.read("pattern.0", heads=[1]), t.read("pattern.0", pos=-1)
    assert torch.equal(last.tensor, torch.stack([whole.tensor[0, 9], whole.tensor[1, 4]]))
    assert torch.equal(some.tensor[1], whole.tensor[1, 3:5, [1]])
    assert some.tokens == [["n", "e"], ["l", "o"]]
    assert torch.equal(one.tensor[0], whole.tensor[1, [3, 0]])
    assert torch.equal(pattern.tensor[1, 0, 4], query.tensor[1, 1])
    assert pattern.tensor[0].shape == (1, 10, 10)
    assert (whole.axes, last.axes, pattern.axes) == (
        ("row", "position", "head", "dimension"),
        ("row", "head", "dimension"),
        ("row", "head", "position", "key"),
    )
    assert torch.equal(token.tensor[0], whole.tensor[0, 6])


@pytest.mark.parametrize("kind", DECODERS)
def test_a_patch_from_another_run_is_what_own_hooks_do(kind: str) -> None:
    """The oracle writes the head's slice by a hook of its own."""
    llm = Model(make_subject(kind), make_tokenizer())
    clean = llm.run("hallo wein", read=["z.*", "resid_post.0"])
    with llm.trace("hello wine") as t:
        t.patch("z.1", clean["z.1"], heads=[1], pos=[2, 5])
        t.patch("blocks.0.hook_resid_post", clean["resid_post.0"], pos=1)
        logits = t.read("logits")
    subject, tokens = llm.subject, torch.tensor(llm.tokenize("hello wine"))

    def put_head(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        value = args[0].clone().unflatten(-1, (-1, clean["z.1"].tensor.shape[-1]))
        for place in (2, 5):
            value[:, place, 1] = clean["z.1"].tensor[:, place, 1]
        return (value.flatten(-2), *args[1:])

    def put_stream(_module: nn.Module, _args: object, output: object) -> object:
        value = output[0] if isinstance(output, tuple) else output
        assert isinstance(value, Tensor)
        value[:, 1] = clean["resid_post.0"].tensor[:, 1]
        return output

    handles = [
        module_of(subject.net, find_point(subject.net, "z.1")).register_forward_pre_hook(put_head),
        module_of(subject.net, find_point(subject.net, "resid_post.0")).register_forward_hook(put_stream),
    ]
    try:
        expected = subject.logits(tokens, None)
    finally:
        for handle in handles:
            handle.remove()
    torch.testing.assert_close(logits.tensor, expected, rtol=1e-6, atol=1e-6)


def test_a_row_is_patched_from_another_row_of_the_same_forward(llm: Model) -> None:
    """One forward instead of two, with the same answer; the other row stays what it is."""
    clean = llm.run("hallo wein", read=["z.1", "logits"])
    with llm.trace(["hello wine", "hallo wein"]) as t:
        source = t.read("z.1", rows=1)
        t.patch("z.1", source, rows=0)
        logits = t.read("logits")
    with llm.trace("hello wine") as alone:
        alone.patch("z.1", clean["z.1"])
        expected = alone.read("logits")
    torch.testing.assert_close(logits.tensor[:1], expected.tensor, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(logits.tensor[1:], clean["logits"].tensor, rtol=1e-5, atol=2e-6)


def test_reads_come_before_writes_and_writes_as_listed(llm: Model) -> None:
    """Else a patch and its own reading would depend on the order of lines in a notebook."""
    with llm.trace("hello") as t:
        after, before = t.read("resid_post.0", after=True), t.read("resid_post.0")
        t.scale("resid_post.0", 2.0)
        t.add("resid_post.0", torch.ones(D_MODEL), times=0.5)
        t.patch("resid_post.0", "zero", pos=1)
    expected = before.tensor * 2 + 0.5
    expected[:, 1] = 0
    torch.testing.assert_close(after.tensor, expected)
    plain = llm.run("hello", read="resid_post.0")["resid_post.0"].tensor
    assert torch.equal(before.tensor, plain)


def test_directions_are_taken_away_and_capped(llm: Model) -> None:
    """By the formulas that the plan states."""
    vector = torch.linspace(-1, 2, D_MODEL)
    unit = vector / vector.norm()
    with llm.trace("hello") as t:
        t.project_out("resid_post.0", vector)
        t.cap("resid_pre.1", vector, -0.5)
        t.patch("mlp_out.1", "mean")
        out, capped, mean = (t.read(name, after=True) for name in ("resid_post.0", "resid_pre.1", "mlp_out.1"))
        mlp = t.read("mlp_out.1")
    assert (out.tensor @ unit).abs().max() < 1e-5
    assert (capped.tensor @ unit).max() < -0.5 + 1e-5
    torch.testing.assert_close(mean.tensor, mlp.tensor.mean(1, keepdim=True).expand_as(mlp.tensor))


def test_frozen_patterns_are_those_of_an_unedited_forward(llm: Model) -> None:
    """The oracle patches patterns that another run has read. Derivatives keep the shape of the prompt."""
    clean = llm.run("hello wine", read="pattern.*")
    vector = torch.linspace(-3, 3, D_MODEL)
    with llm.trace("hello wine") as t:
        t.freeze("pattern.*")
        t.add("resid_pre.0", vector)
        d = t.logit_diff("a", "b")
        read, g = t.read("pattern.1", after=True), t.grad(d, at="resid_post.0")
    with llm.trace("hello wine") as oracle:
        oracle.patch("pattern.0", clean["pattern.0"])
        oracle.patch("pattern.1", clean["pattern.1"])
        oracle.add("resid_pre.0", vector)
        expected = oracle.logit_diff("a", "b")
        h = oracle.grad(expected, at="resid_post.0")
    torch.testing.assert_close(d.tensor, expected.tensor, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(read.tensor, clean["pattern.1"].tensor, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(g["resid_post.0"].tensor, h["resid_post.0"].tensor, rtol=1e-4, atol=1e-5)


def test_metrics_are_what_the_logits_say(llm: Model) -> None:
    """The oracle reads all logits; the run itself computes those of one position."""
    logits = llm.run(TEXTS, read="logits", pos=-1)["logits"].tensor
    other = llm.run(["hallo wein", "hello"], read="logits", pos=-1)["logits"]
    with llm.trace(TEXTS) as t:
        difference, probability, divergence, loss = t.logit_diff("a", 98), t.logprob("z"), t.kl(other), t.loss()
    log, log_other = logits.log_softmax(-1), other.tensor.log_softmax(-1)
    torch.testing.assert_close(difference.tensor, logits[:, llm.token("a")] - logits[:, 98])
    torch.testing.assert_close(probability.tensor, log[:, llm.token("z")])
    torch.testing.assert_close(divergence.tensor, (log_other.exp() * (log_other - log)).sum(-1), rtol=1e-4, atol=1e-5)
    for i, text in enumerate(TEXTS):
        ids = torch.tensor(llm.tokenize(text))
        torch.testing.assert_close(loss.tensor[i].float(), llm.subject.net(input_ids=ids, labels=ids).loss)


def test_a_run_without_metrics_ends_at_its_last_point() -> None:
    """A quarter of the forward for a quarter of the layers; a point that is never reached is told by name."""
    subject = SubjectModel(make_net("llama"))
    fired: list[str] = []
    subject.net.get_submodule("model.layers.1").register_forward_hook(lambda *_: fired.append("later"))
    run_plan(subject, Plan(rows=ROWS, operations=(Read(name="a", point="resid_post.0"),)), {})
    assert not fired
    with pytest.raises(InputError, match=r"'module:model.layers.0.mlp' \(module 'model.layers.0.mlp'\) did not fire"):
        run_plan(_without_first_block(), Plan(rows=ROWS, operations=(Read(name="a", point="module:model.layers.0.mlp"),)), {})


def _without_first_block() -> SubjectModel:
    """Return a model whose first block is there but takes no part."""
    net = make_net("llama")
    net.get_submodule("model.layers.0").forward = lambda hidden_states, **_: hidden_states
    return SubjectModel(net)


def test_attribution_is_the_derivative_times_the_change(llm: Model) -> None:
    """And for the last residual stream at the last position, small changes, nearly the exact effect."""
    clean = llm.run("hallo wein", read=["resid_post.1", "z.1"])
    metric = llm.logit_diff("a", "b")
    with llm.trace("hello wine") as t:
        d = t.measure(metric)
        g, now = t.grad(d, at=["resid_post.1", "z.1"]), {name: t.read(name) for name in ("resid_post.1", "z.1")}
    found = llm.attribute(["resid_post.1", "z.1"], "hello wine", clean, metric)
    for name in ("resid_post.1", "z.1"):
        expected = (g[name].tensor * (clean[name].tensor - now[name].tensor)).sum(-1)
        torch.testing.assert_close(found[name].tensor, expected)
    assert found["z.1"].axes == ("row", "position", "head")
    zero = llm.attribute("resid_post.1", "hello wine", "zero", metric)["resid_post.1"].tensor
    torch.testing.assert_close(zero, -(g["resid_post.1"].tensor * now["resid_post.1"].tensor).sum(-1))


@pytest.mark.parametrize(
    ("operations", "message"),
    [
        ([Read(name="a", point="resid_pots.1")], "has no hook point 'resid_pots.1'. Near: resid_post.1"),
        ([Read(name="a", point="z.1", pos=10)], "Positions [10] at 'z.1': row 0 has 10 tokens"),
        ([Read(name="a", point="z.1", pos=(0, 0))], "each named once"),
        ([Read(name="a", point="z.1", heads=(2,))], "Heads [2] of 'z.1': it has heads 0 to 1"),
        ([Read(name="a", point="mlp_out.1", heads=(0,))], "'mlp_out.1' has no heads"),
        ([Patch(point="z.1", value=name_tensor(torch.zeros(2, 7)))], "at 'z.1' has shape [2, 7]; expected [2, 10, 2, 8]. Nothing is broadcast"),
        ([Patch(point="resid_post.0", value=name_tensor(torch.zeros(D_MODEL)))], "has shape [16]; expected [2, 10, 16]"),
        ([Add(point="z.1", heads=(0,), value=name_tensor(torch.zeros(3)))], "or [2, 10, 2, 8] or [1, 8] or [8]"),
        ([Read(name="a", point="z.1"), Patch(point="z.0", value=ReadName(read="a"))], "a forward reaches that later"),
        ([Read(name="a", point="z.1", after=True), Patch(point="z.1", value=ReadName(read="a"))], "a forward reaches that later"),
        ([Read(name="a", point="module:transformer.h.1"), Patch(point="z.1", value=ReadName(read="a"))], "a forward reaches that later"),
        ([Read(name="a", point="module:transformer.h.1"), Patch(point="module:transformer.h.0", value=ReadName(read="a"))], "had not reached"),
        ([LogitDiff(name="d", token=5, other=9999)], "names the tokens [9999, 9999] for 2 rows"),
        ([LogitDiff(name="d", token=(1, 2, 3), other=9)], "names the tokens [1, 2, 3] for 2 rows"),
        ([LogitDiff(name="d", token=5, other=9, pos=5)], "at position 5 of row 1, which has 5 tokens"),
        ([DIFFERENCE, Attribute(name="g", of="d", at=("z.0",), source=(name_tensor(torch.zeros(2, 3)),))], "has shape [2, 3], the activation"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing_behind(operations: list, message: str) -> None:
    """Each names what is wrong and what would be right; the model is as it was."""
    subject = make_subject("gpt2")
    before = _n_hooks(subject.net)
    plan = Plan(rows=ROWS, operations=tuple(operations))
    with pytest.raises(InputError, match=re.escape(message)):
        run_plan(subject, plan, {name.tensor: torch.zeros(name.shape) for name in plan.tensors()})
    assert _n_hooks(subject.net) == before


def test_numbers_that_are_not_finite_are_told_by_place(llm: Model) -> None:
    """A NaN in a table is found late."""
    trace = llm.trace("hello")
    trace.read("resid_post.0", after=True)
    trace.scale("resid_post.0", 1e38)
    trace.scale("resid_post.0", 1e38)
    with pytest.raises(NonFiniteError, match=r"read0 is -?(inf|nan) at \[0, 0, 0\]"):
        trace.execute()
    assert _n_hooks(llm.subject.net) == 0


def test_traces_leave_no_hook_and_the_model_as_it_was(llm: Model) -> None:
    """Whatever they did, and however they ended."""
    plain = llm.run("hello", read="logits")["logits"].tensor
    for _ in range(10):
        with llm.trace("hello") as t:
            t.scale("pattern.1", 0.0)
            t.grad(t.loss(), at="z.*")
        with pytest.raises(InputError):
            llm.run("hello", read="z.1", pos=99)
    assert _n_hooks(llm.subject.net) == 0
    assert torch.equal(llm.run("hello", read="logits")["logits"].tensor, plain)


def test_what_is_typed_wrong_is_told_in_its_own_words(llm: Model) -> None:
    """Tokens of two ids, tokens that stand twice, handles before their time, strangers' metrics."""
    with llm.trace("hello") as t:
        early = t.read("z.0")
        with pytest.raises(InputError, match="has not been computed: a trace runs when its `with` block ends"):
            _ = early.tensor
        with pytest.raises(InputError, match=r"'xy' is 2 tokens: \[\d+, \d+\]"):
            t.logit_diff("xy", "a")
        with pytest.raises(InputError, match=r"The token 'l' must stand once in each row.*row 0: \[2, 3\]"):
            t.read("z.0", pos="l")
        with pytest.raises(InputError, match="is no metric of this trace"):
            t.grad(early, at="z.0")
        with pytest.raises(InputError, match="found 'nothing'"):
            t.patch("z.0", "nothing")
    with pytest.raises(InputError, match="a row without tokens"):
        llm.trace(["hello", ""])
    with pytest.raises(InputError, match="Token id 9,999 is outside"):
        llm.run([1, 9999], read="z.0")
    with pytest.raises(InputError, match="longer than the 48"):
        llm.run("x" * 49, read="z.0")


def test_results_are_copies(llm: Model) -> None:
    """Who writes into a result must not write into the model, or into another result."""
    with llm.trace("hello") as t:
        first, second = t.read("resid_post.0"), t.read("resid_post.0")
        g = t.grad(t.loss(), at=["resid_post.0"])
    first.tensor.zero_()
    assert second.tensor.abs().sum() > 0
    assert not first.tensor.requires_grad
    assert not g["resid_post.0"].tensor.requires_grad
