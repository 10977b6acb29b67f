"""A bundle of attention heads becomes a tree that HeadVis shows, and such a tree becomes tables and patterns again.

    config.json                which heads there are, how many intervals, and what each metric means here
    scatter_data.json          a line a head
    heads/L{layer}H{head}.json sequences with the strongest edges of some queries: index q seq_len + k, value to 4 decimals
    server_config.json, attributions/manifest.json      {}: files alone, no server

Both spellings of a metric are written where tools disagree. What we do not measure (UMAP, entropies of tokens) is left out, never invented. A tree
from elsewhere may be wrong: a sequence whose edges lie outside of it is dropped and named, all else refused.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from interp_assets.errors import ArtifactCorruptError, InputError, StoreError
from interp_assets.planning.progress import format_count
from interp_assets.storage.foreign import parse_json
from interp_assets.storage.store import Store
from interp_assets.web.opened import OpenAttention

CONFIG: Final = "config.json"
SCATTER: Final = "scatter_data.json"
PATTERN: Final = "L{layer}H{head}.json"
MAX_BYTES: Final = 256 << 20
_OVER_ALL: Final = "induction of all rows"
_METRICS: Final[dict[str, tuple[str, str]]] = {
    "self_attention_score": ("self", "Mean attention of a token to itself."),
    "previous_token_score": ("previous", "Mean attention to the token before, over queries that have one."),
    "prev_token_score": ("previous", "The same as previous_token_score, as other tools spell it."),
    "first_token_score": ("first", "Mean attention to the first token, over queries behind it."),
    "induction_score": (
        _OVER_ALL,
        "Attention to what followed an earlier occurrence of the query's token, divided by all queries: HeadVis' convention.",
    ),
    "induction_score_repeated": (
        "induction",
        "The same, divided by the queries whose token occurred earlier: the convention of Neuronpedia's port, and of our pages.",
    ),
    "induction_chance": ("uniform_induction", "induction_score_repeated of a head that looks at all visible tokens alike."),
    "duplicate_token_score": ("duplicate", "Mean attention to earlier occurrences of the query's own token, over queries that have one."),
    "pattern_entropy": ("entropy", "Mean entropy of a query's attention, in nats, over queries that see two tokens or more."),
    "qk_distance": ("distance", "Mean distance of what is looked at, in tokens."),
    "logit_std": ("logit_std", "Mean standard deviation of a query's scores before the softmax."),
    "top_logit_margin": ("logit_margin", "Mean margin of the best score over the second."),
    "logit_z_score": ("logit_z", "Mean of (best score - mean) / standard deviation."),
}
"""Their name, our column, and what it means."""
_VARIANCE: Final = "qk_distance_variance"
_DIGITS: Final = 4
_HEAD: Final = re.compile(r"(\d+)\.(\d+)")


class ExportedHeads(NamedTuple):
    """What an export wrote."""

    n_heads: int
    n_files: int
    n_bytes: int


def export_headvis(bundle: OpenAttention, out: Store) -> ExportedHeads:
    """Write all heads of a bundle into `out` as HeadVis reads them."""
    n_files = n_bytes = 0
    for path, content in _write(bundle):
        data = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
        out.put(path, data)
        n_files, n_bytes = n_files + 1, n_bytes + len(data)
    return ExportedHeads(len(bundle.head_names()), n_files, n_bytes)


def _write(bundle: OpenAttention) -> Iterator[tuple[str, Any]]:
    columns, names = _with_own_induction(bundle.description["heads"]), bundle.head_names()
    places = [[int(part) for part in name.split(".")] for name in names]
    metrics = {name: told for name, told in _METRICS.items() if any(value is not None for value in columns.get(told[0], []))}
    n_intervals = int(bundle.description["evidence"]["n_intervals"])
    rows = []
    for i, (layer, head) in enumerate(places):
        found = {name: columns[ours][i] for name, (ours, _) in metrics.items()}
        mean, square = (columns.get(name, [None] * len(names))[i] for name in ("distance", "distance2"))
        variance = None if mean is None or square is None else round(max(0.0, square - mean * mean), _DIGITS)
        rows.append({"layer": layer, "head": head, **found, _VARIANCE: variance})
        yield f"heads/L{layer}H{head}.json", _write_head(bundle, bundle.head(names[i]), n_intervals)
    described = {**{name: told[1] for name, told in metrics.items()}, _VARIANCE: "Variance of that distance over all edges."}
    yield SCATTER, rows
    yield (
        CONFIG,
        {
            "model_name": bundle.description["model"]["name"],
            "heads": places,
            "n_layers": 1 + max(layer for layer, _ in places),
            "n_heads": max(layer["n_heads"] for layer in bundle.description["layers"]),
            "n_intervals": n_intervals,
            "metrics": [*metrics, _VARIANCE],
            "metric_descriptions": described,
            "head_data_pattern": PATTERN,
            "has_umap": False,
            "umap_heads": [],
            "custom_plots": [
                {"key": "qk_distance_histogram", "label": "Share of attention by distance"},
                {"key": "histogram", "label": "Queries by score"},
            ],
            "custom_tables": [
                {"key": "top_query_tokens", "label": "Queries, times chance"},
                {"key": "top_key_tokens", "label": "Keys, times chance"},
            ],
            "statistics_display": {"rows": {"label": "Queries", "format": "default"}},
        },
    )
    yield "server_config.json", {}
    yield "attributions/manifest.json", {}


def _with_own_induction(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Add induction as HeadVis counts it; nothing of a bundle that does not tell how many rows have one."""
    if "induction_rows" not in columns:
        return dict(columns)
    lines = zip(columns["induction"], columns["induction_rows"], columns["rows"], strict=True)
    return {**columns, _OVER_ALL: [None if mean is None else mean * of / rows for mean, of, rows in lines]}


