"""One table of all SAEs: readable by anyone, complete, and the same for the same SAEs whatever the clock said."""

import io
import re
from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import pytest
from measured_saes import HOOK, load_table, measure
from typer.testing import CliRunner

from interp_assets.errors import ArtifactMissingError, InputError
from interp_assets.planning.pipeline import save_plan
from interp_assets.storage.manifest import Produced, load_manifest, read_file
from interp_assets.terminal.cli import app
from interp_assets.train.loop import train_saes
from interp_assets.train.plots import find_best, plot_curves, plot_pareto
from interp_assets.train.refs import evaluation_ref, sae_ref
from interp_assets.train.reports import describe_sweep
from interp_assets.train.sweep import OUTLIERS, SCHEMA, SPEED, make_sweep, shorten

TINY: dict[str, Any] = {"d_sae": 48, "k": 2, "n_rows": 1000, "batch_rows": 100, "learning_rate": 5e-3, "dead_after_rows": 500}
SAES = [{"name": "a", **TINY}, {"name": "b", **TINY, "architecture": "relu", "seed": 3}, {"name": "c", **TINY, "k": 4}]
OTHER = "mlp_out.0"
PAGE = Path(__file__).parents[2] / "docs" / "formats" / "sweep.md"


def make_all(make_planted, names: list[str], *, saes: list[dict[str, Any]] = SAES, **kwargs):
    """Train and measure the named SAEs, and make the sweep."""
    planted = make_planted(saes, **kwargs)
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
    assert (table["seed"].to_list(), table["k"].to_list()) == ([0, 3, 0], [2, None, 4])
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
    """The page's blocks, word for word but for the path, without our code; an older sweep beside it adds no SAE a second time."""
    root = tmp_path / "data"
    planted, older = make_all(make_planted, ["a"], saes=SAES[:1], root=str(root))
    planted, item = make_all(make_planted, ["a", "b", "c"], root=str(root))
    assert older.ref.path != item.ref.path
    assert len(list(root.rglob("sweep.parquet"))) == 2
    page, folder = PAGE.read_text(encoding="utf-8"), planted.store.local_path(item.ref.path)
    assert folder is not None
    page, n_paths = re.subn(r"data/pystdlib/4-sae/sweep-[0-9a-f]{12}(?=/)", str(folder), page)
    assert (n_paths, page.count("data/pystdlib")) == (3, 0)
    rows = [duckdb.execute(query).fetchall() for query in re.findall(r"```sql\n(.*?)```", page, re.DOTALL)]
    assert [row[0] for row in rows[0]] == load_table(planted.pipeline, planted.store).sort("fvu")["name"].to_list()
    curves = pl.read_parquet(io.BytesIO(read_bytes(planted, item, "curves.parquet")))
    assert [row[:2] for row in rows[1]] == curves.sort("name", "n_rows").select("name", "n_rows").rows()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["best"]["name"].to_list() == [row[0] for row in rows[0]]


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


def test_quality_is_told_apart_where_there_are_outliers(make_planted) -> None:
    """An FVU that a few rows of huge norm make would win every comparison; without such rows a person sees no column about them."""
    planted = make_planted(SAES[:2])
    train_saes(planted.pipeline, planted.store, ["a", "b"])
    measure(planted, "a")
    without = make_sweep(planted.pipeline, planted.store)
    assert not set(OUTLIERS) & set(shorten(load_table(planted.pipeline, planted.store)).columns)
    assert "outlier" not in describe_sweep(planted.store, without)
    measure(planted, "b", n_outliers=30)
    item = make_sweep(planted.pipeline, planted.store)
    shown = shorten(load_table(planted.pipeline, planted.store))
    facts = [load_manifest(planted.store, evaluation_ref(planted.pipeline, name)).facts for name in ("a", "b")]
    assert shown["outlier_share"].to_list() == [0, pytest.approx(30 / len(planted.rows), rel=1e-3)]
    for name in OUTLIERS:
        assert load_table(planted.pipeline, planted.store)[name].to_list() == [found[name] for found in facts]
    assert facts[0]["fvu_outliers"] is None
    assert facts[1]["fvu_outliers"] != facts[1]["fvu_ordinary"]
    assert all(f"| {name} |" in describe_sweep(planted.store, item) for name in OUTLIERS)


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


def test_only_saes_that_do_the_same_are_compared() -> None:
    """A transcoder's FVU says nothing about an SAE's; and of two SAEs at one L0 the worse is not among the best."""
    columns = ("name", "hook_points", "target_hook_points", "task", "l0", "fvu")
    rows = [
        ("even", "x", "x", "sae", 9.0, 0.3),
        ("even but worse", "x", "x", "sae", 9.0, 0.4),
        ("sparse", "x", "x", "sae", 4.0, 0.5),
        ("dense for nothing", "x", "x", "sae", 20.0, 0.3),
        ("elsewhere", "y", "y", "sae", 9.0, 0.9),
        ("transcoder", "x", "y", "transcoder", 30.0, 0.8),
    ]
    for order in (rows, rows[::-1]):
        table = pl.DataFrame(order, schema=columns, orient="row")
        assert find_best(table)["name"].to_list() == ["sparse", "even", "transcoder", "elsewhere"]


