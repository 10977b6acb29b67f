"""The stage on the road: made, found again, priced, checked, and refused before any weights where it cannot be."""

from pathlib import Path

import dagster as dg
import numpy as np
import pytest
from tiny_models import make_net, make_tiny_config, make_tokenizer, write_texts

from interp_assets.errors import PlanError
from interp_assets.graph.jobs import RunError, run_road
from interp_assets.graph.stages import make_road
from interp_assets.harvest.heads.examples import load_head_examples
from interp_assets.harvest.heads.prompts import read_prompt
from interp_assets.harvest.heads.records import read_head, read_tables
from interp_assets.harvest.heads.refs import candidates_ref, records_ref
from interp_assets.planning.config import make_config
from interp_assets.planning.pipeline import Pipeline, load_pipeline, open_pipeline_store
from interp_assets.planning.schedule import make_schedule
from interp_assets.storage.manifest import find_manifest
from interp_assets.storage.store import Store
from interp_assets.storage.verify import verify_tree
from interp_assets.web.opened import OpenAttention, list_bundles, open_any

NAMES = ["head_tokens", "head_candidates", "head_examples", "example_patterns", "head_records", "prompt_patterns", "prompt_targets"]
PROMPTS = {"hello": "ab cd ab", "told": {"text": "ab cd ab", "logits": ["b", " "]}}
SELECT = ["token_shards", *NAMES, "attention_browser"]


def _configure(folder: Path, kind: str = "gpt2", **heads: object):
    make_net(kind).save_pretrained(folder / kind)
    make_tokenizer().save_pretrained(folder / kind)
    texts = write_texts(folder / "texts", n_files=4, n_chars=120)
    saes = [{"name": "demo", "hook_point": "resid_post.0", "d_sae": 32, "k": 4, "n_rows": 128, "batch_rows": 16}]
    sections = {
        "corpus": {"shard_bytes": 300},
        "execution": {"device": "cpu"},
        "root": str(folder / "data"),
        "saes": saes,
        "shuffle": {"passes": 2, "fan_out": 2},
    }
    return make_tiny_config(folder / kind, texts, **sections, heads={"key_tokens": 16, "top_k": 3, "prompts": PROMPTS, **heads})


def test_the_stage_is_made_checked_priced_and_found_again(tmp_path: Path) -> None:
    """All that a stage has follows from its records: the order of the road, `interp plan`, checks, plots, what is out of date."""
    config = _configure(tmp_path)
    road = make_road(config)
    with dg.DagsterInstance.ephemeral() as instance:
        made = {report.name: report.n_made for report in run_road(config, instance, select=SELECT)}
        store = open_pipeline_store(config)
        pipeline = load_pipeline(config, store)
        n_shards = len(pipeline.shard_indices)
        assert n_shards > 1
        assert {name: made[name] for name in NAMES} == dict(zip(NAMES, (1, n_shards, 2, n_shards, 2, 2, 1), strict=True))
        assert not any(report.n_made for report in run_road(config, instance, select=SELECT) if report.name in NAMES)
        event = instance.get_latest_materialization_event(dg.AssetKey("head_candidates"))
        assert event is not None
        assert event.asset_materialization is not None
        assert str(event.asset_materialization.metadata["heads"].value).startswith("![Statistics of all heads")
        keys = [
            dg.AssetCheckKey(dg.AssetKey(name), check)
            for name, check in (
                ("head_candidates", "mass_conserved"),
                ("head_records", "records_complete"),
                ("attention_browser", "bundle_reads_back"),
            )
        ]
        for key in keys:
            summary = instance.event_log_storage.get_asset_check_summary_records([key])[key]
            assert summary.last_check_execution_record is not None
            assert summary.last_check_execution_record.status.value == "SUCCEEDED"
        # a shard that is lost is made again with the same bytes, and nothing behind it
        before = find_manifest(store, candidates_ref(pipeline, 0))
        assert before is not None
        store.delete([f"{candidates_ref(pipeline, 0).path}/manifest.json"])
        again = {report.name: report.n_made for report in run_road(config, instance, select=SELECT)}
        assert {name: again[name] for name in NAMES} == dict(zip(NAMES, (0, 1, 0, 0, 0, 0, 0), strict=True))
        assert again["attention_browser"] == 0
        after = find_manifest(store, candidates_ref(pipeline, 0))
        assert after is not None
        assert after.digest == before.digest
        assert not list(verify_tree(store))
        lines = {line.name: line for line in make_schedule(road, pipeline, store, {}, 1)}
        assert lines["head_candidates"].n_missing == 0
        other = pipeline.__class__(make_config({**config.model_dump(), "seed": 1}), pipeline.plan)
        priced = {line.name: line for line in make_schedule(road, other, store, {}, 1)}
        assert all(priced[name].job_bytes >= 0 and priced[name].n_missing for name in NAMES[1:-2])
        assert priced["head_candidates"].n_rows > 0
        assert (priced["attention_browser"].n_missing, lines["attention_browser"].n_missing) == (1, 0)
        assert_bundle_is_what_was_made(pipeline, store)
        few = other.__class__(make_config({**config.model_dump(), "heads": {**config.model_dump()["heads"], "max_shards": 1}}), pipeline.plan)
        assert road.find("head_candidates").partition_keys(few) == ["shard-000000"]
        missing = {line.name: line.n_missing for line in make_schedule(road, few, store, {}, 1)}
        assert {name: missing[name] for name in NAMES} == dict(zip(NAMES, (0, 0, 2, 1, 2, 0, 0), strict=True))  # shard 0 is what it was
        assert records_ref(other, 1).artifact_id != records_ref(pipeline, 1).artifact_id