def _write_head(bundle: OpenAttention, record: Mapping[str, Any], n_intervals: int) -> dict[str, Any]:
    missing = n_intervals - len(record["intervals"])  # those without a row
    interval = {place: i + 1 + missing for i, part in enumerate(record["intervals"]) for place in part["examples"]}
    interval |= dict.fromkeys(record["top"], n_intervals)
    tokens = {"top_query_tokens": record["queries"], "top_key_tokens": record["keys"]}
    edges = [0, *(1 << i for i in range(len(record["distance"])))]
    return {
        "sequences": [_write_sequence(bundle, record, place, interval[place]) for place in sorted(interval)],
        "qk_distance_histogram": {"bin_edges": edges, "bin_values": record["distance"]},
        **{key: [{"token": bundle.vocabulary.text(token), "weight": lift} for token, lift, *_ in found] for key, found in tokens.items()},
        "histogram": {"bin_edges": record["score"]["edges"], "bin_values": record["score"]["counts"]},
        "statistics": {"rows": record["rows"], **{name: value for name, value in record["statistics"].items() if value is not None}},
    }


def _write_sequence(bundle: OpenAttention, record: Mapping[str, Any], place: int, interval: int) -> dict[str, Any]:
    example = record["examples"][place]
    token_ids = record["contexts"][example["context"]]["tokens"]
    n, indices, values = len(token_ids), [], []
    for row, (keys, masses) in enumerate(zip(example["keys"], example["masses"], strict=True)):
        for key, byte in zip(keys, masses, strict=True):
            if byte:
                indices.append((example["first_query"] + row) * n + key)
                values.append(round((byte / 255) ** 2, _DIGITS))
    inner = [value for index, value in zip(indices, values, strict=True) if index >= n and index % n]
    return {
        "sequence_id": place,
        "interval": interval,
        "tokens": [bundle.vocabulary.text(token) for token in token_ids],
        "attention_indices": indices,
        "attention_values": values,
        "seq_len": n,
        "max_activation": max(inner, default=0.0),
    }


class Sampled(NamedTuple):
    """One text of a head, with the edges that were kept."""

    sequence_id: int
    interval: int
    tokens: list[str]
    edges: NDArray[np.int64]
    """[edges, 2]: query and key."""
    values: NDArray[np.float64]

    def pattern(self) -> NDArray[np.float64]:
        """Return the edges as [queries, keys], zero where none was kept."""
        found = np.zeros((len(self.tokens), len(self.tokens)))
        found[self.edges[:, 0], self.edges[:, 1]] = self.values
        return found


class ReadHead(NamedTuple):
    """One head of a tree."""

    sequences: list[Sampled]
    refused: list[str]
    """Sequences that are not shown, each with the reason."""
    record: dict[str, Any]
    """All else of its file."""


