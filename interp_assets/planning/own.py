"""A function of one's own, named as `my_sae.py:p_anneal`: its file's bytes become what it declares, without executing them.

A configuration names the file; what decides ids is the hash of its bytes, which is kept in the configuration and goes wherever that goes. Workers
execute the artifact with this hash, never a file that lies where they run (`train/own/load.py`).

    @architecture(kind="relu", decoder_norm=0.1)          kind: the built-in architecture whose recipe, initial weights and saved function it has
    def p_anneal(w, x, y, step, *, p_end: float = 0.5):   keyword arguments are options of the SAE: their defaults are numbers or lists of numbers

All of that is written out in the file, so it is read off its syntax: configurations are checked, and forecasts made, before any code has run.
"""

import ast
import difflib
import hashlib
import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple, cast

from interp_assets.errors import ConfigError, OwnCodeError
from interp_assets.planning.options import ARCHITECTURES, OPTIONS, REQUIRED, Architecture, judge

NAMED: Final = re.compile(r"^([^:\n]*[^/:\n]\.py):([A-Za-z_]\w*)$")
"""How a function in a file is named."""
MAX_BYTES: Final = 1 << 20
DECORATOR: Final = "architecture"
CONSTANTS: Final = tuple(name for name, option in OPTIONS.items() if not option.is_of_loss)
"""Constants of a recipe that a declaration may state; without them they are those of its kind."""
_FLAGS: Final = ("unit_norm", "whole_batch", "surrogate_gradient")
_FUNCTIONS: Final = ("init", "fold")
_PARAMETERS: Final = ("w", "x", "y", "step")
_TERMS: Final = ("kind", "error", *_FLAGS, *_FUNCTIONS)
_OF_BATCH: Final = ("batch_topk", "matryoshka_batch_topk", "jump_relu")
"""What these do with a row depends on the other rows of its batch."""


class Declared(NamedTuple):
    """What a file says of an architecture."""

    kind: Architecture
    constants: dict[str, Any]
    """Those of the recipe that differ from its kind's."""
    options: dict[str, Any]
    """Keyword arguments with their defaults; `REQUIRED` where there is none."""
    error: str
    """`sum` or `mean` over dimensions of the squared error in its loss."""
    unit_norm: bool | None
    """Whether decoder rows are kept at norm 1; None as its kind."""
    whole_batch: bool
    """Whether it has to see all rows of a batch at once."""
    surrogate_gradient: bool
    """Whether its gradient is meant to differ from that of its value: straight-through, stopped gradients."""
    functions: dict[str, str]
    """`init` and `fold`: names of functions of the file."""


def split_name(name: str) -> tuple[str, str] | None:
    """Return path and function of `path.py:function`; None for anything else."""
    found = NAMED.match(name)
    return (found[1], found[2]) if found else None


def hash_code(source: bytes) -> str:
    """Return the SHA-256 of a file's bytes, as `sha256sum` prints it."""
    return hashlib.sha256(source).hexdigest()