def assert_bundle_is_what_was_made(pipeline: Pipeline, store: Store) -> None:
    """A page and a notebook show the same: records, statistics and patterns of the bundle are those of the stage."""
    (place,) = list_bundles(store)
    bundle = open_any(place)
    assert isinstance(bundle, OpenAttention)
    assert bundle.head_names() == ["0.0", "0.1", "1.0", "1.1"]
    assert all(bundle.head(name) == read_head(pipeline, store, name) for name in bundle.head_names())
    table, columns = read_tables(pipeline, store), bundle.description["heads"]
    assert list(columns) == [*table.columns, "induction_rows"]
    rows = [load_head_examples(pipeline, store, layer)[1].sum_of("induction_rows").tolist() for layer in (0, 1)]
    assert columns["induction_rows"] == rows[0] + rows[1]
    assert all(0 < of < n for of, n in zip(columns["induction_rows"], columns["rows"], strict=True))
    for name in table.columns:
        assert columns[name] == [value if value is None else pytest.approx(value, rel=1e-4) for value in table[name].to_list()]
    made, shown = read_prompt(pipeline, store, "hello"), bundle.prompt("hello")
    assert shown.tokens == made.tokens
    assert all((shown.pattern(head) == made.pattern(head)).all() for head in made.heads())
    assert all(np.array_equal(shown.lengths[layer], made.lengths[layer]) for layer in made.lengths)
    assert [prompt["columns"] for prompt in bundle.description["prompts"]] == [["value", "output"], ["value", "output", "logit:65", "logit:220"]]
    assert np.array_equal(bundle.prompt("told").pattern("1.1"), shown.pattern("1.1"))
    assert bundle.prompt("told").lengths[1].shape == shown.lengths[1].shape
    texts = [bundle.vocabulary.text(token) for token in bundle.head("1.0")["contexts"][0]["tokens"]]
    assert set("".join(texts)) - {"\ufffd"}


@pytest.mark.parametrize(
    ("kind", "heads", "message"),
    [("gpt_neo", {}, "masks keys inside its own method"), ("gpt2", {"layers": [1, 7]}, r"`heads.layers` names \[7\]")],
)
def test_heads_that_cannot_be_shown_stop_the_plan(kind: str, heads: dict, message: str, tmp_path: Path) -> None:
    """The model's structure tells, before weights are loaded or text is tokenized."""
    config = _configure(tmp_path, kind, **heads)
    with dg.DagsterInstance.ephemeral() as instance, pytest.raises((PlanError, RunError), match=message):
        list(run_road(config, instance, select=["token_shards"]))


def test_a_pipeline_without_heads_is_what_it_was() -> None:
    """Neither assets nor the saved configuration know of the stage where nobody asks for it."""
    config = make_config({})
    assert not any(asset.group == "heads" for asset in make_road(config))
    assert "heads" not in config.model_dump(mode="json")
    assert [asset.name for asset in make_road(make_config({"heads": {}})) if asset.group == "heads"] == NAMES[:-2]
