"""The benchmark that is for GPUs runs through on a CPU, tiny: what a rented machine would find broken is found here."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_gpu_benchmark_runs_through_without_one(tmp_path: Path) -> None:
    """Every architecture has its line, with the ratios that the goals are about."""
    script = [sys.executable, str(ROOT / "benchmarks" / "bench_train.py"), "--device", "cpu-as-cuda", "--steps", "2"]
    done = subprocess.run([*script, "--append", str(tmp_path / "lines")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "lines").read_text() == done.stdout
    lines = {line["name"].removeprefix("train_gpu_"): line for line in map(json.loads, done.stdout.splitlines())}
    assert list(lines) == ["relu", "topk", "batch_topk", "matryoshka_batch_topk", "jump_relu", "gated"]
    for name, line in lines.items():
        assert {"value", "unit", "ours", "floor", "ratio_to_floor", "ratio_to_best_peer", "ratio_to_dense", "matmul_flops"} <= set(line)
        assert (line["share_of_matmul_rate"] is None) == (name in ("topk", "batch_topk", "matryoshka_batch_topk"))
    assert lines["relu"]["ratio_to_dense"] == 1.0
    assert lines["relu"]["config"] == {"d_in": 32, "d_sae": 256, "batch_rows": 64, "k": 32, "dtype": "bfloat16"}
