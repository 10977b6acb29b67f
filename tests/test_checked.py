"""Types are checked in tests: those of a function inside another too, whenever it is defined, though its checks are written once."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from checked import check_calls, check_types
from jaxtyping import Float, TypeCheckError, jaxtyped
from torch import Tensor

from interp_assets.compute.seeds import stream
from interp_assets.planning.pipeline import shard_key
from interp_assets.train.sae import topk_threshold


def define(kind: Any, default: Any = None) -> Callable[..., Any]:
    """Define a function again, with types of its own."""

    @jaxtyped(typechecker=check_types)
    def pass_on(x: kind, y: kind = default, *, result: Any = None) -> kind:
        return x if result is None else result

    return pass_on


def test_every_definition_checks_arguments_and_results() -> None:
    """The checks of the first definition serve all later ones of the same signature, and none of another."""
    for _ in range(3):
        assert define(int, 1)(2) == 2
        assert define(str, "a")("b") == "b"
        with pytest.raises(TypeCheckError, match="checking the parameters"):
            define(int, 1)("b")
        with pytest.raises(TypeCheckError, match="checking the return value"):
            define(str, "a")("b", result=2)


def test_every_definition_checks_shapes() -> None:
    """An axis has one size in a call, and the next call may have another."""
    for size in (2, 3):
        pass_on = define(Float[Tensor, "n"])
        assert len(pass_on(torch.zeros(size), torch.zeros(size))) == size
        with pytest.raises(TypeCheckError, match="checking the parameters"):
            pass_on(torch.zeros(size), torch.zeros(size + 1))
        with pytest.raises(TypeCheckError, match="checking the return value"):
            pass_on(torch.zeros(size), torch.zeros(size), result=torch.zeros(size + 1))


def test_a_default_without_a_hash_is_checked_too() -> None:
    """Its signature cannot be looked up."""
    assert define(list[int], [1])([2]) == [2]
    with pytest.raises(TypeCheckError, match="checking the parameters"):
        define(list[int], [1])("b")


def test_the_package_is_checked() -> None:
    """Plain types by beartype alone, arrays by jaxtyping; what is right goes through."""
    assert shard_key(3) == "shard-000003"
    wrong: Any = "3"
    with pytest.raises(TypeCheckError, match="str '3' not instance of int"):
        shard_key(wrong)
    with pytest.raises(TypeCheckError):
        stream(wrong, "what")
    assert topk_threshold(torch.ones(2, 1)).shape == (2,)
    with pytest.raises(TypeCheckError, match="checking the parameters"):
        topk_threshold(torch.ones(2))


class _Named:
    """A class that its own method names before it is there."""

    @check_calls
    def other(self, other: "_Named | None", *, n: "list[int]" = [1]) -> "_Named":  # noqa: B006 - a default without a hash
        """Return the other."""
        return other if other is not None and n else wrong_result


wrong_result: Any = "no instance"


def test_names_of_classes_are_resolved_when_a_function_is_called() -> None:
    """Also within others, and defaults are passed by."""
    one, wrong = _Named(), _as_any(["a"])
    assert one.other(one) is one
    with pytest.raises(TypeCheckError):
        one.other(one, n=wrong)
    with pytest.raises(TypeCheckError):
        one.other(wrong)
    with pytest.raises(TypeCheckError, match="return"):
        one.other(None)


def _as_any(value: object) -> Any:
    return value
