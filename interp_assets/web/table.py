"""The list files of a bundle become pages of a list: sorted, filtered and searched, without the table in memory.

An order is a range of an order file when nothing is filtered; else the order file, reduced to the latents that the filters' columns and the
index let through. What was read or reduced is kept while it is among the latest `_KEPT_BYTES`; everything else stays where it is, so memory does
not grow with the number of features beyond that and one query's columns (at ten million: 40 MB each).
"""

import re
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock, RLock
from typing import Any, Final, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from interp_assets.errors import InputError
from interp_assets.web.columns import NO_WORD, ROW, ROW_BLOCK, ROWS, VALUES, WORD_COLUMNS, WORDS, decode_words
from interp_assets.web.labels import LabelSet
from interp_assets.web.search import LABEL, OFFSETS, POSTINGS, Index, Span, join_spans

MAX_ROWS: Final = 500
"""Rows of one page."""
MAX_FILTERS: Final = 16
RELEVANCE: Final = "relevance"
"""What a search may be sorted by besides the columns: the best match first, equal ones in order of latent."""
LIVES: Final = ("all", "live", "dead")
_KEPT_BYTES: Final = 96 << 20
_READ_BYTES: Final = 4 << 20
_AHEAD: Final = 8
_CONDITION: Final = re.compile(r"(\w+)\s*(>=|<=|>|<)\s*(-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)\s*(%?)")
_RELATIONS: Final[dict[str, Callable[[Any, Any], Any]]] = {">=": np.greater_equal, "<=": np.less_equal, ">": np.greater, "<": np.less}


@runtime_checkable
class Files(Protocol):
    """The files of a bundle, read by verified ranges."""

    description: dict[str, Any]

    @property
    def where(self) -> str:
        """Address for people and messages."""
        ...

    def read(self, name: str) -> bytes:
        """Read a whole file."""
        ...

    def read_spans(self, name: str, starts: Sequence[int], lengths: Sequence[int]) -> list[bytes]:
        """Read several ranges of one file at once."""
        ...


class Query(NamedTuple):
    """What a list shows: `sort` is a column, `life` one of all, live and dead, `filters` are like `max>=3.5`."""

    sort: str = "latent"
    is_descending: bool = False
    life: str = "all"
    filters: tuple[str, ...] = ()
    text: str = ""


class Page(NamedTuple):
    """Some rows of a list, and how long the whole list is."""

    n_features: int
    n_matches: int
    rows: list[dict[str, Any]]


class Place(NamedTuple):
    """Where a feature stands in a list: its position and its neighbours there, or None at the ends and when it is not in the list."""

    position: int | None
    n_matches: int
    previous: int | None
    next: int | None


