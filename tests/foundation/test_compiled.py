"""Loops are compiled: in the order in which they are written, and also where no disk can keep the code."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from interp_assets.compiled import compiled, reordered

SOURCE = """
def add(values):
    total = np.float32(0)
    for i in range(len(values)):
        total += values[i]
    return total
"""


def make_loop() -> Callable[..., Any]:
    """Return a loop without a source file, beside which nothing can be kept."""
    space: dict[str, Any] = {"np": np}
    exec(SOURCE, space)
    return space["add"]


@pytest.mark.parametrize("compile_loop", [compiled, reordered])
def test_a_loop_is_compiled_where_nothing_can_be_kept(compile_loop) -> None:
    """A read-only file system costs a second at the start, not the run."""
    loop = compile_loop(make_loop())
    assert loop(np.arange(100, dtype=np.float32)) == 4950
    assert loop.nopython_signatures


def test_only_a_reordered_loop_may_add_in_another_order() -> None:
    """1 is lost in 2^24 each time it is added in order; sums by lane keep some. Loops that define bytes must not be reordered."""
    values = np.ones(4097, np.float32)
    values[0] = 2.0**24
    assert compiled(make_loop())(values) == 2.0**24
    assert 2.0**24 <= reordered(make_loop())(values) <= 2.0**24 + 4096