def test_the_best_are_listed_by_what_they_do(make_planted) -> None:
    """A reader sees the hook point, the task and the coefficient beside the numbers, and no SAE among those of another hook point."""
    saes = [*SAES, {"name": "d", **TINY, "hook_point": OTHER}, {"name": "e", **TINY, "architecture": "relu", "sparsity_coefficient": 0.125}]
    planted, item = make_all(make_planted, ["a", "b", "c"], saes=saes)
    train_saes(planted.pipeline, planted.store, ["d", "e"])
    measure(planted, "d", OTHER)
    measure(planted, "e")
    item = make_sweep(planted.pipeline, planted.store)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in describe_sweep(planted.store, item).splitlines()]
    head, body = lines[0], lines[2:]
    assert [line[head.index("hook_points")] for line in body] == [OTHER, HOOK, HOOK, HOOK, HOOK]
    assert {line[head.index("task")] for line in body} == {"sae"}
    assert [line[head.index("sparsity_coefficient")] for line in body if line[0] == "e"] == ["0.125"]
    fvu = [float(line[head.index("fvu")]) for line in body[1:]]
    assert fvu == sorted(fvu)
    assert plot_pareto(planted.store, item).startswith("![")


def test_the_command_prints_the_table(make_planted, tmp_path: Path) -> None:
    """Sorted as asked; every column as CSV; and a column that there is not names those that there are."""
    planted, _ = make_all(make_planted, ["a", "b", "c"], root=str(tmp_path / "data"))
    save_plan(planted.store, planted.pipeline.plan)
    config = tmp_path / "pipeline.yaml"
    config.write_text(planted.pipeline.config.model_dump_json())
    table = load_table(planted.pipeline, planted.store)
    shown = CliRunner().invoke(app, ["sweep", "--config", str(config), "--sort", "l0"], catch_exceptions=False).stdout.splitlines()
    assert shown[0].split()[:7] == ["name", "hook_points", "task", "architecture", "d_sae", "k", "sparsity_coefficient"]
    assert [line.split()[0] for line in shown[1:-2]] == table.sort("l0")["name"].to_list()
    assert pl.read_parquet(shown[-1].removeprefix("file://")).equals(table)
    csv = CliRunner().invoke(app, ["sweep", "--config", str(config), "--csv"], catch_exceptions=False).stdout
    assert pl.read_csv(io.StringIO(csv)).columns == [*table.columns, "code", "status", "why"]
    with pytest.raises(InputError, match=r"no column 'quality'; it has name, architecture, kind"):
        CliRunner().invoke(app, ["sweep", "--config", str(config), "--sort", "quality"], catch_exceptions=False)


def test_the_command_shows_saes_that_are_only_trained(make_planted, tmp_path: Path) -> None:
    """Whoever waits for the evaluation, or lost one SAE of three, wants to see what there is; and `k` only where it decides something."""
    saes = [{**SAES[0], "options": {"decay_share": 0.5}}, *SAES[1:]]
    planted = make_planted(saes, root=str(tmp_path / "data"))
    train_saes(planted.pipeline, planted.store, ["a", "b"])
    save_plan(planted.store, planted.pipeline.plan)
    config = tmp_path / "pipeline.yaml"
    config.write_text(planted.pipeline.config.model_dump_json())

    def show() -> list[str]:
        return CliRunner().invoke(app, ["sweep", "--config", str(config)], catch_exceptions=False).stdout.splitlines()

    head, *lines = show()
    assert "train_fvu" in head
    rows = {line.split()[0]: line.split() for line in lines[:2]}
    k, options = head.split().index("k"), head.split().index("options")
    assert (rows["a"][k], rows["b"][k]) == ("2", "-")
    assert rows["a"][options] == '{"decay_share":'
    assert lines[2:4] == ["1 SAE not trained: c", "2 SAEs trained, not measured: a, b"]
    measure(planted, "a")
    make_sweep(planted.pipeline, planted.store)
    measure(planted, "b")
    head, *lines = show()
    assert ("train_fvu" in head, lines[2]) == (False, "1 SAE not trained: c")


def test_the_page_names_every_column() -> None:
    """A column that is not on the page does not exist for readers."""
    page = PAGE.read_text(encoding="utf-8")
    assert [name for name in SCHEMA if f"`{name}`" not in page] == []
