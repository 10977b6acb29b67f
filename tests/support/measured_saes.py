"""SAEs of planted rows, measured on these rows as `sae_evaluation` measures on held-out shards."""

from typing import Any

import polars as pl
import torch

from interp_assets.planning.pipeline import Pipeline
from interp_assets.storage.manifest import create_artifact, load_manifest
from interp_assets.storage.store import Store
from interp_assets.train.checkpoint import load_sae
from interp_assets.train.evaluate import save_evaluation
from interp_assets.train.metrics import ReconstructionSums
from interp_assets.train.refs import evaluation_ref, sae_ref, sweep_ref
from interp_assets.train.sweep import TABLE, read_table

HOOK = "resid_post.0"


def measure(planted: Any, name: str, hook_point: str = HOOK, n_outliers: int = 0) -> None:
    """Publish an evaluation of a trained SAE, on the rows of the planted data, the first of which are taken for outliers."""
    rows = planted.rows if hook_point == HOOK else planted.rows[:, : planted.rows.shape[1] // 2]
    sums = ReconstructionSums(load_sae(planted.pipeline, planted.store, name), rows.double().mean(0))
    sums.add(rows, is_outlier=torch.arange(len(rows)) < n_outliers)
    trained = load_manifest(planted.store, sae_ref(planted.pipeline, name))
    with create_artifact(planted.store, evaluation_ref(planted.pipeline, name), made_from=[trained]) as art:
        save_evaluation(art, sums, None, "this is a test")


def load_table(pipeline: Pipeline, store: Store) -> pl.DataFrame:
    """Read the pipeline's table of SAEs, which is there."""
    ref = sweep_ref(pipeline)
    return read_table(store, ref.path, load_manifest(store, ref), TABLE)
