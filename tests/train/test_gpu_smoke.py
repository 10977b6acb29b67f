"""The script for a machine that is lent for minutes runs through without a GPU: what would be found broken there is found here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(append: Path, *options: str) -> list[dict]:
    """Run it on the CPU and return what it printed."""
    script = [sys.executable, str(ROOT / "benchmarks" / "gpu_smoke.py"), "--device", "cpu", "--append", str(append), *options]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_run_that_was_cut_goes_on_where_it_was(tmp_path: Path) -> None:
    """A device is lent for minutes: what was measured is kept line by line, half a line does no harm, and nothing is measured twice."""
    path = tmp_path / "lines"
    (first,) = run(path, "--only", "train relu")
    assert first["ok"]
    assert first["difference"] <= first["limit"]
    with path.open("a") as file:
        file.write('{"name": "smoke encode flo\n')
    lines = run(path, "--only", "train relu", "encode float32", "kernels")
    assert [line["name"] for line in lines] == ["smoke kernels", "smoke encode float32"]
    assert lines[0]["because"] == "no CUDA device with Triton"
    assert lines[1]["firings"] > 0


def test_no_step_begins_without_time(tmp_path: Path) -> None:
    """The lender takes the machine back at the minute that was said."""
    assert run(tmp_path / "lines", "--minutes", "0.01") == []


@pytest.mark.faults
def test_all_steps_run_through(tmp_path: Path) -> None:
    """Every path that a GPU takes, its stand-in here; both benchmarks with their lines."""
    lines = run(tmp_path / "lines")
    assert all(line.get("ok", True) for line in lines)
    names = {line["name"] for line in lines}
    assert {"smoke harvest", "smoke train gated", "smoke two ranks", "train_gpu_topk", "pass A, job"} <= names
