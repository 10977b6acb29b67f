"""A text becomes what every head looks at in it: arrays, a table, and a page for notebooks that needs nothing but itself.

The page is a sandboxed frame with its data inside (bytes as `codec.py` writes them, a gzip member a head), and is forbidden the network. It holds at
most `PAGE_BYTES`; heads beyond that are named on it, and are in the arrays all the same.
"""

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from interp_assets.errors import InputError
from interp_assets.garcon.attention import Attended, AttentionLayer, attention_heard, gram, list_attention
from interp_assets.garcon.patterns.codec import check_pattern, pack_triangle, quantize
from interp_assets.garcon.subject import SubjectModel
from interp_assets.planning.progress import choose_word, format_count

PAGE_BYTES: Final = 8 << 20
HEIGHT: Final = 640
_PAGE: Final = Path(__file__).parent / "view.html"
_SHOWN_NAMES: Final = 8


class Attention:
    """What heads look at in one text. In a notebook it shows itself."""

    def __init__(
        self,
        patterns: Mapping[int, NDArray[np.floating]],
        tokens: Sequence[str],
        *,
        weights: bool = False,
        note: str = "",
        lengths: Mapping[int, NDArray[np.floating]] = MappingProxyType({}),
    ) -> None:
        """Take patterns [heads, queries, keys] by layer, and the text of every token.

        `lengths` [heads, 2, keys] by layer are how long each key's value is, before and after W_O. Raises `InputError` for an array of another
        shape, and for rows that do not sum to one; `weights` takes any numbers from 0.
        """
        for pattern in patterns.values():
            check_pattern(pattern, len(tokens), weights=weights)
        self.patterns, self.tokens, self.note, self.lengths = dict(patterns), list(tokens), note, dict(lengths)

    def heads(self) -> list[str]:
        """List the heads, such as `5.3`: layer and head in it."""
        return [f"{layer}.{head}" for layer, pattern in self.patterns.items() for head in range(len(pattern))]

    def pattern(self, head: str) -> NDArray[np.floating]:
        """Return one head's pattern [queries, keys]. Raises `InputError` with the heads there are."""
        layer, _, place = head.partition(".")
        found = self.patterns.get(int(layer)) if layer.isdigit() and place.isdigit() else None
        if found is None or int(place) >= len(found):
            raise InputError(f"There is no head {head!r}; there are {_shorten(self.heads())}. A head is named by layer and place, such as 5.3.")
        return found[int(place)]

    def table(self, head: str, query: int, n: int = 10) -> pl.DataFrame:
        """Return the keys that a query looks at most: place, token, mass, and the share of the row so far. Raises `InputError` for a query beyond."""
        if not -len(self.tokens) <= query < len(self.tokens):
            raise InputError(f"There is no query {query}; the text has {len(self.tokens)} tokens, from 0.")
        row = self.pattern(head)[query]
        keys = np.argsort(-row, kind="stable")[:n]
        masses = row[keys].astype(np.float64)
        tokens = [self.tokens[key] for key in keys.tolist()]
        return pl.DataFrame({"key": keys, "token": tokens, "mass": masses, "covered": np.cumsum(masses) / max(float(row.sum()), 1e-30)})

    def to_html(self) -> str:
        """Return a whole page with everything in it, for a file or a frame."""
        both_ways = any(bool(np.triu(pattern, 1).any()) for pattern in self.patterns.values())
        shown, hidden, n_bytes = [], [], 0
        for head in self.heads():
            data = base64.b64encode(pack_triangle(quantize(self.pattern(head)), both_ways=both_ways)).decode()
            if n_bytes + len(data) > PAGE_BYTES:
                hidden.append(head)
                continue
            n_bytes += len(data)
            shown.append({"name": head, "data": data})
        left_out = f"Not shown, for the size of the page: {_shorten(hidden)}." if hidden else ""
        content = {"tokens": self.tokens, "heads": shown, "both_ways": both_ways, "note": " ".join(filter(None, (self.note, left_out)))}
        text = json.dumps(content).replace("<", "\\u003c")  # a token may be `</script>`
        return _PAGE.read_text(encoding="utf-8").replace("__CONTENT__", text)

    def __repr__(self) -> str:
        """Say how much there is."""
        return f"Attention of {format_count(len(self.heads()), 'head')} over {format_count(len(self.tokens), 'token')}"

    def _repr_html_(self) -> str:
        page = html.escape(self.to_html(), quote=True)
        return (
            f'<iframe sandbox="allow-scripts" style="width:100%;height:{HEIGHT}px;border:0" title="Attention of every head" srcdoc="{page}"></iframe>'
        )


def read_attention(subject: SubjectModel, row: Sequence[int], tokens: Sequence[str], layers: Sequence[int] | None = None) -> Attention:
    """Run one row of token ids and return what the heads of some layers, or of all, look at.

    A row that is longer than the model takes is cut, and the result's note says so. Raises `InputError` for a layer that does not attend.
    """
    length = min(len(row), subject.max_context)
    note = f"Cut to the {length:,} tokens that the model takes, of {len(row):,}." if length < len(row) else ""
    known = {layer.layer: layer for layer in list_attention(subject.net)}
    if missing := [layer for layer in layers or () if layer not in known]:
        named = f"{choose_word(len(missing), 'layer')} {', '.join(map(str, missing))}"
        raise InputError(f"{subject.name} has no attention in {named}; those that attend are {_shorten(list(map(str, known)))}.")
    found: dict[int, NDArray[np.float32]] = {}
    lengths: dict[int, NDArray[np.float32]] = {}

    def hear(layer: AttentionLayer) -> Any:
        def keep(heard: Attended) -> None:
            found[layer.layer] = heard.pattern(0, slice(0, length)).cpu().numpy()
            lengths[layer.layer] = _measure_values(heard, layer)

        return keep

    chosen = [layer for number, layer in known.items() if layers is None or number in layers]
    token_ids = torch.tensor([list(row[:length])])
    with attention_heard({layer.module: hear(layer) for layer in chosen}), torch.no_grad():
        subject.net.base_model(**subject.arguments(token_ids, None))
    has_sinks = any(getattr(layer.module, "sinks", None) is not None for layer in chosen)
    patterns = {layer.layer: found[layer.layer] for layer in chosen}
    return Attention(patterns, tokens[:length], weights=has_sinks, note=note, lengths=lengths)


def _measure_values(heard: Attended, layer: AttentionLayer) -> NDArray[np.float32]:
    """Return how long each key's value is, before and after W_O, [heads, 2, keys]."""
    value = heard.value[0].float()
    value = value.repeat_interleave(layer.n_heads // len(value), dim=0)
    outputs = torch.bmm(value, gram(layer).to(value.device, value.dtype))
    squared = torch.stack([value.square().sum(dim=2), (outputs * value).sum(dim=2)], dim=1)
    return squared.clamp(min=0).sqrt().cpu().numpy()


def _shorten(names: Sequence[str]) -> str:
    rest = len(names) - _SHOWN_NAMES
    return ", ".join(names[:_SHOWN_NAMES]) + (f" and {rest} more" if rest > 0 else "")
