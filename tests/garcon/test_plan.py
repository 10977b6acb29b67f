"""A plan is plain data: one text, one hash, and nothing in it that could run."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from interp_assets.errors import InputError
from interp_assets.garcon.plan import Add, Grad, LogitDiff, Patch, Plan, Read, ReadName, Span, digest_tensor, name_tensor, parse_plan

VECTOR = torch.arange(3.0)


def _plan(**changes: object) -> Plan:
    operations = (
        Read(name="a", point="z.1", pos=-1, heads=(0,)),
        Read(name="b", point="resid_post.0", pos=Span(start=1)),
        Patch(point="z.1", value=ReadName(read="a")),
        Add(point="resid_post.0", value=name_tensor(VECTOR), times=0.1),
        LogitDiff(name="d", token=5, other=9),
        Grad(name="g", of="d", at=("resid_post.0",)),
    )
    return Plan.model_validate({"rows": ((1, 2), (3,)), "operations": operations, **changes})


def test_a_plan_survives_its_own_text() -> None:
    """A notebook, a server and a stored artifact must mean the same by it."""
    plan = _plan()
    again = parse_plan(Plan, plan.json())
    assert again == plan
    assert (again.hash, again.json()) == (plan.hash, plan.json())
    assert [name.shape for name in plan.tensors()] == [(3,)]


def test_the_hash_is_what_it_was() -> None:
    """It is an artifact's identity: a new optional field must not move it. Raise the version when this changes on purpose."""
    assert _plan().hash == "7947aad250215da4e2440d34efabbcad"


def test_the_hash_follows_what_is_asked_and_every_byte_of_a_tensor() -> None:
    """Two plans of one hash would answer for each other."""
    changed = VECTOR.clone()
    changed[2] += 1e-6
    hashes = {_plan().hash, _plan(rows=((1, 2), (4,))).hash, _plan(operations=_plan().operations[:2]).hash}
    hashes |= {Plan(rows=((1,),), operations=(Add(point="z.1", value=name_tensor(tensor)),)).hash for tensor in (VECTOR, changed, VECTOR.half())}
    assert len(hashes) == 6
    assert digest_tensor(VECTOR) != digest_tensor(VECTOR[None])
    assert digest_tensor(torch.arange(6.0)[None, 3::9]) == digest_tensor(torch.tensor([[3.0]]))
    assert digest_tensor(torch.arange(12.0)[::2].reshape(2, 3)) == digest_tensor(torch.tensor([[0.0, 2.0, 4.0], [6.0, 8.0, 10.0]]))
    assert digest_tensor(torch.arange(6.0).reshape(2, 3).T) == digest_tensor(torch.arange(6.0).reshape(2, 3).T.contiguous())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"operations": [{"op": "reed", "point": "z.1"}]},
            "at operations.0: Input tag 'reed' found using 'op' does not match any of the expected tags: 'read'",
        ),
        (
            {"operations": [{"op": "read", "name": "a", "point": "z.1", "code": "import os"}]},
            "at operations.0.read.code: Extra inputs are not permitted",
        ),
        ({"operations": [{"op": "scale", "point": "z.1", "times": float("nan")}]}, "finite number"),
        ({"operations": [{"op": "grad", "name": "g", "of": "d", "at": ["z.1"]}]}, "'g' is of the metric 'd'; the metrics are []"),
        ({"operations": [{"op": "patch", "point": "z.1", "value": {"read": "x"}}]}, "takes the read 'x'; the reads are []"),
        ({"operations": [{"op": "read", "name": "a", "point": "z.1", "rows": [2]}]}, "on rows [2]; the plan has rows 0 to 1"),
        ({"operations": [{"op": "read", "name": "a", "point": "z.1"}] * 2}, "two operations have one name: ['a']"),
        (
            {"operations": [{"op": "add", "point": "z.1", "value": {"tensor": "../x", "dtype": "float32", "shape": [1]}}]},
            "String should match pattern",
        ),
        ({"version": 2}, "at version: Input should be 1"),
        ({"operations": []}, "at operations"),
    ],
)
def test_what_is_wrong_in_any_model_is_refused_by_name(change: dict, message: str) -> None:
    """The text may come from anywhere."""
    content = {"rows": [[1, 2], [3]], "operations": [{"op": "read", "name": "a", "point": "z.1"}], **change}
    with pytest.raises(InputError) as caught:
        parse_plan(Plan, json.dumps(content))
    assert message in str(caught.value)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_no_text_is_anything_but_a_plan_or_a_refusal(content: object) -> None:
    """Anything may be sent to a server."""
    for text in (json.dumps(content), json.dumps({"rows": [[1]], "operations": [content]}), str(content)):
        with pytest.raises(InputError):
            parse_plan(Plan, text)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.tensor([1.0, torch.nan]), r"holds nan at \[1\]"),
        (torch.tensor([[1.0], [-torch.inf]]), r"holds -inf at \[1, 0\]"),
        (torch.zeros(2, dtype=torch.float64), "dtype float64 cannot stand in a plan"),
        (torch.zeros(2, dtype=torch.complex64), "dtype complex64"),
    ],
)
def test_a_tensor_that_cannot_travel_is_refused(tensor: torch.Tensor, message: str) -> None:
    """A NaN would surface as another one's error, far from here."""
    with pytest.raises(InputError, match=message):
        name_tensor(tensor)
