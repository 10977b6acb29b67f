"""A feature record becomes a small gzip member of JSON, and a record again: columns instead of objects, characters instead of numbers.

Two thirds of a record are the token ids of its windows. Here

1. a window that stands in several lists is kept once, in the order of the data set, and lists name it by its place;
2. a column of numbers is one string over 91 printable ASCII characters in which small numbers take one character (digits.py);
3. a token is its rank by frequency in the data set, so that frequent tokens take one character and gzip finds repeated text as it would in a text;
4. activations beside the peak have 3 significant digits, the peak itself and all that people sort by keep 4: rounded here, once.

Measured on the demo (70 different windows of 59 tokens in 90 places): 10,331 bytes as JSON of ids, 6,950 so, at the cost of one gzip. A dictionary of
tokens in every record instead of the shared ranks takes 400 bytes more, planes of bytes in binary win less than 100, three more blocks
of Huffman codes 140. An arithmetic coder with the data set's frequencies would need 5,110 bytes for the tokens alone, gzip 4,650.
The layout is described in docs/formats/feature_record.md; frontend/src/lib/packing.ts reads it, too.
"""

import gzip
import json
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from interp_assets.errors import ArtifactCorruptError, ArtifactForeignError
from interp_assets.planning.progress import format_count
from interp_assets.storage.foreign import parse_json, unpack_gzip
from interp_assets.visualize import digits

RECORD_VERSION: Final = 3
ORDER: Final = "tokens.order"
"""Token ids by falling frequency in the data set, u32: a token's rank is its place here."""
GZIP_LEVEL: Final = 9
MAX_RECORD_BYTES: Final = 16 << 20
"""Of one record's JSON, and tokens that its lists may show; the demo's records have 10 KB."""
_BIN_SHIFT: Final = 21
"""A float32 shifted by this is its quarter octave, the histogram's bin."""


class TokenOrder:
    """The ranks of all token ids, and how each is written."""

    def __init__(self, order: Sequence[int] | NDArray[Any]) -> None:
        """`order` has every token id once, the most frequent first."""
        self.order = np.asarray(order, np.uint32)
        ranks = np.empty(len(self.order), np.int64)
        ranks[self.order] = np.arange(len(self.order))
        self.codes = [digits.encode_number(rank) for rank in ranks.tolist()]


def order_tokens(shards: Iterable[NDArray[Any]], n_tokens: int) -> NDArray[np.uint32]:
    """Return all token ids below `n_tokens` (and those that occur above) by falling count in the shards, equal counts by id."""
    counts = np.zeros(n_tokens, np.int64)
    for token_ids in shards:
        found = np.bincount(token_ids, minlength=len(counts))
        found[: len(counts)] += counts
        counts = found
    return np.argsort(-counts, kind="stable").astype(np.uint32)


def pack_record(record: dict[str, Any], tokens: TokenOrder) -> bytes:
    """Return a record as one gzip member. Equal records give equal bytes: a member carries no time."""
    examples = record["examples"]
    windows = _distinct(examples)
    place = {tuple(window["row"]): i for i, window in enumerate(windows)}

    def listed(shown: list[dict[str, Any]]) -> str:
        return digits.encode_numbers(place[tuple(window["row"])] for window in shown)

    packed = {
        "version": RECORD_VERSION,
        "latent": record["latent"],
        "statistics": {**record["statistics"], "histogram": _pack_histogram(record["statistics"]["histogram"])},
        "lists": {
            "top": listed(examples["top"]),
            "intervals": [[part["low"], part["high"], listed(part["examples"])] for part in examples["intervals"]],
            "random": listed(examples["random"]),
        },
        "windows": _pack_windows(windows, tokens),
        "logits": record["logits"] and {**record["logits"], **{end: _turn(record["logits"][end], 2) for end in ("top", "bottom")}},
        "logits_reason": record["logits_reason"],
        "neighbours": _turn(record["neighbours"], 2),
        "coactivations": _turn(record["coactivations"], 3),
    }
    return gzip.compress(json.dumps(packed, separators=(",", ":"), allow_nan=False).encode(), GZIP_LEVEL, mtime=0)


def unpack_record(member: bytes, order: Sequence[int] | NDArray[Any], where: str) -> dict[str, Any]:
    """Return the record of a gzip member; `order` are the token ids by rank, `where` names it in messages.

    Raises `ArtifactForeignError` for another version and `ArtifactCorruptError` for what is no record.
    """
    try:
        packed = parse_json(unpack_gzip(member, MAX_RECORD_BYTES))
        version = packed["version"]
        if version != RECORD_VERSION:
            do = "Upgrade interp-assets." if version > RECORD_VERSION else "Materialize `feature_records` and `feature_browser` again."
            raise ArtifactForeignError(f"{where} has version {version}; this release reads version {RECORD_VERSION}. {do}")
        return _unpack(packed, order)
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise ArtifactCorruptError(f"{where} is no feature record ({error!r}). Materialize it again.") from error


