"""The benchmark of the road from activations to records runs through, tiny and without peers."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_records_are_measured_from_activations_on() -> None:
    """All four passes did their work, and it is said that nothing was there to compare with."""
    script = [
        sys.executable,
        str(ROOT / "benchmarks" / "bench_dashboards.py"),
        "--latents",
        "64",
        "--tokens",
        "4096",
        "--d-in",
        "32",
        "--rounds",
        "1",
    ]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "No peers" in done.stderr
    records, candidates = map(json.loads, done.stdout.splitlines())
    assert list(records["passes"]) == ["candidates", "examples", "windows", "records"]
    assert records["bytes"]["records.bin"] > 64 * 100
    assert 0 < candidates["value"] < records["value"]
    assert records["ratio_to_best_peer"] is None
    assert {"hardware", "features", "load", "rss_gb"} <= set(records)
