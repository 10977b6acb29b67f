"""Two runs become the causes of their difference: what they were configured with, which text and weights they were planned on, which code they ran.

With the versions of the code all artifact ids follow from configuration and plan, so that what differs there is what differs, whether the artifacts
are still there or not. A run is an entry of the history (`planning/history.py`); the state of a folder as it is now is one, too.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from interp_assets.errors import StoreMissingError
from interp_assets.planning.history import read_plan_aside
from interp_assets.storage.foreign import parse_json
from interp_assets.storage.manifest import CONFIGURATION, PLAN
from interp_assets.storage.store import Store
from interp_assets.train.results.causes import FIELD, OPTION, TEXT, VERSION, WEIGHTS, Cause, flatten, name_code, write_value

_NOT_IDENTITY = ("execution", "name", "root", "shuffle.memory_bytes")


class State(NamedTuple):
    """What a run worked by."""

    store: Store
    config: dict[str, Any]
    plan: dict[str, Any]
    code: dict[str, Any]
    sae_ids: dict[str, str]
    """Artifact ids of the SAEs that it made or found, by name; empty where they are not known."""


def read_state(store: Store, entry: Mapping[str, Any] | None = None) -> State:
    """Return what a run worked by, or, without an entry, how a folder is planned now."""
    if entry is None:
        try:
            return State(store, parse_json(store.get(CONFIGURATION)), parse_json(store.get(PLAN)), {}, {})
        except StoreMissingError:
            return State(store, {}, {}, {}, {})
    found = next((asset for asset in entry.get("assets", []) if asset["name"] == "sae"), {})
    ids = {name: each[0] for part in ("made", "reused") for name, each in (found.get(part) or {}).items() if isinstance(each, list) and each}
    return State(store, entry["config"], read_plan_aside(store, entry.get("plan", "")), entry.get("code", {}), ids)


def compare_states(a: State, b: State) -> list[Cause]:
    """Return what two runs differ in, each cause once; a field that all SAEs share is said once for all."""
    return [*_compare_configs(a, b), *_compare_plans(a.plan, b.plan), *_compare_code(a.code, b.code)]


def _compare_configs(a: State, b: State) -> Iterator[Cause]:
    plain = [{name: value for name, value in side.config.items() if name not in ("saes", *_NOT_IDENTITY)} for side in (a, b)]
    for name, before, after in _differences(plain[0], plain[1]):
        if name not in _NOT_IDENTITY:
            yield Cause(FIELD, name, before, after)
    saes = [{sae["name"]: sae for sae in side.config.get("saes", [])} for side in (a, b)]
    code: dict[Cause, None] = {}
    found: dict[tuple[str, str, str], list[str]] = {}
    for name in saes[0].keys() & saes[1].keys():
        for field, before, after in _differences(saes[0][name], saes[1][name]):
            if field == "code.digest":
                code[name_code((a.store, b.store), (before, after), saes[1][name]["architecture"])] = None
            elif field != "code.path":
                found.setdefault((field, before, after), []).append(name)
    yield from code
    n_both = len(saes[0].keys() & saes[1].keys())
    for (field, before, after), names in sorted(found.items()):
        who = "*" if len(names) == n_both else ",".join(sorted(names)[:4]) + (",..." if len(names) > 4 else "")
        kind = OPTION if field.startswith("options.") else FIELD
        yield Cause(kind, f"saes.{who}.{field}", before, after)
    for name in sorted(saes[0].keys() ^ saes[1].keys()):
        yield Cause(FIELD, "saes", *(name if name in side else "absent" for side in saes))


def _compare_plans(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[Cause]:
    if not (a and b):
        return
    shards = [{shard["index"]: shard for shard in side["shards"]} for side in (a, b)]
    for index in sorted({*shards[0], *shards[1]}):
        prints = [side[index]["fingerprint"][:12] if index in side else "absent" for side in shards]
        if prints[0] != prints[1]:
            yield Cause(TEXT, f"shard {index}", *prints)
    for kind, what, key in ((WEIGHTS, "model", "model_fingerprint"), (WEIGHTS, "tokenizer", "tokenizer_fingerprint")):
        if a[key] != b[key]:
            yield Cause(kind, what, a[key], b[key])


def _compare_code(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[Cause]:
    if not (a and b):
        return
    if a.get("sources") != b.get("sources"):
        yield Cause(VERSION, "interp-assets", *(_name_version(side) for side in (a, b)))


def _name_version(code: Mapping[str, Any]) -> str:
    repository = code.get("package") or {}
    commit = f" at {repository['commit'][:9]}{' with changes' if repository.get('dirty') else ''}" if repository.get("commit") else ""
    return f"{code.get('version', '')} {str(code.get('sources', ''))[:12]}{commit}"


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> Sequence[tuple[str, str, str]]:
    before, after = dict(flatten(a)), dict(flatten(b))
    return [
        (name, write_value(before.get(name)), write_value(after.get(name)))
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    ]
