"""The benchmark of harvesting runs through, tiny and without peers: what nobody runs for weeks is broken when it is needed."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_harvesting_is_measured_beside_the_bare_forward(tmp_path: Path) -> None:
    """A line says the ratio to the floor, what is missing, and the machine; an encoder has its mask."""
    sizes = ["--d-in", "64", "--layers", "2", "--tokens", "300", "--rounds", "1", "--dtypes", "bfloat16", "--shapes", "gpt2", "minilm"]
    script = [sys.executable, str(ROOT / "benchmarks" / "bench_harvest.py"), *sizes, "--append", str(tmp_path / "lines")]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "No peers" in done.stderr
    assert (tmp_path / "lines").read_text() == done.stdout
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["name"] for line in lines] == ["harvest_gpt2", "harvest_minilm"]
    for line in lines:
        assert line["ratio_to_floor"] > 0
        assert line["ratio_to_best_peer"] is None
        assert {"hardware", "features", "load", "commit", "unit", "ours", "value"} <= set(line)
        assert line["config"]["padded"] >= line["config"]["rows"] >= 300
