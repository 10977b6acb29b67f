"""Two artifacts of one kind become the causes of their difference: fields, options, text, weights, versions, found by walking manifests upstream.

An artifact's id is a hash of its identity and of the ids of its inputs. So two differ because a leaf of their identities does, or because an input
does; the walk goes on at each input that differs, and ends at leaves. Every cause is said once, by whichever way it was met.

Inputs of many artifacts are one combined id (`combine_ids`), which names none of them. Which they were is found by trying: artifacts of one family,
alike but for their place and text, are put together, and a guess counts only where its hash is the id. So an answer is exact or none: what
cannot be put together, because it was deleted, is the cause `unknown`.

Where ids agree and bytes do not (made again on another kind of device), the walk follows digests to the first artifact whose inputs agree.
"""

import difflib
import itertools
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from interp_assets.corpus.tokens import DOCUMENTS, TOKENS
from interp_assets.errors import ArtifactError
from interp_assets.storage.manifest import MANIFEST, Manifest, combine_ids, load_manifest, read_file, read_manifest
from interp_assets.storage.store import Store
from interp_assets.train.refs import CODE as CODE_FILE
from interp_assets.train.refs import code_ref

FIELD, OPTION, TEXT, WEIGHTS, VERSION, CODE = "field", "option", "text", "weights", "version", "code"
BYTES, UNKNOWN, ROWS = "bytes", "unknown", "rows"
_READERS: Final = 16
_MAX_GUESSES: Final = 4096
_MOST_LINES: Final = 4
_MOST_HELD_OUT: Final = 256
_PLACES: Final = ("shard", "bucket")
_LEAVES: Final[dict[str, dict[str, tuple[str, str]]]] = {
    "token_shard": {
        "text": (TEXT, ""),
        "tokenizer": (WEIGHTS, "tokenizer"),
        "excluded.excluded_positions": (FIELD, "harvest.excluded_positions"),
        "excluded.excluded_token_ids": (FIELD, "harvest.excluded_token_ids"),
        **{name: (FIELD, f"corpus.{name}") for name in ("text_field", "text_kind", "context_length", "contexts")},
    },
    "activation_shard": {"model": (WEIGHTS, "model"), "model_dtype": (FIELD, "model.dtype"), "dtype": (FIELD, "harvest.dtype")},
    "shuffle_plan": {"passes": (FIELD, "shuffle.passes"), "fan_out": (FIELD, "shuffle.fan_out")},
    "sae": {"pick": (VERSION, "picking of latents"), "own": (VERSION, "architectures of one's own"), "sae.code.digest": (CODE, "")},
}
"""Leaves of an identity, by kind of artifact: what sort of cause they are and what people call them; all others are fields of their own name."""
_NAME: Final = "sae.name"
"""It is in the id of an SAE, and decides nothing: said only where nothing else differs."""
_OF_SAE: Final = "sae."
_OPTIONS: Final = "sae.options."


class Side(NamedTuple):
    """An artifact that is compared."""

    store: Store
    path: str
    manifest: Manifest


class Cause(NamedTuple):
    """One reason why two artifacts differ."""

    kind: str
    what: str
    before: str
    after: str
    detail: str = ""

    def __str__(self) -> str:
        """Say it in a line."""
        return f"{self.kind} {self.what}: {self.before} -> {self.after}" + (f" ({self.detail})" if self.detail else "")


def find_causes(a: Side, b: Side) -> list[Cause]:
    """Return why two artifacts of one kind differ, each cause once, in the order of the walk; none where they are the same."""
    index = _Index(a.store)
    walk = _Walk(index, index if a.store.url == b.store.url else _Index(b.store))
    walk.visit(a, b)
    return list(walk.causes)