def read_declaration(source: bytes, file: str, function: str) -> Declared:
    """Read off a file what its function declares. Raises `OwnCodeError` with file and line, `ConfigError` for a function that is not there."""
    node = find_function(source, file, function)
    where = f"{file}, line {node.lineno}"
    decorator = next((item for item in node.decorator_list if _called(item) == DECORATOR), None)
    if not isinstance(decorator, ast.Call) or decorator.args:
        message = f'{where}: {function} is declared by @lab.architecture(kind="relu"), with named arguments'
        raise OwnCodeError(f"{message}; kind is one of {', '.join(ARCHITECTURES)}.")
    given = _read_arguments(decorator, file)
    kind = given.pop("kind", None)
    if kind not in ARCHITECTURES:
        near = difflib.get_close_matches(str(kind), ARCHITECTURES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise OwnCodeError(f"{where}: kind is {kind!r}{hint} It is the built-in architecture that is nearest: {', '.join(ARCHITECTURES)}.")
    error = given.pop("error", "sum" if kind in ("relu", "gated", "jump_relu_tanh") else "mean")
    flags = {name: given.pop(name, None) for name in _FLAGS}
    functions = {name: given.pop(name) for name in _FUNCTIONS if name in given}
    return Declared(
        kind=cast("Architecture", kind),
        constants=given,
        options=_read_options(node, file),
        error=error,
        unit_norm=flags["unit_norm"],
        whole_batch=kind in _OF_BATCH if flags["whole_batch"] is None else flags["whole_batch"],
        surrogate_gradient=bool(flags["surrogate_gradient"]),
        functions=functions,
    )


def check_metric(source: bytes, file: str, function: str) -> None:
    """Raise `OwnCodeError` for a file that is no Python or a function that is no metric, `ConfigError` for one that is not there."""
    node = find_function(source, file, function)
    n_free = len(node.args.posonlyargs) + len(node.args.args)
    if n_free - len(node.args.defaults) > 2 or (n_free < 2 and not node.args.vararg):
        raise OwnCodeError(f"{file}, line {node.lineno}: a metric takes (sae, blocks) and returns a dict of numbers.")


def find_function(source: bytes, file: str, function: str) -> ast.FunctionDef:
    """Find a function at the top of a file. Raises `OwnCodeError` for a file that is no Python, `ConfigError` for a name that is not there."""
    try:
        tree = ast.parse(source, filename=file)
    except SyntaxError as error:
        text = f" ({error.text.strip()[:80]!r})" if error.text else ""
        raise OwnCodeError(f"{file}, line {error.lineno}: it is no Python: {error.msg}{text}.") from error
    except (ValueError, RecursionError, MemoryError) as error:
        raise OwnCodeError(f"{file}: it is no Python: {error}.") from error
    found = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    if function not in found:
        near = difflib.get_close_matches(function, found, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ConfigError(f"{file} has no function {function!r}{hint} It has {', '.join(found) or 'none'}.")
    return found[function]


def _called(node: ast.expr) -> str:
    """Return the last name of what is called or named."""
    node = node.func if isinstance(node, ast.Call) else node
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _read_arguments(call: ast.Call, file: str) -> dict[str, Any]:
    """Read the arguments of a declaration: words, numbers and lists that are written out, and names of functions."""
    given: dict[str, Any] = {}
    for item in call.keywords:
        where, name = f"{file}, line {item.value.lineno}", str(item.arg)
        if name not in (*_TERMS, *CONSTANTS):
            near = difflib.get_close_matches(name, (*_TERMS, *CONSTANTS), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise OwnCodeError(f"{where}: a declaration has no {name!r}{hint} It has {', '.join((*_TERMS, *CONSTANTS))}.")
        if name in _FUNCTIONS:
            if not isinstance(item.value, ast.Name):
                raise OwnCodeError(f"{where}: {name} is the name of a function of the same file.")
            given[name] = item.value.id
            continue
        given[name] = value = _as_floats(name, _read_literal(item.value, f"{where}: {name}"))
        if said := _judge_argument(name, value):
            raise OwnCodeError(f"{where}: {name} is {said} (got {value!r:.80}).")
    return given


def _as_floats(name: str, value: Any) -> Any:
    """Return a constant of the recipe as floats; anything else as it is."""
    parts = list(value) if isinstance(value, tuple | list) else [value]
    if name not in CONSTANTS or not all(isinstance(part, int | float) for part in parts):
        return value
    return tuple(map(float, parts)) if isinstance(value, tuple | list) else float(value)


def _judge_argument(name: str, value: Any) -> str:
    if name in CONSTANTS:
        is_number = isinstance(value, float) or (isinstance(value, tuple) and all(isinstance(part, float) for part in value))
        return judge(name, value) if is_number else "a number, or a list of numbers"
    if name in _FLAGS:
        return "" if isinstance(value, bool) else "True or False"
    return "'sum' or 'mean'" if name == "error" and value not in ("sum", "mean") else ""


def _read_literal(node: ast.expr, what: str) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, RecursionError) as error:
        raise OwnCodeError(f"{what} has to be written out, because it is read without executing the file.") from error


def _read_options(node: ast.FunctionDef, file: str) -> dict[str, Any]:
    """Read a function's keyword arguments. Raises `OwnCodeError` for other arguments than it will get, and for names that are taken."""
    found, where = node.args, f"{file}, line {node.lineno}"
    n_free = len(found.posonlyargs) + len(found.args)
    if n_free != len(_PARAMETERS) or found.vararg or found.kwarg:
        raise OwnCodeError(f"{where}: {node.name} takes ({', '.join(_PARAMETERS)}, *, options), each option by its name.")
    options: dict[str, Any] = {}
    for argument, default in zip(found.kwonlyargs, found.kw_defaults, strict=True):
        line = f"{file}, line {argument.lineno}"
        if argument.arg in CONSTANTS:
            raise OwnCodeError(f"{line}: {argument.arg!r} is an option of every architecture. Call it otherwise.")
        value = REQUIRED if default is None else _read_literal(default, f"{line}: the default of {argument.arg!r}")
        parts = value if isinstance(value, tuple | list) else [value]
        if value is not REQUIRED and not all(isinstance(part, int | float) for part in parts):
            raise OwnCodeError(f"{line}: {argument.arg!r} is {value!r:.80}: options are numbers or lists of numbers.")
        options[argument.arg] = value
    return options


def fill_options(options: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of a call: those given, as the kind of number that their defaults are, and the defaults of the rest."""
    filled: dict[str, Any] = {}
    for name, default in options.items():
        value = given.get(name, default)
        filled[name] = type(default)(value) if isinstance(default, bool | int | float) and isinstance(value, int | float) else value
    return filled
