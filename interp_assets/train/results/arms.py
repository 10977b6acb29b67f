"""All SAEs of a pipeline, or of a folder, become one table and one table of curves: measured, only trained, stopped and failed ones.

Most of it is in sweeps that lie there already (`sweep.py`). A row of one is taken where neither the SAE nor its evaluation was written after it,
which one listing tells; everything else is read from manifests, an SAE at a time. Ten thousand SAEs of one sweep are a listing and a Parquet file.

    read_table      the SAEs of the configuration; with `everything` all of the folder, other configurations' and older ones too
    read_curves     the logged steps of the former

`status` says of each what has become of it, `why` of those that ended early what ended them (`ended.py`). Nothing is written.
"""

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

import polars as pl
from pydantic import ValidationError

from interp_assets.errors import ArtifactError, ArtifactMissingError
from interp_assets.planning.config import SaeConfig
from interp_assets.planning.options import ARCHITECTURES
from interp_assets.planning.pipeline import Pipeline
from interp_assets.storage.lineage import Digests
from interp_assets.storage.manifest import MANIFEST, ArtifactRef, Manifest, combine_ids, read_manifest
from interp_assets.storage.store import Store
from interp_assets.train.own.columns import add_metrics
from interp_assets.train.refs import FOLDER, SWEEP_VERSION, evaluation_ref, sae_ref
from interp_assets.train.results.ended import ENDED, Ended, ended_ref, find_ended, read_ended_log
from interp_assets.train.sweep import CURVES, NO_CURVES, SCHEMA, TABLE, Experiment, describe, describe_recipe, find_experiment, read_curve
from interp_assets.train.sweep import read_table as read_file_of

MEASURED: Final = "measured"
TRAINED: Final = "trained"
COLUMNS: Final[dict[str, pl.DataType]] = {**SCHEMA, "code": pl.String(), "status": pl.String(), "why": pl.String()}
"""Every column of the table and its type: those of a sweep, the hash of an architecture of one's own, and what has become of the SAE."""
_READERS: Final = 16
_NEVER: Final = datetime.max.replace(tzinfo=UTC)
_SWEEP, _SAE, _EVALUATION = "sweep", "sae", "sae_evaluation"


class _Swept(NamedTuple):
    """Rows of a sweep that are as things are now."""

    path: str
    manifest: Manifest
    rows: pl.DataFrame


def read_table(pipeline: Pipeline, store: Store, *, everything: bool = False) -> pl.DataFrame:
    """Return a row for each SAE that is trained, or ended before it was. Raises `ArtifactMissingError` where there is none."""
    times = store.list_times(FOLDER)
    told = list(_read_sweeps(store, times, None if everything else _wanted(pipeline, times)))
    known = {path for item in told for path in item.rows["sae_path"]}
    found = _find_all(store, times, known) if everything else _find_wanted(pipeline, store, times, known)
    rows = [{**describe(store, item), **_told(item.config, MEASURED if item.measured else TRAINED)} for item in found]
    there = known | {str(row["sae_path"]) for row in rows}
    rows += [_describe_ended(item) for item in _find_ended(pipeline, store, times, there)]
    codes = {sae.name: sae.code.digest for sae in pipeline.config.saes if sae.code}
    code = pl.col("name").replace_strict(codes, default=None, return_dtype=pl.String()) if codes and not everything else pl.lit(None, pl.String())
    parts = [item.rows.with_columns(code.alias("code"), pl.lit(MEASURED).alias("status"), pl.lit(None, pl.String()).alias("why")) for item in told]
    table = pl.concat([*parts, pl.DataFrame(rows, schema=COLUMNS, orient="row")])
    if not table.height:
        raise ArtifactMissingError(
            f"Pipeline {pipeline.config.name!r} has no SAE yet ({store.url}/{FOLDER}). `interp run` trains those of the configuration, `interp try` "
            "tries them, or for no more than the table: interp run --select +sweep"
        )
    order = {sae.name: place for place, sae in enumerate(pipeline.config.saes)}
    places = table["name"].replace_strict(order, default=len(order), return_dtype=pl.Int64())
    ordered = table.with_columns(places.alias("_place")).sort("_place", "name", maintain_order=True).drop("_place")
    return ordered if everything else add_metrics(pipeline, store, ordered)


