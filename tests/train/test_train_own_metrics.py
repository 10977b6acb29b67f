"""Metrics of one's own: a function in a file measures every SAE, and nothing is trained again."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from own_files import reading, write_file

from interp_assets.corpus.refs import token_shard_ref
from interp_assets.errors import OwnCodeError
from interp_assets.graph.stages import make_road
from interp_assets.harvest.refs import activation_shard_ref
from interp_assets.planning.pipeline import Pipeline
from interp_assets.planning.sections import Metric
from interp_assets.storage.manifest import create_artifact, read_manifest
from interp_assets.storage.tensors import save_tensors
from interp_assets.train.checkpoint import load_sae
from interp_assets.train.loop import train_saes
from interp_assets.train.own.columns import add_metrics, read_metrics
from interp_assets.train.own.measure import measure_own
from interp_assets.train.refs import evaluation_ref, metric_ref, sae_ref

TINY: dict[str, Any] = {"d_sae": 48, "k": 2, "n_rows": 300, "batch_rows": 100, "learning_rate": 5e-3}
HOOK = "resid_post.0"
METRIC = """def half_norm(sae, blocks):
    norms = [x.norm(dim=1) for x, _ in blocks]
    again = sum(len(x) for x, y in blocks)
    return {"half_norm": sum(float(n.sum()) for n in norms) / 2 / again, "latents": sae.d_sae}
"""


def measuring(planted: Any, folder: Path, text: str = METRIC, *names: str) -> Any:
    """Return a planted pipeline that measures by a file, with 20 held-out rows of which the last 5 are not valid."""
    write_file(folder, text, "my.py")
    metrics = [Metric(function=f"my.py:{name}") for name in names or ("half_norm",)]
    planted = planted._replace(pipeline=Pipeline(planted.pipeline.config.model_copy(update={"metrics": metrics}), planted.pipeline.plan))
    planted, table, n = reading(planted, folder), io.BytesIO(), np.arange(20, dtype=np.uint32)
    pq.write_table(pa.table({"token_id": n, "context": n * 0, "document": n * 0, "valid": n < 15}), table)
    with create_artifact(planted.store, token_shard_ref(planted.pipeline, 0)) as art:
        art.put("tokens.parquet", table.getvalue())
    with create_artifact(planted.store, activation_shard_ref(planted.pipeline, HOOK, 0)) as art:
        save_tensors(art, "rows.safetensors", {"rows": planted.rows[:20]})
    return planted


def test_a_metric_is_an_artifact_a_function_and_sae_and_columns(make_planted, tmp_path: Path) -> None:
    """Valid held-out rows, as often as the function wants them; made once, and kept with its file."""
    planted = measuring(make_planted([{"name": "a", **TINY}, {"name": "b", **TINY, "seed": 1}]), tmp_path)
    train_saes(planted.pipeline, planted.store, ["a", "b"])
    (made,) = measure_own(planted.pipeline, planted.store, "a")
    expected = float(planted.rows[:15].float().norm(dim=1).mean()) / 2
    assert made.manifest.facts == {**made.manifest.facts, "n_rows": 15, "values": {"my.half_norm": pytest.approx(expected), "my.latents": 48.0}}
    assert not made.is_cached
    assert measure_own(planted.pipeline, planted.store, "a")[0].is_cached
    table = add_metrics(planted.pipeline, planted.store, pl.DataFrame({"name": ["a", "b", "other"]}))
    assert table.columns == ["name", "my.half_norm", "my.latents"]
    assert table["my.latents"].to_list() == [48.0, None, None]
    (asset,) = [asset for asset in make_road(planted.pipeline.config) if asset.name == "sae_metrics"]
    assert any("/code-" in ref.path for item in asset.lineage(planted.pipeline, planted.store, "a") for ref in item.sources)


def test_another_metric_retrains_nothing(make_planted, tmp_path: Path) -> None:
    """Trainings and evaluations keep their ids; a function that changes is measured anew."""
    first = measuring(make_planted([{"name": "a", **TINY}]), tmp_path)
    other = measuring(make_planted([{"name": "a", **TINY}]), tmp_path / "other", METRIC.replace("/ 2", "/ 3"))
    for address in (sae_ref, evaluation_ref):
        assert address(first.pipeline, "a") == address(other.pipeline, "a")
    one, two = (metric_ref(item.pipeline, "a", item.pipeline.config.metrics[0]).path for item in (first, other))
    assert one != two
    assert [asset.name for asset in make_road(make_planted([TINY]).pipeline.config) if asset.name == "sae_metrics"] == []


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("sae.nothing", r"my.py, line 2, `return sae.nothing`: AttributeError"),
        ("3", r"my.py:half_norm has to return a dict of 1 to 64 numbers by name, and returned int"),
        ("{'x': 'y'}", r"my.py:half_norm returned x = 'y', which is no number"),
        ("{'x': float('nan')}", r"my.py:half_norm returned x = nan, which is not finite"),
    ],
)
def test_what_is_wrong_with_a_metric_is_said(make_planted, tmp_path: Path, body: str, message: str) -> None:
    """With its line, and nothing is published."""
    planted = measuring(make_planted([{"name": "a", **TINY}]), tmp_path, f"def half_norm(sae, blocks):\n    return {body}\n")
    train_saes(planted.pipeline, planted.store, ["a"])
    with pytest.raises(OwnCodeError, match=message):
        raise measure_own(planted.pipeline, planted.store, "a")
    assert read_metrics(planted.pipeline, planted.store, "a") == {}
    assert isinstance(load_sae(planted.pipeline, planted.store, "a").W_dec, torch.Tensor)
    assert read_manifest(planted.store, sae_ref(planted.pipeline, "a").path).kind == "sae"
