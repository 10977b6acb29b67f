"""A sweep as people write it becomes plain SAEs: `each`, `zip` and `where` of an entry are written out before anything is checked.

    - {name: k, architecture: topk, each: {k: [16, 32, 64], learning_rate: {log: [1e-4, 1e-2, 5]}, seed: {count: 3}}}     45 SAEs
    - {name: w, zip: {d_sae: [1024, 4096], k: [16, 64]}, where: k < d_sae / 32}                                          side by side

Names come from what varies: `k-k16-learning_rate0.0001-seed0`. `--set saes.*.k=64` sets a field of every entry, `--set saes.*.k=[16,32]` varies it.
Ids, stages and pages see plain SAEs and know nothing of this.
"""

import ast
import difflib
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from interp_assets.errors import ConfigError

MAX_ARMS: Final = 10_000
_KEYS: Final = ("each", "zip", "where")
_RANGES: Final = "{count: 3}, {linear: [0, 1, 5]} or {log: [1e-4, 1e-2, 5]}"
_OPERATIONS: Final[dict[type[ast.AST], Callable[..., Any]]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
    ast.USub: operator.neg,
    ast.Not: operator.not_,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_TRIPLE: Final = 3
"""Numbers that a range takes: first, last, how many."""

Entry = Mapping[str, Any]


def expand(entries: Sequence[Any], defaults: Mapping[str, Any]) -> list[Any]:
    """Write out all entries of `saes`; `defaults` are what `where` reads of fields that an entry does not state. Raises `ConfigError`."""
    arms: list[Any] = []
    for place, entry in enumerate(entries):
        if isinstance(entry, Mapping) and any(key in entry for key in _KEYS):
            arms += _write_out(entry, f"saes.{place}", defaults)
        else:
            arms.append(entry)
        if len(arms) > MAX_ARMS:
            raise ConfigError(f"saes.{place}: more than {MAX_ARMS:,} SAEs come of it. Vary less at once.")
    return arms


def set_values(content: dict[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """Return a configuration with `path=value` applied; below `saes` a name, a number or `*` says which. Raises `ConfigError`."""
    from interp_assets.storage.foreign import parse_yaml  # noqa: PLC0415 - YAML is read nowhere else here

    for setting in settings:
        path, is_set, text = setting.partition("=")
        parts = path.strip().split(".")
        if not is_set or not all(parts):
            raise ConfigError(f"--set {setting!r} is no path=value, such as saes.*.k=64 or corpus.max_shards=4.")
        value = _read_number(parse_yaml(text))
        content = _set_sae(content, parts[1:], value) if parts[0] == "saes" and len(parts) > 1 else _set(content, parts, value)
    return content


def _set(content: Any, parts: Sequence[str], value: Any) -> Any:
    if not parts:
        return value
    if content is not None and not isinstance(content, Mapping):
        raise ConfigError(f"--set: {parts[0]!r} has no place there: what stands above it is a value, no section.")
    return {**(content or {}), parts[0]: _set((content or {}).get(parts[0]), parts[1:], value)}


def _set_sae(content: dict[str, Any], parts: Sequence[str], value: Any) -> dict[str, Any]:
    """Set a field of some entries; what varied there varies no more, and a list of values is varied."""
    entries: list[Any] = content.get("saes") or [{}]
    names = [str(entry.get("name", "demo")) for entry in entries]
    chosen = [place for place, name in enumerate(names) if parts[0] in ("*", name, str(place))]
    if not chosen or len(parts) < 2:
        near = difflib.get_close_matches(parts[0], names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"--set saes.{'.'.join(parts)}: no entry of saes is called so{hint} (there are {', '.join(names)}; * is all of them).")
    field = ".".join(parts[1:])
    changed = list(entries)
    for place in chosen:
        entry = dict(changed[place])
        for key in ("each", "zip"):
            if isinstance(entry.get(key), Mapping) and field in entry[key]:
                entry[key] = {name: values for name, values in entry[key].items() if name != field}
        if isinstance(value, list) and field not in ("more_hook_points", "options.betas", "options.groups"):
            entry.pop(field, None)
            changed[place] = {**entry, "each": {**(entry.get("each") or {}), field: value}}
        else:
            changed[place] = _set(entry, parts[1:], value)
    return {**content, "saes": changed}


def _write_out(entry: Entry, where: str, defaults: Mapping[str, Any]) -> list[dict[str, Any]]:
    each, zipped = (_read_ranges(entry.get(key, {}), f"{where}.{key}") for key in ("each", "zip"))
    if both := sorted({*each, *zipped} & {*entry} | {*each} & {*zipped}):
        raise ConfigError(f"{where}: {', '.join(both)} is said twice: once for all, in `each`, or in `zip`.")
    lengths = {name: len(values) for name, values in zipped.items()}
    if len(set(lengths.values())) > 1:
        raise ConfigError(f"{where}.zip: its lists stand side by side and need one length; they have {lengths}.")
    base = {name: value for name, value in entry.items() if name not in _KEYS}
    together = [dict(zip(zipped, values, strict=True)) for values in zip(*zipped.values(), strict=True)] or [{}]
    n_arms = len(together) * math.prod(len(values) for values in each.values())
    if n_arms > MAX_ARMS:
        raise ConfigError(f"{where}: {n_arms:,} SAEs come of it, at most {MAX_ARMS:,}. Vary less at once.")
    arms = [{**dict(zip(each, values, strict=True)), **row} for values in itertools.product(*each.values()) for row in together]
    conditions = entry.get("where", [])
    for condition in [conditions] if isinstance(conditions, str) else conditions:
        kept = [arm for arm in arms if _holds(str(condition), {**defaults, **base, **arm}, f"{where}.where")]
        if not kept:
            raise ConfigError(f"{where}.where: {condition!r} leaves none of {len(arms):,} SAEs. Loosen it, or vary something else.")
        arms = kept
    values_of = {name: list(values) for name, values in {**each, **zipped}.items()}
    name = str(base.get("name", "demo"))
    return [_place(base, arm) | {"name": "-".join([name, *(_label(key, value, values_of[key]) for key, value in arm.items())])} for arm in arms]


def _place(base: Mapping[str, Any], arm: Mapping[str, Any]) -> dict[str, Any]:
    """Put what varies into an entry; `options.p` is a field of a section."""
    for name, value in arm.items():
        base = _set(base, name.split("."), value)
    return dict(base)


def _read_ranges(given: Any, where: str) -> dict[str, list[Any]]:
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where} must name fields and their values, such as {{k: [16, 32]}} (got {given!r:.80}).")
    return {str(name): list(_read_range(values, f"{where}.{name}")) for name, values in given.items()}


def _read_range(given: Any, where: str) -> Iterator[Any]:
    """Yield the values of a list, or of a range."""
    if isinstance(given, list) and given:
        yield from map(_read_number, given)
        return
    kind, content = next(iter(given.items())) if isinstance(given, Mapping) and len(given) == 1 else ("", None)
    if kind == "count" and isinstance(content, int) and 0 < content <= MAX_ARMS:
        yield from range(content)
        return
    content = [_read_number(part) for part in content] if isinstance(content, list) else content
    first, last, n = content if kind in ("log", "linear") and isinstance(content, list) and len(content) == _TRIPLE else (0, 0, 0)
    is_sound = all(isinstance(end, int | float) for end in (first, last)) and isinstance(n, int) and 1 < n <= MAX_ARMS
    if not is_sound or (kind == "log" and not (first > 0 and last > 0)):
        raise ConfigError(f"{where} is neither a list of values nor {_RANGES} (got {given!r:.80}).")
    for i in range(n):
        share = i / (n - 1)
        yield float(f"{first * (last / first) ** share if kind == 'log' else first + (last - first) * share:.6g}")


def _read_number(value: Any) -> Any:
    """Return the number that YAML took for a word: `1e-4` has no point."""
    try:
        return float(value) if isinstance(value, str) and value[:1] in "+-.0123456789" else value
    except ValueError:
        return value


def _label(field: str, value: Any, values: Sequence[Any]) -> str:
    """Name one value of what varies: with its field, or alone where it is a word."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return f"{field.rpartition('.')[2]}{values.index(value)}"
    text = value if isinstance(value, str) else f"{field.rpartition('.')[2]}{value:g}"
    return "".join(char if char.isascii() and (char.isalnum() or char in "_-.") else "_" for char in text.replace("+", ""))


def _holds(condition: str, fields: Mapping[str, Any], where: str) -> bool:
    """Say whether a comparison of fields holds for one SAE; only comparisons, arithmetic, `and`, `or`, `not`, and nothing that is called."""
    try:
        return bool(_evaluate(ast.parse(condition, mode="eval").body, fields))
    except (SyntaxError, TypeError, ZeroDivisionError, KeyError, RecursionError) as error:
        near = difflib.get_close_matches(str(error.args[0]), list(fields), n=1) if isinstance(error, KeyError) else []
        said = f"there is no field {error.args[0]!r}{f'; did you mean {near[0]!r}?' if near else ''}" if isinstance(error, KeyError) else str(error)
        raise ConfigError(f"{where}: {condition!r} cannot be read ({said}). It compares fields: k < d_sae / 16") from error


def _evaluate(node: ast.AST, fields: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant(value=int() | float() | str() as value):
            return value
        case ast.Name(id=name):
            return fields[name]
        case ast.BoolOp(op=op, values=values):
            found = (bool(_evaluate(value, fields)) for value in values)
            return all(found) if isinstance(op, ast.And) else any(found)
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATIONS:
            return _OPERATIONS[type(op)](_evaluate(operand, fields))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATIONS:
            return _OPERATIONS[type(op)](_evaluate(left, fields), _evaluate(right, fields))
        case ast.Compare(left=left, ops=ops, comparators=comparators):
            values = [_evaluate(value, fields) for value in (left, *comparators)]
            pairs = zip(ops, values, values[1:], strict=False)
            return all(_OPERATIONS.get(type(op), _refuse)(a, b) for op, a, b in pairs)
        case _:
            return _refuse(node)


def _refuse(*_found: Any) -> Any:
    message = "it is no comparison of fields"
    raise TypeError(message)
