"""Heads and edges that are taken away: the same as a plan that patches them, and as weights that are zero."""

import re
from typing import Literal

import numpy as np
import pytest
import torch
from tiny_models import VOCABULARY, make_net, make_subject

from interp_assets.errors import InputError
from interp_assets.garcon.patterns.cuts import Cut, measure_cut, sweep_heads
from interp_assets.garcon.session import Model
from interp_assets.garcon.subject import SubjectModel

ROW = [int(token) for token in torch.randint(0, VOCABULARY - 3, (14,), generator=torch.Generator().manual_seed(4))]
KINDS = ["gpt2", "llama", "gemma2", "gptj", "gpt_oss"]


def _divergence(before: torch.Tensor, after: torch.Tensor) -> float:
    log_p, log_q = torch.log_softmax(before.double(), -1), torch.log_softmax(after.double(), -1)
    return float((log_p.exp() * (log_p - log_q)).sum())


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_that_is_cut_is_one_whose_output_rows_are_zero(kind: str) -> None:
    """The oracle changes the weights; everything that follows is the model's own."""
    change = measure_cut(make_subject(kind), ROW, Cut(0, 1))
    net = make_net(kind)
    before = SubjectModel(net).logits(torch.tensor([ROW]), None)[0, -1]
    o_proj = next(module for name, module in net.named_modules() if name.endswith(("attn.c_proj", "self_attn.o_proj", "attn.out_proj")))
    is_turned = type(o_proj).__name__ == "Conv1D"
    d_head = (o_proj.weight.shape[0] if is_turned else o_proj.weight.shape[1]) // net.config.num_attention_heads
    with torch.no_grad():
        (o_proj.weight if is_turned else o_proj.weight.T)[d_head : 2 * d_head] = 0.0
    after = SubjectModel(net).logits(torch.tensor([ROW]), None)[0, -1]
    assert change.kl == pytest.approx(_divergence(before, after), rel=1e-3, abs=1e-8)
    assert change.kl > 1e-6
    for token, was, is_now in zip(change.tokens, change.before, change.after, strict=True):
        assert was == pytest.approx(float(before[token] - before.mean()), abs=1e-5)
        assert is_now == pytest.approx(float(after[token] - after.mean()), abs=1e-5)


@pytest.mark.parametrize("how", ["zero", "mean"])
@pytest.mark.parametrize("kind", [*KINDS, "mistral"])
def test_an_edge_that_is_cut_takes_its_part_of_the_output_away(kind: str, how: Literal["zero", "mean"]) -> None:
    """The oracle is a plan that patches the pattern; a mean is over the queries that see the key; the other edges of the row keep their mass."""
    llm = Model(make_subject(kind), None)
    pattern = llm.run([ROW], read="pattern.1")["pattern.1"].tensor.clone()
    last = 12 if kind == "mistral" else 13  # its window is 4 tokens
    pattern[:, 0, 12, 9] = 0.0 if how == "zero" else pattern[0, 0, 9 : last + 1, 9].mean()
    with llm.trace([ROW]) as t:
        t.patch("pattern.1", pattern)
        edited = t.read("logits", pos=12)
    before = llm.run([ROW], read="logits")["logits"].tensor[0, 12]
    change = measure_cut(llm.subject, ROW, Cut(1, 0, how, query=12, key=9), position=12, tokens=[5])
    assert change.kl == pytest.approx(_divergence(before, edited.tensor[0]), rel=1e-3, abs=1e-9)
    assert change.kl > 1e-9
    assert change.tokens[0] == 5
    assert change.after[0] == pytest.approx(float(edited.tensor[0, 5] - edited.tensor[0].mean()), abs=1e-5)


def test_nothing_before_the_position_changes_and_means_are_of_the_text() -> None:
    """An edge of a later query leaves earlier predictions alone, to the bit; a mean is a plan's mean."""
    subject = make_subject("llama")
    assert measure_cut(subject, ROW, Cut(0, 0, query=9, key=2), position=8).kl == 0.0
    assert measure_cut(subject, ROW, Cut(0, 0, query=9, key=2), position=9).kl > 0.0
    llm = Model(subject, None)
    with llm.trace([ROW]) as t:
        t.patch("z.1", "mean", heads=[1])
        edited = t.read("logits", pos=6)
    change = measure_cut(subject, ROW, Cut(1, 1, "mean"), position=6)
    before = llm.run([ROW], read="logits")["logits"].tensor[0, 6]
    assert change.kl == pytest.approx(_divergence(before, edited.tensor[0]), rel=1e-3, abs=1e-9)


def test_every_head_is_cut_by_itself() -> None:
    """Some at a time, with the numbers of one at a time."""
    subject = make_subject("gpt2")
    found = {(cut.layer, cut.head): kl for cuts, kls in sweep_heads(subject, ROW, "mean", 10) for cut, kl in zip(cuts, kls, strict=True)}
    assert list(found) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    alone = [measure_cut(subject, ROW, Cut(*head, "mean"), position=10).kl for head in found]
    np.testing.assert_allclose(list(found.values()), alone, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "cut", "position", "reason"),
    [
        ("gpt2", Cut(0, 2), -1, "no head 0.2; layer 0 has heads 0 to 1"),
        ("gpt2", Cut(7, 0), -1, "has no hook point 'z.7'"),
        ("gpt2", Cut(0, 0, query=3), -1, "name both, or neither"),
        ("gpt2", Cut(0, 0, query=3, key=4), -1, "no edge from query 3 to key 4"),
        ("gpt2", Cut(0, 0), 14, "no position 14; the text has 14 tokens"),
        ("bert", Cut(0, 0), -1, "no language-model head"),
    ],
)
def test_what_cannot_be_cut_is_named(kind: str, cut: Cut, position: int, reason: str) -> None:
    """Before anything is run."""
    with pytest.raises(InputError, match=re.escape(reason)):
        measure_cut(make_subject(kind), ROW, cut, position)
    with pytest.raises(InputError, match="no token 999"):
        measure_cut(make_subject("gpt2"), ROW, Cut(0, 0), tokens=[999])