def read_curves(pipeline: Pipeline, store: Store) -> pl.DataFrame:
    """Return the logged steps of every SAE of the configuration, of those that ended early too: `name`, and the columns of `training.parquet`."""
    times = store.list_times(FOLDER)
    told = list(_read_sweeps(store, times, _wanted(pipeline, times)))
    parts = [read_file_of(store, item.path, item.manifest, CURVES).filter(pl.col("name").is_in(item.rows["name"].implode())) for item in told]
    known = {path for item in told for path in item.rows["sae_path"]}
    for item in _find_wanted(pipeline, store, times, known):
        known.add(item.path)
        parts += [] if item.config.imported else [read_curve(store, item)]
    parts += [read_ended_log(store, item) for item in _find_ended(pipeline, store, times, known)]
    return pl.concat([NO_CURVES, *parts])


def count_held_out(store: Store, table: pl.DataFrame) -> int | None:
    """Return how many held-out rows the measured SAEs of a table were measured on; None where none is, or not all on as many."""
    paths = table.filter(pl.col("status") == MEASURED)["evaluation_path"].to_list()
    counts = {read_manifest(store, path).facts["n_rows"] for path in (paths[:1] + paths[-1:])}
    return counts.pop() if len(counts) == 1 else None


def _wanted(pipeline: Pipeline, times: Mapping[str, datetime]) -> dict[str, str]:
    """Return where the SAEs of a configuration lie that are there, and their evaluations."""
    return {path: evaluation for path, evaluation in _places(pipeline).items() if f"{path}/{MANIFEST}" in times}


def _places(pipeline: Pipeline) -> dict[str, str]:
    """Return where the SAEs of a configuration and their evaluations will lie: ten thousand ids are computed once."""
    names = [sae.name for sae in _configs(pipeline)]
    return pipeline.remember("places of SAEs", lambda: {sae_ref(pipeline, name).path: evaluation_ref(pipeline, name).path for name in names})


def _configs(pipeline: Pipeline) -> list[SaeConfig]:
    """Return the SAEs of a configuration; none before the shuffle is planned, without which they have no ids."""
    try:
        for sae in pipeline.config.saes[:1]:
            sae_ref(pipeline, sae.name)
    except ArtifactMissingError:
        return []
    return pipeline.config.saes


def _read_sweeps(store: Store, times: Mapping[str, datetime], wanted: Mapping[str, str] | None) -> Iterator[_Swept]:
    """Yield what sweeps tell that still holds, of the newest first: of `wanted` SAEs with these evaluations, or of all."""
    paths = [path for path in _list_artifacts(times) if path.startswith(f"{FOLDER}/{_SWEEP}-")]
    left = None if wanted is None else dict(wanted)
    seen: set[str] = set()
    for path in sorted(paths, key=lambda path: times[f"{path}/{MANIFEST}"], reverse=True):
        if left is not None and not left:
            return
        manifest = _read(store, path)
        if manifest is None or manifest.kind != _SWEEP or manifest.identity["code"] != SWEEP_VERSION:
            continue
        table, at = read_file_of(store, path, manifest, TABLE), times[f"{path}/{MANIFEST}"]
        if left is None:  # of an architecture of one's own the table has the name, and not which bytes that were
            table = table.filter(pl.col("architecture").is_in(ARCHITECTURES) | pl.col("architecture").is_null())
        pairs = table.select("sae_path", "evaluation_path").rows()
        keep = [
            sae not in seen
            and (left is None or left.get(sae) == evaluation)
            and all(times.get(f"{part}/{MANIFEST}", _NEVER) <= at for part in (sae, evaluation))
            for sae, evaluation in pairs
        ]
        rows = table.filter(pl.Series(keep, dtype=pl.Boolean()))
        seen |= set(rows["sae_path"])
        if left is not None:
            left = {sae: evaluation for sae, evaluation in left.items() if sae not in seen}
        if rows.height:
            yield _Swept(path, manifest, rows)


