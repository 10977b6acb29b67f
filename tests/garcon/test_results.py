"""What a notebook shows of answers: tables and heat maps; and that what was given to a trace is what it uses."""

import re
from typing import Any

import torch
from tiny_models import make_subject, make_tokenizer

from interp_assets.garcon.results import draw_heat_map
from interp_assets.garcon.session import Model


class CountingTokenizer:
    """A tokenizer that counts what it decodes."""

    def __init__(self) -> None:
        self.own, self.n_decoded = make_tokenizer(), 0

    def __call__(self, text: str, **options: Any) -> Any:
        return self.own(text, **options)

    def decode(self, ids: list[int]) -> str:
        self.n_decoded += 1
        return self.own.decode(ids)


def test_tokens_are_decoded_when_they_are_asked_for() -> None:
    """Decoding costs more than a small forward, and most answers are only computed with."""
    tokenizer = CountingTokenizer()
    llm = Model(make_subject("gpt2"), tokenizer)
    with llm.trace("hello") as t:
        read, some = t.read("resid_post.1"), t.read("resid_post.1", pos=[0, -1])
        loss = t.loss()
    assert (tokenizer.n_decoded, loss.tensor.shape) == (0, (1,))
    assert read.tokens == [["h", "e", "l", "l", "o"]]
    assert some.tokens == [["h", "o"]]
    assert tokenizer.n_decoded == 7


def test_a_trace_uses_what_it_was_given() -> None:
    """A loop that writes its next vector into the same memory would otherwise change what earlier lines of the trace put in."""
    llm = Model(make_subject("gpt2"), make_tokenizer())
    vector = torch.ones(16)
    with llm.trace("hello") as t:
        t.patch("resid_post.0", vector[None], pos=1)
        vector.mul_(2.0)
        t.patch("resid_post.0", vector[None], pos=2)
        read = t.read("resid_post.0", after=True)
        vector.zero_()
    assert torch.equal(read.tensor[0, 1], torch.ones(16))
    assert torch.equal(read.tensor[0, 2], torch.full((16,), 2.0))


def test_a_heat_map_shows_spaces_ends_and_long_labels() -> None:
    """Half of all tokens begin with a space, and a document's name is longer than a column is wide; the whole label is the cell's hint."""
    long = "a label that is much longer than its column"
    drawn = draw_heat_map(torch.tensor([[0.0, 2.0, -1.0, 0.5]]), ["head 3"], [" the", "\n", "\t ", long], "title <i>")
    assert "-2<" in drawn
    assert re.findall(r">([^<>]*)</th>", drawn) == ["", "·the", "⏎", "⇥·", "a label that is muc…", "head 3"]
    assert f"title='head 3 / {long}: 0.5'" in drawn
    assert "title &lt;i&gt;" in drawn
    assert re.findall(r"title='head 3 / [^']*' style='[^']*background-color:([^']*)'", drawn) == [
        "transparent",
        "rgba(214,39,40,1.000)",
        "rgba(31,119,210,0.500)",
        "rgba(214,39,40,0.250)",
    ]


def test_a_heat_map_of_zeros_is_drawn() -> None:
    """A patch without any effect is a result, too."""
    assert draw_heat_map(torch.tensor([[0.0, -0.0]]), ["a"], ["b", "c"], "nothing").count("height:1.3em;background-color:transparent") == 2


def test_results_of_one_axis_are_the_lines_of_one_heat_map() -> None:
    """An attribution has a number for each position of each layer: one picture, not one a layer. Others are listed."""
    llm = Model(make_subject("gpt2"), make_tokenizer())
    drawn = llm.attribute("resid_post.*", "hello", "zero", llm.logit_diff("a", "b"))._repr_html_()
    assert drawn.count("<td") == 2 * 5
    assert "resid_post.1</th>" in drawn
    assert "logit_diff" in drawn
    listed = llm.run("hello", read="resid_post.*")._repr_html_()
    assert listed.startswith("<code>resid_post.0 [row, position, dimension]")
    assert listed.count("<br>") == 1
    with llm.trace("hello") as t:
        waiting = t.grad(t.loss(), at="resid_post.*")
        assert "not yet run" in waiting._repr_html_()


def test_tables_become_pandas() -> None:
    """Half of the field has its plots there."""
    llm = Model(make_subject("gpt2"), make_tokenizer())
    frame = llm.run("hello", read="z.*", pos=-1).table().to_pandas()
    assert list(frame.columns) == ["point", "row", "head", "dimension", "value"]
    assert len(frame) == 2 * 16
