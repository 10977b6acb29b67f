"""The pages of the formats say what the files hold."""

import io
import json
import re
from pathlib import Path

import polars as pl

from interp_assets.storage.manifest import read_file
from interp_assets.train.checkpoint import load_sae
from interp_assets.train.loop import train_saes
from interp_assets.train.metrics import ReconstructionSums

PAGES = Path(__file__).parents[2] / "docs" / "formats"


def read_table(page: str, title: str) -> list[list[str]]:
    """Return the cells of the first table below a heading."""
    section = (PAGES / page).read_text(encoding="utf-8").split(f"## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def names(cells: list[str]) -> list[str]:
    """Return what a cell quotes as code."""
    return re.findall(r"`([^`]+)`", cells[0])


def test_the_page_of_the_sae_describes_a_trained_one(make_planted) -> None:
    """Columns, facts and the example of cfg.json."""
    planted = make_planted([{"name": "a", "d_sae": 48, "k": 2, "n_rows": 2000, "batch_rows": 100}])
    item = train_saes(planted.pipeline, planted.store, ["a"])["a"]
    read = lambda name: read_file(planted.store, item.ref.path, item.manifest, name)  # noqa: E731
    log = pl.read_parquet(io.BytesIO(read("training.parquet")))
    described = {names(cells)[0]: cells[1] for cells in read_table("sae.md", "`training.parquet`")}
    assert described == {name: str(dtype) for name, dtype in log.schema.items()}
    assert sorted(name for cells in read_table("sae.md", "Facts") for name in names(cells) if name in item.manifest.facts) == sorted(
        item.manifest.facts
    )
    page = (PAGES / "sae.md").read_text(encoding="utf-8")
    example = json.loads(page.split("```json\n")[1].split("```")[0])
    assert example == json.loads(read("cfg.json"))


def test_the_page_of_the_evaluation_names_every_key(make_planted) -> None:
    """A metric that is not on the page does not exist for readers."""
    planted = make_planted([{"name": "a", "d_sae": 48, "k": 2, "n_rows": 2000, "batch_rows": 100}])
    train_saes(planted.pipeline, planted.store, ["a"])
    sums = ReconstructionSums(load_sae(planted.pipeline, planted.store, "a"), planted.rows.double().mean(0))
    sums.add(planted.rows)
    page = (
        (PAGES / "sae_evaluation.md")
        .read_text(encoding="utf-8")
        .replace("`normalized_...`", "`normalized_freq_over_1_percent` `normalized_freq_over_10_percent`")
    )
    documented = set(re.findall(r"`([a-z0-9_]+)`", page))
    for section, metrics in sums.saebench().items():
        assert {section, *metrics} <= documented
    assert set(sums.frequency_histogram()) <= documented
