"""The SAEs of a pipeline become one JSON that pages compare them by: table, curves, replicas, on a server or as a file of a static host.

    sweeps/<pipeline>.json    columns of the table of SAEs, as lists; for each recipe its replicas, means and deviations; curves, thinned

It is made from what lies there when it is asked for, trained, failed and stopped ones included, and is no artifact; a server keeps it until a file
that it depends on is written. Of more than `MAX_CURVES` SAEs the curves of those with the least FVU are in it. Format: `docs/formats/comparison.md`.
"""

import hashlib
import json
import logging
import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Final

import polars as pl

from interp_assets.errors import ArtifactMissingError, InterpError, NotFoundError
from interp_assets.planning.pipeline import Pipeline, load_configuration, load_pipeline
from interp_assets.storage.manifest import CONFIGURATION, find_manifest
from interp_assets.storage.store import Store
from interp_assets.train.refs import FOLDER as SAES
from interp_assets.train.refs import MATCHES, matches_ref
from interp_assets.train.results.arms import count_held_out, read_curves, read_table
from interp_assets.train.results.replicas import list_replicas, over_seeds
from interp_assets.train.sweep import IDS
from interp_assets.train.sweep import read_table as read_table_of
from interp_assets.web.opened import BundlePlace
from interp_assets.web.refs import FOLDER

FORMAT: Final = "interp-assets/comparison-of-saes"
VERSION: Final = 1
MAX_CURVES: Final = 256
_POINTS: Final = 100
"""Logged steps of one SAE that are sent."""
_CURVES: Final = ("n_rows", "loss", "l0", "fvu", "dead_share")
_DIGITS: Final = 6
_MATCHES: Final = 24
"""Matched latents of a pair of SAEs that are sent, those that fire most alike."""
_MATCHED: Final = ("latent", "other_latent", "cosine", "correlation", "n_fired", "n_other_fired")
_LEFT_OUT: Final = frozenset(IDS) - {"sae_id", "mixed_shards_id"}


def find_pipelines(places: Sequence[BundlePlace]) -> dict[str, Store]:
    """Return, by name, the pipelines' folders that bundles lie in and that have SAEs to compare."""
    found: dict[str, Store] = {}
    for store, path in places:
        above, _, last = path.rpartition("/")
        if last and (above == FOLDER or above.endswith(f"/{FOLDER}")):
            folder = above.removesuffix(FOLDER).rstrip("/")
            add_pipeline(found, store.child(folder) if folder else store)
    return found


def add_pipeline(found: dict[str, Store], store: Store) -> None:
    """Add a pipeline's folder, unless it is one already or has no SAE; a second one of the same name becomes `name-2`."""
    if any(known.url == store.url for known in found.values()):
        return
    try:
        if store.size(CONFIGURATION) is not None:
            pipeline = _open(store)
            read_table(pipeline, store)
            name = pipeline.config.name
            found[next(free for free in (name, *(f"{name}-{i}" for i in range(2, len(found) + 3))) if free not in found)] = store
    except ArtifactMissingError:
        return
    except InterpError as error:  # another release's, or damaged: its bundles are shown all the same
        logging.getLogger(__name__).warning("No comparison of the SAEs in %s: %s", store.url, error)


class Comparisons:
    """The JSON of every pipeline, made when it is asked for and kept while nothing that it is made of is written. For several threads."""

    def __init__(self, pipelines: Mapping[str, Store]) -> None:
        self._pipelines, self._lock = pipelines, threading.Lock()
        self._kept: dict[str, tuple[str, bytes]] = {}

    def find(self, name: str) -> tuple[str, bytes]:
        """Return the stamp of what a pipeline's SAEs are now, and their comparison as JSON. Raises `NotFoundError` for a name that there is not."""
        if name not in self._pipelines:
            raise NotFoundError(f"No pipeline is called {name!r:.200}. This server has {', '.join(self._pipelines) or 'none'}.")
        store, kept = self._pipelines[name], self._kept.get(name)
        stamp = find_stamp(store)  # before the tables are read: what is written meanwhile is read again
        if kept is None or kept[0] != stamp:
            kept = stamp, json.dumps(describe_comparison(store), ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
            with self._lock:
                self._kept[name] = kept
        return kept


def find_stamp(store: Store) -> str:
    """Hash what a comparison depends on: version, configuration, plan, when each file of the stage was written; a listing and two small files."""
    hasher = hashlib.blake2b(f"{VERSION}\0".encode() + store.get(CONFIGURATION), digest_size=16)
    hasher.update(store.get(load_configuration(store).execution.plan))
    for path, written in sorted(store.list_times(SAES).items()):
        hasher.update(f"{path}\0{written.isoformat()}\0".encode())
    return hasher.hexdigest()


def describe_comparison(store: Store) -> dict[str, Any]:
    """Return what pages compare the SAEs of a pipeline by. Raises `InterpError` where there is none."""
    pipeline = _open(store)
    table, curves = read_table(pipeline, store), read_curves(pipeline, store)
    shown = table.sort("fvu", "train_fvu", nulls_last=True, maintain_order=True)["name"].head(MAX_CURVES).to_list()
    folded = over_seeds(table)
    config = pipeline.config
    return {
        "format": FORMAT,
        "version": VERSION,
        "pipeline": config.name,
        "model": {"name": config.model.shown_name, "revision": config.model.revision},
        "n_held_out": count_held_out(store, table),
        "saes": _columns(table.drop(_LEFT_OUT)),
        "replicas": {"members": list_replicas(table), "columns": _columns(folded)},
        "matches": _describe_matches(pipeline, store),
        "curves": {name: _thin(curves.filter(pl.col("name") == name)) for name in shown},
    }


def _describe_matches(pipeline: Pipeline, store: Store) -> list[dict[str, Any]]:
    """Return what is known of pairs of SAEs whose latents were matched, and their best mutual matches; nothing where none were."""
    if pipeline.config.matches is None or (manifest := find_manifest(store, matches_ref(pipeline))) is None:
        return []
    table = read_table_of(store, matches_ref(pipeline).path, manifest, MATCHES)
    parts = table.filter("is_mutual").partition_by("sae", "other_sae", as_dict=True)
    told = []
    for pair in manifest.facts["pairs"]:
        own = parts.get((pair["sae"], pair["other_sae"]), table.clear())
        best = own.sort("correlation", "cosine", descending=True, nulls_last=True).head(_MATCHES).select(_MATCHED)
        told.append({**{name: _plain(value) for name, value in pair.items()}, "n_held_out": manifest.facts["n_held_out"], "best": _columns(best)})
    return told


def _open(store: Store) -> Pipeline:
    return load_pipeline(load_configuration(store), store)


def _columns(table: pl.DataFrame) -> dict[str, list[Any]]:
    return {name: [_plain(value) for value in table[name]] for name in table.columns}


def _thin(curve: pl.DataFrame) -> dict[str, list[Any]]:
    """Keep evenly spaced steps of a curve, the first and the last among them."""
    n = curve.height
    places = sorted({round(i * (n - 1) / (_POINTS - 1)) for i in range(_POINTS)}) if n > _POINTS else range(n)
    return _columns(curve.select(_CURVES)[list(places)])


def _plain(value: Any) -> Any:
    """Return a value as JSON has it: of numbers six digits, and nothing that is not finite."""
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    return value