class _Index:
    """The manifests of a pipeline's folder, by id; combined ids are put together when they are asked for."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._sides: dict[str, Side] | None = None
        self._combined: dict[str, list[Side]] | None = None

    def find(self, artifact_id: str) -> list[Side]:
        """Return the artifact that has an id, or all those whose ids were combined to it; nothing where they are not there."""
        if self._sides is None:
            self._sides = {side.manifest.artifact_id: side for side in self._read()}
        if artifact_id in self._sides:
            return [self._sides[artifact_id]]
        if self._combined is None:
            self._combined = {combine_ids([side.manifest.artifact_id for side in sides]): sides for sides in self._guess()}
        return self._combined.get(artifact_id, [])

    def _read(self) -> Iterator[Side]:
        paths = [item.path.removesuffix(f"/{MANIFEST}") for item in self.store.list() if item.path.endswith(f"/{MANIFEST}")]

        def read(path: str) -> Side | None:
            try:
                return Side(self.store, path, read_manifest(self.store, path))
            except ArtifactError:
                return None

        with ThreadPoolExecutor(_READERS) as readers:
            yield from (side for side in readers.map(read, paths) if side)

    def _guess(self) -> Iterator[list[Side]]:
        """Yield lists of artifacts, in order of place, whose ids may have been combined."""
        families: defaultdict[str, defaultdict[int, list[Side]]] = defaultdict(lambda: defaultdict(list))
        for side in (self._sides or {}).values():
            if (place := _place(side.manifest)) is not None:
                families[self._family(side.manifest, side.path.rpartition("/")[0])][place].append(side)
        for family in families.values():
            places = sorted(family)
            for first in range(min(len(places), _MOST_HELD_OUT)):
                for stop in sorted({first + 1, *range(max(first + 1, len(places) - 1), len(places) + 1)}):
                    chosen = [family[place] for place in places[first:stop]]
                    yield from map(list, itertools.islice(itertools.product(*chosen), _MAX_GUESSES))

    def _family(self, manifest: Manifest, folder: str = "") -> str:
        """Name what an artifact shares with those beside it: all but its place and its text."""
        identity = {name: value for name, value in manifest.identity.items() if name not in (*_PLACES, "text")}
        sides = self._sides or {}
        inputs = {role: self._family(sides[found].manifest) if found in sides else found for role, found in manifest.inputs.items()}
        return json.dumps([manifest.kind, folder, identity, inputs], sort_keys=True)


class _Walk:
    """Two artifacts and all that they were made from, compared pair by pair."""

    def __init__(self, a: _Index, b: _Index) -> None:
        self._a, self._b = a, b
        self._seen: set[tuple[str, str]] = set()
        self.causes: dict[Cause, None] = {}

    def visit(self, a: Side, b: Side) -> bool:
        """Collect the causes of one pair's difference; answer whether there was any."""
        pair = (a.manifest.artifact_id, b.manifest.artifact_id)
        if pair in self._seen or (pair[0] == pair[1] and a.manifest.digest == b.manifest.digest):
            return pair in self._seen
        self._seen.add(pair)
        leaves = list(_compare_leaves(a, b))
        self.causes |= dict.fromkeys(leaves)
        found = [self._follow(a, b, role) for role in sorted({*a.manifest.inputs, *b.manifest.inputs})]
        if not leaves and not any(found):
            what = f"{a.manifest.kind} {a.path}"
            digests = a.manifest.digest[:12], b.manifest.digest[:12]
            named = [write_value(dict(flatten(side.manifest.identity)).get(_NAME)) for side in (a, b)]
            cause = Cause(BYTES, what, *digests, "one id, other bytes: another device") if pair[0] == pair[1] else Cause(FIELD, "name", *named)
            self.causes[cause] = None
        return True

    def _follow(self, a: Side, b: Side, role: str) -> bool:
        """Compare what both were made from in one role."""
        ids = a.manifest.inputs.get(role, ""), b.manifest.inputs.get(role, "")
        if not all(ids):
            self.causes[Cause(FIELD, f"{a.manifest.kind} {role}", ids[0][:12] or "none", ids[1][:12] or "none")] = None
            return True
        if ids[0] == ids[1] and self._a is self._b:
            return False
        found = self._a.find(ids[0]), self._b.find(ids[1])
        if not all(found):
            if ids[0] != ids[1]:
                self.causes[Cause(UNKNOWN, f"{a.manifest.kind} {role}", ids[0][:12], ids[1][:12], "what it was made from is gone")] = None
            return ids[0] != ids[1]
        pairs = [{_place(side.manifest): side for side in sides} for sides in found]
        places = sorted({*pairs[0], *pairs[1]}, key=lambda place: -1 if place is None else place)
        alone = [place for place in places if (place in pairs[0]) != (place in pairs[1])]
        if alone:
            noun = found[0][0].manifest.kind
            self.causes[Cause(ROWS, f"{noun}s", str(len(found[0])), str(len(found[1])), f"only on one side: {', '.join(map(str, alone[:8]))}")] = None
        differs = [self.visit(pairs[0][place], pairs[1][place]) for place in places if place not in alone]
        return any(differs) or bool(alone)


