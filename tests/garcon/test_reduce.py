"""Many texts become a few numbers: equal to those of all activations at once, however they were batched."""

import re
from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import make_subject, make_tokenizer
from torch import Tensor

from interp_assets.errors import InputError
from interp_assets.garcon.plan import ReducePlan, parse_plan
from interp_assets.garcon.reduce import Largest, Moments, find_largest
from interp_assets.garcon.session import Model

TEXTS = ["hello wine", "hal", "a longer text than these", "x"] * 40
EVERYTHING = ["mean", "cov", "norms", "histogram", "top:5"]


@pytest.fixture(scope="module")
def llm() -> Model:
    """A tiny Llama with one token a byte."""
    return Model(make_subject("llama"), make_tokenizer())


def _rows(llm: Model, point: str) -> Tensor:
    """Return all rows, each text alone: the oracle."""
    return torch.cat([llm.run(text, read=point)[point].tensor[0].flatten(1) for text in TEXTS])


@pytest.mark.parametrize("point", ["resid_post.1", "z.0"])
def test_reductions_are_those_of_all_rows_at_once(llm: Model, point: str) -> None:
    """Moments in float64, histograms and largest values exactly as counted by hand; several batches are run."""
    found = llm.reduce(TEXTS, {point: EVERYTHING})[point]
    rows = _rows(llm, point)
    wide = rows.double()
    torch.testing.assert_close(found["mean"], wide.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found["cov"], torch.cov(wide.T, correction=0), rtol=1e-4, atol=1e-6)
    norms, table = wide.norm(dim=1), found["norms"]
    assert table["count"].sum() == len(rows)
    for low, high, count in table.rows():
        assert abs(int(((norms >= low) & (norms < high)).sum()) - count) <= 4  # another batch's rounding may cross an edge
    histogram = found["histogram"].filter(pl.col("dimension") == 3)
    assert histogram["count"].sum() == len(rows)
    assert histogram["low"].is_sorted()
    negative = histogram.filter(pl.col("high") <= 0)["count"].sum()
    assert negative == int((rows[:, 3] < 0).sum())
    top = found["top:5"]
    assert top.columns == ["dimension", "rank", "value", "text", "position", "token_id"]
    values = top["value"].to_numpy().reshape(-1, 5)
    np.testing.assert_allclose(values, rows.topk(5, dim=0).values.T.numpy(), rtol=1e-4, atol=1e-6)
    first = top.row(0, named=True)
    assert TEXTS[first["text"]].encode()[first["position"]] == llm.tokenizer.decode([first["token_id"]]).encode()[0]


def test_equal_texts_in_other_batches_give_equal_largest_rows(llm: Model) -> None:
    """Ties go to the earlier row: repeated texts name the first that has them."""
    top = llm.reduce(["hello wine"] * 30, {"resid_post.0": ["top:3"]})["resid_post.0"]["top:3"]
    best = top.filter(pl.col("rank") == 0)
    assert set(best["text"]) == {0}
    assert best["position"].to_list() == llm.run("hello wine", read="resid_post.0")["resid_post.0"].tensor[0].argmax(0).tolist()


def test_special_tokens_are_left_out_unless_they_are_asked_for(llm: Model) -> None:
    """A start token's row is of another size than all others."""
    rows: Any = [[256, 104, 105], [104, 257]]
    norms, all_norms = (llm.reduce(rows, {"resid_post.0": ["norms"]}, special=special)["resid_post.0"]["norms"] for special in (False, True))
    assert (norms["count"].sum(), all_norms["count"].sum()) == (3, 5)
    heard: list[int] = []
    llm.reduce(rows, {"resid_post.0": ["mean"]}, progress=heard.append)
    assert sum(heard) == 5


VALUES = st.lists(st.sampled_from([-1.5, -0.0, 0.0, 1.0, 1.0000001, 2.0, 3.4e38, -3.4e38, 1e-45]), min_size=1, max_size=30)


@settings(deadline=None)
@given(VALUES, st.integers(1, 7), st.data())
def test_the_largest_of_parts_are_the_largest_of_all_in_any_order(values: list[float], k: int, data: st.DataObject) -> None:
    """With their rows, ties too; the oracle sorts by value and row in Python."""
    column = torch.tensor(values, dtype=torch.float32)[:, None]
    cuts = sorted({0, len(values), *data.draw(st.lists(st.integers(0, len(values)), max_size=3))})
    parts = [find_largest(column[start:stop], start, k) for start, stop in pairwise(cuts)]
    total = Largest(torch.zeros((0, 1), dtype=torch.int64))
    for part in data.draw(st.permutations(parts)):
        total = total.merge(part, k)
    expected = sorted(range(len(values)), key=lambda row: (-float(column[row]), row))[:k]
    assert total.rows[:, 0].tolist() == expected
    assert total.values[:, 0].tolist() == [float(column[row]) for row in expected]


def test_moments_merge_to_within_rounding() -> None:
    """Sums of parts are the sum of all."""
    rows = torch.randn((500, 4), generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 3
    parts = [Moments(len(part), part.sum(0), part.T @ part) for part in rows.split(77)]
    total = parts[0]
    for part in parts[1:]:
        total = total.merge(part)
    torch.testing.assert_close(total.mean, rows.mean(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(total.cov, torch.cov(rows.T, correction=0), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    ("texts", "wanted", "message"),
    [
        (["a"], {"resid_post.0": ["median"]}, "The plan is wrong at reductions.resid_post.0.0: String should match pattern"),
        (["a"], {"resid_post.0": ["top:0"]}, "String should match pattern"),
        (["a"], {}, "at reductions"),
        (["a"], {"resid_pots.0": ["mean"]}, "Near: resid_post.0"),
        (["a"], {"pattern.0": ["mean"]}, "Hook point 'pattern.0' has no rows"),
        ([[256, 257]], {"resid_post.0": ["mean"]}, "The texts have no tokens but special ones"),
        (["x" * 49], {"resid_post.0": ["mean"]}, "longer than the 48"),
        (["a", ""], {"resid_post.0": ["mean"]}, "a row without tokens"),
    ],
)
def test_what_cannot_be_reduced_is_refused(llm: Model, texts: Any, wanted: dict[str, list[str]], message: str) -> None:
    """Before hours of forwards."""
    with pytest.raises(InputError, match=re.escape(message)):
        llm.reduce(texts, wanted)


def test_a_plan_that_reduces_survives_its_own_text() -> None:
    """Its hash is what it was: raise the version when this changes on purpose."""
    plan = ReducePlan(rows=((1, 2), (3,)), reductions={"z.1": ("mean", "top:3")}, special=(256,))
    assert parse_plan(ReducePlan, plan.json()) == plan
    assert plan.hash == "f351595373ebfeb840bac9f70d1d4582"
