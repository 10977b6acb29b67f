"""A stage is one folder and one line: the toy stage of `tests/support/toy_stage` gets all that a stage of ours has."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from road_world import make_road_config

ROOT = Path(__file__).parents[2]
LAST_LINE = '    "web",\n'
SENTENCE = "The quick brown fox jumps over the lazy dog, and nobody minds. "


@pytest.fixture(scope="module")
def walked(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Copy the package, add the folder and the line, and do with the stage what people do with any."""
    checkout, folder = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("work")
    for name in ("interp_assets", "resources", "docs"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__", "static"))
    shutil.copytree(ROOT / "tests" / "support" / "toy_stage", checkout / "interp_assets" / "lengths")
    stages = checkout / "interp_assets" / "graph" / "stages.py"
    assert stages.read_text().count(LAST_LINE) == 1
    stages.write_text(stages.read_text().replace(LAST_LINE, LAST_LINE + '    "lengths",\n'))
    texts = folder / "texts"
    texts.mkdir()
    for i in range(4):
        (texts / f"{i}.txt").write_text(SENTENCE * (i + 2))
    config = make_road_config(tiny_world, folder / "data", corpus={"path": str(texts), "shard_bytes": 1})
    (folder / "p.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, str(ROOT / "tests" / "support" / "walk_toy.py"), str(folder / "p.yaml"), str(texts), str(checkout)]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=environment, cwd=folder)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout[-2000:] + done.stderr[-4000:]
    found = json.loads(lines[0].removeprefix("RESULT "))
    assert found["package"].startswith(str(checkout))
    return found


def test_a_stage_of_one_folder_and_one_line_has_all_that_a_stage_has(walked: dict[str, Any]) -> None:
    """One test, because the walk takes half a minute, and test processes would each take it."""
    # `interp plan` shows its partitions, rows, bytes and memory.
    lengths, summary = walked["plan"]["document_lengths"], walked["plan"]["length_summary"]
    assert (lengths["n_missing"], lengths["n_partitions"]) == (4, 4)
    assert lengths["n_rows"] == summary["n_rows"] > 0
    assert lengths["read_bytes"] > lengths["n_rows"]
    assert lengths["job_bytes"] > 0
    assert (summary["n_missing"], summary["n_partitions"]) == (1, 1)
    # A run makes what is missing, and a second run nothing.
    assert walked["made"] == {"corpus_plan": 1, "token_shards": 0, "document_lengths": 4, "length_summary": 1}
    assert walked["again"] == {"corpus_plan": 1, "token_shards": 0, "document_lengths": 0, "length_summary": 0}
    # `interp verify` names a flipped byte, and a backfill of that shard mends it.
    (fault,) = walked["faults"]
    assert fault.startswith("7-lengths/shard-000001-")
    assert walked["backfilled"] == {"document_lengths": 1}
    assert walked["faults after"] == []
    # What depends on other bytes is out of date, and nothing else is.
    assert walked["after a change"] == {"corpus_plan": 1, "token_shards": 1, "document_lengths": 1, "length_summary": 1}
    # Dependencies, check, costs, and the plot among the metadata.
    assert walked["graph"] == {"document_lengths": ["token_shards"], "length_summary": ["document_lengths"]}
    assert walked["check"] == "SUCCEEDED"
    assert walked["costs"] == {"document_lengths": 4, "length_summary": 1}
    assert {"longest", "rows", "bytes", "digest", "cost"} <= set(walked["metadata"]["document_lengths"])
    assert {"longest", "digest", "cost"} <= set(walked["metadata"]["length_summary"])
    # As tasks on a cluster its shards have the bytes that one process gives.
    spread = walked["spread"]
    assert len(spread["nodes"]) == 4
    assert all(spread["nodes"])
    unchanged = [f"shard-{i:06d}" for i in range(3)]
    assert {key: spread["versions"]["document_lengths"][key] for key in unchanged} == {
        key: walked["versions"]["document_lengths"][key] for key in unchanged
    }
    # `docs/assets.md` follows from the records.
    assert len(walked["documents"]) == 2
    assert "`token_shards`" in walked["documents"][0]
