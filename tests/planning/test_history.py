"""What was done to a pipeline is kept: complete, atomic, without secrets, and readable when something else damaged it."""

import json
import re
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from interp_assets.errors import ArtifactCorruptError, InputError, PlanError
from interp_assets.planning.config import PipelineConfig
from interp_assets.planning.history import FOLDER, begin_entry, list_entries, read_entry, read_history, read_plan_aside, save_entry
from interp_assets.planning.pipeline import Pipeline, open_pipeline_store, save_plan
from interp_assets.planning.progress import AssetReport
from interp_assets.planning.sections import Code, Metric
from interp_assets.storage.store import Store
from interp_assets.storage.verify import verify_tree
from interp_assets.terminal.recording import describe_code, hash_sources, recorded
from interp_assets.train.results.causes import Cause
from interp_assets.train.results.states import compare_states, read_state

PAGE = Path(__file__).parents[2] / "docs" / "formats" / "history.md"


@pytest.fixture
def config(small_config: PipelineConfig, tmp_path: Path) -> PipelineConfig:
    """Return a configuration whose folder is a local one."""
    return small_config.model_copy(update={"root": str(tmp_path / "data")})


def test_the_page_s_example_is_read(memory_store: Store) -> None:
    """Who writes a reader of their own has the page alone."""
    (text,) = re.findall(r"```json\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    entry = json.loads(text)
    save_entry(memory_store, {name: value for name, value in entry.items() if name not in ("format", "version")})
    assert read_entry(memory_store, entry["id"]) == entry
    (row,) = read_history(memory_store).iter_rows(named=True)
    assert (row["status"], row["note"], row["commit"], row["n_made"], row["forecast_s"]) == ("done", "three seeds", "093a463c", 1, 24.0)


def test_a_command_is_one_file_from_its_beginning_to_its_end(config: PipelineConfig) -> None:
    """A killed one stays `running`; a finished one has code, machine, configuration, plan, and what was made."""
    store = open_pipeline_store(config)
    with recorded(config, "why") as recorder:
        (name,) = list_entries(store)
        assert read_entry(store, name)["status"] == "running"
        recorder.add(AssetReport("corpus_plan", 1, 1, 10, 0.5, []))
    entry = read_entry(store, name)
    assert list_entries(store) == [name]
    assert (entry["status"], entry["note"], entry["command"]) == ("done", "why", sys.argv[1:])
    assert entry["config"] == config.model_dump(mode="json")
    assert entry["code"]["sources"] == hash_sources()
    assert entry["machine"]["cpus"] > 0
    assert [asset["name"] for asset in entry["assets"]] == ["corpus_plan"]
    assert list(verify_tree(store)) == []  # a file that belongs to no artifact would be a fault


@pytest.mark.parametrize(
    ("error", "status"), [(PlanError("too large"), "failed"), (KeyboardInterrupt(), "interrupted"), (ValueError("a bug"), "failed")]
)
def test_whatever_ends_a_command_is_said(config: PipelineConfig, error: BaseException, status: str) -> None:
    """The error goes on to the person, and its first words stay."""
    with pytest.raises(type(error)), recorded(config):
        raise error
    (row,) = read_history(open_pipeline_store(config)).iter_rows(named=True)
    assert row["status"] == status
    assert row["error"] == (str(error) or "KeyboardInterrupt")


def test_no_secret_is_kept(memory_store: Store) -> None:
    """Names and keys before a host go, wherever they stand; the rest of the address stays."""
    entry = begin_entry(["run", "--set", "root=s3://KEY:SECRET@bucket/x"])
    save_entry(
        memory_store,
        {
            **entry,
            "error": "cannot read https://me:hunter2@host/file, nor https://me:p@55word@host/file, s3://KEY:SEC/RET@b/x, https://h/a?X-Amz-Signature=abc123&n=1",
            "config": {},
            "assets": [],
        },
    )
    text = memory_store.get(f"{FOLDER}/{entry['id']}.json").decode()
    assert "SECRET" not in text
    assert "hunter2" not in text
    assert not [word for word in ("55word", "RET@", "abc123") if word in text]
    assert "&n=1" in text
    assert "s3://...@bucket/x" in text


def test_entries_are_in_order_and_found_by_their_beginning(memory_store: Store) -> None:
    """Who types a time means the run of that time; two of them, or none, are said."""
    times = [datetime(2026, 11, 30, 21, minute, tzinfo=UTC) for minute in (5, 1, 5)]
    ids = [entry["id"] for time in times if (entry := begin_entry(["run"], now=time)) and save_entry(memory_store, {**entry, "config": {}}) is None]
    assert list_entries(memory_store) == sorted(ids)
    assert read_entry(memory_store, "20261130T2101")["id"] == ids[1]
    with pytest.raises(InputError, match="is the beginning of several runs"):
        read_entry(memory_store, "20261130T2105")
    with pytest.raises(InputError, match="is no run of"):
        read_entry(memory_store, "2025")
    memory_store.put(f"{FOLDER}/{ids[0]}.json", b"{")
    assert read_history(memory_store).height == 2
    with pytest.raises(ArtifactCorruptError, match="is no entry of a history"):
        read_entry(memory_store, ids[0])


def test_two_runs_differ_in_exactly_what_was_changed(config: PipelineConfig, small_pipeline: Pipeline) -> None:
    """A field, an option, a text, weights, the code: each is named once, and nothing for what only decides how work is done."""
    store = open_pipeline_store(config)
    save_plan(store, small_pipeline.plan)

    def run(changed: PipelineConfig) -> str:
        with recorded(changed) as recorder:
            return recorder.entry["id"]

    def causes(a: str, b: str) -> list[Cause]:
        return compare_states(*(read_state(store, read_entry(store, each)) for each in (a, b)))

    sae = config.saes[0]
    first = run(config)
    assert causes(first, run(config.model_copy(update={"execution": config.execution.model_copy(update={"workers": 7})}))) == []
    assert causes(first, run(config.model_copy(update={"saes": [sae.model_copy(update={"k": 5})]}))) == [Cause("field", "saes.*.k", "4", "5")]
    option = config.model_copy(update={"saes": [sae.model_copy(update={"options": {"decay_share": 0.4}})]})
    assert causes(first, run(option)) == [Cause("option", "saes.*.options.decay_share", "absent", "0.4")]
    assert causes(first, run(config.model_copy(update={"seed": 9}))) == [Cause("field", "seed", "0", "9")]
    plan = small_pipeline.plan
    shards = [replace(shard, fingerprint="new") if shard.index == 1 else shard for shard in plan.shards]
    save_plan(store, replace(plan, shards=shards, model_fingerprint="other"))
    found = causes(first, run(config))
    assert found == [Cause("text", "shard 1", "text-1", "new"), Cause("weights", "model", "model", "other")]
    entry = read_entry(store, first)
    entry["code"] |= {"sources": "older"}
    old = read_state(store, entry)
    assert [cause.kind for cause in compare_states(read_state(store, read_entry(store, first)), old)] == ["version"]
    assert read_plan_aside(store, "none") == {}


def test_own_code_is_hashed_and_git_is_asked_if_there_is_one(config: PipelineConfig) -> None:
    """The working directory of a test is no repository."""
    told = describe_code(config)
    assert told["files"] == {}
    metric = Metric(function="my.py:half_norm", code=Code(digest="0" * 64))
    assert describe_code(config.model_copy(update={"metrics": [metric]}))["files"] == {"my.py": "0" * 64}
    assert told["folder"] is None or re.fullmatch(r"[0-9a-f]{40}", told["folder"]["commit"])
