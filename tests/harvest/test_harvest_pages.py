"""The pages on token shards, activation shards and statistics describe the files that are written."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from tiny_models import make_tiny_config, save_model, write_texts

from interp_assets.corpus.packing import pack
from interp_assets.corpus.plan import plan_corpus
from interp_assets.corpus.tokens import make_token_shard
from interp_assets.garcon.subject import load_subject_model
from interp_assets.garcon.tokenizer import load_tokenizer
from interp_assets.harvest.activations import harvest_shard
from interp_assets.harvest.statistics import measure_rows, merge_statistics, norm_histogram
from interp_assets.planning.config import ExecutionConfig
from interp_assets.planning.pipeline import shard_key
from interp_assets.storage.manifest import Produced
from interp_assets.storage.store import Store
from interp_assets.storage.tensors import read_spans

PAGES = Path(__file__).parents[2] / "docs" / "formats"


def _page(kind: str) -> str:
    return (PAGES / f"{kind}.md").read_text(encoding="utf-8")


def _table(page: str, column: str) -> dict[str, str]:
    """Return the first two columns of the tables whose first header is `column`."""
    rows: dict[str, str] = {}
    is_inside = False
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            is_inside = False
        elif cells[0] == column:
            is_inside = True
        elif is_inside and not line.startswith("|---"):
            rows[cells[0].strip("`")] = cells[1].replace("`", "")
    return rows


@pytest.fixture
def made(tmp_path: Path, local_store: Store) -> dict[str, Produced]:
    """Make one artifact of each kind."""
    config = make_tiny_config(save_model(tmp_path / "model", "gpt2"), write_texts(tmp_path / "texts", n_files=4))
    pipeline = plan_corpus(config, local_store)
    subject = load_subject_model(config.model, ExecutionConfig(device="cpu"))
    made: dict[str, Produced] = {}
    for index in pipeline.shard_indices:
        made["token_shard"] = make_token_shard(pipeline, local_store, load_tokenizer(config.model), index)
        made["activation_shard"] = harvest_shard(pipeline, local_store, subject, index)["resid_post.0"]
        assert shard_key(index) in made["activation_shard"].ref.path
    made["activation_statistics"] = merge_statistics(pipeline, local_store, "resid_post.0")
    return made


def test_token_tables_have_the_documented_columns(made: dict[str, Produced], local_store: Store) -> None:
    """Names and types, for readers without our code."""
    folder = local_store.local_path(made["token_shard"].ref.path)
    assert folder is not None
    columns = {
        name: {"Boolean": "bool", "String": "string"}.get(str(dtype), str(dtype).lower())
        for file in ("tokens", "documents")
        for name, dtype in pl.read_parquet(folder / f"{file}.parquet").schema.items()
    }
    assert columns == _table(_page("token_shard"), "column")


@pytest.mark.parametrize("kind", ["activation_shard", "activation_statistics"])
def test_tensor_files_have_the_documented_tensors(kind: str, made: dict[str, Produced], local_store: Store) -> None:
    """Names, types and shapes."""
    produced = made[kind]
    n_rows = produced.manifest.facts.get("n_rows")
    found = {}
    for entry in produced.manifest.files:
        for name, span in read_spans(local_store, produced.ref.path, produced.manifest, entry.name).items():
            found[name] = f"{span.dtype} {list(span.shape)}"
            assert span.start % 4096 == 0 or entry.name != "rows.safetensors"
    expected = {}
    for name, text in _table(_page(kind), "tensor").items():
        expected[name] = text.replace("harvest.dtype", "bfloat16").replace("n_rows", str(n_rows)).replace("d_in", "16")
    assert found == expected


@pytest.mark.parametrize("kind", ["token_shard", "activation_shard", "activation_statistics"])
def test_facts_are_documented(kind: str, made: dict[str, Produced]) -> None:
    """A new fact needs a word on the page."""
    facts = _page(kind).partition("## Facts")[2]
    for name in made[kind].manifest.facts:
        assert f"`{name}`" in facts


def test_the_example_of_contexts_is_what_packing_does() -> None:
    """The drawing on the page, executed."""
    lines = _page("token_shard").partition("```text\n")[2].partition("```")[0].splitlines()
    drawn = {line.split()[0]: line.split()[1:] for line in lines}
    layout = pack([np.full(5, ord("a"), np.uint32), np.full(2, ord("b"), np.uint32)], 5, leading=ord("^"), separator=ord("."))
    assert [chr(token) for token in layout.token_ids] == drawn["token"]
    assert [str(i) for i in layout.contexts] == drawn["context"]
    assert [str(i) for i in layout.documents] == drawn["document"]
    assert ["-" if chr(token) in "^." else "+" for token in layout.token_ids] == drawn["valid"]


def test_the_examples_of_statistics_are_right() -> None:
    """Numbers on a page are computed, not typed."""
    example = json.loads(_page("activation_shard").partition("```json\n")[2].partition("```")[0])
    assert norm_histogram(torch.tensor(example["norms"])).nonzero().flatten().tolist() == example["bins"]
    example = json.loads(_page("activation_statistics").partition("```json\n")[2].partition("```")[0])
    statistics = measure_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0], [-3.0, 2.0]]))
    assert statistics.n_rows == example["count"]
    assert statistics.mean.tolist() == example["mean"]
    assert statistics.mean_squared_norm == pytest.approx(example["mean_squared_norm"])
    assert statistics.variance == pytest.approx(example["variance"])
