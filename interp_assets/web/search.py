"""The features' tokens become an inverted index that finds features by any piece of a token, read by range from anywhere.

Full-text search breaks text into words and drops the rest; tokens are pieces of words, spaces and punctuation. So the index knows no text, only
numbers: `words.json` numbers every distinct token, and for each word and each kind of evidence there is the rising list of the latents that have it.

    search/postings.bin    lists of latents: for word 0 its peaks, its raised, its lowered, then word 1, ...
    search/postings.idx    u64: where each of these 3 * n_words lists starts and how wide its numbers are, and one more

A list holds the steps from one latent to the next in numbers of 1, 2 or 4 bytes, whichever makes it shortest; the largest number of its width steps
so far without naming a latent. Frequent words take a byte a latent, and a list is read with one running sum (`mark_latents`).

A query is cut at spaces; each part selects all tokens that contain it (letter case ignored), and a feature must match every part. To
find tokens by their own spaces, a part may be quoted: `" in"` finds ` in`, ` int`, ` import`... A part may name its column: `raised:def`.
A single ASCII letter or digit would select half of all tokens, so it finds only the token that is that character, with or without spaces.

How well a feature matches a part is a number: a label counts most, then tokens that it fires on, that it raises, that it lowers; among them the
whole token, then one that begins so, then any other. Of several tokens the best one counts, and the parts add up. From the index alone, so a
page without a server ranks alike (`frontend/src/lib/files.ts`).

Why not SQLite's FTS5, which `labels.py` uses for sentences: it wants a whole local file, so not a bucket and not a static host, and it takes seconds
for the union of some hundred frequent tokens (docs/decisions/0006). Cost: 1 to 2 bytes a posting, some 40 bytes a feature.
"""

import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from interp_assets.errors import InputError
from interp_assets.storage.manifest import ArtifactWriter
from interp_assets.web.columns import WordIds

COLUMNS: Final = ("peaks", "raised", "lowered")
"""Tokens at the peaks of the top examples, top logits, bottom logits."""
LABEL: Final = "label"
"""What a part may name besides: the labels that were imported for the bundle."""
LABEL_WEIGHT: Final = 10
"""What a match in a label is worth: more than any in a token."""
POSTINGS: Final = "search/postings.bin"
OFFSETS: Final = "search/postings.idx"
POSTING_BLOCK: Final = 64 << 10
MAX_QUERY: Final = 200
"""Characters of a query."""
MAX_BYTES: Final = 256 << 20
"""Bytes of lists that one search may read: some seconds."""
_PART: Final = re.compile(r'(?:(\w+):)?(?:"([^"]*)"|(\S+))')
_GATHERED: Final = 4 << 20
"""Postings gathered at once while the index is written."""
_READ: Final = 4 << 20
"""Bytes of one read, unless a single list is longer."""
_GAP: Final = 4 * POSTING_BLOCK
"""Bytes that are read in vain rather than asked around: a request to a bucket costs as much as they do."""
_AT_ONCE: Final = 1 << 19
"""Numbers of a list that are summed at once."""
WIDTHS: Final = (1, 2, 4)


class Span(NamedTuple):
    """Bytes [start, stop) of the postings: one list, in numbers of `width` bytes."""

    start: int
    stop: int
    width: int


class _Run(NamedTuple):
    """The postings of some consecutive latents, sorted by list: bytes in the spill file, and how many each list has."""

    start: int
    counts: NDArray[np.int64]


def write_index(art: ArtifactWriter, features: Iterable[WordIds], n_words: int) -> None:
    """Write the index of `features`, which come in order of latent. Memory: one table's postings, and 24 bytes a word and table."""
    with tempfile.TemporaryFile() as spill:
        runs = [_spill(spill, found, n_words) for found in features]
        totals = np.zeros(3 * n_words, np.int64)
        for run in runs:
            totals += run.counts
        counted = np.concatenate([[0], np.cumsum(totals)])
        entries, n_bytes = [], 0
        with art.open(POSTINGS, block_bytes=POSTING_BLOCK) as sink:
            first = 0
            while first < len(totals):
                last = max(first + 1, int(np.searchsorted(counted, counted[first] + _GATHERED, side="right")) - 1)
                gathered = _gather(spill, runs, first, last)
                for latents in np.split(gathered, counted[first + 1 : last] - counted[first]):
                    data, width = encode_latents(latents)
                    entries.append(n_bytes << 2 | WIDTHS.index(width))
                    n_bytes += len(data)
                    sink.write(data)
                first = last
    art.put(OFFSETS, np.array([*entries, n_bytes << 2], "<u8").tobytes(), block_bytes=POSTING_BLOCK)


