"""One table of all SAEs, whatever has become of each, from a listing and the tables that are there."""

import os
import time
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from measured_saes import load_table, measure
from own_files import reading, write_file
from typer.testing import CliRunner

from interp_assets import lab
from interp_assets.errors import ArtifactMissingError, InputError
from interp_assets.planning.config import make_config
from interp_assets.planning.pipeline import Pipeline, save_configuration, save_plan
from interp_assets.storage.manifest import MANIFEST, load_manifest, remove_artifact
from interp_assets.storage.traffic import METER
from interp_assets.terminal.cli import app
from interp_assets.train.launch import run_training
from interp_assets.train.loop import train_saes
from interp_assets.train.refs import LogRow, evaluation_ref, sae_ref
from interp_assets.train.results.arms import COLUMNS, read_curves, read_table
from interp_assets.train.results.replicas import has_replicas, over_seeds, shared_name
from interp_assets.train.sweep import SCHEMA, TRAINING, make_sweep
from interp_assets.train.sweep import read_table as read_file_of

TINY: dict[str, Any] = {"d_sae": 48, "k": 2, "n_rows": 600, "batch_rows": 100, "learning_rate": 5e-3, "dead_after_rows": 500}
SAES = [{"name": "a", **TINY}, {"name": "bad", **TINY, "architecture": "relu", "learning_rate": 1e25}, {"name": "c", **TINY, "k": 4}]


def opened(planted) -> lab.Opened:
    """Open planted data as a notebook does."""
    return lab.Opened(planted.pipeline, planted.store)


def with_saes(planted, saes: list[dict[str, Any]]):
    """Return the same rows with other SAEs."""
    content = planted.pipeline.config.model_dump() | {"saes": [{"hook_point": "resid_post.0", **fields} for fields in saes]}
    return planted._replace(pipeline=Pipeline(make_config(content), planted.pipeline.plan))


def test_the_table_says_of_every_sae_what_has_become_of_it(make_planted) -> None:
    """Measured, only trained, failed with the reason; the curve of the failed one ends where it did."""
    planted = make_planted(SAES)
    with pytest.raises(ArtifactMissingError, match="has no SAE yet"):
        opened(planted).table()
    found = run_training(planted.pipeline, planted.store, ["a", "bad", "c"])
    assert list(found.failed) == ["bad"]
    measure(planted, "a")
    table = opened(planted).table()
    assert dict(table.schema) == COLUMNS
    assert table.select("name", "status").rows() == [("a", "measured"), ("bad", "failed"), ("c", "trained")]
    assert table["why"][1] == str(found.failed["bad"])
    assert (table["k"].to_list(), table["fvu"].is_null().to_list()) == ([2, None, 4], [False, True, True])
    curves = opened(planted).curves()
    ref = sae_ref(planted.pipeline, "c")
    log = read_file_of(planted.store, ref.path, load_manifest(planted.store, ref), TRAINING)
    assert curves.filter(pl.col("name") == "c").select(LogRow._fields).equals(log.select(LogRow._fields))
    assert 0 < curves.filter(pl.col("name") == "bad").height < log.height


def test_a_failure_is_forgotten_once_the_sae_is_there(make_planted) -> None:
    """A record of yesterday's failure beside today's SAE would be a lie."""
    planted = make_planted(SAES)
    run_training(planted.pipeline, planted.store, ["bad"])
    assert opened(planted).table()["status"].to_list() == ["failed"]
    mended = with_saes(planted, [{**SAES[1], "learning_rate": 1e-3}])
    with pytest.raises(ArtifactMissingError):
        opened(mended).table()
    run_training(mended.pipeline, mended.store, ["bad"])
    assert opened(mended).table()["status"].to_list() == ["trained"]


def test_what_a_sweep_tells_costs_a_listing_and_a_file(make_planted) -> None:
    """Ten thousand manifests would take a minute; the answer is the same as from manifests alone."""
    planted = make_planted([SAES[0], SAES[2]])
    train_saes(planted.pipeline, planted.store, ["a", "c"])
    for name in ("a", "c"):
        measure(planted, name)
    slow, curves = read_table(planted.pipeline, planted.store), read_curves(planted.pipeline, planted.store)
    made = make_sweep(planted.pipeline, planted.store)
    before = METER.total()
    fast = read_table(planted.pipeline, planted.store)
    took = METER.total().since(before)
    assert took.gets <= 3
    assert fast.equals(slow)
    assert read_curves(planted.pipeline, planted.store).equals(curves)
    assert fast.select(*SCHEMA).equals(load_table(planted.pipeline, planted.store))
    assert made.manifest.facts["n_rows"] == 2