def _compare_leaves(a: Side, b: Side) -> Iterator[Cause]:
    before, after = dict(flatten(a.manifest.identity)), dict(flatten(b.manifest.identity))
    for name in sorted({*before, *after}):
        if name in _PLACES or before.get(name) == after.get(name) or name == _NAME:
            continue
        kind, what = _classify(a.manifest.kind, name)
        values = write_value(before.get(name)), write_value(after.get(name))
        if kind == CODE:
            yield name_code((a.store, b.store), (values[0], values[1]), str(after.get("sae.architecture")))
        elif kind == TEXT:
            yield Cause(kind, f"shard {_place(a.manifest)}", values[0][:12], values[1][:12], _describe_text(a, b))
        else:
            yield Cause(kind, what, values[0], values[1])


def _classify(kind: str, name: str) -> tuple[str, str]:
    """Say what sort of cause a leaf of an identity is, and what people call it."""
    if name == "code":
        return VERSION, kind
    if found := _LEAVES.get(kind, {}).get(name):
        return found
    if name.startswith(_OPTIONS):
        return OPTION, name.removeprefix(_OPTIONS)
    return FIELD, name.removeprefix(_OF_SAE) if name.startswith(_OF_SAE) else name


def name_code(stores: tuple[Store, Store], digests: tuple[str, str], architecture: str) -> Cause:
    """Return the cause that two files are, with the first lines in which they differ, as far as the pipelines keep them."""
    file = architecture.rpartition(":")[0] or architecture
    try:
        refs = [code_ref(digest) for digest in digests]
        sources = [
            read_file(store, ref.path, load_manifest(store, ref), CODE_FILE).decode().splitlines() for store, ref in zip(stores, refs, strict=True)
        ]
    except (ArtifactError, UnicodeDecodeError):
        return Cause(CODE, file, digests[0][:12], digests[1][:12])
    said = []
    for tag, start, stop, first, last in difflib.SequenceMatcher(None, *sources, autojunk=False).get_opcodes():
        if tag != "equal":
            old, new = ("; ".join(line.strip() for line in lines) or "nothing" for lines in (sources[0][start:stop], sources[1][first:last]))
            said.append(f"line {first + 1}: {old:.80} -> {new:.80}")
    more = f" and {len(said) - _MOST_LINES:,} more places" if len(said) > _MOST_LINES else ""
    return Cause(CODE, file, digests[0][:12], digests[1][:12], " | ".join(said[:_MOST_LINES]) + more)


def _describe_text(a: Side, b: Side) -> str:
    """Name the documents of a shard that are not the same in both."""
    try:
        documents = [_read_documents(side) for side in (a, b)]
    except (ArtifactError, KeyError, ValueError):
        return ""
    names = [name for name in dict.fromkeys((*documents[0], *documents[1])) if documents[0].get(name) != documents[1].get(name)]
    said = []
    for name in names[:4]:
        old, new = documents[0].get(name), documents[1].get(name)
        if old is None or new is None:
            said.append(f"{name} {'added' if old is None else 'removed'}")
        else:
            first = next((i for i, (x, y) in enumerate(zip(old, new, strict=False)) if x != y), min(len(old), len(new)))
            said.append(f"{name} from token {first:,}")
    more = f" and {len(names) - len(said):,} more" if len(names) > len(said) else ""
    return f"{', '.join(said)}{more}" if said else "no token differs"


def _read_documents(side: Side) -> dict[str, list[int]]:
    """Read the tokens of a shard's documents, by their names."""

    def read(name: str) -> pa.Table:
        return pq.read_table(pa.BufferReader(read_file(side.store, side.path, side.manifest, name)))

    tokens, table = read(TOKENS), read(DOCUMENTS)
    ids, owners = tokens["token_id"].to_pylist(), tokens["document"].to_pylist()
    by_document: defaultdict[int, list[int]] = defaultdict(list)
    for token, owner in zip(ids, owners, strict=True):
        by_document[owner].append(token)
    return {name: by_document[place] for place, name in enumerate(table["source"].to_pylist())}


def _place(manifest: Manifest) -> int | None:
    """Return which of several alike an artifact is; None of one that stands alone."""
    return next((manifest.identity[name] for name in _PLACES if name in manifest.identity), None)


def flatten(content: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested sections, by their paths."""
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def write_value(value: Any) -> str:
    """Write one value for a person."""
    return "absent" if value is None else str(value) if isinstance(value, int | float | str) and value != "" else json.dumps(value)


def say_causes(causes: Iterable[Cause]) -> list[str]:
    """Return a line a cause, those of one sort together."""
    order: Sequence[str] = (FIELD, OPTION, CODE, TEXT, WEIGHTS, VERSION, ROWS, BYTES, UNKNOWN)
    return [str(cause) for cause in sorted(causes, key=lambda cause: order.index(cause.kind))]
