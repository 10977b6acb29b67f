"""What checks types in tests: every function of the package that is not async refuses arguments and results of other types than the annotated ones.

An import hook puts a decorator on each. A function whose annotations name arrays goes through jaxtyping, so that an axis has one size in a call; all
others are beartype's alone, which takes a tenth of that. Checks are written when a function is first called: of all functions that a test process
imports, it calls a few. A function inside another is defined at every call of the outer one; its checks are written once for its signature.
"""

import ast
import hashlib
import inspect
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, Final, get_args, get_type_hints
from warnings import catch_warnings

import jaxtyping
from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintPep585DeprecationWarning

PACKAGE: Final = "interp_assets"
_NAME: Final = "__checked__"
_SUFFIX: Final = f".checked-{hashlib.blake2b(Path(__file__).read_bytes(), digest_size=4).hexdigest()}.pyc"
_ARRAYS: Final = tuple(f"{name}[" for name in dir(jaxtyping) if inspect.isclass(getattr(jaxtyping, name)))
_CONF: Final = BeartypeConf(violation_type=jaxtyping.TypeCheckError)
"""What is wrong is a `TypeError`, as it would be without checks a little later: readers of foreign files look out for these."""

_checks: dict[tuple[str, str, inspect.Signature], Callable[..., Any]] = {}


class _Finder(MetaPathFinder):
    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname.split(".", maxsplit=1)[0] != PACKAGE:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    """Compiles a module with its checks, and keeps that beside what Python keeps of it without."""

    def source_to_code(self, data: Any, path: Any, *, _optimize: int = -1) -> Any:  # type: ignore[override]
        tree = _Decorating().visit(ast.parse(data, path))
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True, optimize=_optimize)

    def get_data(self, path: str) -> bytes:
        return super().get_data(path.removesuffix(".pyc") + _SUFFIX if path.endswith(".pyc") else path)

    def set_data(self, path: str, data: Any, *, _mode: int = 0o666) -> None:
        super().set_data(path.removesuffix(".pyc") + _SUFFIX, data, _mode=_mode)  # type: ignore[call-arg]


class _Decorating(ast.NodeTransformer):
    """Puts the decorator nearest to every function, and on every class for those that dataclasses write."""

    def __init__(self) -> None:
        self._depth = 0

    def visit_Module(self, node: ast.Module) -> ast.Module:
        self.generic_visit(node)
        place = 1 if ast.get_docstring(node) is not None else 0
        node.body.insert(place, ast.Import([ast.alias(__name__, _NAME)]))
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        self.generic_visit(node)
        node.decorator_list.insert(0, _decorator("check_class", node))
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        self._depth += 1
        self.generic_visit(node)
        self._depth -= 1
        node.decorator_list.append(_decorator("check_inner" if self._depth else "check_calls", node))
        return node

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AsyncFunctionDef:
        self._depth += 1
        self.generic_visit(node)
        self._depth -= 1
        return node


def _decorator(name: str, node: ast.stmt) -> ast.expr:
    made = ast.Attribute(ast.Name(_NAME, ast.Load()), name, ast.Load())
    for part in ast.walk(made):
        ast.copy_location(part, node)
    return made


def check_class(kind: Any) -> Any:
    """Check what makes an instance of a dataclass."""
    return jaxtyping.jaxtyped(kind, typechecker=check_types)


def check_inner(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check a function that is defined inside another, whenever it is."""
    return jaxtyping.jaxtyped(function, typechecker=check_types)


def check_calls(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check a function of a module or class; its checks are written when it is first called."""
    if not function.__annotations__:
        return function
    made: list[Callable[..., Any]] = []

    @wraps(function)
    def check(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        if not made:
            made.append(_write(function))
        return made[0](*args, **kwargs)

    return check


def _write(function: Any) -> Callable[..., Any]:
    if any(map(_names_array, function.__annotations__.values())):
        return jaxtyping.jaxtyped(function, typechecker=check_types)
    own = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    own.__kwdefaults__, own.__qualname__, own.__module__ = function.__kwdefaults__, function.__qualname__, function.__module__
    own.__annotations__ = {name: _resolve(hint, function.__globals__) for name, hint in function.__annotations__.items()}
    return _write_checks(own)


def _names_array(hint: object) -> bool:
    if isinstance(hint, str):
        return any(name in hint for name in _ARRAYS)
    return (inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray)) or any(map(_names_array, get_args(hint)))


def _resolve(hint: Any, names: dict[str, Any]) -> Any:
    """Return an annotation with the classes that it names; anything where a name is known to type checkers alone."""
    holder = FunctionType((lambda: None).__code__, names)
    holder.__annotations__ = {"hint": hint}
    try:
        return get_type_hints(holder, names, include_extras=True)["hint"]
    except (NameError, AttributeError):
        return Any


def check_types(empty: Callable[..., Any]) -> Callable[..., Any]:
    """Return an empty function that refuses arguments and results of other types; jaxtyping calls one beside each function."""
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


def _write_checks(function: Callable[..., Any]) -> Callable[..., Any]:
    with catch_warnings(action="ignore", category=BeartypeDecorHintPep585DeprecationWarning):  # of annotations that other libraries inherit
        return beartype(conf=_CONF)(function)


assert PACKAGE not in sys.modules, "import checked before the package: what is imported already is not checked"
sys.meta_path.insert(0, _Finder())