def test_a_row_of_a_sweep_falls_with_what_it_was_made_of(make_planted, tmp_path: Path) -> None:
    """An SAE or evaluation that was written after the sweep is read itself; one that is gone is not there."""
    planted = make_planted([SAES[0], SAES[2]], root=str(tmp_path / "data"))
    train_saes(planted.pipeline, planted.store, ["a", "c"])
    for name in ("a", "c"):
        measure(planted, name)
    make_sweep(planted.pipeline, planted.store)
    evaluation = evaluation_ref(planted.pipeline, "a")
    remove_artifact(planted.store, evaluation.path)
    measure(planted, "a", n_outliers=30)
    late = time.time() + 10
    os.utime(planted.store.local_path(f"{evaluation.path}/{MANIFEST}"), (late, late))
    assert opened(planted).table()["outlier_share"].to_list() == [pytest.approx(0.01), 0]
    remove_artifact(planted.store, sae_ref(planted.pipeline, "c").path)
    assert opened(planted).table()["name"].to_list() == ["a"]


def test_all_of_a_folder_are_those_of_other_configurations_too(make_planted) -> None:
    """A new `k` makes a new SAE beside the old one; whoever asks for everything sees both, with the ids that tell them apart."""
    planted = make_planted([SAES[0]])
    train_saes(planted.pipeline, planted.store, ["a"])
    measure(planted, "a")
    make_sweep(planted.pipeline, planted.store)
    other = with_saes(planted, [{**SAES[0], "k": 3}, SAES[2]])
    train_saes(other.pipeline, other.store, ["a", "c"])
    measure(other, "c")
    assert opened(other).table().select("name", "k", "status").rows() == [("a", 3, "trained"), ("c", 4, "measured")]
    everything = opened(other).table(everything=True)
    assert sorted(everything.select("name", "k", "status").rows()) == [("a", 2, "measured"), ("a", 3, "trained"), ("c", 4, "measured")]
    assert everything.filter(pl.col("k") == 2).drop("why").equals(opened(planted).table().drop("why"))
    assert everything["sae_id"].n_unique() == 3


def arms(*rows: tuple[str, int, int, float]) -> pl.DataFrame:
    """Make a table of SAEs: name, k, seed, FVU."""
    content = [
        {**dict.fromkeys(COLUMNS), "name": name, "k": k, "seed": seed, "fvu": fvu, "hook_points": "x", "task": "sae"} for name, k, seed, fvu in rows
    ]
    return pl.DataFrame(content, schema=COLUMNS)


def test_seeds_become_mean_deviation_and_n_and_noise_is_named() -> None:
    """Worked by hand: 0.20 +- 0.01 of two, 0.21 +- 0.01 of two (half a deviation more), 0.30 +- 0.01 of three; one trained once says nothing."""
    low, near = [("low-seed0", 1, 0, 0.19), ("low-seed1", 1, 1, 0.21)], [("near-seed0", 2, 0, 0.20), ("near-seed1", 2, 1, 0.22)]
    far = [(f"far-seed{i}", 3, i, 0.3 + 0.01 * (i - 1)) for i in range(3)]
    table = arms(*low, *near, *far, ("once", 4, 0, 0.25))
    assert has_replicas(table)
    assert not has_replicas(arms(low[0], near[1]))
    found = over_seeds(table)
    assert found["name"].to_list() == ["low", "near", "far", "once"]
    assert found["n"].to_list() == [2, 2, 3, 1]
    assert found["fvu"].to_list() == pytest.approx([0.2, 0.21, 0.3, 0.25])
    assert found["fvu_deviation"].to_list() == [pytest.approx(0.02 / 2**0.5), pytest.approx(0.02 / 2**0.5), pytest.approx(0.01), None]
    assert found["versus_best"].to_list() == ["best", "within noise", "+0.1", "one seed"]
    assert "seed" not in found.columns


def test_other_code_is_another_recipe() -> None:
    """Two versions of one file have one name: folded as seeds they would be called noise."""
    table = arms(("a", 1, 0, 0.2), ("b", 1, 1, 0.3)).with_columns(pl.Series("code", ["x" * 64, "y" * 64]))
    assert over_seeds(table)["n"].to_list() == [1, 1]
    assert over_seeds(table.with_columns(pl.lit("x" * 64).alias("code")))["n"].to_list() == [2]


def test_what_was_trained_on_other_rows_is_no_replica() -> None:
    """A text that has changed is no seed: all SAEs of a folder hold both."""
    table = arms(("a", 1, 0, 0.2), ("a", 1, 0, 0.3)).with_columns(pl.Series("mixed_shards_id", ["x", "y"]))
    assert over_seeds(table)["n"].to_list() == [1, 1]


