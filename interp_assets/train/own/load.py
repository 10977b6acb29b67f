"""The file of an architecture of one's own becomes an artifact, and the artifact a recipe: here alone a configuration's code is executed.

    keep_code       the file's bytes are published as `4-sae/code-<hash>`, by the process that has both them and the configuration
    open_recipe     reads that artifact, compares its bytes with the configuration's hash, and executes them

So torchrun's, Ray's and Kubernetes' processes execute what was named when the configuration was read, whatever lies where they run. A store can hold
other bytes, but none with that hash: what a bundle, a manifest or a foreign configuration names is not executed, because only trainings
and measurements ask here, by the configuration that somebody has typed.
"""

import linecache
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor

from interp_assets.errors import ArtifactError, InterpError, OwnCodeError
from interp_assets.planning.config import SaeConfig
from interp_assets.planning.own import check_metric, fill_options, hash_code, read_declaration, split_name
from interp_assets.planning.sections import Code, Metric
from interp_assets.storage.manifest import create_artifact, find_manifest, load_manifest, read_file
from interp_assets.storage.store import Store
from interp_assets.train.losses.loss import Weights
from interp_assets.train.own.loss import OwnLoss
from interp_assets.train.recipes import RECIPES, Recipe, make_recipe, vary
from interp_assets.train.refs import CODE, code_ref

_OF_MEMORY: Final = (MemoryError, torch.OutOfMemoryError)


def keep_code(store: Store, code: Code | None, name: str) -> None:
    """Publish the file of the function called `name`; nothing where it is there, or the function is built in.

    Raises `OwnCodeError` when neither the pipeline nor this machine has the bytes that the configuration names.
    """
    if split_name(name) is None:
        return
    code = _require(code, name)
    if find_manifest(store, code_ref(code.digest)) is not None:
        return
    try:
        source = Path(code.path).read_bytes()
    except OSError as error:
        raise _lost(store, code, name, f"and {code.path or 'a file of it'} cannot be read ({error.strerror})") from error
    if hash_code(source) != code.digest:
        raise _lost(store, code, name, f"and {code.path} has other bytes by now: run the command again, or take `code` out of the configuration")
    with create_artifact(store, code_ref(code.digest)) as art:
        art.put(CODE, source)


def open_recipe(store: Store, config: SaeConfig) -> Recipe:
    """Return the recipe of an SAE: a built-in one, or that of its own file, which is executed. Raises `OwnCodeError` with file and line."""
    if not config.is_own:
        return make_recipe(config)
    return load_recipe(_read_code(store, config.code, config.architecture), config)


def open_metric(store: Store, metric: Metric) -> Callable[..., Any]:
    """Return the function of a metric, whose file is executed. Raises `OwnCodeError` with file and line."""
    source = _read_code(store, metric.code, metric.function)
    file, _, function = metric.function.partition(":")
    check_metric(source, file, function)
    return _Guarded(getattr(_execute(source, file), function), file, "")


def _read_code(store: Store, code: Code | None, name: str) -> bytes:
    """Read the bytes that a configuration names, and no others."""
    code = _require(code, name)
    ref = code_ref(code.digest)
    try:
        source = read_file(store, ref.path, load_manifest(store, ref), CODE)
    except ArtifactError as error:
        raise _lost(store, code, name, f"or it is damaged ({error})") from error
    if hash_code(source) != code.digest:
        raise _lost(store, code, name, "which has another one's bytes there")
    return source


def load_recipe(source: bytes, config: SaeConfig) -> Recipe:
    """Execute a file, and make a recipe of the function that an SAE's architecture names."""
    named = split_name(config.architecture)
    assert named is not None
    file = Path(named[0]).name
    declared = read_declaration(source, file, named[1])
    module = _execute(source, file)
    options = fill_options(declared.options, config.options)
    function = _Guarded(getattr(module, named[1]), file, config.name)
    more = {name: _Guarded(getattr(module, held), file, config.name) for name, held in declared.functions.items()}
    recipe = replace(
        RECIPES[declared.kind],
        loss=OwnLoss(lambda *arguments: function(*arguments, **options), declared, f"{file}:{named[1]}"),
        **declared.constants,
        **({} if declared.unit_norm is None else {"is_unit_norm": declared.unit_norm}),
        **{name: _with_options(name, guarded, options) for name, guarded in more.items()},
    )
    return vary(recipe, {name: value for name, value in config.options.items() if name not in declared.options})


class _Guarded:
    """A function of a file; what it raises becomes one sentence with the file's line."""

    def __init__(self, function: Callable[..., Any], file: str, sae: str) -> None:
        self.function, self._file, self._sae = function, file, sae

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        with telling(self._file, self._sae):
            return self.function(*arguments, **options)


def _with_options(role: str, guarded: _Guarded, options: Mapping[str, Any]) -> Callable[..., Weights]:
    """Return a function of the file that gets those of the options that it takes, and whose answer is weights by name."""
    taken = {name: value for name, value in options.items() if name in signature(guarded.function).parameters}

    def call(*arguments: Any) -> Weights:
        found = guarded(*arguments, **taken)
        values = found.values() if isinstance(found, dict) else [None]
        if not all(isinstance(value, Tensor) and value.dim() and value.is_floating_point() for value in values):
            raise OwnCodeError(f"{role}={guarded.function.__name__} has to return a dict of tensors by name, each of one dimension or more.")
        return {str(name): value.detach().contiguous() for name, value in found.items()}

    return call


def _execute(source: bytes, file: str) -> ModuleType:
    """Run a file as a module of its own, whose lines messages can show."""
    module = ModuleType(f"interp_own_{hash_code(source)[:12]}")
    module.__file__ = file
    sys.modules[module.__name__] = module  # where dataclasses look
    linecache.cache[file] = (len(source), None, source.decode(errors="replace").splitlines(keepends=True), file)
    with telling(file, ""):
        exec(compile(source, file, "exec", dont_inherit=True), module.__dict__)  # noqa: S102 - what it is for: the configuration names its hash
    return module


@contextmanager
def telling(file: str, sae: str) -> Iterator[None]:
    """Turn what a file's code raises into `OwnCodeError` with its line; memory that runs out is another's business."""
    try:
        yield
    except InterpError:
        raise
    except Exception as error:
        if isinstance(error, _OF_MEMORY) or "can't allocate" in str(error) or "not enough memory" in str(error):
            raise
        of = f" (SAE {sae!r})" if sae else ""
        raise OwnCodeError(f"{_place(error, file)}: {type(error).__name__}: {str(error).strip() or 'no message'}{of}.") from error


def _place(error: BaseException, file: str) -> str:
    """Return the last line of the file that an error went through, with its text."""
    found, trace = "", error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == file:
            found = f"{file}, line {trace.tb_lineno}, `{linecache.getline(file, trace.tb_lineno).strip()}`"
        trace = trace.tb_next
    return found or (f"{file}, line {error.lineno}" if isinstance(error, SyntaxError) else file)


def _require(code: Code | None, name: str) -> Code:
    if code is None:
        raise OwnCodeError(f"The file of {name} was not read. Read the configuration from a file.")
    return code


def _lost(store: Store, code: Code, name: str, why: str) -> OwnCodeError:
    return OwnCodeError(f"The file of {name} (SHA-256 {code.digest[:12]}) is not at {store.url}/{code_ref(code.digest).path}, {why}.")