class HeadVis:
    """A tree that HeadVis, or another tool, wrote."""

    def __init__(self, store: Store) -> None:
        """Read what it holds. Raises `ArtifactCorruptError` for a folder that is no such tree."""
        self._store = store
        self.config = self._read(CONFIG, dict)
        rows = self._read(SCATTER, list)
        try:
            self._heads = [(int(layer), int(head)) for layer, head in self.config["heads"]]
            self._pattern, self.n_intervals = str(self.config["head_data_pattern"]), int(self.config["n_intervals"])
            self.scatter = pl.DataFrame(rows, infer_schema_length=None)
            listed = set(zip(self.scatter["layer"].to_list(), self.scatter["head"].to_list(), strict=True))
        except (LookupError, TypeError, ValueError, pl.exceptions.PolarsError) as error:
            raise ArtifactCorruptError(f"{store.url} is no tree of HeadVis ({type(error).__name__}: {error}). Write it again.") from error
        if listed - set(self._heads):
            layer, head = min(listed - set(self._heads))
            raise ArtifactCorruptError(f"{store.url}/{SCATTER} has a line of head {layer}.{head}, which {CONFIG} does not list. Write it again.")

    def heads(self) -> list[str]:
        """List the heads, such as `5.3`."""
        return [f"{layer}.{head}" for layer, head in self._heads]

    def head(self, name: str) -> ReadHead:
        """Read one head. Raises `InputError` with what there is, and `ArtifactCorruptError` for a file that holds no head."""
        found = _HEAD.fullmatch(name)
        if not found or (int(found[1]), int(found[2])) not in self._heads:
            raise InputError(f"There is no head {name!r:.40} in {self._store.url}; there are {', '.join(self.heads()[:8])}.")
        path = f"heads/{self._pattern.replace('{layer}', found[1]).replace('{head}', found[2])}"
        record = self._read(path, dict)
        listed = record.pop("sequences", None)
        if not isinstance(listed, list):
            raise ArtifactCorruptError(f"{self._store.url}/{path} has no list of sequences. Write it again.")
        sequences, refused = [], []
        for place, content in enumerate(listed):
            try:
                sequences.append(self._check(content))
            except (ValueError, TypeError, LookupError) as error:
                refused.append(f"{path}: sequence {place} is left out: {error}")
        return ReadHead(sequences, refused, record)

    def _check(self, content: dict[str, Any]) -> Sampled:
        tokens, n, interval = content["tokens"], content["seq_len"], content["interval"]
        if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens) or len(tokens) != n:
            raise ValueError(f"it has {format_count(len(tokens), 'token')} and says {n}")
        if not isinstance(interval, int) or not 1 <= interval <= self.n_intervals:
            raise ValueError(f"it stands in interval {interval} of {self.n_intervals}")
        indices, values = np.array(content["attention_indices"]), np.array(content["attention_values"], np.float64)
        if not len(indices) and not len(values):
            return Sampled(int(content["sequence_id"]), interval, tokens, np.zeros((0, 2), np.int64), values)
        if indices.dtype.kind != "i" or indices.shape != values.shape or indices.ndim != 1:
            raise ValueError(f"it has {indices.size} indices and {values.size} values")
        if outside := indices[(indices < 0) | (indices >= n * n)].tolist():
            raise ValueError(f"index {outside[0]} lies outside of {n} x {n} edges")
        if not np.isfinite(values).all():
            raise ValueError("a value is not finite")
        return Sampled(int(content["sequence_id"]), interval, tokens, np.stack(np.divmod(indices, n), axis=1), values)

    def _read(self, path: str, kind: type) -> Any:
        where = f"{self._store.url}/{path}"
        try:
            if (n_bytes := self._store.size(path)) is None:
                raise ArtifactCorruptError(f"There is no {where}: the folder holds no tree of HeadVis. Name the folder with {CONFIG}.")
            if n_bytes > MAX_BYTES:
                raise ArtifactCorruptError(f"{where} has {n_bytes:,} bytes; at most {MAX_BYTES:,} are read.")
            content = parse_json(self._store.get(path), MAX_BYTES)
        except (ValueError, StoreError) as error:
            raise ArtifactCorruptError(f"{where} cannot be read ({error}). Write it again.") from error
        if not isinstance(content, kind):
            raise ArtifactCorruptError(f"{where} holds no {kind.__name__}. Write it again.")
        return content
