"""The feature table becomes pages of a list: sorted, filtered and searched.

An order (the latents that match a query, sorted) is computed once and kept for the next page and for "next feature" and "previous
feature"; a page is a gather of some rows. The table is held in memory (about 200 bytes a feature).
"""

import io
import re
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any, Final, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from interp_assets.errors import InputError
from interp_assets.web.search import search_latents

MAX_ROWS: Final = 500
"""Rows of one page."""
MAX_FILTERS: Final = 16
_KEPT_ORDERS: Final = 8
_N_BINS: Final = 48
_CONDITION: Final = re.compile(r"(\w+)(>=|<=|>|<)(-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)")
_DISTRIBUTED: Final = ("frequency", "max", "mean")
"""Columns whose distribution over the live features is shown."""


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

    def __init__(self, parquet: bytes, search_path: Path) -> None:
        """Read `features.parquet`; `search_path` is the full-text index on this machine."""
        self._frame = pl.read_parquet(io.BytesIO(parquet))
        self._search_path = search_path
        self._orders: OrderedDict[Query, NDArray[np.uint32]] = OrderedDict()
        self._lock = Lock()
        self.numeric = [name for name, dtype in self._frame.schema.items() if dtype.is_numeric()]
        self.sortable = [*self.numeric, *(name for name, dtype in self._frame.schema.items() if dtype in (pl.String, pl.Boolean))]

    def page(self, query: Query, offset: int, limit: int) -> Page:
        """Return rows [offset, offset + limit) of the list. Raises `InputError` for a column, filter or limit that makes no sense."""
        if not 0 < limit <= MAX_ROWS or offset < 0:
            raise InputError(f"Asked for {limit:,} rows from {offset:,}; ask for 1 to {MAX_ROWS} rows from 0 or later.")
        order = self.order(query)
        return Page(self._frame.height, len(order), self._frame[order[offset : offset + limit]].to_dicts())

    def rows(self, latents: Sequence[int]) -> list[dict[str, Any]]:
        """Return the rows of some latents. Raises `InputError` for too many, and for one that the SAE does not have."""
        wrong = [latent for latent in latents if not 0 <= latent < self._frame.height]
        if wrong or len(latents) > MAX_ROWS:
            raise InputError(f"Asked for {len(latents):,} latents, {wrong[:3]} among them; there are {self._frame.height:,}, {MAX_ROWS} at a time.")
        return self._frame[np.asarray(latents, np.uint32)].to_dicts()

    def place(self, query: Query, latent: int) -> Place:
        """Find a feature in a list, for stepping to the next and the previous one."""
        order = self.order(query)
        found = np.flatnonzero(order == latent)
        if not len(found):
            return Place(None, len(order), None, None)
        position = int(found[0])
        before = int(order[position - 1]) if position else None
        after = int(order[position + 1]) if position + 1 < len(order) else None
        return Place(position, len(order), before, after)

    def order(self, query: Query) -> NDArray[np.uint32]:
        """Return the latents of a list in order; equal values stand in order of latent."""
        with self._lock:
            if query in self._orders:
                self._orders.move_to_end(query)
                return self._orders[query]
        order = self._compute_order(query)
        with self._lock:
            self._orders[query] = order
            while len(self._orders) > _KEPT_ORDERS:
                self._orders.popitem(last=False)
        return order

    def distributions(self) -> dict[str, dict[str, list[float]]]:
        """Return logarithmic histograms over the live features: `edges` (n + 1) and `counts` (n) for each of a few columns."""
        live = self._frame.filter(~pl.col("is_dead"))
        shown = {}
        for name in _DISTRIBUTED:
            values = live[name].to_numpy().astype(np.float64)
            values = values[values > 0]
            if len(values):
                low, high = np.log10(values.min()), np.log10(values.max())
                edges = np.logspace(low, high if high > low else low + 1e-6, _N_BINS + 1)
                counts = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]
                shown[name] = {"edges": edges.tolist(), "counts": counts.tolist()}
        return shown

    def _compute_order(self, query: Query) -> NDArray[np.uint32]:
        if query.sort not in self.sortable:
            raise InputError(f"Cannot sort by {query.sort!r}; the table has {self.sortable}.")
        frame = self._frame.lazy().select("latent", "is_dead", pl.col(query.sort).alias("key"), *_columns(query.filters, self.numeric))
        if query.life not in ("all", "live", "dead"):
            raise InputError(f"{query.life!r} is none of all, live and dead.")
        if query.life != "all":
            frame = frame.filter(pl.col("is_dead") == (query.life == "dead"))
        for name, relation, value in map(_parse_filter, query.filters):
            column = pl.col(f"filter:{name}")
            frame = frame.filter({">=": column >= value, "<=": column <= value, ">": column > value, "<": column < value}[relation])
        if query.text.strip():
            found = pl.LazyFrame({"latent": search_latents(self._search_path, query.text)}, schema={"latent": pl.UInt32})
            frame = frame.join(found, on="latent", how="semi")
        ordered = frame.sort(["key", "latent"], descending=[query.is_descending, False], nulls_last=True).select("latent").collect()
        return ordered["latent"].to_numpy().astype(np.uint32)


def _parse_filter(text: str) -> tuple[str, str, float]:
    found = _CONDITION.fullmatch(text.strip())
    if not found:
        raise InputError(f"{text!r} is no filter; they look like 'max>=3.5' or 'frequency<1e-3'.")
    return found[1], found[2], float(found[3])


def _columns(filters: tuple[str, ...], numeric: list[str]) -> list[pl.Expr]:
    if len(filters) > MAX_FILTERS:
        raise InputError(f"{len(filters)} filters were given, at most {MAX_FILTERS} are taken.")
    names = dict.fromkeys(_parse_filter(text)[0] for text in filters)
    for name in names:
        if name not in numeric:
            raise InputError(f"Cannot filter by {name!r}; the numeric columns are {numeric}.")
    return [pl.col(name).alias(f"filter:{name}") for name in names]