def encode_latents(latents: NDArray[np.uint32]) -> tuple[bytes, int]:
    """Return a rising list as its shortest bytes, and the width of their numbers."""
    steps = np.diff(latents.astype(np.int64), prepend=0)
    lengths = {width: width * (len(steps) + int((steps // _limit(width)).sum())) for width in WIDTHS}
    width = min(WIDTHS, key=lambda width: (lengths[width], width))
    far = steps // _limit(width)
    numbers = np.full(len(steps) + int(far.sum()), _limit(width), f"<u{width}")
    numbers[np.cumsum(far + 1) - 1] = steps % _limit(width)
    return numbers.tobytes(), width


def mark_latents(data: bytes | memoryview, width: int, marks: NDArray[Any], weight: int = 1) -> None:
    """Raise the marks of a list's latents to `weight`, where they are lower."""
    numbers = np.frombuffer(data, f"<u{width}")
    at = 0
    for start in range(0, len(numbers), _AT_ONCE):
        part = numbers[start : start + _AT_ONCE]
        places = np.cumsum(part, dtype=np.int64) + at
        at = int(places[-1])
        latents = places if width == WIDTHS[-1] else places[part != _limit(width)]
        marks[latents] = np.maximum(marks[latents], weight)


def _limit(width: int) -> int:
    return (1 << 8 * width) - 1


def _spill(spill: IO[bytes], found: WordIds, n_words: int) -> _Run:
    """Sort the postings of one table by list and latent, and write their latents."""
    packed = []
    for column, (counts, ids) in enumerate(zip(found.counts, found.ids, strict=True)):
        latents = np.repeat(np.arange(found.first, found.first + len(counts), dtype=np.uint64), counts)
        packed.append((ids.astype(np.uint64) * np.uint64(3) + np.uint64(column)) << np.uint64(32) | latents)
    postings = np.concatenate(packed)
    postings.sort()
    is_new = np.ones(len(postings), bool)
    is_new[1:] = postings[1:] != postings[:-1]  # a feature may show two tokens with one text
    postings = postings[is_new]
    counts = np.bincount((postings >> np.uint64(32)).astype(np.int64), minlength=3 * n_words)
    start = spill.tell()
    spill.write(postings.astype("<u4").tobytes())  # keeps the low half: the latent
    return _Run(start, counts.astype(np.int64))


def _gather(spill: IO[bytes], runs: Sequence[_Run], first: int, last: int) -> NDArray[np.uint32]:
    """Return lists [first, last) of all runs, one after the other."""
    per_run = np.array([run.counts[first:last] for run in runs], np.int64).reshape(len(runs), last - first)
    starts = np.cumsum(per_run.T.reshape(-1)) - per_run.T.reshape(-1)  # list by list, and in it run by run
    gathered = np.empty(int(per_run.sum()), "<u4")
    for i, run in enumerate(runs):
        counts = per_run[i]
        n = int(counts.sum())
        if not n:
            continue
        spill.seek(run.start + 4 * int(run.counts[:first].sum()))
        values = np.frombuffer(spill.read(4 * n), "<u4")
        targets = np.repeat(starts.reshape(last - first, len(runs))[:, i] - (np.cumsum(counts) - counts), counts) + np.arange(n)
        gathered[targets] = values
    return gathered


class Index:
    """The words and lists of one bundle; postings are read when they are needed."""

    def __init__(self, words: Sequence[str], entries: NDArray[np.int64], read: Callable[[Sequence[Span]], Iterable[memoryview]]) -> None:
        """`entries` are those of `postings.idx`, 3 for each word and one more; `read` returns the bytes of several spans."""
        self._folded = [word.casefold() for word in words]
        self._offsets, self._widths, self._read = entries >> 2, entries & 3, read

    def search(self, query: str, n_features: int, labelled: Callable[[str], Iterable[NDArray[np.uint32]]] | None = None) -> NDArray[np.uint16] | None:
        """Say how well each latent matches `query`, 0 where it does not; None when it is empty. `labelled` finds latents by a piece of a label.

        Raises `InputError` for a query that is too long or reads too much.
        """
        if len(query) > MAX_QUERY:
            raise InputError(f"The query has {len(query):,} characters, at most {MAX_QUERY} are searched. Shorten it.")
        parts = parse_query(query)
        if not parts:
            return None
        plans = [[] if column == LABEL else self._plan(column, text) for column, text in parts]
        n_bytes = sum(span.stop - span.start for plan in plans for span, _ in plan)
        if n_bytes > MAX_BYTES:
            raise InputError(f"{query!r} would read {n_bytes:,} bytes of the index, at most {MAX_BYTES:,} are read. Use longer pieces.")
        total = np.zeros(n_features, np.uint16)
        for place, ((column, text), plan) in enumerate(zip(parts, plans, strict=True)):
            found = np.zeros(n_features, np.uint16)
            for (span, weight), data in zip(plan, self._read([span for span, _ in plan]), strict=True):
                mark_latents(data, span.width, found, weight)
            if labelled and column in ("", LABEL):
                for latents in labelled(text):
                    found[latents] = LABEL_WEIGHT
            total = np.where((found > 0) & ((total > 0) | (place == 0)), total + found, 0).astype(np.uint16)
        return total

    def _plan(self, column: str, text: str) -> list[tuple[Span, int]]:
        """Return the lists of one part in the order of the file, and what a match in each is worth."""
        folded = text.casefold()
        if is_single(folded):
            words = [number for number, word in enumerate(self._folded) if word.strip() == folded]
        else:
            words = [number for number, word in enumerate(self._folded) if folded in word]
        spans: list[tuple[Span, int]] = []
        for number in words:
            kind = _compare(self._folded[number], folded)
            for place in [3 * number + COLUMNS.index(column)] if column else range(3 * number, 3 * number + 3):
                start, stop = int(self._offsets[place]), int(self._offsets[place + 1])
                if stop > start:
                    spans.append((Span(start, stop, WIDTHS[int(self._widths[place])]), weigh(place % 3, kind)))
        return spans


def join_spans(spans: Iterable[Span]) -> Iterator[tuple[int, list[Span]]]:
    """Group rising spans that one read serves: gaps up to `_GAP`, `_READ` bytes at most. Yield where each read starts, and its spans."""
    group: list[Span] = []
    for span in spans:
        if group and (span.start - group[-1].stop > _GAP or span.stop - group[0].start > _READ):
            yield group[0].start, group
            group = []
        group.append(span)
    if group:
        yield group[0].start, group


def weigh(column: int, kind: int) -> int:
    """Return what a match is worth: in which of `COLUMNS`, and whether the token is the text (2), begins with it (1) or holds it (0)."""
    return 1 + 3 * (len(COLUMNS) - 1 - column) + kind


def _compare(word: str, text: str) -> int:
    """Say how close a token is to the text that it holds, spaces around both aside."""
    bare, wanted = word.strip(), text.strip()
    return 2 if bare == wanted else int(bare.startswith(wanted))


def is_single(folded: str) -> bool:
    """Say whether a part is one ASCII letter or digit."""
    return len(folded) == 1 and folded.isascii() and folded.isalnum()


def parse_query(query: str) -> list[tuple[str, str]]:
    """Cut a query into (column or "", text)."""
    parts = []
    for column, quoted, plain in _PART.findall(query):
        if column and column not in (*COLUMNS, LABEL):
            parts.append(("", f"{column}:{quoted or plain}"))  # a token may hold a colon
        else:
            parts.append((column, quoted or plain))
    return [(column, text) for column, text in parts if text]
