"""Trying SAEs: seconds, the numbers of a short training, and nothing that the pipeline would take for its own."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from threading import Timer
from typing import Any

import polars as pl
import pytest
from own_files import write_file
from rich.console import Console
from typer.testing import CliRunner

from interp_assets.errors import InputError, NonFiniteError
from interp_assets.planning.config import load_config
from interp_assets.planning.history import read_history
from interp_assets.planning.pipeline import save_plan
from interp_assets.storage.manifest import load_manifest, read_manifest
from interp_assets.storage.store import open_store
from interp_assets.storage.verify import verify_tree
from interp_assets.terminal.cli import app
from interp_assets.terminal.trying import draw_line, shorten_training, try_saes, wait_for_change, watch_try
from interp_assets.train.loop import train_saes
from interp_assets.train.refs import LogRow, sae_ref
from interp_assets.train.sweep import TRAINING, read_table

TINY: dict[str, Any] = {"d_sae": 48, "k": 2, "n_rows": 100_000, "batch_rows": 100, "learning_rate": 5e-3, "dead_after_rows": 50_000}
SAES = [{"name": "a", **TINY}, {"name": "b", **TINY, "architecture": "relu"}, {"name": "bad", **TINY, "learning_rate": 1e25}]


def test_a_try_is_a_short_training_of_which_nothing_is_published(make_planted) -> None:
    """Its log is that of a training of so many rows; beside it lies one artifact, which no path of the pipeline leads to."""
    planted = make_planted(SAES)
    tried = try_saes(planted.pipeline, planted.store, 2000)
    assert tried.table["name"].to_list() == ["a", "b"]
    assert isinstance(tried.failed["bad"], NonFiniteError)
    assert not [item.path for item in planted.store.list("4-sae")]
    assert list(verify_tree(planted.store)) == []
    short = [shorten_training(config, 2000).model_dump() for config in planted.pipeline.config.saes[:2]]
    trained = make_planted(short)
    expected = train_saes(trained.pipeline, trained.store, ["a", "b"])
    ref = sae_ref(trained.pipeline, "a")
    manifest = load_manifest(trained.store, ref)
    curves = read_table(planted.store, tried.path, read_manifest(planted.store, tried.path), "curves.parquet")
    log = read_table(trained.store, ref.path, manifest, TRAINING)
    assert curves.filter(pl.col("name") == "a").select(LogRow._fields).equals(log.select(LogRow._fields))
    assert tried.table["fvu"].to_list() == [item.manifest.facts["fvu"] for item in expected.values()]


def test_the_command_prints_the_best_first_and_fails_for_what_failed(make_planted, tmp_path: Path) -> None:
    """Exit code 1, the others all the same."""
    planted = make_planted(SAES, root=str(tmp_path / "data"))
    save_plan(planted.store, planted.pipeline.plan)
    config = tmp_path / "pipeline.yaml"
    config.write_text(planted.pipeline.config.model_dump_json())
    done = CliRunner().invoke(app, ["try", "--config", str(config), "--rows", "2000", "--set", "saes.*.seed=3"], catch_exceptions=False)
    lines = done.stdout.splitlines()
    assert done.exit_code == 1
    assert lines[0].split()[:3] == ["name", "L0", "FVU"]
    assert sorted(line.split()[0] for line in lines[1:3]) == ["a", "b"]
    fvu = [float(line.split()[2]) for line in lines[1:3]]
    assert fvu == sorted(fvu)
    assert lines[3].startswith("bad failed: The loss of SAE 'bad' is")
    assert "2,000 rows each in" in lines[4]


def test_a_saved_file_is_tried_again(make_planted, tmp_path: Path) -> None:
    """What is saved is tried, what is wrong is said and waited for, and a file of code is waited for like the configuration."""
    write_file(tmp_path)
    planted = make_planted(SAES[:1], root=str(tmp_path / "data"))
    save_plan(planted.store, planted.pipeline.plan)
    path, content = tmp_path / "pipeline.yaml", planted.pipeline.config.model_dump(mode="json")
    own = {**content["saes"][0], "name": "own", "architecture": "my_sae.py:p_anneal", "sparsity_coefficient": 0.5}
    saved = [{**content, "saes": content["saes"]}, {**content, "sase": 1}, {**content, "saes": [own]}]
    path.write_text(json.dumps(saved.pop(0)))
    waited: list[list[str]] = []

    def wait(files: Sequence[Path]) -> bool:
        waited.append([file.name for file in files])
        if saved:
            path.write_text(json.dumps(saved.pop(0)))
        return len(waited) < 3

    out = Console(file=io.StringIO(), width=200)
    watch_try(out, lambda: load_config(path), path, 1000, wait=wait)
    text = out.file.getvalue()
    assert waited == [["pipeline.yaml"], ["pipeline.yaml"], ["pipeline.yaml", "my_sae.py"]]
    assert "Error:" in text
    assert "did you mean 'saes'?" in text
    assert [line.split()[0] for line in text.splitlines() if line.startswith(("a ", "own "))] == ["a", "own"]
    assert read_history(planted.store)["status"].to_list() == ["done", "done"]


def test_a_file_that_is_saved_is_seen(tmp_path: Path) -> None:
    """By another thread, as an editor does: taken away and put back, too."""
    file = tmp_path / "a.yaml"
    file.write_text("1")
    Timer(0.2, lambda: file.write_text("22")).start()
    assert wait_for_change([file])
    Timer(0.2, file.unlink).start()
    assert wait_for_change([file])


def test_without_mixed_rows_it_says_how_they_are_made(make_planted) -> None:
    """The first thing that a newcomer types."""
    planted = make_planted(SAES)
    with pytest.raises(InputError, match=r"has no mixed rows .*interp run --select \+shuffle_certificate --select \+activation_statistics"):
        try_saes(planted.pipeline, open_store("memory://").child("empty"), 2000)


def test_a_line_of_blocks_falls_with_its_numbers() -> None:
    """The best that 24 characters can say of a curve; one value is the least."""
    assert draw_line([4.0, 3.0, 2.0, 1.0]) == "█▆▃▁"
    assert (draw_line([]), draw_line([1.0]), len(draw_line([float(i) for i in range(200)]))) == ("", "▁", 23)
