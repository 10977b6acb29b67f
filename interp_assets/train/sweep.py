"""All SAEs of a pipeline become one table: configuration, quality, speed and artifact ids of each, and one of their learning curves.

`sweep.parquet` has one row per experiment that is trained and measured, in the order of the configuration; `curves.parquet` has the logged
steps of all of them. An SAE that is not there yet is named in the facts as missing, and comes in when the sweep is made again: the
artifact remembers the digests of what it was made from.

Speeds are times: they come from `times.json` of each SAE, and the table is outside the digest like that file. What the digest covers
instead is the fact `table_digest`, the hash of all columns but those. Columns: `docs/formats/sweep.md`.
"""

import hashlib
import io
import json
from typing import Any, Final, NamedTuple

import polars as pl

from interp_assets.errors import ArtifactMissingError
from interp_assets.planning.config import SaeConfig
from interp_assets.planning.options import FIELDS, find_unread
from interp_assets.planning.pipeline import Pipeline
from interp_assets.storage.lineage import Digests, find_current, trace
from interp_assets.storage.manifest import ArtifactRef, Manifest, Produced, create_artifact, find_made_from, find_manifest, read_file, timed
from interp_assets.storage.store import Store
from interp_assets.train.lineage import evaluation_lineage
from interp_assets.train.refs import METRICS, TRAINING, LogRow, evaluation_ref, sae_ref, sweep_ref

TABLE: Final = "sweep.parquet"
CURVES: Final = "curves.parquet"

_TEXT, _COUNT, _NUMBER = pl.String(), pl.Int64(), pl.Float64()
CONFIGURATION: Final[dict[str, pl.DataType]] = {
    "name": _TEXT,
    "architecture": _TEXT,
    "kind": _TEXT,
    "task": _TEXT,
    "hook_points": _TEXT,
    "target_hook_points": _TEXT,
    "d_in": _COUNT,
    "d_out": _COUNT,
    "d_sae": _COUNT,
    "k": _COUNT,
    "sparsity_coefficient": _NUMBER,
    "learning_rate": _NUMBER,
    "batch_rows": _COUNT,
    "n_rows": _COUNT,
    "dead_after_rows": _COUNT,
    "seed": _COUNT,
    "product_dtype": _TEXT,
    "options": _TEXT,
}
TRAINED: Final[dict[str, pl.DataType]] = dict.fromkeys(("train_loss", "train_l0", "train_fvu", "train_dead_share"), _NUMBER)
OUTLIERS: Final = ("outlier_share", "fvu_ordinary", "fvu_outliers")
"""Columns that tell rows of huge norm from all others."""
HELD_OUT: Final[dict[str, pl.DataType]] = dict.fromkeys(("l0", "fvu", "median_row_fvu", *OUTLIERS, "ce_recovered", "kl", "dead_share"), _NUMBER)
_SAEBENCH: Final[dict[str, tuple[str, ...]]] = {
    "reconstruction_quality": ("explained_variance", "mse", "cossim"),
    "shrinkage": ("l2_ratio", "relative_reconstruction_bias"),
    "misc": ("average_max_encoder_cosine_sim", "average_max_decoder_cosine_sim", "freq_over_1_percent", "freq_over_10_percent"),
}
SPEED: Final[dict[str, pl.DataType]] = {
    "rows_per_s": _NUMBER,
    "step_rows_per_s": _NUMBER,
    "wall_s": _NUMBER,
    "input_wait_share": _NUMBER,
    "peak_memory_bytes": _COUNT,
    "peak_device_bytes": _COUNT,
    "n_together": _COUNT,
    "processes": _COUNT,
    "latent_processes": _COUNT,
    "device": _TEXT,
}
"""The columns that are times, or tell on what they were taken: outside the digest."""
IDS: Final[dict[str, pl.DataType]] = dict.fromkeys(
    ("mixed_shards_id", "sae_id", "sae_digest", "sae_path", "evaluation_id", "evaluation_digest", "evaluation_path"), _TEXT
)
SCHEMA: Final[dict[str, pl.DataType]] = {
    **CONFIGURATION,
    **TRAINED,
    **HELD_OUT,
    **{name: _NUMBER for names in _SAEBENCH.values() for name in names},
    **SPEED,
    **IDS,
}
"""Every column of the table and its type, in order."""


SHOWN: Final = (
    "name",
    "hook_points",
    "task",
    "architecture",
    "d_sae",
    "k",
    "sparsity_coefficient",
    "learning_rate",
    "seed",
    "options",
    "train_fvu",
    "l0",
    "fvu",
    *OUTLIERS,
    "ce_recovered",
    "kl",
    "dead_share",
    "rows_per_s",
    "wall_s",
)
"""Columns of the sweep that a person sees first."""
COMPARED: Final = ("hook_points", "target_hook_points", "task")
"""SAEs that agree in these columns do the same thing: their L0 and FVU can be compared."""
MAX_SHOWN: Final = 60
"""Rows of the table that a person is shown at once."""


NO_CURVES: Final = pl.DataFrame(schema={"name": _TEXT, **{name: _COUNT if kind is int else _NUMBER for name, kind in LogRow.__annotations__.items()}})
"""Imported SAEs have none."""


class Experiment(NamedTuple):
    """An SAE that is there, and where."""

    config: SaeConfig
    path: str
    trained: Manifest
    evaluation: ArtifactRef | None
    measured: Manifest | None