def test_an_own_architecture_is_in_the_table_with_its_code(make_planted, tmp_path: Path) -> None:
    """Of this configuration, and of all of the folder, where its recipe is read off the manifest."""
    write_file(tmp_path)
    planted = reading(make_planted([{"name": "a", **TINY, "architecture": "my_sae.py:p_anneal", "sparsity_coefficient": 0.5}]), tmp_path)
    train_saes(planted.pipeline, planted.store, ["a"])
    measure(planted, "a")
    code = planted.pipeline.config.saes[0].code.digest
    for sweep in (False, True):
        if sweep:
            make_sweep(planted.pipeline, planted.store)
        tables = [opened(planted).table(everything=everything) for everything in (False, True)]
        assert [table.select("name", "architecture", "code", "status").rows() for table in tables] == 2 * [
            [("a", "my_sae.py:p_anneal", code, "measured")]
        ]


def test_a_recipes_name_is_what_its_seeds_share() -> None:
    """As sweeps write names, and as people do."""
    assert shared_name(["k-k16-seed0", "k-k16-seed1"]) == "k-k16"
    assert shared_name(["k-seed0-k16", "k-seed11-k16"]) == "k-k16"
    assert shared_name(["first", "fifth"]) == "fi"
    assert shared_name(["seed0", "seed1"]) == "seed"
    assert shared_name(["alone-seed3"]) == "alone-seed3"


def test_a_notebook_asks_in_five_lines(make_planted, tmp_path: Path) -> None:
    """Table, curves and one SAE on raw rows, from the folder alone; SQL over the same; and what is wrong is said."""
    planted = make_planted([SAES[0], {**SAES[0], "name": "b", "seed": 1}], root=str(tmp_path / "data"))
    train_saes(planted.pipeline, planted.store, ["a", "b"])
    for name in ("a", "b"):
        measure(planted, name)
    save_plan(planted.store, planted.pipeline.plan)
    save_configuration(planted.store, planted.pipeline.config)
    run = lab.open(str(tmp_path / "data" / "planted"))
    table, curves = run.table(), run.curves()
    sae = run.sae(table.sort("fvu")["name"][0])
    latents = sae.encode(run.rows("resid_post.0", 1000))
    assert latents.shape == (1000, 48)
    assert set(curves["name"]) == {"a", "b"}
    assert run.table(over="seed")["n"].to_list() == [2]
    asked = run.sql("select s.name, min(c.fvu) as least from saes s join curves c using (name) group by all order by s.name")
    assert asked["least"].to_list() == [curves.filter(pl.col("name") == name)["fvu"].min() for name in ("a", "b")]
    with pytest.raises(InputError, match="The tables are saes, replicas, curves and history"):
        run.sql("select nothing from nowhere")
    with pytest.raises(InputError, match="folded over 'seed'"):
        run.table(over="k")


def test_the_command_folds_seeds_and_takes_all_in(make_planted, tmp_path: Path) -> None:
    """Means over n where there are replicas, each alone on request, other configurations' on request, failures with their reason."""
    planted = make_planted([SAES[0], {**SAES[0], "name": "b", "seed": 1}, SAES[1]], root=str(tmp_path / "data"))
    run_training(planted.pipeline, planted.store, ["a", "b", "bad"])
    for name in ("a", "b"):
        measure(planted, name)
    save_plan(planted.store, planted.pipeline.plan)
    config = tmp_path / "pipeline.yaml"
    config.write_text(planted.pipeline.config.model_dump_json())

    def show(*options: str) -> list[str]:
        return CliRunner().invoke(app, ["sweep", "--config", str(config), *options], catch_exceptions=False).stdout.splitlines()

    lines = show()
    assert lines[0].split()[:2] == ["name", "n"]
    assert {"fvu_deviation", "versus_best"} <= set(lines[0].split())
    assert len([line for line in lines if line.startswith(("a ", "b "))]) == 1
    assert any(line.startswith("bad failed: The loss of SAE 'bad' is") for line in lines)
    assert any("within noise" in line for line in lines)
    assert any(f"{len(planted.rows):,} held-out rows" in line for line in lines)
    each = show("--over", "none")
    assert [line.split()[0] for line in each[1:4]][:2] in (["a", "b"], ["b", "a"])
    other = planted.pipeline.config.model_dump(mode="json")
    other["saes"] = [{**other["saes"][0], "k": 3}]
    config.write_text(make_config(other).model_dump_json())
    assert len([line for line in show("--all", "--over", "none") if line.split()[0] in ("a", "b")]) == 2
    with pytest.raises(InputError, match="neither `seed` nor `none`"):
        CliRunner().invoke(app, ["sweep", "--config", str(config), "--over", "k"], catch_exceptions=False)
