"""What checks types in tests: beartype, once for every signature, and not before its function is called.

The import hook hands over an empty function of the checked one's signature whenever that is defined. A function inside another is defined at
every call of the outer one: writing and compiling its checks anew each time took most of the time of a training. And of all functions that a test
process imports, it calls a few.
"""

import inspect
from collections.abc import Callable
from typing import Any
from warnings import catch_warnings

from beartype import beartype
from beartype.roar import BeartypeDecorHintPep585DeprecationWarning

_checks: dict[tuple[str, str, inspect.Signature], Callable[..., Any]] = {}


def check_types(empty: Callable[..., Any]) -> Callable[..., Any]:
    """Return an empty function that refuses arguments and results of other types than the annotated ones."""
    made: list[Callable[..., Any]] = []

    def check(*args: Any, **kwargs: Any) -> Any:
        if not made:
            made.append(_write_checks(empty))
        return made[0](*args, **kwargs)

    key = (empty.__module__, empty.__qualname__, inspect.signature(empty))
    try:
        return _checks.setdefault(key, check)
    except TypeError:  # a default or an annotation without a hash
        return check


def _write_checks(empty: Callable[..., Any]) -> Callable[..., Any]:
    with catch_warnings(action="ignore", category=BeartypeDecorHintPep585DeprecationWarning):  # of annotations that other libraries inherit
        return beartype(empty)