@timed
def make_sweep(pipeline: Pipeline, store: Store) -> Produced:
    """Collect what is known of every SAE of the pipeline. Raises `ArtifactMissingError` when none is trained and measured yet."""
    ref = sweep_ref(pipeline)
    known = Digests(store)
    found = (find_experiment(pipeline, store, config, known) for config in pipeline.config.saes)
    experiments = [item for item in found if item and item.measured]
    made_from = [manifest for item in experiments for manifest in (item.trained, item.measured) if manifest]
    manifest = find_made_from(store, ref, made_from) if experiments else None
    if manifest is not None:
        return Produced(ref, manifest, is_cached=True)
    names = [config.name for config in pipeline.config.saes]
    if not experiments:
        raise ArtifactMissingError(f"None of the SAEs {names} is trained and measured yet. Materialize `sae` and `sae_evaluation` first.")
    table = pl.DataFrame([describe(store, item) for item in experiments], schema=SCHEMA, orient="row")
    curves = pl.concat([NO_CURVES, *(read_curve(store, item) for item in experiments if not item.config.imported)])
    with create_artifact(store, ref, made_from=made_from) as art:
        art.put(TABLE, _as_parquet(table), n_rows=table.height, is_timed=True)
        art.put(CURVES, _as_parquet(curves), n_rows=curves.height)
        art.facts |= {
            "n_rows": table.height,
            "missing": [name for name in names if name not in set(table["name"])],
            "table_digest": hashlib.blake2b(_as_parquet(table.drop(*SPEED)), digest_size=16).hexdigest(),
        }
    return art.produced


def read_table(store: Store, path: str, manifest: Manifest, name: str) -> pl.DataFrame:
    """Read one of the two tables of the sweep at `path`."""
    return pl.read_parquet(io.BytesIO(read_file(store, path, manifest, name)))


def shorten(table: pl.DataFrame) -> pl.DataFrame:
    """Keep of a sweep's table what a person reads first: a few columns, numbers of four digits; nothing that no SAE has.

    Of outliers nothing where there is none, and FVU at the end of training only where one is not measured.
    """
    has_outliers = bool((table["outlier_share"] > 0).any())
    is_measured = not bool(table["fvu"].is_null().any())
    hidden = {*(() if has_outliers else OUTLIERS), *(("train_fvu",) if is_measured else ())}
    shown = [each for name in SHOWN for each in ((name, "n") if name == "name" else (name, f"{name}_deviation"))] + ["versus_best"]
    names = [name for name in shown if name in table.columns and name.removesuffix("_deviation") not in hidden and not table[name].is_null().all()]
    return table.head(MAX_SHOWN).select(pl.col(name).round_sig_figs(4) if table.schema[name] == pl.Float64() else pl.col(name) for name in names)


def find_experiment(pipeline: Pipeline, store: Store, config: SaeConfig, known: Digests) -> Experiment | None:
    """Return an SAE of a pipeline that is trained, measured as the held-out rows are now or not."""
    ref, evaluation = sae_ref(pipeline, config.name), evaluation_ref(pipeline, config.name)
    trained = find_manifest(store, ref)
    if trained is None:
        return None
    measured = find_current(store, evaluation, trace(known, evaluation_lineage(pipeline, config.name)))
    return Experiment(config, ref.path, trained, evaluation, measured)


def describe(store: Store, item: Experiment) -> dict[str, Any]:
    """Return the row of an SAE."""
    from interp_assets.train.times import find_times  # noqa: PLC0415 - takes torch, and reading a table does without

    config, path, trained, evaluation, measured = item
    metrics = json.loads(read_file(store, evaluation.path, measured, METRICS)) if evaluation and measured else {}
    facts, times = trained.facts, find_times(store, path, trained)
    row: dict[str, Any] = {
        **describe_recipe(config),
        **{name: facts[name] for name in ("kind", "d_in", "d_out", "n_rows")},
        **{name: facts.get(name.removeprefix("train_")) for name in TRAINED},
        **{name: measured.facts[name] if measured else None for name in HELD_OUT},
        **{name: metrics[section][name] if measured else None for section, names in _SAEBENCH.items() for name in names},
        **{name: times.get(name) for name in SPEED},
        "mixed_shards_id": trained.inputs.get("mixed_shards"),
        "sae_id": trained.artifact_id,
        "sae_digest": trained.digest,
        "sae_path": path,
        "evaluation_id": evaluation.artifact_id if evaluation else None,
        "evaluation_digest": measured.digest if measured else None,
        "evaluation_path": evaluation.path if evaluation else None,
    }
    return {name: row[name] for name in SCHEMA}


def describe_recipe(config: SaeConfig) -> dict[str, Any]:
    """Return the columns of a row that the configuration tells, null where its architecture does not read them."""
    return {
        **dict.fromkeys(CONFIGURATION),  # an imported SAE has no recipe
        **{name: value for name, value in config.described().items() if name in CONFIGURATION},
        **dict.fromkeys(find_unread(config.architecture, FIELDS)),
        "options": json.dumps(config.options, sort_keys=True) if config.options else None,
        "hook_points": ",".join(config.sources),
        "target_hook_points": ",".join(config.targets),
    }


def read_curve(store: Store, item: Experiment) -> pl.DataFrame:
    """Read the logged steps of an SAE that was trained here."""
    curve = read_table(store, item.path, item.trained, TRAINING)
    return curve.select(pl.lit(item.config.name).alias("name"), *LogRow._fields)


def _as_parquet(frame: pl.DataFrame) -> bytes:
    buffer = io.BytesIO()
    frame.write_parquet(buffer)
    return buffer.getvalue()
