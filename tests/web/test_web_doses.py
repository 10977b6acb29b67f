"""Dose curves in a bundle: what was swept is what a page reads, and what is no curve is refused with its file."""

import json
import math
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_bundle import DOSED, build_synthetic_bundle, make_invented_curve

from interp_assets.errors import ArtifactCorruptError
from interp_assets.garcon.steering.dose import Dose
from interp_assets.storage.store import open_store
from interp_assets.web.doses import LatentDoses, describe_dose, read_doses
from interp_assets.web.opened import OpenBundle, list_bundles

PAGE = (Path(__file__).parents[2] / "docs" / "formats" / "feature_bundle.md").read_text(encoding="utf-8").split("## `doses/")[1]
EXAMPLE: dict[str, Any] = json.loads(re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)[0])


def test_the_pages_example_is_read_and_its_table_lists_every_key() -> None:
    """The page is the format."""
    (curve,) = read_doses(json.dumps(EXAMPLE).encode(), 12, "here").curves
    assert curve.outcomes["kl"]["zero"].mean == [None, None]
    rows = re.findall(r"^\| (`[^|]+) \|", PAGE, re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`([^`]+)`", row)} == set(EXAMPLE) | set(EXAMPLE["curves"][0])


def test_a_bundle_tells_which_latents_were_swept(tmp_path: Path) -> None:
    """And reads what was written; of others there is nothing."""
    store = open_store(str(tmp_path))
    build_synthetic_bundle(store, n_features=3, n_documents=4)
    bundle = OpenBundle(list_bundles(store)[0])
    assert bundle.description["doses"] == {"version": 1, "latents": [DOSED]}
    assert bundle.doses(DOSED) == [make_invented_curve("synthetic", recipe) for recipe in ("golden", "other")]
    assert bundle.doses(0) == []


def test_a_curve_is_the_table_of_its_dose() -> None:
    """Number for number; what could not be measured is null, because JSON has no NaN."""
    arms = [("feature", "1 max"), ("other", "1 max"), ("zero", ""), ("feature", "9 max")]
    lines = [
        {
            "arm": arm,
            "strength": strength,
            "prompt": prompt,
            "continuation": 0,
            "kl": float(i + prompt),
            "distinct_2": math.nan,
            "text": f"{arm}{i}",
        }
        for i, (arm, strength) in enumerate(arms)
        for prompt in (0, 1)
    ]
    dose = Dose(pl.DataFrame(lines), "Latent 5", ["1 max", "9 max"], 0)
    curve = describe_dose(dose, "golden", [{"latent": 5}], prompts=["a", "b"], new_tokens=1, temperature=0.0)
    table = dose.table().filter(pl.col("outcome") == "kl")
    for arm, found in curve.outcomes["kl"].items():
        own = {line["strength"]: line for line in table.filter(pl.col("arm") == arm).to_dicts()}
        for name in ("mean", "low", "high"):
            assert getattr(found, name) == [own[strength][name] if strength in own else None for strength in dose.strengths]
    assert set(curve.outcomes["kl"]) == set(table["arm"])
    assert curve.outcomes["kl"]["other"].mean[1] is None
    assert curve.outcomes["distinct_2"]["feature"].mean == [None, None]
    assert curve.n_texts == 2
    texts = [(text.strength, text.prompt, text.text) for text in curve.texts]
    assert texts == [(0, 0, "feature0"), (0, 1, "feature0"), (1, 0, "feature3"), (1, 1, "feature3")]


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("version",), 2, "version"),
        (("latent",), 13, "the dose curves of latent 13"),
        (("curves",), [], "curves"),
        (("curves", 0, "strengths"), ["1 max"], "curves of \\[2\\] points for 1 strength "),
        (("curves", 0, "outcomes", "kl", "feature", "mean"), [0.5, "high"], "mean"),
        (("curves", 0, "texts", 0, "prompt"), 1, "a prompt that is not there"),
        (("curves", 0, "html"), "<b>", "html"),
    ],
)
def test_what_is_no_curve_is_refused_with_its_file(place: tuple, value: object, message: str) -> None:
    """Whoever copies a bundle may have changed it."""
    content = json.loads(json.dumps(EXAMPLE))
    target = content
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    with pytest.raises(ArtifactCorruptError, match=rf"here/doses/12.json .*{message}.*feature_browser"):
        read_doses(json.dumps(content).encode(), 12, "here/doses/12.json")


@given(st.binary(max_size=200))
def test_any_bytes_are_curves_or_refused(data: bytes) -> None:
    """Never another error."""
    with suppress(ArtifactCorruptError):
        assert isinstance(read_doses(data, 12, "here"), LatentDoses)
