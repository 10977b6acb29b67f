"""Trackers are outputs: they get the curve that the artifact has, in their own offline files, and whatever they do, training is the same."""

import json
import sqlite3
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from interp_assets.errors import ConfigError
from interp_assets.planning.config import make_config
from interp_assets.planning.pipeline import Pipeline
from interp_assets.train.loop import train_saes
from interp_assets.train.refs import TRAINING, sae_ref
from interp_assets.train.sweep import read_table
from interp_assets.train.trackers.track import LEFT_OUT, MEASURED, Told, open_tracker, tracked

TINY: dict[str, Any] = {"d_sae": 32, "k": 2, "n_rows": 2500, "batch_rows": 100, "learning_rate": 5e-3}
NUMBERS = {"fvu": [0.9, 0.5, 0.25], "l0": [3.0, 2.5, 2.0]}
CONFIG = {"architecture": "topk", "k": 2, "learning_rate": 0.005}


def write(name: str, folder: Path) -> Told:
    """Write three steps of two SAEs, in turns, with a tracker's own package; skip where it is not installed."""
    if find_spec(name) is None:  # before it is imported: it reads its variables then
        pytest.skip(f"{name} is not installed")
    with pytest.MonkeyPatch.context() as patch:  # what the packages take from the environment alone
        for variable in ("WANDB_MODE", "WANDB_API_KEY", "MLFLOW_TRACKING_URI"):
            patch.delenv(variable, raising=False)
        patch.setenv("TRACKIO_DIR", str(folder / "trackio"))
        told = Told("toy", folder, {"a": CONFIG, "b": CONFIG}, {"a": "a-0123", "b": "b-4567"})
        tracker = open_tracker(name, told)
        for step in range(3):
            for sae in ("a", "b"):
                tracker.log(sae, 100 * (step + 1), {number: values[step] for number, values in NUMBERS.items()})
        tracker.close()
    return told


def test_tensorboard_has_a_folder_an_sae(tmp_path: Path) -> None:
    """Its own reader finds the numbers by rows, and the configuration."""
    write("tensorboard", tmp_path)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for name in ("a-0123", "b-4567"):
        events = EventAccumulator(str(tmp_path / "tensorboard" / name))
        events.Reload()
        for number, values in NUMBERS.items():
            found = events.Scalars(number)
            assert [(event.step, event.value) for event in found] == [(100 * (i + 1), pytest.approx(value)) for i, value in enumerate(values)]
        assert b"learning_rate | 0.005" in events.Tensors("configuration/text_summary")[0].tensor_proto.string_val[0]


@pytest.mark.filterwarnings("ignore:The ``noload`` loader")  # of SQLAlchemy, about MLflow
def test_mlflow_has_a_run_an_sae(tmp_path: Path) -> None:
    """In a file beside the pipeline; the next training adds to the same experiment."""
    write("mlflow", tmp_path)
    write("mlflow", tmp_path)
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("toy").experiment_id])
    assert sorted(run.info.run_name for run in runs) == ["a", "a", "b", "b"]
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert runs[0].data.params == {name: str(value) for name, value in CONFIG.items()}
    assert [(item.step, item.value) for item in client.get_metric_history(runs[0].info.run_id, "fvu")] == [(100, 0.9), (200, 0.5), (300, 0.25)]


def test_wandb_stays_offline(tmp_path: Path) -> None:
    """Without a key: a file a run, which `wandb sync` would send."""
    write("wandb", tmp_path)
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    data = files[0].read_bytes()
    assert b"learning_rate" in data
    assert data.count(b"fvu") >= 3


