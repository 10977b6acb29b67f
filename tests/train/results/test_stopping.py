"""Stopping losers: a record and a checkpoint of theirs, and not one bit of the others'."""

from typing import Any

import pytest
from planned import executing

from interp_assets.errors import ConfigError, StoppedError
from interp_assets.planning.config import make_config
from interp_assets.planning.pipeline import Pipeline
from interp_assets.storage.manifest import find_manifest, load_manifest
from interp_assets.train.launch import run_training
from interp_assets.train.refs import sae_ref
from interp_assets.train.results.arms import read_curves, read_table
from interp_assets.train.resume import has_checkpoint

TINY: dict[str, Any] = {"d_sae": 48, "k": 4, "n_rows": 2000, "batch_rows": 100, "learning_rate": 5e-3, "dead_after_rows": 500}
SAES = [
    {"name": "good", **TINY},
    {"name": "slow", **TINY, "learning_rate": 1e-6},
    {"name": "denser", **TINY, "k": 8},
    {"name": "sparse", **TINY, "k": 1},
]
NAMES = [sae["name"] for sae in SAES]


def stopping(planted, stop: dict[str, Any] | None):
    """Return planted data whose trainings are stopped so."""
    content = planted.pipeline.config.model_dump() | {"stop": stop}
    return planted._replace(pipeline=Pipeline(make_config(content), planted.pipeline.plan))


def test_only_what_is_dominated_ends_and_the_others_are_bit_for_bit_themselves(make_planted) -> None:
    """Goal 4. One that learns nothing is dominated; one that is denser and better, or sparser and worse, is not."""
    alone = make_planted(SAES)
    whole = run_training(alone.pipeline, alone.store, NAMES)
    planted = stopping(make_planted(SAES), {"at": [0.5]})
    assert sae_ref(planted.pipeline, "slow").artifact_id == sae_ref(alone.pipeline, "slow").artifact_id
    found = run_training(planted.pipeline, planted.store, NAMES)
    assert list(found.failed) == ["slow"]
    assert isinstance(found.failed["slow"], StoppedError)
    assert "stopped at step 10 of 20" in str(found.failed["slow"])
    assert "'good' has L0" in str(found.failed["slow"])
    assert {name: item.manifest.digest for name, item in found.made.items()} == {
        name: item.manifest.digest for name, item in whole.made.items() if name != "slow"
    }
    ref = sae_ref(planted.pipeline, "slow")
    assert find_manifest(planted.store, ref) is None
    assert has_checkpoint(planted.store, ref)
    table = read_table(planted.pipeline, planted.store)
    assert dict(table.select("name", "status").rows())["slow"] == "stopped"
    assert read_curves(planted.pipeline, planted.store).filter(name="slow")["step"].max() == 10


def test_it_stays_ended_and_goes_on_bit_for_bit_when_it_may(make_planted) -> None:
    """The same command again does not train it once more; without the section it becomes what it would have been, and the record says nothing."""
    alone = make_planted(SAES[:2])
    whole = run_training(alone.pipeline, alone.store, NAMES[:2])
    planted = stopping(make_planted(SAES[:2]), {"at": [0.25]})
    first = run_training(planted.pipeline, planted.store, NAMES[:2])
    heard: list[int] = []
    again = run_training(planted.pipeline, planted.store, NAMES[:2], heard.append, lambda metrics: pytest.fail(f"{metrics.name} is trained again"))
    assert (list(again.failed), list(again.made), sum(heard)) == (["slow"], ["good"], 4000)
    assert str(again.failed["slow"]) == str(first.failed["slow"])
    assert read_curves(planted.pipeline, planted.store).filter(name="slow").height == 5
    free = stopping(planted, None)
    done = run_training(free.pipeline, free.store, NAMES[:2])
    assert done.made["slow"].manifest.digest == whole.made["slow"].manifest.digest
    assert read_table(free.pipeline, free.store)["status"].to_list() == ["trained", "trained"]
    assert load_manifest(free.store, sae_ref(free.pipeline, "slow")).facts["n_steps"] == 20


def test_without_the_section_nothing_stops_and_wrong_shares_are_refused(make_planted) -> None:
    """Off by default; the end of a training is no place to stop it."""
    planted = make_planted(SAES[:2])
    assert planted.pipeline.config.stop is None
    assert not run_training(planted.pipeline, planted.store, NAMES[:2]).failed
    assert executing(planted.pipeline, workers=2).config.stop is None
    with pytest.raises(ConfigError, match=r"stop\.at"):
        stopping(planted, {"at": [1.0]})
    with pytest.raises(ConfigError, match=r"did you mean 'margin'"):
        stopping(planted, {"margins": 0.1})
