"""A check that does not pass says number, limit, place and next step: a name alone sends people to the source."""

import pytest

from interp_assets.planning.pipeline import Pipeline
from interp_assets.storage.manifest import create_artifact
from interp_assets.storage.store import Store
from interp_assets.train.checks import IMPORTED_FIT, QUALITY_BOUNDS
from interp_assets.train.refs import evaluation_ref, sae_ref


def test_quality_outside_its_bounds_is_explained(make_planted) -> None:
    """Both bounds at once, each with what would help; inside them there is nothing to say."""
    planted = make_planted([{"name": "own", "d_sae": 24, "k": 3}])
    pipeline, store = planted.pipeline, planted.store
    name = pipeline.config.saes[0].name
    assert _judge(pipeline, store, name, 0.2, 0.1) == []
    fvu, dead = _judge(pipeline, store, name, 0.734, 0.62)
    assert fvu == f"SAE {name} has FVU of 0.734 on the held-out shards, at most 0.5 is sound: train on more rows, or raise k or d_sae."
    assert dead == f"SAE {name} has a dead share of 0.620 on the held-out shards, at most 0.5 is sound: lower d_sae, or train on more rows."


@pytest.mark.parametrize("is_accepted", [False, True])
def test_a_misfit_that_was_accepted_at_the_import_does_not_fail_for_ever(make_planted, is_accepted: bool) -> None:
    """The entry remembers it, so that a check that fails means something new."""
    entry = {"name": "theirs", "d_sae": 24, "k": 3, "imported": "/theirs", "imported_digest": "a", "accepts_misfit": is_accepted}
    planted = make_planted([entry])
    pipeline, store = planted.pipeline, planted.store
    with create_artifact(store, evaluation_ref(pipeline, "theirs")) as art:
        art.facts |= {"n_rows": 900, "l0": 3.0, "fvu": 2.0, "median_row_fvu": 1.7}
    with create_artifact(store, sae_ref(pipeline, "theirs")) as art:
        art.facts |= {"imported": {"l0": 3.0}}
    verdict = IMPORTED_FIT.verdicts(pipeline, store, ["theirs"])["theirs"]
    assert verdict.passed == is_accepted
    said = str(verdict.shown["misfit"]) if is_accepted else verdict.wrong[0]
    assert said.startswith("accepted: on 900" if is_accepted else "SAE theirs: on 900")
    assert "the mean alone would do better" in said


def _judge(pipeline: Pipeline, store: Store, name: str, fvu: float, dead_share: float) -> list[str]:
    with create_artifact(store, evaluation_ref(pipeline, name), replace=True) as art:
        art.facts |= {"fvu": fvu, "dead_share": dead_share}
    return list(QUALITY_BOUNDS.verdicts(pipeline, store, [name])[name].wrong)