class FeatureTable:
    """The statistics of all features of one bundle. Safe to use from several threads."""

    def __init__(self, files: Files, labels: Sequence[LabelSet] = ()) -> None:
        """Read nothing yet. `labels` are searched, sorted by and shown beside what the bundle holds."""
        self._files, self._labels = files, labels
        self.n_features: int = files.description["d_sae"]
        self._n_live: int = files.description["n_live"]
        self._orders: dict[str, str] = files.description["columns"]["sortable"]
        self.sortable = [*self._orders, *([LABEL] if labels else [])]
        self.numeric = list(files.description["columns"]["numeric"])
        self._kept: OrderedDict[Any, NDArray[Any]] = OrderedDict()
        self._lock, self._words_lock, self._making = Lock(), Lock(), RLock()
        self._words: list[str] | None = None
        self._index: Index | None = None

    def page(self, query: Query, offset: int, limit: int, among: NDArray[np.bool_] | None = None) -> Page:
        """Return rows [offset, offset + limit) of the list; `among` marks the latents that may be in it, for filters of the caller.

        Raises `InputError` for a column, filter or limit that makes no sense.
        """
        if not 0 < limit <= MAX_ROWS or offset < 0:
            raise InputError(f"Asked for {limit:,} rows from {offset:,}; ask for 1 to {MAX_ROWS} rows from 0 or later.")
        self._check(query)
        if query.filters or query.text.strip() or among is not None or query.sort == LABEL:
            order = self.order(query, among)
            n_matches, latents = len(order), order[offset : offset + limit]
        else:
            n_matches = self._span(query)[1]
            latents = self._read_order(query, offset, min(limit, max(0, n_matches - offset)))
        return Page(self.n_features, n_matches, self._rows(latents))

    def rows(self, latents: Sequence[int]) -> list[dict[str, Any]]:
        """Return the rows of some latents. Raises `InputError` for too many, and for one that the SAE does not have."""
        wrong = [latent for latent in latents if not 0 <= latent < self.n_features]
        if wrong or len(latents) > MAX_ROWS:
            raise InputError(f"Asked for {len(latents):,} latents, {wrong[:3]} among them; there are {self.n_features:,}, {MAX_ROWS} at a time.")
        return self._rows(np.asarray(latents, np.uint32))

    def place(self, query: Query, latent: int, among: NDArray[np.bool_] | None = None) -> Place:
        """Find a feature in a list, for stepping to the next and the previous one."""
        order = self.order(query, among)
        found = np.flatnonzero(order == latent)
        if not len(found):
            return Place(None, len(order), None, None)
        position = int(found[0])
        before = int(order[position - 1]) if position else None
        after = int(order[position + 1]) if position + 1 < len(order) else None
        return Place(position, len(order), before, after)

    def order(self, query: Query, among: NDArray[np.bool_] | None = None) -> NDArray[np.uint32]:
        """Return the latents of a list in order; equal values stand in order of latent, and in falling lists in reverse."""
        self._check(query)
        is_plain = not query.filters and not query.text.strip() and among is None and query.sort != LABEL
        if is_plain:
            return self._whole_order(query)
        if among is not None:
            return self._reduce(query, among)
        return self._keep(query, lambda: self._reduce(query, None))

    def _check(self, query: Query) -> None:
        sortable = [*self.sortable, *([RELEVANCE] if query.text.strip() else [])]
        if query.sort not in sortable:
            raise InputError(f"Cannot sort by {query.sort!r}; the table has {sortable}.")
        if query.life not in LIVES:
            raise InputError(f"{query.life!r} is none of all, live and dead.")
        if len(query.filters) > MAX_FILTERS:
            raise InputError(f"{len(query.filters)} filters were given, at most {MAX_FILTERS} are taken.")
        for name, _, _ in map(parse_filter, query.filters):
            if name not in self.numeric:
                raise InputError(f"Cannot filter by {name!r}; the numeric columns are {self.numeric}.")

    def _span(self, query: Query) -> tuple[int, int]:
        """Return the first entry of the order file that belongs to the list, and how many do."""
        n_dead = self.n_features - self._n_live
        return {"all": (0, self.n_features), "dead": (0, n_dead), "live": (n_dead, self._n_live)}[query.life]

    def _read_order(self, query: Query, offset: int, n: int) -> NDArray[np.uint32]:
        """Read entries [offset, offset + n) of an unfiltered list."""
        if n == 0:
            return np.empty(0, np.uint32)
        first, length = self._span(query)
        start = first + (length - offset - n if query.is_descending else offset)
        if query.sort == "latent" and query.life == "all":
            part = np.arange(start, start + n, dtype=np.uint32)
        else:
            part = np.frombuffer(self._files.read_spans(f"list/{self._orders[query.sort]}.order", [4 * start], [4 * n])[0], "<u4")
        return part[::-1] if query.is_descending else part

    def _whole_order(self, query: Query) -> NDArray[np.uint32]:
        first, length = self._span(query)
        if query.sort == "latent" and query.life == "all":
            whole = np.arange(length, dtype=np.uint32)
        else:
            name = f"list/{self._orders[query.sort]}.order"
            whole = self._keep(name, lambda: self._load(name, "<u4"))[first : first + length]
        return whole[::-1] if query.is_descending else whole

    def _reduce(self, query: Query, among: NDArray[np.bool_] | None) -> NDArray[np.uint32]:
        mask, found = np.ones(self.n_features, bool) if among is None else among.copy(), None
        for name, relation, value in map(parse_filter, query.filters):
            column = self._column(name)
            mask &= _RELATIONS[relation](column, column.dtype.type(value))  # compared in the column's own precision
        if query.text.strip():
            found = self.index().search(query.text, self.n_features, self._search_labels)
            mask &= found > 0 if found is not None else True
        if query.sort == RELEVANCE:
            order = self._whole_order(query._replace(sort="latent", is_descending=False))
            order = order[mask[order]]
            if found is not None:
                order = order[np.argsort(-found[order].astype(np.int32), kind="stable")]
            return order[::-1] if query.is_descending else order
        order = self._label_order(query) if query.sort == LABEL else self._whole_order(query)
        return order[mask[order]]

    def _search_labels(self, text: str) -> Iterator[NDArray[np.uint32]]:
        return (labels.search(text) for labels in self._labels)

    def _label_order(self, query: Query) -> NDArray[np.uint32]:
        """Return the labelled latents by label: those of the first set, then those that only later ones have."""
        orders = np.concatenate([labels.order() for labels in self._labels])
        order = orders[np.sort(np.unique(orders, return_index=True)[1])]
        if query.life != "all":
            order = order[(self._column("count")[order] > 0) == (query.life == "live")]
        return order[::-1] if query.is_descending else order

    def _column(self, name: str) -> NDArray[Any]:
        path = f"list/{name}.bin"
        return self._keep(path, lambda: self._load(path, VALUES[name]))

    def _keep(self, key: Any, make: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        """Return what was made for `key`, making it when it is not among the latest; one thing is made at a time, and none of them twice at once."""
        found = self._find(key)
        if found is not None:
            return found
        with self._making:
            found = self._find(key)  # a page asks for several ranges of one list at once
            if found is not None:
                return found
            made = make()
            with self._lock:
                self._kept[key] = made
                while len(self._kept) > 1 and sum(array.nbytes for array in self._kept.values()) > _KEPT_BYTES:
                    self._kept.popitem(last=False)
            return made

    def _find(self, key: Any) -> NDArray[Any] | None:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def _load(self, name: str, dtype: str) -> NDArray[Any]:
        """Read a file of one number for each latent, some megabytes at a time."""
        values = np.empty(self.n_features, dtype)
        step = _READ_BYTES // values.itemsize
        firsts = range(0, self.n_features, step)
        spans = [(first * values.itemsize, min(step, self.n_features - first) * values.itemsize) for first in firsts]
        for first, part in zip(firsts, self._read_ahead(name, spans), strict=True):
            values[first : first + step] = np.frombuffer(part, dtype)
        return values

    def _read_ahead(self, name: str, spans: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        """Yield (start, length) ranges of a file in order, `_AHEAD` of them on their way at a time: a bucket answers each after a while."""
        with ThreadPoolExecutor(_AHEAD) as pool:
            waiting: deque[Future[list[bytes]]] = deque()
            for start, length in spans:
                waiting.append(pool.submit(self._files.read_spans, name, [start], [length]))
                if len(waiting) == _AHEAD:
                    yield waiting.popleft().result()[0]
            while waiting:
                yield waiting.popleft().result()[0]

    def _rows(self, latents: NDArray[np.uint32]) -> list[dict[str, Any]]:
        """Gather rows; each block of the file is read once."""
        if not len(latents):
            return []
        words = self.words()
        per_block = ROW_BLOCK // ROW.itemsize
        blocks = np.unique(latents // per_block)
        starts = blocks.astype(np.int64) * ROW_BLOCK
        lengths = np.minimum(ROW_BLOCK, self.n_features * ROW.itemsize - starts)
        parts = self._files.read_spans(ROWS, starts.tolist(), lengths.tolist())
        content = {int(block): np.frombuffer(part, ROW) for block, part in zip(blocks, parts, strict=True)}
        labels = self.labels(latents.tolist())
        return [
            {**_as_row(latent, content[latent // per_block][latent % per_block], words), "label": next(iter(labels.get(latent, [])), None)}
            for latent in latents.tolist()
        ]

    def labels(self, latents: Sequence[int]) -> dict[int, list[dict[str, Any]]]:
        """Return all labels of some latents, by latent, with their provenance."""
        found: dict[int, list[dict[str, Any]]] = {}
        for label in (label for labels in self._labels for label in labels.of(latents)):
            found.setdefault(label["latent"], []).append(label)
        return found

    def words(self) -> list[str]:
        """Return every distinct token, read once."""
        with self._words_lock:
            if self._words is None:
                self._words = decode_words(self._files.read(WORDS), f"{self._files.where}/{WORDS}")
            return self._words

    def index(self) -> Index:
        """Return the index of tokens, its offsets read once."""
        words = self.words()
        with self._words_lock:
            if self._index is None:
                entries = np.frombuffer(self._files.read(OFFSETS), "<u8").astype(np.int64)
                self._index = Index(words, entries, self._read_postings)
            return self._index

    def _read_postings(self, spans: Sequence[Span]) -> Iterator[memoryview]:
        """Yield the bytes of rising spans, some megabytes at a time; spans in one block or in neighbouring ones are read together."""
        groups = list(join_spans(spans))
        parts = self._read_ahead(POSTINGS, [(start, inside[-1].stop - start) for start, inside in groups])
        for (start, inside), part in zip(groups, parts, strict=True):
            data = memoryview(part)
            yield from (data[span.start - start : span.stop - start] for span in inside)


def parse_filter(text: str) -> tuple[str, str, float]:
    """Read column, relation and value of a filter. Raises `InputError` for anything else."""
    found = _CONDITION.fullmatch(text.strip())
    if not found:
        raise InputError(f"{text!r} is no filter; they look like 'max>=3.5', 'frequency<1e-3' or 'frequency<0.1%'.")
    return found[1], found[2], float(found[3]) / (100 if found[4] else 1)


def _as_row(latent: int, row: Any, words: Sequence[str]) -> dict[str, Any]:
    texts = {name: [words[number] for number in row[name].tolist() if number != NO_WORD] for name in WORD_COLUMNS}
    numbers = {name: float(f"{float(row[name]):.7g}") for name in ("frequency", "mean", "max", "decoder_norm")}
    counts = {name: int(row[name]) for name in ("count", "n_examples")}
    return {"latent": latent, "is_dead": not counts["count"], **counts, **numbers, "top_token": (texts["top_tokens"] or [""])[0], **texts}
