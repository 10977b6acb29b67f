"""What checks types in tests: beartype, once for every signature.

The import hook hands over an empty function of the checked one's signature whenever that is defined. A function inside another is defined at
every call of the outer one: writing and compiling its checks anew each time took most of the time of a training.
"""

import inspect
from collections.abc import Callable
from typing import Any

from beartype import beartype

_checks: dict[tuple[str, str, inspect.Signature], Callable[..., Any]] = {}


def check_types(empty: Callable[..., Any]) -> Callable[..., Any]:
    """Return an empty function that refuses arguments and results of other types than the annotated ones."""
    key = (empty.__module__, empty.__qualname__, inspect.signature(empty))
    try:
        found = _checks.get(key)
    except TypeError:  # a default or an annotation without a hash
        return beartype(empty)
    return found or _checks.setdefault(key, beartype(empty))
