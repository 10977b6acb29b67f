"""Sweeps in one growing batch: the same numbers as one forward a cell, in every family."""

import pytest
import torch
from tiny_models import ENCODERS, INSIDE, make_subject, make_tokenizer

from interp_assets.errors import InputError
from interp_assets.garcon import sweep
from interp_assets.garcon.plan import Loss
from interp_assets.garcon.session import Model


def _model(kind: str) -> Model:
    return Model(make_subject(kind), make_tokenizer())


@pytest.mark.parametrize("kind", [kind for kind in INSIDE if kind not in ENCODERS])
def test_every_cell_is_what_a_run_of_its_own_gives(kind: str) -> None:
    """The oracle is a loop of patches; by position at the stream and inside blocks, by head at z, queries and patterns."""
    llm = _model(kind)
    inside = "v.*" if kind == "gpt_oss" else "mlp_act.*"
    names = {"position": ["resid_*", "attn_out.1", "z.0", inside], "head": ["z.*", "q.0", "pattern.1"]}
    source = llm.run("hallo", read=[name for each in names.values() for name in each])
    metric = llm.logit_diff("a", "b")
    for by, points in names.items():
        grid = llm.sweep(points, "hello", source, metric, by=by)
        assert grid.tensor.shape == (len(grid.points), 5 if by == "position" else llm.subject.net.config.num_attention_heads)
        for i, name in enumerate(grid.points):
            for j in (0, 1) if by == "head" else (1, 4):
                with llm.trace("hello") as t:
                    t.patch(name, source[name], **({"pos": j} if by == "position" else {"heads": [j]}))
                    d = t.measure(metric)
                assert abs(d.value - float(grid.tensor[i, j])) < 2e-6, (name, j)
        with llm.trace("hello") as t:
            d = t.measure(metric)
        assert abs(d.value - grid.base) < 2e-6


def test_zero_and_loss_and_many_small_forwards_give_the_same() -> None:
    """What does not fit one forward is spread over several."""
    llm = _model("gpt2")
    whole = llm.sweep("resid_post.*", "hello", "zero", Loss(name="metric"))
    row, names = llm.tokenize("hello")[0], ["resid_post.0", "resid_post.1"]
    cells = [sweep.Cell(sweep.find_point(llm.subject.net, name), i) for name in names for i in range(5)]
    parts = [sweep._forward(llm.subject, row, cells[i : i + 3], "zero", Loss(name="metric"), "position")[1:] for i in range(0, 10, 3)]
    torch.testing.assert_close(torch.cat(parts).reshape(2, 5), whole.tensor)
    with llm.trace("hello") as t:
        t.patch("resid_post.0", "zero", pos=2)
        loss = t.loss()
    torch.testing.assert_close(whole.tensor[0, 2], loss.tensor[0])


def test_a_grid_is_a_table_and_a_picture() -> None:
    """Names of tokens are text of strangers: they are escaped."""
    llm = _model("gpt2")
    grid = llm.sweep("resid_post.*", "<b>x", "zero", llm.logit_diff("a", "b"))
    table = grid.table()
    assert table.columns == ["point", "column", "label", "value", "difference"]
    assert table.height == 8
    assert table["label"].to_list()[:4] == ["<", "b", ">", "x"]
    drawn = grid._repr_html_()
    assert ">&lt;</th>" in drawn
    assert "<b>" not in drawn
    assert "2 points x 4" in repr(grid)


@pytest.mark.parametrize(
    ("points", "prompt", "by", "message"),
    [
        ("logits", "hello", "position", "'logits' is neither"),
        ("resid_post.0", "hello", "head", "needs points with one number of heads"),
        ("resid_post.0", "hello", "token", "by 'position' or by 'head'"),
        ("resid_post.0", ["hello", "hallo"], "position", "A sweep is over one row; the prompt has 2"),
        ("resid_post.0", "hello wine", "position", r"shape \[1, 5, 16\], the activation \[1, 10, 16\]"),
    ],
)
def test_what_cannot_be_swept_is_refused(points: str, prompt: object, by: str, message: str) -> None:
    """Each with what to do instead."""
    llm = _model("gpt2")
    source = llm.run("hallo", read=["resid_post.0", "logits"])
    with pytest.raises(InputError, match=message):
        llm.sweep(points, prompt, source, llm.logit_diff("a", "b"), by=by)
