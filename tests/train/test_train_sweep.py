"""One table of all SAEs: readable by anyone, complete, and the same for the same SAEs whatever the clock said."""

import io
import re
from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import pytest
from typer.testing import CliRunner

from interp_assets.cli import app
from interp_assets.errors import ArtifactMissingError, InputError
from interp_assets.manifest import Produced, create_artifact, load_manifest, read_file
from interp_assets.pipeline import save_plan
from interp_assets.plots import plot_curves, plot_pareto
from interp_assets.train.checkpoint import load_sae
from interp_assets.train.evaluate import save_evaluation
from interp_assets.train.loop import train_saes
from interp_assets.train.metrics import ReconstructionSums
from interp_assets.train.refs import evaluation_ref, sae_ref
from interp_assets.train.reports import describe_sweep
from interp_assets.train.sweep import SCHEMA, SPEED, load_table, make_sweep

TINY: dict[str, Any] = {"d_sae": 48, "k": 2, "n_rows": 1000, "batch_rows": 100, "learning_rate": 5e-3, "dead_after_rows": 500}
SAES = [{"name": "a", **TINY}, {"name": "b", **TINY, "architecture": "relu", "seed": 3}, {"name": "c", **TINY, "k": 4}]
PAGE = Path(__file__).parents[2] / "docs" / "formats" / "sweep.md"


def measure(planted, name: str) -> None:
    """Publish an evaluation of a trained SAE, on the rows of the planted data."""
    sums = ReconstructionSums(load_sae(planted.pipeline, planted.store, name), planted.rows.double().mean(0))
    sums.add(planted.rows)
    trained = load_manifest(planted.store, sae_ref(planted.pipeline, name))
    with create_artifact(planted.store, evaluation_ref(planted.pipeline, name), made_from=[trained]) as art:
        save_evaluation(art, sums, None, "this is a test")


def make_all(make_planted, names: list[str], **kwargs):
    """Train and measure the named SAEs, and make the sweep."""
    planted = make_planted(SAES, **kwargs)
    train_saes(planted.pipeline, planted.store, names)
    for name in names:
        measure(planted, name)
    return planted, make_sweep(planted.pipeline, planted.store)


def read_bytes(planted, item: Produced, name: str) -> bytes:
    """Read a file of the sweep."""
    return read_file(planted.store, item.ref.path, item.manifest, name)


def test_the_table_has_what_the_artifacts_say(make_planted) -> None:
    """Configuration, quality, speed and ids of every SAE, in the order of the configuration."""
    planted, item = make_all(make_planted, ["a", "b", "c"])
    table = load_table(planted.pipeline, planted.store)
    assert dict(table.schema) == SCHEMA
    assert table["name"].to_list() == ["a", "b", "c"]
    assert table["architecture"].to_list() == ["batch_topk", "relu", "batch_topk"]
    assert table["kind"].to_list() == ["jump_relu", "relu", "jump_relu"]
    assert (table["seed"].to_list(), table["k"].to_list()) == ([0, 3, 0], [2, 2, 4])
    for row in table.iter_rows(named=True):
        sae, evaluation = sae_ref(planted.pipeline, row["name"]), evaluation_ref(planted.pipeline, row["name"])
        trained, measured = (load_manifest(planted.store, ref) for ref in (sae, evaluation))
        assert (row["sae_id"], row["sae_digest"], row["sae_path"]) == (sae.artifact_id, trained.digest, sae.path)
        assert (row["evaluation_id"], row["evaluation_digest"]) == (evaluation.artifact_id, measured.digest)
        assert row["mixed_shards_id"] == trained.inputs["mixed_shards"]
        assert (row["l0"], row["fvu"], row["dead_share"]) == tuple(measured.facts[name] for name in ("l0", "fvu", "dead_share"))
        assert row["explained_variance"] == pytest.approx(1 - row["fvu"])
        assert row["train_loss"] == trained.facts["loss"]
        assert row["ce_recovered"] is None
        assert row["rows_per_s"] > 0
        assert 0 < row["input_wait_share"] < 1
        assert row["n_together"] == 3
    assert item.manifest.facts["missing"] == []