def _find_wanted(pipeline: Pipeline, store: Store, times: Mapping[str, datetime], known: set[str]) -> list[Experiment]:
    digests, due = Digests(store), _wanted(pipeline, times).keys() - known
    configs = [sae for sae in _configs(pipeline) if due and sae_ref(pipeline, sae.name).path in due]
    found = (find_experiment(pipeline, store, config, digests) for config in configs)
    return [item for item in found if item]


def _find_all(store: Store, times: Mapping[str, datetime], known: set[str]) -> list[Experiment]:
    """Return every SAE of the folder that no sweep tells of, with the newest evaluation of what it is now."""
    paths = [path for path in _list_artifacts(times) if path not in known]
    with ThreadPoolExecutor(_READERS) as readers:
        read = {path: manifest for path, manifest in zip(paths, readers.map(lambda path: _read(store, path), paths), strict=True) if manifest}
    evaluations: dict[tuple[str, str], tuple[str, Manifest]] = {}
    for path, manifest in sorted(read.items(), key=lambda item: item[1].created):
        if manifest.kind == _EVALUATION:
            evaluations[manifest.inputs["sae"], str(manifest.facts.get("made_from"))] = path, manifest
    found = []
    for path, manifest in read.items():
        if manifest.kind == _SAE and (config := _read_config(path, manifest)):
            place = evaluations.get((manifest.artifact_id, combine_ids([manifest.digest])))
            found.append(Experiment(config, path, manifest, _address(*place) if place else None, place[1] if place else None))
    return found


def _read_config(path: str, manifest: Manifest) -> SaeConfig | None:
    """Make the configuration of an SAE from its manifest, None where another release wrote what this one does not know."""
    recipe = {**manifest.identity["sae"]}
    if digest := recipe.get("imported_digest"):
        told = {name: manifest.facts[name] for name in ("architecture", "d_sae") if manifest.facts.get(name)}
        recipe |= {"name": path.rpartition("/")[2].rpartition("-")[0], "imported": digest, **told}
    try:
        return SaeConfig.model_validate(recipe)
    except ValidationError:
        return None


def _find_ended(pipeline: Pipeline, store: Store, times: Mapping[str, datetime], there: set[str]) -> Iterator[Ended]:
    """Yield the SAEs of a configuration that ended early and have not been trained since."""
    if not any(f".{ENDED}-" in path for path in times):
        return
    for config in _configs(pipeline):
        sae = sae_ref(pipeline, config.name)
        if sae.path not in there and f"{ended_ref(sae, config.name).path}/{MANIFEST}" in times and (found := find_ended(store, sae, config)):
            yield found


def _describe_ended(item: Ended) -> dict[str, Any]:
    row = {**dict.fromkeys(COLUMNS), **describe_recipe(item.config)}
    told = {f"train_{name}": item.facts.get(name) for name in ("loss", "l0", "fvu", "dead_share")}
    return (
        row
        | told
        | {"n_rows": item.facts.get("n_rows"), "sae_id": item.sae.artifact_id, **_told(item.config, item.facts["status"], item.facts["why"])}
    )


def _told(config: SaeConfig, status: str, why: str | None = None) -> dict[str, str | None]:
    """Return the columns that a sweep has not."""
    return {"code": config.code.digest if config.code else None, "status": status, "why": why}


def _list_artifacts(times: Iterable[str]) -> list[str]:
    """Return the folders directly below the stage's that have a manifest."""
    return sorted(path.removesuffix(f"/{MANIFEST}") for path in times if path.count("/") == 2 and path.endswith(f"/{MANIFEST}"))


def _read(store: Store, path: str) -> Manifest | None:
    try:
        return read_manifest(store, path)
    except ArtifactError:
        return None  # damaged, or gone meanwhile: `interp verify` says so


def _address(path: str, manifest: Manifest) -> ArtifactRef:
    return ArtifactRef(manifest.kind, path, manifest.artifact_id, manifest.identity, manifest.inputs)