def test_trackio_keeps_runs_apart(tmp_path: Path) -> None:
    """Two that are written in turns, in one database."""
    write("trackio", tmp_path)
    (database,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as base:
        rows = base.execute("select run_name, step, metrics from metrics order by run_name, step").fetchall()
    assert [(run, step, json.loads(text)["fvu"]) for run, step, text in rows] == [
        (run, 100 * (i + 1), value) for run in ("a-0123", "b-4567") for i, value in enumerate(NUMBERS["fvu"])
    ]


class _Kept:
    """A tracker that keeps what it is told, or fails."""

    def __init__(self, told: Told) -> None:
        self.told, self.steps, self.is_closed = told, list[Any](), False

    def log(self, sae: str, n_rows: int, numbers: Any) -> None:
        if sae == "bad":
            message = "no route to https://anna:secret@host/api"
            raise OSError(message)
        self.steps.append((sae, n_rows, dict(numbers)))

    def close(self) -> None:
        self.is_closed = True


def follow(planted: Any, track: list[str], names: list[str], opened: dict[str, Any], warned: list[str]) -> Any:
    """Train with trackers that are opened here."""
    pipeline = Pipeline(planted.pipeline.config.model_copy(update={"track": track}), planted.pipeline.plan)

    def make(name: str, told: Told) -> Any:
        if name == "mlflow":
            message = "No module named 'mlflow'"
            raise ModuleNotFoundError(message)
        return opened.setdefault(name, _Kept(told))

    with tracked(pipeline, names, None, warned.append, make) as listener:
        made = train_saes(pipeline, planted.store, names, on_metrics=listener.hear)
        listener.end(made)
    return made


def test_a_tracker_gets_the_curve_of_the_artifact(make_planted) -> None:
    """Every logged step of every SAE, its configuration, and what was measured at the end; ids are as without."""
    planted, opened, warned = make_planted([{"name": "a", **TINY}, {"name": "b", **TINY, "seed": 1}]), dict[str, Any](), list[str]()
    follow(planted, ["tensorboard"], ["a", "b"], opened, warned)
    kept = opened["tensorboard"]
    ref = sae_ref(planted.pipeline, "a")
    from interp_assets.storage.manifest import load_manifest

    manifest = load_manifest(planted.store, ref)
    log = read_table(planted.store, ref.path, manifest, TRAINING)
    steps = [(n_rows, numbers) for name, n_rows, numbers in kept.steps if name == "a"]
    assert [n for n, _ in steps] == [*log["n_rows"].to_list(), 2500]
    assert pl.DataFrame([numbers for _, numbers in steps[:-1]]).equals(log.drop(*LEFT_OUT))
    assert steps[-1][1] == {f"measured_{name}": manifest.facts[name] for name in MEASURED}
    assert kept.told.configs["a"]["k"] == 2
    assert kept.told.ids["a"] == ref.path.rpartition("/")[2]
    assert kept.is_closed
    assert warned == []
    follow(planted, ["tensorboard"], ["a"], {}, warned)
    assert warned == [], "what is there already is not written again"


def test_what_fails_costs_one_warning_and_no_training(make_planted) -> None:
    """A package that is not there, and a server that is not: said once, without its password; the SAEs are bit for bit the same."""
    planted, opened, warned = make_planted([{"name": "bad", **TINY}]), dict[str, Any](), list[str]()
    made = follow(planted, ["mlflow", "wandb"], ["bad"], opened, warned)
    assert warned == [
        "Nothing is tracked by mlflow: No module named 'mlflow'. Install it: pip install 'interp-assets[mlflow]'",
        "Nothing more is tracked by wandb: OSError: no route to https://host/api.",
    ]
    plain = make_planted([{"name": "bad", **TINY}])
    expected = train_saes(plain.pipeline, plain.store, ["bad"])
    assert made["bad"].manifest.digest == expected["bad"].manifest.digest
    assert made["bad"].ref.path == expected["bad"].ref.path


def test_a_tracker_that_there_is_not_is_refused() -> None:
    """When the configuration is read."""
    with pytest.raises(ConfigError, match=r"track\.0: .*'tensorboard', 'wandb', 'mlflow' or 'trackio'"):
        make_config({"track": ["comet"]})
    assert make_config({"track": ["tensorboard"]}).track == ["tensorboard"]