def test_polars_and_duckdb_read_the_table_where_it_lies(make_planted, tmp_path: Path) -> None:
    """The queries of the page, word for word, without our code."""
    planted, item = make_all(make_planted, ["a", "b", "c"], root=str(tmp_path))
    folder = planted.store.local_path(item.ref.path)
    queries = re.findall(r"```sql\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(queries) == 2
    for query in queries:
        place = re.search(r"'data/[^']*/(\w+\.parquet)'", query)
        assert place is not None
        assert duckdb.execute(query.replace(place.group(0), f"'{folder}/{place.group(1)}'")).fetchall()
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    best = pl.read_parquet(f"{folder}/sweep.parquet").sort("fvu").select("name", "architecture", "l0", "fvu", "ce_recovered")
    assert "pl.read_parquet(" in code
    assert '.sort("fvu").select("name", "architecture", "l0", "fvu", "ce_recovered")' in code
    assert best.height == 3


def test_the_same_saes_give_the_same_digest_whatever_the_clock_said(make_planted) -> None:
    """Rates are in the table, but not in what Dagster compares."""
    (first, item), (second, again) = (make_all(make_planted, ["a", "b", "c"]) for _ in range(2))
    assert item.manifest.digest == again.manifest.digest
    assert item.manifest.timed == ["sweep.parquet"]
    assert read_bytes(first, item, "curves.parquet") == read_bytes(second, again, "curves.parquet")
    tables = [load_table(planted.pipeline, planted.store) for planted in (first, second)]
    assert tables[0].drop(*SPEED).equals(tables[1].drop(*SPEED))
    assert make_sweep(first.pipeline, first.store).is_cached


def test_an_sae_that_is_not_there_yet_comes_in_later(make_planted) -> None:
    """One failed experiment of fifty must not hide the others."""
    planted, item = make_all(make_planted, ["a", "c"])
    assert load_table(planted.pipeline, planted.store)["name"].to_list() == ["a", "c"]
    assert item.manifest.facts["missing"] == ["b"]
    assert "Not trained and measured yet: b." in describe_sweep(planted.store, item)
    train_saes(planted.pipeline, planted.store, ["b"])
    assert make_sweep(planted.pipeline, planted.store).is_cached
    measure(planted, "b")
    whole = make_sweep(planted.pipeline, planted.store)
    assert not whole.is_cached
    assert load_table(planted.pipeline, planted.store)["name"].to_list() == ["a", "b", "c"]
    assert whole.manifest.facts["missing"] == []


def test_a_sweep_of_nothing_is_refused(make_planted) -> None:
    """An empty table looks like a result."""
    planted = make_planted(SAES)
    with pytest.raises(ArtifactMissingError, match=r"None of the SAEs \['a', 'b', 'c'\] is trained and measured yet"):
        make_sweep(planted.pipeline, planted.store)


def test_curves_hold_every_logged_step_of_every_sae(make_planted) -> None:
    """What the learning curves are drawn from."""
    planted, item = make_all(make_planted, ["a", "b", "c"])
    curves = pl.read_parquet(io.BytesIO(read_bytes(planted, item, "curves.parquet")))
    for name in ("a", "b", "c"):
        ref = sae_ref(planted.pipeline, name)
        own = pl.read_parquet(io.BytesIO(read_file(planted.store, ref.path, load_manifest(planted.store, ref), "training.parquet")))
        assert curves.filter(pl.col("name") == name).drop("name").equals(own)


def test_pictures_and_table_are_small_enough_for_dagsters_database(make_planted) -> None:
    """They are kept with every event."""
    planted, item = make_all(make_planted, ["a", "b", "c"])
    for text in (plot_curves(planted.store, item), plot_pareto(planted.store, item)):
        assert text.startswith("![")
        assert 4000 < len(text) < 40_000
    lines = describe_sweep(planted.store, item).splitlines()
    fvu = load_table(planted.pipeline, planted.store).sort("fvu")
    assert [line.split("|")[1].strip() for line in lines[2:]] == fvu["name"].to_list()


def test_the_command_prints_the_table(make_planted, tmp_path: Path) -> None:
    """Sorted as asked; every column as CSV; and a column that there is not names those that there are."""
    planted, _ = make_all(make_planted, ["a", "b", "c"], root=str(tmp_path / "data"))
    save_plan(planted.store, planted.pipeline.plan)
    config = tmp_path / "pipeline.yaml"
    config.write_text(planted.pipeline.config.model_dump_json())
    table = load_table(planted.pipeline, planted.store)
    shown = CliRunner().invoke(app, ["sweep", "--config", str(config), "--sort", "l0"], catch_exceptions=False).stdout.splitlines()
    assert shown[0].split()[:4] == ["name", "architecture", "d_sae", "k"]
    assert [line.split()[0] for line in shown[1:]] == table.sort("l0")["name"].to_list()
    csv = CliRunner().invoke(app, ["sweep", "--config", str(config), "--csv"], catch_exceptions=False).stdout
    assert pl.read_csv(io.StringIO(csv)).columns == table.columns
    with pytest.raises(InputError, match=r"no column 'quality'; it has name, architecture, kind"):
        CliRunner().invoke(app, ["sweep", "--config", str(config), "--sort", "quality"], catch_exceptions=False)


def test_the_page_names_every_column() -> None:
    """A column that is not on the page does not exist for readers."""
    page = PAGE.read_text(encoding="utf-8")
    assert [name for name in SCHEMA if f"`{name}`" not in page] == []