def _distinct(examples: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the windows of all lists, each once, by shard and row."""
    shown = [*examples["top"], *(window for part in examples["intervals"] for window in part["examples"]), *examples["random"]]
    found = {tuple(window["row"]): window for window in shown}
    return [found[row] for row in sorted(found)]


def _pack_windows(windows: list[dict[str, Any]], tokens: TokenOrder) -> dict[str, Any] | None:
    if not windows:
        return None
    shards, rows = zip(*(window["row"] for window in windows), strict=True)
    documents = {name: i for i, name in enumerate(dict.fromkeys(window["document"] for window in windows))}
    beside = [[pair for pair in window["activations"] if pair[0] != window["peak"]] for window in windows]
    values = [value for pairs in beside for _, value in pairs]
    exponent = max(int(f"{value:.{digits.DIGITS - 1}e}".partition("e")[2]) for value in [*values, *(window["activation"] for window in windows)])
    return {
        "documents": list(documents),
        "document": digits.encode_numbers(documents[window["document"]] for window in windows),
        "shard": digits.encode_numbers(b - a for a, b in pairwise((0, *shards))),
        "row": digits.encode_numbers(row - (rows[i - 1] if i and shards[i] == shards[i - 1] else 0) for i, row in enumerate(rows)),
        "before": digits.encode_numbers(window["peak"] for window in windows),
        "after": digits.encode_numbers(len(window["tokens"]) - 1 - window["peak"] for window in windows),
        "position": digits.encode_numbers(window["position"] for window in windows),
        "masked": {str(i): window["masked"] for i, window in enumerate(windows) if window["masked"]},
        "exponent": exponent,
        "peak": digits.encode_decimals([window["activation"] for window in windows], exponent, digits.PEAK_DIGITS),
        "firings": digits.encode_numbers(len(pairs) for pairs in beside),
        "gap": digits.encode_numbers(b - a for pairs in beside for a, b in pairwise((0, *(place for place, _ in pairs)))),
        "activation": digits.encode_decimals(values, exponent, digits.DIGITS),
        "tokens": "".join(tokens.codes[token] for window in windows for token in window["tokens"]),
        **({"roles": _pack_roles([window["roles"] for window in windows])} if "roles" in windows[0] else {}),
    }


def _pack_roles(runs: list[list[list[Any]]]) -> dict[str, Any]:
    names = {name: i for i, name in enumerate(dict.fromkeys(name for spoken in runs for _, name in spoken))}
    return {
        "names": list(names),
        "runs": digits.encode_numbers(len(spoken) for spoken in runs),
        "gap": digits.encode_numbers(b - a for spoken in runs for a, b in pairwise((0, *(place for place, _ in spoken)))),
        "name": digits.encode_numbers(names[name] for spoken in runs for _, name in spoken),
    }


def _unpack_roles(packed: dict[str, Any], n_windows: int) -> list[list[list[Any]]]:
    counts, gaps, names = (digits.decode_numbers(packed[column]) for column in ("runs", "gap", "name"))
    if len(counts) != n_windows or not len(gaps) == len(names) == sum(counts):
        raise ValueError(f"for {format_count(n_windows, 'window')} its roles have {len(counts)} runs, {len(gaps)} of gap and {len(names)} of name")
    ends = list(accumulate(counts, initial=0))
    return [
        [list(run) for run in zip(accumulate(gaps[low:high]), (packed["names"][name] for name in names[low:high]), strict=True)]
        for low, high in pairwise(ends)
    ]


def _pack_histogram(histogram: dict[str, list[Any]]) -> dict[str, Any]:
    """Replace the edges by the number of the first: bits of its float32, shifted."""
    if not histogram["counts"]:
        return {"first": 0, "counts": []}
    bits = int(np.float32(histogram["edges"][0]).view(np.uint32))
    return {"first": bits + (1 << _BIN_SHIFT - 1) >> _BIN_SHIFT, "counts": histogram["counts"]}  # edges are rounded: the nearest one is meant


def _turn(rows: list[list[Any]], n_columns: int) -> list[list[Any]]:
    return [list(column) for column in zip(*rows, strict=True)] if rows else [[] for _ in range(n_columns)]


def _unpack(packed: dict[str, Any], order: Sequence[int] | NDArray[Any]) -> dict[str, Any]:
    statistics, lists, logits = packed["statistics"], packed["lists"], packed["logits"]
    windows = _unpack_windows(packed["windows"], order) if packed["windows"] else []
    texts = [lists["top"], *(text for _, _, text in lists["intervals"]), lists["random"]]
    n_tokens = sum(len(windows[place]["tokens"]) for text in texts for place in digits.decode_numbers(text))
    if n_tokens > MAX_RECORD_BYTES:  # a window that is named often is shown as often
        raise ValueError(f"its lists show {format_count(n_tokens, 'token')}, and {MAX_RECORD_BYTES:,} are allowed")

    def listed(text: str) -> list[dict[str, Any]]:
        return [windows[place] for place in digits.decode_numbers(text)]

    return {
        "version": packed["version"],
        "latent": packed["latent"],
        "is_dead": statistics["count"] == 0,
        "statistics": {**statistics, "histogram": _unpack_histogram(statistics["histogram"])},
        "examples": {
            "top": listed(lists["top"]),
            "intervals": [{"low": low, "high": high, "examples": listed(text)} for low, high, text in lists["intervals"]],
            "random": listed(lists["random"]),
        },
        "logits": logits and {**logits, **{end: _turn_back(logits[end]) for end in ("top", "bottom")}},
        "logits_reason": packed["logits_reason"],
        "neighbours": _turn_back(packed["neighbours"]),
        "coactivations": _turn_back(packed["coactivations"]),
    }


def _unpack_windows(packed: dict[str, Any], order: Sequence[int] | NDArray[Any]) -> list[dict[str, Any]]:
    names = ("document", "shard", "row", "before", "after", "position", "firings", "gap", "tokens")
    columns = {name: digits.decode_numbers(packed[name]) for name in names}
    peaks = digits.decode_decimals(packed["peak"], packed["exponent"], digits.PEAK_DIGITS)
    values = digits.decode_decimals(packed["activation"], packed["exponent"], digits.DIGITS)
    _check_lengths(columns, len(peaks), len(values))
    tokens = np.asarray(order)[columns["tokens"]].tolist() if columns["tokens"] else []
    shards = list(accumulate(columns["shard"]))
    windows: list[dict[str, Any]] = []
    roles = _unpack_roles(packed["roles"], len(peaks)) if "roles" in packed else None
    token, firing = 0, 0
    for i, (peak, activation) in enumerate(zip(columns["before"], peaks, strict=True)):
        length, n_beside = peak + 1 + columns["after"][i], columns["firings"][i]
        places = accumulate(columns["gap"][firing : firing + n_beside])
        beside = list(map(list, zip(places, values[firing : firing + n_beside], strict=True)))
        is_next = i > 0 and shards[i] == shards[i - 1]
        windows.append(
            {
                "row": [shards[i], columns["row"][i] + (windows[-1]["row"][1] if is_next else 0)],
                "document": packed["documents"][columns["document"][i]],
                "tokens": tokens[token : token + length],
                "peak": peak,
                "position": columns["position"][i],
                "activation": activation,
                "activations": sorted([*beside, [peak, activation]]),
                "masked": packed["masked"].get(str(i), []),
                **({"roles": roles[i]} if roles else {}),
            }
        )
        token, firing = token + length, firing + n_beside
    return windows


def _check_lengths(columns: dict[str, list[int]], n_peaks: int, n_values: int) -> None:
    """Raise `ValueError` unless every column has one number a window, a firing or a token."""
    n_firings, n_tokens = sum(columns["firings"]), sum(columns["before"]) + sum(columns["after"]) + n_peaks
    expected = dict.fromkeys(("document", "shard", "row", "before", "after", "position", "firings"), n_peaks) | {"gap": n_firings, "tokens": n_tokens}
    wrong = [f"{len(columns[name])} of {name}, not {n}" for name, n in expected.items() if len(columns[name]) != n]
    if n_values != n_firings:
        wrong.append(f"{n_values} of activation, not {n_firings}")
    if wrong:
        raise ValueError(f"for {format_count(n_peaks, 'window')} its columns have {'; '.join(wrong)}")


def _unpack_histogram(packed: dict[str, Any]) -> dict[str, list[Any]]:
    counts = packed["counts"]
    numbers = np.arange(packed["first"], packed["first"] + len(counts) + 1, dtype=np.uint32) << np.uint32(_BIN_SHIFT)
    return {"edges": digits.round_significant(numbers.view(np.float32)).tolist() if counts else [], "counts": counts}


def _turn_back(columns: list[list[Any]]) -> list[list[Any]]:
    return [list(row) for row in zip(*columns, strict=True)]
